//! What a Linux guest must do right, tried from within: each check in a process of its own, all at once as stress, and how
//! long the usual things take.

pub mod break_entry;
pub mod check;
pub mod faults;
pub mod files;
pub mod fp;
pub mod interrupted;
pub mod ipc;
pub mod kernel;
pub mod limits;
pub mod mapping;
pub mod measure;
pub mod memory;
pub mod net;
pub mod pointers;
pub mod processes;
pub mod signals;
pub mod stress;
pub mod sys;
pub mod system;
pub mod terminals;
pub mod threads;
pub mod timers;
pub mod tracing;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use check::{Check, Verdict};

const USAGE: &str = "usage: checks [NAME...]             run the checks, or those whose name begins so
       checks list                  their names
       checks stress SECONDS [SEED] run them all at once, at random, with a heartbeat each second
       checks measure               how long system calls, forks, faults and the like take
       checks break-entry           break a ring-3 kernel, which must notice and end the VM";
/// A check that takes as long hangs; in stress it shares the machine, which may also be moved or slowed down.
const PATIENCE: Duration = Duration::from_secs(60);

/// The checks of all files.
pub fn all() -> impl Iterator<Item = &'static Check> {
    [
        faults::CHECKS,
        interrupted::CHECKS,
        signals::CHECKS,
        timers::CHECKS,
        threads::CHECKS,
        fp::CHECKS,
        tracing::CHECKS,
        memory::CHECKS,
        pointers::CHECKS,
        processes::CHECKS,
        limits::CHECKS,
        ipc::CHECKS,
        terminals::CHECKS,
        net::CHECKS,
        kernel::CHECKS,
        files::CHECKS,
        system::CHECKS,
    ]
    .into_iter()
    .flatten()
}

/// Does what the command line says.
#[must_use]
pub fn run(words: &[&str]) -> ExitCode {
    if let Some(status) = processes::helper(words) {
        return ExitCode::from(status);
    }
    match words {
        ["list"] => {
            all().for_each(|check| println!("{}", check.name));
            ExitCode::SUCCESS
        }
        ["measure"] => {
            let measured = measure::run();
            if let Err(stop) = &measured {
                println!("FAIL measure: {stop:?}");
            }
            ExitCode::from(u8::from(measured.is_err()))
        }
        ["break-entry"] => break_entry::run(),
        ["stress", seconds, seed @ ..] => match (seconds.parse(), seed.first().unwrap_or(&"1").parse()) {
            (Ok(seconds), Ok(seed)) => run_stress(Duration::from_secs(seconds), seed),
            _ => usage(),
        },
        _ => run_checks(words),
    }
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

fn run_stress(duration: Duration, seed: u64) -> ExitCode {
    let checks: Vec<&Check> = all().filter(|check| check.stress).collect();
    let failed = net::loopback_up().and_then(|()| stress::run(&checks, duration, seed));
    match failed {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(stop) => {
            println!("FAIL stress: {stop:?}");
            ExitCode::FAILURE
        }
    }
}

fn run_checks(prefixes: &[&str]) -> ExitCode {
    let wanted = |check: &&Check| {
        prefixes.is_empty()
            || prefixes
                .iter()
                .any(|prefix| !prefix.is_empty() && check.name.starts_with(prefix))
    };
    let (mut ok, mut skipped, mut failed) = (0, 0, 0);
    if let Err(stop) = net::loopback_up() {
        println!("no loopback: {stop:?}");
    }
    for check in all().filter(wanted) {
        let start = Instant::now();
        match check.run_apart(PATIENCE) {
            Verdict::Ok => {
                println!("check {} ok ({} ms)", check.name, start.elapsed().as_millis());
                ok += 1;
            }
            Verdict::Skipped(why) => {
                println!("check {} skipped: {why}", check.name);
                skipped += 1;
            }
            Verdict::Failed(what) => {
                println!("FAIL {}: {what}", check.name);
                failed += 1;
            }
        }
        drop(std::io::stdout().flush());
    }
    if ok + skipped + failed == 0 {
        return usage();
    }
    println!("checks: {ok} ok, {skipped} skipped, {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}
