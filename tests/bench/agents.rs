//! `cargo xtask bench agents`: what a scheduler needs when many agents report to it, and how soon it acts on a report.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde::Serialize;
use shoal_tests::fleet::{Fleet, Reported, Scheduler, Size};
use tokio::time::sleep;

use crate::process::cpu_time;

/// Overloads that wait for the scheduler at a time: half of the migrations that it has under way at most.
const AT_ONCE: usize = 4;
const POLL: Duration = Duration::from_millis(20);
/// For all agents to register and be known.
const PATIENCE: Duration = Duration::from_secs(300);
/// Rounds of planning, after which the first reports do not matter any more.
const SETTLING: Duration = Duration::from_secs(15);

#[derive(Debug, Args)]
pub struct Agents {
    /// How many agents
    #[arg(long, default_value_t = 10_000)]
    agents: usize,
    /// VMs on each node
    #[arg(long, default_value_t = 10)]
    vms: usize,
    /// How long each part is measured
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where to write the figures as JSON
    #[arg(long, overrides_with = "out")]
    out: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Figures {
    agents: usize,
    vms: usize,
    connect_s: f64,
    deltas: Part,
    whole: Part,
    cpu_ratio: f64,
    bytes_ratio: f64,
    overloads: usize,
    decision_p50_ms: f64,
    decision_p99_ms: f64,
    decision_max_ms: f64,
    migrations: u64,
    planning_mean_ms: f64,
    peak_memory_bytes: u64,
    descriptors: usize,
}

/// A stretch of time.
#[derive(Debug, Serialize)]
struct Part {
    seconds: f64,
    reports_per_second: f64,
    bytes_per_report: f64,
    scheduler_cpus: f64,
    agents_cpus: f64,
    scheduler_memory_bytes: u64,
}

/// Measures and prints.
///
/// # Errors
/// If the scheduler does not keep up, or something does not start.
pub fn run(options: &Agents) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let figures = runtime.block_on(measure(options))?;
    show(&figures);
    if let Some(path) = &options.out {
        fs::write(path, serde_json::to_string_pretty(&figures)?)?;
        println!("written to {}", path.display());
    }
    Ok(())
}

async fn measure(options: &Agents) -> Result<Figures> {
    let size = Size {
        agents: options.agents,
        vms: options.vms,
    };
    println!(
        "{} agents with {} VMs each begin to report",
        size.agents, size.vms
    );
    let started = Instant::now();
    let (fleet, scheduler) = Fleet::start(size).await?;
    let sessions = u64::try_from(size.agents)?;
    while fleet.sessions() < sessions || fleet.reported().wholes < sessions {
        ensure!(
            started.elapsed() < PATIENCE,
            "only {} agents are registered",
            fleet.sessions()
        );
        sleep(POLL).await;
    }
    let connect_s = started.elapsed().as_secs_f64();
    println!("all are registered {connect_s:.1} s after the store began to be written");
    sleep(SETTLING).await;
    let time = Duration::from_secs(options.seconds);
    let planning = planning(&scheduler)?;
    let deltas = part(&fleet, &scheduler, time, true).await?;
    let planned = self::planning(&scheduler)?;
    let mut latencies = fleet.latencies();
    latencies.sort_unstable();
    fleet.set_whole_only(true);
    sleep(Duration::from_secs(5)).await;
    let whole = part(&fleet, &scheduler, time, false).await?;
    ensure!(
        fleet.sessions() == sessions,
        "only {} agents are left",
        fleet.sessions()
    );
    let all = size.agents * size.vms;
    let (running, different) = fleet.running();
    ensure!(
        (running, different) == (all, all),
        "{different} of {all} VMs run, {running} times"
    );
    let at = |share: f64| latency(&latencies, share);
    let figures = Figures {
        agents: size.agents,
        vms: size.vms,
        connect_s,
        cpu_ratio: deltas.scheduler_cpus / whole.scheduler_cpus,
        bytes_ratio: deltas.bytes_per_report / whole.bytes_per_report,
        deltas,
        whole,
        overloads: latencies.len(),
        decision_p50_ms: at(0.5),
        decision_p99_ms: at(0.99),
        decision_max_ms: at(1.0),
        migrations: fleet.moves(),
        planning_mean_ms: (planned.0 - planning.0) * 1e3 / (planned.1 - planning.1).max(1.0),
        peak_memory_bytes: memory(scheduler.pid(), "VmHWM:")?,
        descriptors: fs::read_dir(format!("/proc/{}/fd", scheduler.pid()))?.count(),
    };
    fleet.stop().await;
    Ok(figures)
}

