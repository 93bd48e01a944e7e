//! `cargo xtask bench`: what a migration costs, beside QEMU and beside what the machine can do at best.
//! The method is in docs/benchmarks.md.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "this program's output")]

mod case;
mod figures;
mod gap;
mod memory;
mod process;
mod qemu;
mod qmp;
mod references;
mod shoal;
mod startup;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use shoal_tests::machine::Machine as Lock;
use tokio::runtime::Runtime;

use case::{CASES, Case};
use figures::{CaseReport, Machine, Pair, Report, Side};
use memory::Warm;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", about = "Measure start, memory and migration")]
struct Arguments {
    /// How often each case is run; medians are shown
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Only this case; may be repeated
    #[arg(long = "case", value_parser = CASES.map(|case| case.name))]
    cases: Vec<String>,
    /// Shoal alone, even if QEMU is installed
    #[arg(long)]
    no_qemu: bool,
    /// Limit on downtime for both
    #[arg(long, default_value_t = 20)]
    max_downtime_ms: u64,
    /// Leave free memory as it is; see memory.rs
    #[arg(long)]
    cold: bool,
    /// Where to write the figures as JSON
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let Some(_lock) = Lock::with_kvm("the benchmark") else {
        return Ok(ExitCode::SUCCESS);
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = measure(&runtime, &arguments)?;
    if let Some(path) = &arguments.out {
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("written to {}", path.display());
    }
    let sides = report.cases.iter().flat_map(|case| {
        let Pair { shoal, qemu } = &case.sides;
        std::iter::once(shoal).chain(qemu)
    });
    let failures = sides.map(|side| side.failures.len()).sum::<usize>();
    if failures > 0 {
        println!("{failures} runs FAILED");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

fn measure(runtime: &Runtime, arguments: &Arguments) -> Result<Report> {
    let machine = machine(arguments.no_qemu)?;
    println!("{}", table::machine(&machine));
    let references = references::measure()?;
    println!("{}", table::references(&references));
    let with_qemu = machine.qemu.is_some();
    let startup = Pair {
        shoal: runtime.block_on(startup::shoal())?,
        qemu: with_qemu.then(startup::qemu).transpose()?,
    };
    println!("{}", table::startup(&startup));
    let wanted =
        |case: &&Case| arguments.cases.is_empty() || arguments.cases.iter().any(|name| name == case.name);
    let mut cases = Vec::new();
    for case in CASES.iter().filter(wanted) {
        let report = measure_case(runtime, case, arguments, with_qemu);
        println!("{}", table::case(&report, &references));
        cases.push(report);
    }
    Ok(Report {
        machine,
        max_downtime_ms: arguments.max_downtime_ms,
        cold: arguments.cold,
        runs: arguments.runs,
        references,
        startup,
        cases,
    })
}

/// Runs take turns, so that what else happens on the machine hits both alike.
fn measure_case(runtime: &Runtime, case: &Case, arguments: &Arguments, with_qemu: bool) -> CaseReport {
    let max_downtime = Duration::from_millis(arguments.max_downtime_ms);
    let (mut shoal, mut qemu) = (Vec::new(), Vec::new());
    for _ in 0..arguments.runs {
        let warm = || Warm::up(!arguments.cold);
        shoal.push(warm().and_then(|warm| runtime.block_on(shoal::run(case, max_downtime, warm))));
        if with_qemu {
            qemu.push(warm().and_then(|warm| qemu::run(case, max_downtime, warm)));
        }
    }
    CaseReport {
        name: case.name,
        title: case.title,
        cmdline: case.cmdline,
        sides: Pair {
            shoal: Side::of(shoal),
            qemu: with_qemu.then(|| Side::of(qemu)),
        },
    }
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
        qemu: if no_qemu { None } else { qemu::version() },
    })
}

/// Milliseconds.
fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
