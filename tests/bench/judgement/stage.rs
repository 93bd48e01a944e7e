//! A cluster whose nodes are held in CPU quotas, the guests on it, and what is seen of both.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;
use serde_json::Value;
use shoal_tests::cgroups::Groups;
use shoal_tests::cluster::{Cluster, Shape};
use shoal_tests::guest::{self, Heartbeat};
use shoal_tests::machine::Machine;
use shoal_tests::wait::{self, seconds};

use super::host::{interrupted, sleep_until};
use super::{Outcome, Settings};

/// A guest that is as busy as it can be, and counts what it gets done.
pub const BUSY: &[&str] = &["wss=1MiB", "rate=10000000"];
/// Of each node, unless a row says otherwise: half a CPU.
pub const HALF: f64 = 0.5;
const GROUPS: &str = "shoal-judgement";
const MEMORY: &str = "64MiB";
/// From one look to the next.
const LOOK: Duration = Duration::from_secs(1);
/// How often a long look says that it goes on.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);
/// Keeps VMs off a node while others are placed.
const TAINT: &str = "judgement";

/// A move that was begun, or ended.
#[derive(Debug, Clone, Serialize)]
pub struct Move {
    /// Since the stage was ready.
    at_s: f64,
    /// The event's: `migration-planned`, …
    kind: String,
    vm: String,
    message: String,
}

/// Where VMs that run are: so many on each node, in the order of the nodes' names.
pub type Spread = Vec<usize>;

/// A cluster, made for one row.
#[derive(Debug)]
pub struct Stage {
    /// The cluster.
    pub cluster: Cluster,
    nodes: usize,
    begun: Instant,
    /// The number of the last event that was seen.
    seen: u64,
    moves: Vec<Move>,
    recorder: Option<Recorder>,
    // After the cluster, whose VMMs are in them.
    _groups: Option<Groups>,
}

impl Stage {
    /// Starts nodes with a CPU quota each, which they get whatever else the host does, and which move nothing yet.
    ///
    /// # Errors
    /// If cgroups cannot be made.
    pub fn start(settings: &Settings, quotas: &[f64]) -> Result<Self> {
        let (machine, groups) = (machine()?, Groups::make(GROUPS, quotas)?);
        groups.favour()?;
        Self::with_groups(settings, machine, groups, quotas)
    }

    /// The same, but others take from what they get.
    ///
    /// # Errors
    /// If cgroups cannot be made.
    pub fn start_among_others(settings: &Settings, quotas: &[f64]) -> Result<Self> {
        let (machine, groups) = (machine()?, Groups::make(GROUPS, quotas)?);
        Self::with_groups(settings, machine, groups, quotas)
    }

