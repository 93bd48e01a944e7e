//! A cluster of its own for each test, made as a user makes one, and how to kill and restart its parts.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use shoal_agent::ProcessIdentity;
use shoal_proto::cluster::MigrateVmRequest;
use shoal_proto::vm::{GetStatusRequest, MigrationPolicy, OnStall, VmState};

use crate::guest::{Console, tail, written_twice};
use crate::machine::Machine;
use crate::migration::WatchedMigration;
use crate::shoal::Shoal;
use crate::{paths, vmm, wait};

/// What a cluster is to be like.
#[derive(Debug, Clone)]
pub struct Shape {
    /// How many nodes.
    pub nodes: u32,
    /// What each lends, as typed.
    pub node_memory: &'static str,
    /// CPUs that each lends. More than there are keeps load from moving VMs where memory should.
    pub node_cpus: u32,
    /// Whether the scheduler moves VMs on its own.
    pub automatic: bool,
    /// A directory with a cgroup for each node, which its VMs are put into.
    pub cgroups: Option<PathBuf>,
    /// More arguments for `shoal up`.
    pub up: &'static [&'static str],
    /// `SHOAL_FAULT` of every VMM, if any.
    pub fault: Option<&'static str>,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            nodes: 2,
            node_memory: "2GiB",
            node_cpus: 2,
            automatic: false,
            cgroups: None,
            up: &[],
            fault: None,
        }
    }
}

/// A cluster made by `shoal up`; `shoal down --purge` ends it.
#[derive(Debug)]
pub struct Cluster {
    directory: tempfile::TempDir,
    /// The command for it.
    pub shoal: Shoal,
    restarted: Vec<Child>,
    _machine: Machine,
}

/// A VMM process that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmProcess {
    /// On which node.
    pub node: String,
    /// At which epoch.
    pub epoch: u64,
    /// Which process.
    pub identity: ProcessIdentity,
    /// Its directory.
    pub directory: PathBuf,
}

impl Cluster {
    /// Agents have no VMM obey `SHOAL_FAULT`, so theirs is one that is told to.
    fn vmm_that_allows_faults(&self) -> PathBuf {
        let path = self.directory.path().join("vmm-that-allows-faults");
        let vmm = paths::program("shoal-vmm");
        let script = format!("#!/bin/sh\nexec '{}' --allow-faults \"$@\"\n", vmm.display());
        fs::write(&path, script).expect("a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a script");
        path
    }

