//! `cargo xtask demo`: a cluster, a Linux guest that is moved while it counts, and a node that is relieved of its VMs
//! before it runs out of memory. Told with measured figures; every claim is checked.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::context::{Context, step};
use crate::guest;
use crate::images::Image;
use crate::shoal::{Cluster, wait_for};
use crate::{build, images, packages};

const COUNT_FOR_EVER: &str = "i=0; while :; do echo count $i; i=$((i+1)); sleep 1; done";
const NODES: [&str; 3] = ["--nodes=3", "--node-memory=1GiB", "--node-cpus=32"];
/// VMs that together do not fit node3 once they have filled their memory.
const CROWD: [&str; 4] = ["crowd1", "crowd2", "crowd3", "crowd4"];
const CROWD_FILL: u64 = 320 << 20;
/// The scheduler aims to keep every node below this part of its memory.
const THRESHOLD: f64 = 0.90;
/// The cluster is at rest when nothing was moved for so long.
const REST: Duration = Duration::from_secs(10);

/// What of the demo is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Story {
    /// All of it.
    Whole,
    /// What needs no Linux, so that no kernel is built.
    ProbeAlone,
}

/// Runs the demo. `keep` leaves the cluster up.
///
/// # Errors
/// If anything that it claims did not hold.
pub fn run_demo(context: &Context, story: Story, keep: bool) -> Result<()> {
    match story {
        Story::Whole => {
            packages::ensure_all()?;
            images::build_all_beside(context, || build::programs(context))?;
        }
        Story::ProbeAlone => {
            build::programs(context)?;
            images::build(context, Image::Probe, &[])?;
        }
    }
    let state_dir = context.target_dir("demo")?.join("state");
    let mut cluster = step("starting a cluster of three nodes of 1 GiB", || {
        let program = build::program(context, "shoal");
        Cluster::start(
            program,
            &state_dir,
            &context.target().join("images"),
            &NODES,
            keep,
        )
    })?;
    let told = tell(&cluster, story);
    if keep {
        println!("\nThe cluster is still up. Talk to it:");
        println!(
            "  export SHOAL_ENDPOINT={} PATH={}:$PATH",
            cluster.endpoint(),
            context.target().join("release").display()
        );
        println!("  shoal ps; shoal nodes; shoal logs -f counter; shoal events");
        println!("  shoal down --purge --state-dir {}", state_dir.display());
        return told;
    }
    if told.is_err() {
        println!("\nLogs are kept in {}", state_dir.display());
    }
    step("tearing down", || cluster.down(told.is_ok()))?;
    told
}

fn tell(cluster: &Cluster, story: Story) -> Result<()> {
    if story == Story::Whole {
        step("booting Linux on node1", || boot_counter(cluster))?;
        step("moving it to node2 while it counts", || move_counter(cluster))?;
    }
    step("overloading node3 with four VMs that will not fit it", || {
        overload(cluster)
    })?;
    step("checking that nothing was lost", || {
        if story == Story::Whole {
            check_counter(cluster)?;
        }
        check(cluster)
    })?;
    println!(
        "\nAll of it held: nothing was killed, nothing lost, no page corrupted, and no node ran out of memory."
    );
    Ok(())
}

fn boot_counter(cluster: &Cluster) -> Result<()> {
    let run = [
        "run",
        "linux",
        "--detach",
        "--name",
        "counter",
        "--prefer-node",
        "node1",
        "--",
        "sh",
        "-c",
        COUNT_FOR_EVER,
    ];
    cluster.json(&run)?;
    wait_to_count(cluster, 3, Duration::from_secs(30))
}

fn move_counter(cluster: &Cluster) -> Result<()> {
    let before = counts(cluster)?.len();
    let report = cluster.json(&["migrate", "counter", "--to", "node2"])?;
    ensure!(
        report["result"] == "completed",
        "the migration did not complete: {report}"
    );
    println!("    {}", figures(&report));
    wait_to_count(cluster, before + 3, Duration::from_secs(30))
}

fn overload(cluster: &Cluster) -> Result<()> {
    for name in CROWD {
        let probe = [
            "fill=320MiB",
            "fill_rate=12MiB",
            "wss=16MiB",
            "rate=500",
            "pattern=random",
        ];
        let mut run = vec![
            "run",
            "probe",
            "--detach",
            "--name",
            name,
            "--prefer-node",
            "node3",
            "--memory",
            "384MiB",
            "--",
        ];
        run.extend(probe);
        cluster.json(&run)?;
    }
    let mut watch = Watch {
        cluster,
        told: last_sequence(cluster)?,
        moves: 0,
        last_move: Instant::now(),
        peak: 0.0,
        shown: Vec::new(),
    };
    wait_for(
        "the VMs to fill their memory and the moves to end",
        Duration::from_secs(180),
        || {
            watch.look()?;
            let filled = CROWD
                .iter()
                .map(|name| Ok(filled(cluster, name)? >= CROWD_FILL))
                .collect::<Result<Vec<_>>>()?;
            let at_rest = watch.last_move.elapsed() >= REST && filled.iter().all(|&done| done);
            Ok(at_rest.then_some(()))
        },
    )?;
    ensure!(watch.moves > 0, "no VM was moved away from node3");
    ensure!(
        watch.peak < 1.0,
        "a node ran out of its memory, at {:.0} %",
        watch.peak * 100.0
    );
    println!(
        "    {} automatic moves; the fullest node came to {:.0} % of its memory at most; the scheduler aims for {:.0} %",
        watch.moves,
        watch.peak * 100.0,
        THRESHOLD * 100.0
    );
    Ok(())
}

