//! `cargo xtask bench`: what a migration costs, beside QEMU and beside what the machine can do at best.
//! The method is in docs/benchmarks.md.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this program's output")]

mod agents;
mod case;
mod cloud_hypervisor;
mod figures;
mod gap;
mod goals;
mod judgement;
mod linux;
mod memory;
mod place;
mod process;
mod qemu;
mod qmp;
mod references;
mod run;
mod sampling;
mod shoal;
mod startup;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use shoal_tests::machine::Machine as Lock;
use tokio::runtime::Runtime;

use case::{BASIC, CASES, Case};
use figures::{CaseReport, Machine, MigrateReport, Pair, Report};
use place::Place;
use run::{Progress, Runner};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask bench",
    about = "Measure start, memory and migration",
    args_conflicts_with_subcommands = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    options: Basic,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure migrations of every kind and hold them against their goals
    Migrate(Migrate),
    /// Let many simulated agents report to a real scheduler, and measure what it needs and how soon it acts
    Agents(agents::Agents),
    /// Measure what it costs to sample how guests write their memory
    Sampling(sampling::Sampling),
    /// Judge what the scheduler does on a real cluster, whose nodes are held in CPU quotas
    Judgement(judgement::Judgement),
    /// Measure a Linux guest, in Shoal's VMM and in QEMU, and how long one takes to run a command
    Linux(linux::Linux),
    /// One end of a stream that tells what a link carries
    #[command(hide = true)]
    Stream { role: String, address: String },
}