    /// Starts one and waits until it is ready.
    #[must_use]
    pub fn start(machine: Machine, shape: &Shape) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let listen = format!("127.0.0.1:{}", free_port());
        let shoal = Shoal::new(&format!("http://{listen}"));
        let cluster = Self {
            directory,
            shoal,
            restarted: Vec::new(),
            _machine: machine,
        };
        let (state, images) = (cluster.state_dir(), paths::images());
        let mut args = vec!["up".into(), "--detach".into(), format!("--nodes={}", shape.nodes)];
        args.extend([
            format!("--node-memory={}", shape.node_memory),
            format!("--node-cpus={}", shape.node_cpus),
        ]);
        args.extend([
            format!("--state-dir={}", state.display()),
            format!("--listen={listen}"),
        ]);
        args.push(format!("--images-dir={}", images.display()));
        if !shape.automatic {
            args.push("--manual".into());
        }
        args.extend(
            shape
                .cgroups
                .iter()
                .map(|groups| format!("--cgroup={}", groups.display())),
        );
        args.extend(shape.up.iter().map(|&arg| arg.to_owned()));
        let fault = shape.fault.map(|fault| ("SHOAL_FAULT", fault));
        if fault.is_some() {
            args.push(format!(
                "--vmm-binary={}",
                cluster.vmm_that_allows_faults().display()
            ));
        }
        let up = cluster
            .shoal
            .command(&args)
            .envs(fault)
            .output()
            .expect("shoal starts");
        assert!(up.status.success(), "shoal up failed with {}: {up:?}", up.status);
        cluster
    }

    /// Where everything of it is.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    /// Runs a probe on a node and waits until it has filled its memory. Answers the VM's id.
    pub fn run_probe(&self, name: &str, node: &str, memory: &str, args: &str) -> String {
        let vm = self.start_probe(name, node, memory, args);
        let wanted = fill_of(args);
        wait::until_true(&format!("{name} to fill its memory"), wait::seconds(60), || {
            crate::guest::heartbeats(&self.logs(name))
                .last()
                .is_some_and(|beat| beat.filled >= wanted)
        });
        vm
    }

    /// Runs a probe on a node. Answers the VM's id.
    pub fn start_probe(&self, name: &str, node: &str, memory: &str, args: &str) -> String {
        let mut all = vec![
            "run",
            "probe",
            "--detach",
            "--name",
            name,
            "--prefer-node",
            node,
            "--memory",
            memory,
            "--",
        ];
        let args = crate::guest::with_quick_beat(args);
        all.extend(args.split(' '));
        self.shoal.json(&all)["id"].as_str().expect("an id").to_owned()
    }

    /// What `ps` says of a VM.
    #[must_use]
    pub fn vm(&self, name: &str) -> Value {
        let vms = self.shoal.json(&["ps", "--all"]);
        let found = vms
            .as_array()
            .expect("a list")
            .iter()
            .find(|vm| vm["name"] == name || vm["id"] == name);
        found.unwrap_or_else(|| panic!("no VM {name} in {vms}")).clone()
    }

    /// What `nodes` says of a node.
    #[must_use]
    pub fn node(&self, name: &str) -> Value {
        let nodes = self.shoal.json(&["nodes"]);
        let found = nodes
            .as_array()
            .expect("a list")
            .iter()
            .find(|node| node["name"] == name);
        found
            .unwrap_or_else(|| panic!("no node {name} in {nodes}"))
            .clone()
    }

    /// Waits until `ps` says so of a VM's state.
    pub fn wait_for_state(&self, name: &str, state: &str, limit: Duration) -> Value {
        wait::until(&format!("{name} to be {state}"), limit, || {
            let vm = self.vm(name);
            (vm["state"] == state).then_some(vm)
        })
    }

    /// Waits until an agent that was started again has registered: on another port than the one before. The scheduler takes
    /// moves from and to its node meanwhile, and they fail.
    pub fn wait_for_return(&self, before: &Value) {
        let name = before["name"].as_str().expect("a name");
        wait::until_true(&format!("{name} to be back"), wait::seconds(30), || {
            let now = self.node(name);
            now["state"] == "ready" && now["address"] != before["address"]
        });
    }

    /// A VM's console so far.
    #[must_use]
    pub fn logs(&self, name: &str) -> String {
        self.shoal.ok(&["logs", name])
    }

    /// Waits until the guest has printed so many more heartbeats than now.
    pub fn wait_for_heartbeats(&self, name: &str, more: usize) {
        let count = || crate::guest::heartbeats(&self.logs(name)).len();
        let wanted = count() + more;
        wait::until_true(&format!("{more} heartbeats of {name}"), wait::seconds(30), || {
            count() >= wanted
        });
    }

    /// Every event so far.
    #[must_use]
    pub fn events(&self) -> Vec<Value> {
        self.shoal.json(&["events"]).as_array().expect("a list").clone()
    }

    /// Events of one kind.
    #[must_use]
    pub fn events_of_kind(&self, kind: &str) -> Vec<Value> {
        self.events()
            .into_iter()
            .filter(|event| event["kind"] == kind)
            .collect()
    }

    /// Starts a migration that is watched.
    #[must_use]
    pub fn migrate(&self, vm: &str, to: &str) -> WatchedMigration {
        let request = MigrateVmRequest {
            vm: vm.into(),
            to_node: to.into(),
            ..MigrateVmRequest::default()
        };
        WatchedMigration::start(self.shoal.endpoint(), request)
    }

    /// Starts a migration whose limit on downtime cannot be met while the guest keeps writing, so that it stays in
    /// pre-copy until something happens, at the latest after `timeout`.
    #[must_use]
    pub fn migrate_without_end(&self, vm: &str, to: &str, timeout: Duration) -> WatchedMigration {
        let timeout_ms = u64::try_from(timeout.as_millis()).expect("a sane timeout");
        let request = MigrateVmRequest {
            vm: vm.into(),
            to_node: to.into(),
            policy: Some(MigrationPolicy {
                max_downtime_ms: Some(1),
                timeout_ms: Some(timeout_ms),
                on_stall: OnStall::Cancel.into(),
                ..MigrationPolicy::default()
            }),
        };
        WatchedMigration::start(self.shoal.endpoint(), request)
    }

    /// Every VMM process of a VM that runs, on any node.
    #[must_use]
    pub fn vmms(&self, vm_id: &str) -> Vec<VmmProcess> {
        vmms_below(&self.state_dir(), vm_id)
    }

    /// The only VMM process of a VM. Panics if there is another, or none, for too long.
    #[must_use]
    pub fn only_vmm(&self, vm_id: &str) -> VmmProcess {
        wait::until("exactly one VMM", wait::seconds(20), || {
            let mut all = self.vmms(vm_id);
            (all.len() == 1).then(|| all.remove(0))
        })
    }

    /// The VMM process on a node.
    #[must_use]
    pub fn vmm_on(&self, vm_id: &str, node: &str) -> VmmProcess {
        wait::until(&format!("a VMM on {node}"), wait::seconds(20), || {
            self.vmms(vm_id).into_iter().find(|vmm| vmm.node == node)
        })
    }

    /// Names and pids of the daemons.
    #[must_use]
    pub fn daemons(&self) -> Vec<(String, u32)> {
        let record = self.record();
        let processes = record["processes"].as_array().expect("a list");
        let daemon = |process: &Value| {
            let pid = u32::try_from(process["pid"].as_u64()?).ok()?;
            Some((process["name"].as_str()?.to_owned(), pid))
        };
        processes.iter().filter_map(daemon).collect()
    }

    /// Ends a daemon ("scheduler" or a node's name) as a crash would.
    pub fn kill_daemon(&mut self, name: &str) {
        let record = self.record();
        let process = process_named(&record, name);
        let number = |key: &str| process[key].as_u64().expect("a number");
        let pid = u32::try_from(number("pid")).expect("a pid");
        let identity = ProcessIdentity {
            pid,
            start_ticks: number("start_ticks"),
            boot_id: serde_json::from_value(process["boot_id"].clone()).expect("a UUID"),
        };
        assert!(
            identity.is_running(),
            "{name} should be running before it is killed"
        );
        identity.kill().expect("killed");
        wait::until_true("the daemon to be gone", wait::seconds(10), || {
            !identity.is_running()
        });
    }

    /// Starts a daemon again as `up` had started it, and puts it on record so that `down` finds it.
    pub fn start_daemon(&mut self, name: &str) {
        self.start_daemon_with(name, &[]);
    }

    /// The same with more arguments, which replace those that it was started with.
    pub fn start_daemon_with(&mut self, name: &str, more: &[(&str, &str)]) {
        let mut args = self.args_of(name);
        for (option, value) in more {
            take_option(&mut args, option);
            args.extend([(*option).to_owned(), (*value).to_owned()]);
        }
        self.start_daemon_as(name, &args);
    }

    /// The same without an option that has a value.
    pub fn start_daemon_without(&mut self, name: &str, option: &str) {
        let mut args = self.args_of(name);
        assert!(
            take_option(&mut args, option),
            "{name} was not started with {option}"
        );
        self.start_daemon_as(name, &args);
    }

    fn args_of(&self, name: &str) -> Vec<String> {
        serde_json::from_value(process_named(&self.record(), name)["args"].clone()).expect("arguments")
    }

    fn start_daemon_as(&mut self, name: &str, args: &[String]) {
        let mut record = self.record();
        let log = self.state_dir().join(format!("{name}.log"));
        let log = fs::File::options().append(true).open(log).expect("its log");
        let child = Command::new(paths::program("shoal"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log again"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("shoal starts");
        let identity = ProcessIdentity::of(child.id()).expect("its start time");
        let processes = record["processes"].as_array_mut().expect("a list");
        let process = processes
            .iter_mut()
            .find(|process| process["name"] == name)
            .expect("the daemon");
        process["pid"] = json!(identity.pid);
        process["start_ticks"] = json!(identity.start_ticks);
        fs::write(self.record_path(), record.to_string()).expect("written");
        self.restarted.push(child);
        if name == "scheduler" {
            wait::until_true("the scheduler to answer", wait::seconds(30), || {
                self.shoal.output(&["nodes"]).status.success()
            });
        }
    }

    fn record_path(&self) -> PathBuf {
        self.state_dir().join("up.json")
    }

    fn record(&self) -> Value {
        let text = fs::read(self.record_path()).expect("up.json");
        serde_json::from_slice(&text).expect("JSON in up.json")
    }

    fn print_logs(&self) {
        let state = self.state_dir();
        for entry in fs::read_dir(&state).into_iter().flatten().filter_map(Result::ok) {
            let path = entry.path();
            if path.extension().is_some_and(|extension| extension == "log") {
                eprintln!(
                    "--- {}:\n{}",
                    path.display(),
                    tail(&fs::read_to_string(&path).unwrap_or_default())
                );
            }
        }
        for vmm in all_vmm_dirs(&state) {
            let log = vmm.join("vmm.log");
            eprintln!(
                "--- {}:\n{}",
                log.display(),
                tail(&fs::read_to_string(&log).unwrap_or_default())
            );
        }
        for args in [&["ps", "--all"][..], &["nodes"], &["events"]] {
            let output = self.shoal.output(args);
            eprintln!(
                "--- shoal {}:\n{}",
                args[0],
                tail(&String::from_utf8_lossy(&output.stdout))
            );
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        let state = self.state_dir();
        let output = self
            .shoal
            .output(&["down", "--purge", "--state-dir", &state.to_string_lossy()]);
        for child in &mut self.restarted {
            drop(child.wait());
        }
        if !std::thread::panicking() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "shoal down failed: {stderr}");
            assert!(!state.exists(), "shoal down --purge left {}", state.display());
        }
    }
}