    fn with_groups(settings: &Settings, machine: Machine, groups: Groups, quotas: &[f64]) -> Result<Self> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a few CPUs"
        )]
        let node_cpus = quotas.iter().copied().fold(1.0, f64::max).ceil() as u32;
        let shape = Shape {
            nodes: u32::try_from(quotas.len())?,
            node_memory: "4GiB",
            node_cpus,
            cgroups: Some(groups.directory().to_owned()),
            ..Shape::default()
        };
        Self::open(settings, machine, &shape, Some(groups))
    }

    /// Starts three nodes that have little memory and more CPUs than are used, so that only memory is a reason to move anything.
    ///
    /// # Errors
    /// If KVM is not there.
    pub fn without_quotas(settings: &Settings) -> Result<Self> {
        let shape = Shape {
            nodes: 3,
            node_memory: "1GiB",
            node_cpus: 32,
            ..Shape::default()
        };
        Self::open(settings, machine()?, &shape, None)
    }

    fn open(settings: &Settings, machine: Machine, shape: &Shape, groups: Option<Groups>) -> Result<Self> {
        let cluster = Cluster::start(machine, shape);
        let recording = settings.recording.as_ref().filter(|path| !path.exists());
        let recorder = recording.map(|path| Recorder::start(&cluster, path));
        let stage = Self {
            cluster,
            nodes: usize::try_from(shape.nodes)?,
            begun: Instant::now(),
            seen: 0,
            moves: Vec::new(),
            recorder: recorder.transpose()?,
            _groups: groups,
        };
        // The rows are about balancing. How many VMs may be started on a node is another matter.
        stage.set_policy("cpu_overcommit", "1000");
        if settings.quick {
            stage.set_policy("settle", "5s");
        }
        Ok(stage)
    }

    /// Changes a setting, if this scheduler has it.
    fn set_policy(&self, name: &str, value: &str) {
        let known = self.cluster.shoal.json(&["policy", "get"]);
        if list(&known).iter().any(|field| field["name"] == name) {
            let change = format!("{name}={value}");
            self.cluster.shoal.json(&["policy", "set", &change]);
        }
    }

    /// From now on the scheduler moves VMs as it sees fit.
    pub fn hands_off(&self) {
        self.cluster
            .shoal
            .json(&["policy", "set", "automation=automatic"]);
    }

    /// Runs a probe where the scheduler puts it. Answers its node.
    pub fn run(&self, name: &str, memory: &str, args: &[&str]) -> String {
        self.run_image("probe", name, memory, args)
    }

    /// The same for any image.
    pub fn run_image(&self, image: &str, name: &str, memory: &str, args: &[&str]) -> String {
        let mut words = vec!["run", image, "--detach", "--name", name, "--memory", memory, "--"];
        words.extend(args);
        let vm = self.cluster.shoal.json(&words);
        text(&vm, "node")
    }

    /// Runs a busy guest where the scheduler puts it.
    pub fn run_busy(&self, name: &str) -> String {
        self.run(name, MEMORY, BUSY)
    }

    /// Runs them all at once, each by a command of its own. Answers their nodes.
    ///
    /// # Errors
    /// If one is refused.
    pub fn run_busy_at_once(&self, names: &[String]) -> Result<Vec<String>> {
        let start = |name: &String| {
            let mut words = vec!["run", "probe", "--detach", "--name", name.as_str()];
            words.extend(["--memory", MEMORY, "--"]);
            words.extend(BUSY);
            self.cluster.shoal.start(&words)
        };
        let commands: Vec<_> = names.iter().map(start).collect();
        let mut nodes = Vec::new();
        for command in commands {
            let output = command.wait_with_output().context("shoal run")?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "shoal run: {said}");
            nodes.push(text(&serde_json::from_slice(&output.stdout)?, "node"));
        }
        Ok(nodes)
    }

    /// Has `run` start VMs on that node, of which the scheduler then may dispose as it likes: no rule holds them there.
    ///
    /// # Errors
    /// If they are elsewhere.
    pub fn on_node(&self, number: usize, run: impl Fn(&Self) -> Vec<String>) -> Result<()> {
        let node = format!("node{number}");
        let others: Vec<String> = (1..=self.nodes)
            .filter(|&other| other != number)
            .map(|other| format!("node{other}"))
            .collect();
        let shoal = &self.cluster.shoal;
        for other in &others {
            shoal.json(&["node", "taint", other, TAINT]);
        }
        let nodes = run(self);
        for other in &others {
            shoal.json(&["node", "taint", other, &format!("{TAINT}-")]);
        }
        let elsewhere = nodes.iter().find(|&on| *on != node);
        ensure!(
            elsewhere.is_none(),
            "a VM for {node} was started on {elsewhere:?}"
        );
        Ok(())
    }

    /// Starts so many busy guests on each node, and waits until all run. Answers their names.
    ///
    /// # Errors
    /// If one is started elsewhere.
    pub fn busy_guests(&self, on_nodes: &[usize]) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for (index, &count) in on_nodes.iter().enumerate().filter(|(_, count)| **count > 0) {
            let names: Vec<String> = (1..=count).map(|n| format!("busy{}-{n}", index + 1)).collect();
            self.on_node(index + 1, |stage| {
                names.iter().map(|name| stage.run_busy(name)).collect()
            })?;
            all.extend(names);
        }
        wait::until_true("all guests to work", seconds(60), || {
            all.iter().all(|name| self.last_beat(name).is_some())
        });
        Ok(all)
    }

    fn last_beat(&self, vm: &str) -> Option<Heartbeat> {
        guest::heartbeats(&self.cluster.logs(vm)).pop()
    }

    /// What each guest has got done so far, by its own count and clock.
    ///
    /// # Errors
    /// If one says nothing.
    pub fn reading(&self, vms: &[String]) -> Result<Vec<Heartbeat>> {
        let beat = |vm: &String| self.last_beat(vm).with_context(|| format!("{vm} says nothing"));
        vms.iter().map(beat).collect()
    }

    /// VMs that run, on each node.
    pub fn spread(&self) -> Spread {
        let vms = self.cluster.shoal.json(&["ps"]);
        let mut spread = vec![0; self.nodes];
        for vm in list(&vms).iter().filter(|vm| vm["state"] == "running") {
            let number = text(vm, "node")
                .strip_prefix("node")
                .and_then(|number| number.parse::<usize>().ok());
            if let Some(count) = number.and_then(|number| spread.get_mut(number.checked_sub(1)?)) {
                *count += 1;
            }
        }
        spread
    }

    /// Looks each second for so long, and tells of moves as they come; ends as soon as `done` says so. Answers whether it did.
    ///
    /// # Errors
    /// If a signal comes.
    pub fn watch(&mut self, period: Duration, mut done: impl FnMut(&Self) -> bool) -> Result<bool> {
        let start = Instant::now();
        let mut sign = start + SIGN_OF_LIFE;
        loop {
            self.look();
            if done(self) {
                return Ok(true);
            }
            let now = Instant::now();
            if now >= start + period {
                return Ok(false);
            }
            if now >= sign {
                sign += SIGN_OF_LIFE;
                let shown: Vec<String> = self.spread().iter().map(usize::to_string).collect();
                println!(
                    "    ... {:.0} s: VMs {}, {} moves so far",
                    start.elapsed().as_secs_f64(),
                    shown.join("/"),
                    self.begun_moves()
                );
            }
            sleep_until((now + LOOK).min(start + period))?;
        }
    }

    /// The same for the whole period; answers how many moves were begun in it.
    ///
    /// # Errors
    /// If a signal comes.
    pub fn moves_within(&mut self, period: Duration) -> Result<usize> {
        self.look();
        let before = self.begun_moves();
        self.watch(period, |_| false)?;
        Ok(self.begun_moves() - before)
    }

    fn look(&mut self) {
        if interrupted() {
            return;
        }
        let seen = self.seen.to_string();
        let events = self.cluster.shoal.json(&["events", "--after", &seen]);
        for event in list(&events) {
            self.seen = self.seen.max(event["sequence"].as_u64().unwrap_or_default());
            let kind = text(event, "kind");
            if kind.starts_with("migration-") || ["vm-suspended", "vm-failed"].contains(&kind.as_str()) {
                let one = Move {
                    at_s: (self.begun.elapsed().as_secs_f64() * 10.0).round() / 10.0,
                    kind,
                    vm: text(event, "vm"),
                    message: text(event, "message"),
                };
                println!("    {:>5.0} s {}: {}", one.at_s, one.kind, one.message);
                self.moves.push(one);
            }
        }
    }

    fn of_kind(&self, kind: &str) -> usize {
        self.moves.iter().filter(|one| one.kind == kind).count()
    }

    /// How many moves were begun so far.
    pub fn begun_moves(&self) -> usize {
        self.of_kind("migration-planned")
    }

    /// How often a VM was suspended so far.
    pub fn suspensions(&self) -> usize {
        self.of_kind("vm-suspended")
    }

    /// Checks that every VM runs and every probe among them is unharmed, and gives the moves and their pauses to the outcome.
    pub fn close(mut self, outcome: &mut Outcome) {
        self.look();
        if let Some(Err(error)) = self.recorder.take().map(Recorder::end) {
            outcome.expect(false, format!("{error:#}"));
        }
        let vms = self.cluster.shoal.json(&["ps", "--all"]);
        for vm in list(&vms) {
            let (name, state) = (text(vm, "name"), text(vm, "state"));
            let over = state == "exited" && vm["exit_status"] == 0;
            let message = text(vm, "message");
            outcome.expect(
                ["running", "migrating"].contains(&state.as_str()) || over,
                format!("{name} is {state}: {message}"),
            );
            if vm["image"] == "probe" {
                let unharmed = guest::check_unharmed(&self.cluster.logs(&name));
                outcome.expect(unharmed.is_ok(), format!("{name}: {unharmed:?}"));
            }
        }
        let migrations = self.cluster.shoal.json(&["migrations"]);
        let pauses: Vec<f64> = list(&migrations)
            .iter()
            .filter(|one| one["result"] == "completed")
            .filter_map(|one| one["downtime_ms"].as_f64())
            .collect();
        let longest = pauses.iter().copied().fold(0.0, f64::max);
        let failed = self.of_kind("migration-failed");
        let moved: BTreeSet<&str> = self.moves.iter().map(|one| one.vm.as_str()).collect();
        outcome.tell(format!(
            "{} moves begun, {} completed, {failed} failed, of {} VMs; longest pause {longest:.0} ms",
            self.begun_moves(),
            pauses.len(),
            moved.len()
        ));
        #[expect(clippy::cast_precision_loss, reason = "a few moves")]
        for (name, count) in [
            ("moves_begun", self.begun_moves()),
            ("moves_completed", pauses.len()),
        ] {
            outcome.figure(name, count as f64);
        }
        outcome.figure("longest_pause_ms", longest);
        outcome.moves.append(&mut self.moves);
    }
}