/// Seconds of planning, and rounds.
fn planning(scheduler: &Scheduler) -> Result<(f64, f64)> {
    let seconds = scheduler.metric("shoal_planning_seconds_sum ")?;
    Ok((seconds, scheduler.metric("shoal_planning_seconds_count ")?))
}

/// Lets the agents report for so long, and overloads nodes, one after the other, if asked to.
async fn part(fleet: &Fleet, scheduler: &Scheduler, time: Duration, overload: bool) -> Result<Part> {
    let own = std::process::id();
    let (before, cpu, own_cpu) = (fleet.reported(), cpu_time(scheduler.pid())?, cpu_time(own)?);
    let started = Instant::now();
    let agents = fleet.running().0.max(1);
    let mut next = 0;
    while started.elapsed() < time {
        if overload && fleet.overloaded() < AT_ONCE {
            // Far apart from each other, and not the same again soon.
            next = (next + 617) % agents.min(1_000_000);
            fleet.overload(next % fleet.nodes());
        }
        sleep(POLL).await;
    }
    let seconds = started.elapsed().as_secs_f64();
    let (now, cpu_now, own_now) = (fleet.reported(), cpu_time(scheduler.pid())?, cpu_time(own)?);
    let reports = count(now) - count(before);
    Ok(Part {
        seconds,
        reports_per_second: reports / seconds,
        bytes_per_report: float(now.bytes - before.bytes) / reports.max(1.0),
        scheduler_cpus: (cpu_now.all - cpu.all) / seconds,
        agents_cpus: (own_now.all - own_cpu.all) / seconds,
        scheduler_memory_bytes: memory(scheduler.pid(), "VmRSS:")?,
    })
}

#[expect(clippy::cast_precision_loss, reason = "counts of a short time")]
fn float(count: u64) -> f64 {
    count as f64
}

fn count(reported: Reported) -> f64 {
    float(reported.wholes + reported.deltas)
}

fn latency(sorted: &[Duration], share: f64) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index of a short list"
    )]
    let index = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
    sorted.get(index).map_or(f64::NAN, |time| crate::millis(*time))
}

/// A line of /proc/PID/status, in bytes.
fn memory(pid: u32, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|line| line.split_ascii_whitespace().next());
    Ok(kib.context("no memory in /proc/PID/status")?.parse::<u64>()? << 10)
}

fn show(figures: &Figures) {
    println!(
        "\n{} agents, {} VMs; {} descriptors in the scheduler; registered {:.1} s after the store began to be written",
        figures.agents,
        figures.agents * figures.vms,
        figures.descriptors,
        figures.connect_s
    );
    println!(
        "{:<16}{:>12}{:>14}{:>16}{:>14}{:>12}",
        "", "reports/s", "bytes/report", "scheduler CPUs", "agents' CPUs", "memory"
    );
    for (name, part) in [("deltas", &figures.deltas), ("whole reports", &figures.whole)] {
        println!(
            "{name:<16}{:>12.0}{:>14.0}{:>16.3}{:>14.3}{:>8} MiB",
            part.reports_per_second,
            part.bytes_per_report,
            part.scheduler_cpus,
            part.agents_cpus,
            part.scheduler_memory_bytes >> 20
        );
    }
    println!(
        "deltas by whole reports: {:.2} of the bytes, {:.2} of the scheduler's CPU (its planning is in both)",
        figures.bytes_ratio, figures.cpu_ratio
    );
    println!(
        "report to decision: p50 {:.0} ms, p99 {:.0} ms, worst {:.0} ms, of {} overloads; {} migrations",
        figures.decision_p50_ms,
        figures.decision_p99_ms,
        figures.decision_max_ms,
        figures.overloads,
        figures.migrations
    );
    println!(
        "a round of planning, its look at the cluster included: {:.0} ms; memory at most {} MiB",
        figures.planning_mean_ms,
        figures.peak_memory_bytes >> 20
    );
}