#[derive(Debug, Args)]
struct Basic {
    /// How often each case is run; medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only this case; may be repeated
    #[arg(long = "case", value_parser = CASES[..BASIC].iter().map(|case| case.name).collect::<Vec<_>>())]
    cases: Vec<String>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Migrate {
    /// How often each case is run at most; medians are shown. 5, or 1 with --quick
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Only this case or these cases; may be repeated
    #[arg(long = "case", value_parser = case::selectors())]
    cases: Vec<String>,
    /// One run of a few cases
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Common {
    /// Shoal alone, even if QEMU or Cloud Hypervisor is installed
    #[arg(long)]
    no_qemu: bool,
    /// Limit on downtime for all
    #[arg(long, default_value_t = 20)]
    max_downtime_ms: u64,
    /// Leave free memory as it is; see memory.rs
    #[arg(long)]
    cold: bool,
    /// Where to write the figures as JSON
    #[arg(long, overrides_with = "out")]
    out: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    if let Some(Command::Stream { role, address }) = arguments.command {
        if let Some(seconds) = place::stream(&role, &address)? {
            println!("{seconds}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(Command::Agents(options)) = &arguments.command {
        let _lock = Lock::alone();
        agents::run(options)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(Command::Judgement(options)) = &arguments.command {
        return judgement::run(options, machine(true)?);
    }
    let Some(lock) = Lock::alone_with_kvm("the benchmark") else {
        return Ok(ExitCode::SUCCESS);
    };
    if let Some(Command::Linux(options)) = &arguments.command {
        linux::run(lock, machine(options.no_qemu)?, options)?;
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    if let Some(Command::Sampling(options)) = &arguments.command {
        sampling::run(&runtime, options)?;
        return Ok(ExitCode::SUCCESS);
    }
    let cases = if let Some(Command::Migrate(options)) = &arguments.command {
        let report = measure_migration(&runtime, options)?;
        write(&options.common, &report)?;
        report.cases
    } else {
        let report = measure(&runtime, &arguments.options)?;
        write(&arguments.options.common, &report)?;
        report.cases
    };
    let sides = cases.iter().flat_map(|case| {
        let Pair { shoal, qemu } = &case.sides;
        std::iter::once(shoal).chain(qemu).chain(&case.cloud_hypervisor)
    });
    let failures = sides.map(|side| side.failures.len()).sum::<usize>();
    if failures > 0 {
        println!("{failures} runs FAILED");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn write(common: &Common, report: &impl Serialize) -> Result<()> {
    if let Some(path) = &common.out {
        let text = serde_json::to_string_pretty(report)?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("written to {}", path.display());
    }
    Ok(())
}

fn measure(runtime: &Runtime, options: &Basic) -> Result<Report> {
    let machine = machine(options.common.no_qemu)?;
    println!("{}", table::machine(&machine));
    let references = references::measure()?;
    println!("{}", table::references(&references, None));
    let startup = Pair {
        shoal: runtime.block_on(startup::shoal())?,
        qemu: machine.qemu.is_some().then(startup::qemu).transpose()?,
    };
    println!("{}", table::startup(&startup));
    let cases: Vec<_> = CASES[..BASIC]
        .iter()
        .filter(|case| options.cases.is_empty() || options.cases.iter().any(|name| name == case.name))
        .collect();
    let place = Place::new(false);
    let mut runner = runner(runtime, &place, &options.common, &machine);
    let mut skipped = Vec::new();
    let cases = run_cases(&mut runner, &cases, options.runs, &mut skipped, |case| {
        println!("\n{}", table::case(case, &references, None));
    })?;
    Ok(Report {
        machine,
        max_downtime_ms: options.common.max_downtime_ms,
        cold: options.common.cold,
        runs: options.runs,
        references,
        startup,
        cases,
    })
}

fn measure_migration(runtime: &Runtime, options: &Migrate) -> Result<MigrateReport> {
    let machine = machine(options.common.no_qemu)?;
    println!("{}", table::machine(&machine));
    let named = |case: &Case| {
        options
            .cases
            .iter()
            .any(|word| word == case.name || word == case.group)
    };
    let wanted = |case: &&Case| {
        if options.cases.is_empty() {
            case.quick || !options.quick
        } else {
            named(case)
        }
    };
    let mut cases: Vec<_> = CASES.iter().filter(wanted).collect();
    let mut skipped = Vec::new();
    let link = |case: &&Case| case.settings.gigabit;
    if let Some(why) = Place::no_network().filter(|_| cases.iter().any(link)) {
        skipped.push(format!("the cases over a link of 1 Gbit/s: {why}"));
        cases.retain(|case| !link(case));
    }
    let place = Place::new(cases.iter().any(link));
    let references = references::measure()?;
    let link = place.link_rate()?;
    println!("{}", table::references(&references, link));
    let runs = options.runs.unwrap_or(if options.quick { 1 } else { 5 });
    let mut runner = runner(runtime, &place, &options.common, &machine);
    let cases = run_cases(&mut runner, &cases, runs, &mut skipped, |case| {
        println!("\n{}", table::case(case, &references, link));
    })?;
    println!("{}", table::summary(&cases, machine.cloud_hypervisor.is_some()));
    for what in &skipped {
        println!("SKIPPED {what}");
    }
    let goals = goals::judge(&cases, &references);
    println!("{}", table::goals(&goals));
    Ok(MigrateReport {
        machine,
        max_downtime_ms: options.common.max_downtime_ms,
        cold: options.common.cold,
        runs,
        references,
        link,
        cases,
        skipped,
        goals,
    })
}

fn runner<'a>(runtime: &'a Runtime, place: &'a Place, common: &Common, machine: &Machine) -> Runner<'a> {
    Runner {
        runtime,
        place,
        max_downtime: Duration::from_millis(common.max_downtime_ms),
        cold: common.cold,
        qemu: machine.qemu.is_some(),
        cloud_hypervisor: machine.cloud_hypervisor.is_some(),
        progress: Progress::new(0),
    }
}

fn run_cases(
    runner: &mut Runner<'_>,
    cases: &[&Case],
    runs: u32,
    skipped: &mut Vec<String>,
    mut show: impl FnMut(&CaseReport),
) -> Result<Vec<CaseReport>> {
    let migrations = |runner: &Runner<'_>, case: &Case| runs.min(case.max_runs) * runner.sides(case);
    runner.progress = Progress::new(cases.iter().map(|case| migrations(runner, case)).sum());
    let mut reports = Vec::new();
    for case in cases {
        if let Some(why) = Runner::obstacle(case)? {
            println!("  {}: SKIPPED: {why}", case.name);
            skipped.push(format!("{}: {why}", case.name));
            runner.progress.skip(migrations(runner, case));
            continue;
        }
        let report = runner.case(case, runs.min(case.max_runs));
        show(&report);
        reports.push(report);
    }
    Ok(reports)
}

fn machine(no_qemu: bool) -> Result<Machine> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(':'))
            .map_or("", |(_, value)| value.trim())
    };
    let load = fs::read_to_string("/proc/loadavg")?;
    let load = load.split(' ').next().context("no load in /proc/loadavg")?;
    let peer = |version: fn() -> Option<String>| if no_qemu { None } else { version() };
    Ok(Machine {
        cpus: std::thread::available_parallelism()?.get(),
        cpu_model: field("model name").to_owned(),
        hardware_virtualization: field("flags")
            .split(' ')
            .any(|flag| ["vmx", "svm"].contains(&flag)),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        load_average: load.parse()?,
        qemu: peer(qemu::version),
        cloud_hypervisor: peer(cloud_hypervisor::version),
    })
}

/// Milliseconds.
fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
