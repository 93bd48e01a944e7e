//! Many migrations of one guest in a row, by policies of every kind, some cancelled and some struck by faults: no page is
//! harmed, and no process, descriptor, port or memory is left behind. `cargo xtask soak`, and shorter in the tests.
//!
//! - [`plan`]: what each move is like, by the seed alone
//! - [`chain`]: from VMM to VMM, the bulk
//! - [`through_cluster`]: through a cluster, as a user asks for it
//! - [`linux`]: Linux guests, booted in a row, and moved amid stress
//! - [`summary`]: what there is to tell

pub mod chain;
pub mod linux;
pub mod plan;
pub mod summary;
pub mod through_cluster;

use crate::machine::{Machine, say};
use crate::process;
use plan::Random;
use summary::Summary;

/// Moves of a soak that has little time.
pub const SHORT: u32 = 25;
/// Where nobody says another.
pub const SEED: u64 = 1;
/// One in so many moves goes through a cluster.
const CLUSTER_SHARE: u32 = 10;
/// Descriptors that tests hold which wait for their turn in the same process.
const OF_OTHER_TESTS: usize = 8;
/// How often it is said how it goes.
const PROGRESS_EVERY: u32 = 25;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Migrations to ask for.
    pub migrations: u32,
    /// Decides what they are like.
    pub seed: u64,
}

/// Runs a soak. Panics at the first thing that is wrong, saying at which move.
#[must_use]
pub fn run(machine: Machine, options: Options) -> Summary {
    let before = process::descriptors(std::process::id());
    let mut summary = Summary::default();
    let mut random = Random::new(options.seed);
    let through_cluster = options.migrations / CLUSTER_SHARE;
    let direct = options.migrations - through_cluster;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(chain::run(direct, &mut random, &mut summary));
    drop(runtime);
    through_cluster::run(machine, through_cluster, &mut random, &mut summary);
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
    summary.assert_no_growth();
    summary
}

fn progress(place: &str, number: u32, of: u32, summary: &Summary) {
    if number.is_multiple_of(PROGRESS_EVERY) || number == of {
        let results = ["completed", "failed", "cancelled", "in doubt"].map(|result| {
            let count = summary.counted(&format!("result {result}"));
            format!("{count} {result}")
        });
        say(&format!("{place}: {number} of {of}: {}", results.join(", ")));
    }
}
