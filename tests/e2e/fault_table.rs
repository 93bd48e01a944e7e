//! Faults by name at every phase on both sides, and faults of the link, of the disk and of memory: whatever strikes,
//! exactly one VM runs afterwards, unharmed; or nobody does, and whoever is left says why.

mod hosts;
mod row;
mod rows;

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_tests::machine::{Machine, say};
use shoal_tests::process;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use rows::{POINTS, rows};

/// Pairs at once. Each row is a pair of its own, and most of them wait for time-outs; but guests take turns on the CPUs.
const AT_ONCE: usize = 6;
/// So many rows may be run again, alone.
const AGAIN: usize = 3;
/// What no busy host excuses: two run, or none that should, or what the guest had is damaged.
const UNSAFE: [&str; 12] = [
    "it runs twice",
    "the guest ran twice",
    "vCPUs have run at the destination",
    "that should be stopped writes",
    "it ran meanwhile",
    "has committed a migration",
    "it ended as Lost",
    "it ended as Died",
    "the guest does not go on",
    "memory was corrupted",
    "lost work",
    "a hole or a repeat",
];
/// So many rows are named with the time they took.
const SLOWEST: usize = 10;
/// Descriptors that tests hold which wait for their turn in the same process.
const OF_OTHER_TESTS: usize = 8;

#[test]
fn every_point_is_in_the_table() {
    let known = BTreeSet::from(shoal_vmm::fault::POINTS);
    let tested: BTreeSet<&str> = POINTS.iter().map(|point| point.name).collect();
    assert_eq!(tested, known);
    let names: BTreeSet<String> = rows().iter().map(rows::Row::name).collect();
    assert_eq!(names.len(), rows().len(), "no row is there twice");
}

#[test]
fn wherever_a_fault_strikes_exactly_one_vm_runs_or_it_is_said_why_none_does() {
    let Some(_machine) = Machine::alone_with_kvm("faults at every phase") else {
        return;
    };
    let only = std::env::var("SHOAL_FAULT_ROWS").unwrap_or_default();
    let outcome = |row: rows::Row| {
        let outcome: Outcome = Box::pin(row::run(row));
        (row.name(), outcome)
    };
    let chosen = || rows().into_iter().filter(|row| row.name().contains(&only));
    let failed = run_all(chosen().map(outcome), AT_ONCE);
    let is_unsafe = |why: &str| UNSAFE.iter().any(|words| why.contains(words));
    let harm: Vec<_> = failed.iter().filter(|(_, why)| is_unsafe(why)).collect();
    assert!(harm.is_empty(), "a VM was harmed:\n{harm:#?}");
    assert!(
        failed.len() <= AGAIN,
        "{} rows failed:\n{failed:#?}",
        failed.len()
    );
    say(&format!("{} rows are run again, alone", failed.len()));
    // Beside others on a busy host one side may be late by more than a row allows for. Alone it must end as it should.
    let again = chosen().filter(|row| failed.iter().any(|(name, _)| *name == row.name()));
    assert_none(&run_all(again.map(outcome), 1));
}

/// Nothing failed, and nothing is left.
fn assert_none(failed: &[(String, String)]) {
    assert!(failed.is_empty(), "{} rows failed:\n{failed:#?}", failed.len());
}

/// A row that is run; it panics where it does not end as it should.
type Outcome = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Runs rows, several at once; gives those that failed and why, and checks that nothing is left if none did.
fn run_all(rows: impl Iterator<Item = (String, Outcome)>, at_once: usize) -> Vec<(String, String)> {
    let before = process::descriptors(std::process::id());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let mut ended: Vec<(Duration, String, Option<String>)> = runtime.block_on(async {
        let permits = Arc::new(Semaphore::new(at_once));
        let mut tasks = JoinSet::new();
        for (name, row) in rows {
            let permits = Arc::clone(&permits);
            tasks.spawn(async move {
                let permit = permits.acquire_owned().await;
                let start = Instant::now();
                // A task of its own, so that a panic is known by the row's name.
                let ended = tokio::spawn(row).await;
                drop(permit);
                let why = ended.err().map(panicked_with);
                if let Some(why) = &why {
                    say(&format!("FAILED {name}: {why}"));
                }
                (start.elapsed(), name, why)
            });
        }
        tasks.join_all().await
    });
    ended.sort();
    for (time, name, _) in ended.iter().rev().take(SLOWEST) {
        say(&format!("{:6.1} s {name}", time.as_secs_f64()));
    }
    let failed = ended.into_iter().filter_map(|(_, name, why)| Some((name, why?)));
    let failed: Vec<(String, String)> = failed.collect();
    drop(runtime);
    if !failed.is_empty() {
        return failed;
    }
    assert_eq!(
        process::children("shoal-vmm"),
        Vec::<u32>::new(),
        "processes are left"
    );
    let after = process::descriptors(std::process::id());
    assert!(
        after <= before + OF_OTHER_TESTS,
        "{after} descriptors, {before} before"
    );
    failed
}

fn panicked_with(error: tokio::task::JoinError) -> String {
    let panic = error.into_panic();
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|&text| text.to_owned()))
        .unwrap_or_else(|| "a panic without words".into())
}