/// `shoal record`, beside a row.
#[derive(Debug)]
struct Recorder(Child);

impl Recorder {
    fn start(cluster: &Cluster, path: &Path) -> Result<Self> {
        let mut command = cluster.shoal.command(&["record"]);
        let child = command.arg(path).stdout(Stdio::null()).spawn();
        child.map(Self).context("shoal record")
    }

    /// Has it write what it has.
    fn end(mut self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.0.id())?).context("its id")?;
        kill_process(pid, Signal::INT)?;
        let status = self.0.wait()?;
        ensure!(status.success(), "shoal record ended with {status}");
        Ok(())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // It may have ended; what a row that broke off has left of it is of no use.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn machine() -> Result<Machine> {
    Machine::with_kvm_and_root("the judgement").context("KVM or root is not there any more")
}

/// Work of all guests in a second, between two readings of them: each by its own clock, which goes on while it stands still.
pub fn work_a_second(before: &[Heartbeat], after: &[Heartbeat]) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let rate = |(before, after): (&Heartbeat, &Heartbeat)| {
        let seconds = after.uptime_ms.saturating_sub(before.uptime_ms).max(1) as f64 / 1e3;
        after.dirtied.saturating_sub(before.dirtied) as f64 / seconds
    };
    before.iter().zip(after).map(rate).sum()
}

/// What a command listed.
pub fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A field that is text; empty if it is not there.
pub fn text(value: &Value, field: &str) -> String {
    value[field].as_str().unwrap_or_default().to_owned()
}