/// Every VMM process of a VM that runs, below a directory with one directory for each node.
#[must_use]
pub fn vmms_below(state_dir: &Path, vm_id: &str) -> Vec<VmmProcess> {
    let mut found = Vec::new();
    for directory in all_vmm_dirs(state_dir) {
        let name = directory
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let Some(epoch) = name
            .strip_prefix(vm_id)
            .and_then(|rest| rest.strip_prefix('-')?.parse().ok())
        else {
            continue;
        };
        let pid_file = fs::read_to_string(directory.join("pid")).unwrap_or_default();
        let identity = pid_file.parse().ok().filter(ProcessIdentity::is_running);
        let node = directory
            .ancestors()
            .nth(2)
            .and_then(Path::file_name)
            .unwrap_or_default();
        let node = node.to_string_lossy().into_owned();
        found.extend(identity.map(|identity| VmmProcess {
            node,
            epoch,
            identity,
            directory,
        }));
    }
    found
}

/// Panics if two of these VMMs run the VM, or its guest has written two different things in two of them. A source that says it
/// migrates while the destination already runs has sent Commit and is paused for good, so only two that say they run are one too
/// many.
pub fn assert_at_most_one_runs(vmms: &[VmmProcess]) {
    let running: Vec<&VmmProcess> = vmms
        .iter()
        .filter(|vmm| vmm.state() == Some(VmState::Running))
        .collect();
    // They were not asked at the same moment: the first may have been paused, and the second started, in between.
    let still = running
        .iter()
        .filter(|vmm| vmm.state() == Some(VmState::Running))
        .count();
    assert!(still <= 1, "two copies run: {running:?}");
    let consoles: Vec<Console> = vmms.iter().map(VmmProcess::console).collect();
    let twice = written_twice(&consoles);
    assert_eq!(twice, None, "{vmms:?}");
}