/// Tells what the scheduler does while it does it.
struct Watch<'a> {
    cluster: &'a Cluster,
    told: u64,
    moves: usize,
    last_move: Instant,
    peak: f64,
    /// How full each node was when it was told last, in tens of percent.
    shown: Vec<i64>,
}

impl Watch<'_> {
    fn look(&mut self) -> Result<()> {
        self.usage()?;
        for event in self
            .cluster
            .list(&["events", "--after", &self.told.to_string()])?
        {
            self.told = event["sequence"].as_u64().context("an event's sequence number")?;
            let kind = event["kind"].as_str().unwrap_or_default();
            if kind.starts_with("migration-") {
                self.last_move = Instant::now();
                self.moves += usize::from(kind == "migration-completed");
                println!("    {kind}: {}", event["message"].as_str().unwrap_or_default());
            }
        }
        Ok(())
    }

    /// Keeps the highest use of memory seen, and tells of it as it changes.
    fn usage(&mut self) -> Result<()> {
        let nodes = self.cluster.list(&["nodes"])?;
        let used: Vec<f64> = nodes.iter().map(used_part).collect();
        self.peak = used.iter().copied().fold(self.peak, f64::max);
        #[allow(clippy::cast_possible_truncation, reason = "a part of 1, times 10")]
        let tens: Vec<i64> = used.iter().map(|part| (part * 10.0) as i64).collect();
        if tens != self.shown {
            let told = |(node, part): (&Value, &f64)| {
                format!("{} {:.0} %", node["name"].as_str().unwrap_or("?"), part * 100.0)
            };
            let text: Vec<String> = nodes.iter().zip(&used).map(told).collect();
            println!("    memory in use: {}", text.join(", "));
            self.shown = tens;
        }
        Ok(())
    }
}

fn used_part(node: &Value) -> f64 {
    let bytes = |key: &str| node[key].as_f64().unwrap_or(0.0);
    1.0 - bytes("memory_available_bytes") / bytes("memory_bytes")
}

fn check_counter(cluster: &Cluster) -> Result<()> {
    let numbers = counts(cluster)?;
    guest::check_consecutive("counts", &numbers).map_err(anyhow::Error::msg)?;
    println!("    counter: {} counts, none missing, none twice", numbers.len());
    Ok(())
}

fn check(cluster: &Cluster) -> Result<()> {
    for name in CROWD {
        let console = cluster.console(name)?;
        guest::check_unharmed(&console)
            .map_err(anyhow::Error::msg)
            .context(name)?;
        println!(
            "    {name}: {} heartbeats, no page corrupt",
            guest::heartbeats(&console).len()
        );
        for migration in cluster.json(&["inspect", name])?["migrations"]
            .as_array()
            .into_iter()
            .flatten()
        {
            println!(
                "      {}: {}",
                figures(migration),
                migration["requested_because"].as_str().unwrap_or_default()
            );
        }
    }
    for vm in cluster.list(&["ps", "--all"])? {
        ensure!(
            vm["state"] == "running",
            "{} is {}: {}",
            vm["name"],
            vm["state"],
            vm["message"]
        );
    }
    Ok(())
}

fn figures(report: &Value) -> String {
    let number = |key: &str| report[key].as_f64().unwrap_or(f64::NAN);
    let word = |key: &str| report[key].as_str().unwrap_or("?").to_owned();
    format!(
        "{} -> {}: downtime {:.1} ms, total {:.0} ms, {} passes, {:.1} MiB sent",
        word("from"),
        word("to"),
        number("downtime_ms"),
        number("total_ms"),
        number("passes"),
        number("bytes_sent") / f64::from(1 << 20),
    )
}

fn wait_to_count(cluster: &Cluster, wanted: usize, limit: Duration) -> Result<()> {
    let counted = wait_for("Linux to count", limit, || {
        let state = cluster.json(&["inspect", "counter"])?;
        if state["state"] == "failed" || state["state"] == "exited" {
            bail!(
                "counter is {}: {}\n{}",
                state["state"],
                state["message"],
                guest::tail(&cluster.console("counter")?)
            );
        }
        let numbers = counts(cluster)?;
        Ok((numbers.len() >= wanted).then_some(numbers))
    })?;
    println!("    it counts: {} so far", counted.len());
    Ok(())
}

fn counts(cluster: &Cluster) -> Result<Vec<u64>> {
    Ok(guest::counts(&cluster.console("counter")?))
}

fn filled(cluster: &Cluster, vm: &str) -> Result<u64> {
    Ok(guest::heartbeats(&cluster.console(vm)?)
        .last()
        .map_or(0, |beat| beat.filled))
}

fn last_sequence(cluster: &Cluster) -> Result<u64> {
    Ok(cluster
        .list(&["events"])?
        .last()
        .and_then(|event| event["sequence"].as_u64())
        .unwrap_or(0))
}
