//! `cargo xtask bench judgement`: does the scheduler do what is right on a real, noisy cluster, and nothing else? Nodes are held in
//! CPU quotas, so that a hot node is really hot, and what balancing gains is measured by the guests' own progress.

mod alternating;
mod burst;
mod host;
mod hot;
mod leaks;
mod makespan;
mod slow;
mod stage;
mod still;

use std::any::Any;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use clap::Args;
use serde::Serialize;
use shoal_tests::machine::Machine as Lock;

use crate::figures::Machine;

/// Others that use more of the CPUs than this before or after a row leave their mark on it.
const QUIET_CPUS: f64 = 0.2;

/// Arguments of `judgement`.
#[derive(Debug, Args)]
pub struct Judgement {
    /// Which rows; otherwise all, or with --quick those that have a short form
    #[arg(value_name = "ROW", value_parser = ROWS.iter().map(|row| row.name).collect::<Vec<_>>())]
    rows: Vec<String>,
    /// Shorter, for continuous integration
    #[arg(long)]
    quick: bool,
    /// Leaks in each of the two rows that have them
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    leaks: u32,
    /// Write what `shoal record` sees of each row to FOLDER/ROW.gz; of rows with several clusters, of the first
    #[arg(long, value_name = "FOLDER")]
    record: Option<PathBuf>,
    /// Where to write what was found as JSON
    #[arg(long, overrides_with = "out")]
    out: Option<PathBuf>,
}

/// How a row is to be run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Shorter windows.
    quick: bool,
    /// How often memory leaks.
    leaks: u32,
    /// Where the row is recorded.
    recording: Option<PathBuf>,
}

/// A situation, and what is right in it.
#[derive(Debug)]
struct Row {
    name: &'static str,
    goal: &'static str,
    run: fn(&Settings) -> Result<Outcome>,
    has_short_form: bool,
}

static ROWS: [Row; 10] = [
    row("lone", "one busy VM on three nodes, 5 min: 0 moves", still::lone).and_short(),
    row(
        "equals",
        "six equal busy VMs, 2/2/2, 5 min: 0 moves",
        still::equals,
    )
    .and_short(),
    row(
        "equals-hog",
        "the same, 5 min beside a CPU hog on the host: 0 moves",
        still::equals_beside_hog,
    ),
    row(
        "burst",
        "30 times `run -d` at once: within one VM of even",
        burst::run,
    ),
    row(
        "hot",
        "6/0/0: at most 4 moves to 2/2/2, then none for 4 min; the guests get more done",
        hot::run,
    )
    .and_short(),
    row(
        "slow",
        "a node of half the CPU beside two, 3/1/1: ends with fewer VMs than each of them, then no move for 3 min",
        slow::run,
    ),
    row(
        "alternating",
        "VMs that are busy and idle in turns of 20 s, as busy on average as they may be: at most 1 move in 5 min",
        alternating::run,
    ),
    row(
        "leak",
        "four VMs fill a node: relieved before its memory runs out, each time",
        leaks::quiet,
    ),
    row(
        "leak-busy",
        "the same beside three processes that spin",
        leaks::beside_spinning,
    ),
    row(
        "makespan",
        "60 jobs on three nodes: balanced no later than not, and at most 1.15 times as late as on one node of all the CPU",
        makespan::run,
    ),
];

const fn row(name: &'static str, goal: &'static str, run: fn(&Settings) -> Result<Outcome>) -> Row {
    Row {
        name,
        goal,
        run,
        has_short_form: false,
    }
}

impl Row {
    const fn and_short(self) -> Self {
        Self {
            has_short_form: true,
            ..self
        }
    }
}

/// What came of a row.
#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    /// What did not hold; nothing if it passed.
    failures: Vec<String>,
    /// What is worth telling.
    facts: Vec<String>,
    figures: BTreeMap<String, f64>,
    /// Every move that was begun, as it was explained.
    moves: Vec<stage::Move>,
}

impl Outcome {
    /// Notes what did not hold, if it did not.
    fn expect(&mut self, held: bool, otherwise: impl Into<String>) {
        if !held {
            self.failures.push(otherwise.into());
        }
    }

    fn tell(&mut self, fact: impl Into<String>) {
        self.facts.push(fact.into());
    }

    fn figure(&mut self, name: impl Into<String>, value: f64) {
        self.figures.insert(name.into(), value);
    }

    fn figure_of(&self, name: &str) -> f64 {
        self.figures.get(name).copied().unwrap_or(f64::NAN)
    }
}

#[derive(Debug, Serialize)]
struct RowReport {
    row: &'static str,
    goal: &'static str,
    passed: bool,
    seconds: f64,
    /// CPUs that other processes used right before and right after it.
    others_cpus: f64,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    quick: bool,
    rows: Vec<RowReport>,
}

/// Runs the rows and prints what came of them; the exit status is 1 if one did not pass.
///
/// # Errors
/// If what was found cannot be written.
pub fn run(options: &Judgement, machine: Machine) -> Result<ExitCode> {
    // Each row waits for the machine again, so that others have their turn in between.
    let Some(lock) = Lock::with_kvm_and_root("the judgement") else {
        return Ok(ExitCode::SUCCESS);
    };
    drop(lock);
    host::end_on_signal()?;
    let wanted = |row: &&Row| {
        if options.rows.is_empty() {
            row.has_short_form || !options.quick
        } else {
            options.rows.iter().any(|name| name == row.name)
        }
    };
    let mut rows = Vec::new();
    for row in ROWS.iter().filter(wanted) {
        let settings = Settings {
            quick: options.quick,
            leaks: options.leaks,
            recording: options
                .record
                .as_ref()
                .map(|folder| folder.join(format!("{}.gz", row.name))),
        };
        rows.push(judge(row, settings)?);
        if host::interrupted() {
            break;
        }
    }
    println!();
    for row in &rows {
        println!("{}", summary(row));
    }
    let passed = !host::interrupted() && rows.iter().all(|row| row.passed);
    let report = Report {
        machine,
        quick: options.quick,
        rows,
    };
    if let Some(path) = &options.out {
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
        println!("written to {}", path.display());
    }
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn judge(row: &'static Row, settings: Settings) -> Result<RowReport> {
    println!("\n==> {}: {}", row.name, row.goal);
    let before = host::busy_cpus()?;
    let started = Instant::now();
    // The harness panics where a test would; what a row has made is removed on the way.
    let run = thread::spawn(move || (row.run)(&settings)).join();
    let seconds = started.elapsed().as_secs_f64();
    let outcome = run.unwrap_or_else(|panic| Err(anyhow!("{}", words(panic.as_ref()))));
    let outcome = outcome.unwrap_or_else(|error| Outcome {
        failures: vec![format!("{error:#}")],
        ..Outcome::default()
    });
    let report = RowReport {
        row: row.name,
        goal: row.goal,
        passed: outcome.failures.is_empty(),
        seconds,
        others_cpus: before.max(host::busy_cpus()?),
        outcome,
    };
    for fact in &report.outcome.facts {
        println!("    {fact}");
    }
    println!("{}", summary(&report));
    Ok(report)
}

fn summary(report: &RowReport) -> String {
    let verdict = if report.passed { "PASS" } else { "FAIL" };
    let mut line = format!("{verdict} {:<12} {:>4.0} s", report.row, report.seconds);
    for failure in &report.outcome.failures {
        line += &format!("; {failure}");
    }
    if report.others_cpus > QUIET_CPUS {
        line += &format!(" [beside others, who used {:.1} CPUs]", report.others_cpus);
    }
    line
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "it panicked".to_owned())
}