impl VmmProcess {
    /// Whether its log holds these words.
    #[must_use]
    pub fn has_logged(&self, words: &str) -> bool {
        fs::read_to_string(self.directory.join("vmm.log")).is_ok_and(|log| log.contains(words))
    }

    /// Stops all of its threads, and answers whether it was there to be stopped.
    #[must_use]
    pub fn freeze(&self) -> bool {
        i32::try_from(self.identity.pid)
            .ok()
            .and_then(Pid::from_raw)
            .is_some_and(|pid| kill_process(pid, Signal::STOP).is_ok())
    }

    /// What it says of itself; `None` if it does not answer.
    #[must_use]
    pub fn state(&self) -> Option<VmState> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let mut client = vmm::connect(&self.directory.join("vmm.sock")).await.ok()?;
            Some(
                client
                    .get_status(GetStatusRequest {})
                    .await
                    .ok()?
                    .into_inner()
                    .state(),
            )
        })
    }

    /// What it has of the console that the scheduler has not yet; nothing if it does not answer.
    fn console(&self) -> Console {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            match vmm::connect(&self.directory.join("vmm.sock")).await {
                Ok(mut client) => vmm::console_part(&mut client).await,
                Err(_) => Console::default(),
            }
        })
    }
}

fn all_vmm_dirs(state_dir: &Path) -> Vec<PathBuf> {
    let list = |path: &Path| -> Vec<PathBuf> {
        fs::read_dir(path)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .map(|entry| entry.path())
            .collect()
    };
    list(state_dir)
        .iter()
        .flat_map(|node| list(&node.join("vms")))
        .collect()
}

fn process_named<'a>(record: &'a Value, name: &str) -> &'a Value {
    let processes = record["processes"].as_array().expect("a list");
    processes
        .iter()
        .find(|process| process["name"] == name)
        .unwrap_or_else(|| panic!("no {name} in {record}"))
}

/// Takes an option with its value away; whether it was there.
fn take_option(args: &mut Vec<String>, option: &str) -> bool {
    let at = args.iter().position(|arg| arg == option);
    at.is_some_and(|at| args.drain(at..at + 2).count() == 2)
}

/// The bytes that a probe with these arguments fills.
fn fill_of(args: &str) -> u64 {
    let size = args
        .split(' ')
        .find_map(|arg| arg.strip_prefix("fill="))
        .unwrap_or("0MiB");
    let mib = size
        .strip_suffix("MiB")
        .unwrap_or_else(|| panic!("fill={size} should be in MiB"));
    mib.parse::<u64>().expect("a number of MiB") << 20
}

/// A port that is free now, outside the range from which the kernel hands out ports. None is given twice by one process.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % 5_000).expect("less than 5,000");
    (0..10_000)
        .map(|_| 20_000 + (start + NEXT.fetch_add(1, Ordering::Relaxed) % 10_000) % 10_000)
        .find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok())
        .expect("a free port")
}
