//! How fast a guest dirties memory, and how much of it: what the VMM samples against what a probe was told to do; and that
//! samples never stand in a migration's way.

use shoal_proto::vm::{MemoryBacking, MemorySample, MigrationResult, SampleMemoryRequest};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::pair::{Pair, Runner, Setup, Side};
use shoal_tests::vmm;
use tokio::time::{Duration, timeout};
use tonic::{Code, Streaming};

const PAGE: u64 = 4096;
const LIMIT: Duration = Duration::from_secs(120);

fn on_runtime(test: &str, body: impl Future<Output = ()>) {
    let Some(_machine) = Machine::alone_with_kvm(test) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async { timeout(2 * LIMIT, body).await.expect("in time") });
}

fn setup(memory: u64, probe: &str, fill: u64, backing: MemoryBacking) -> Setup {
    Setup {
        memory,
        backing,
        probe: format!("beat=1000 {probe}"),
        fill,
        ..Setup::default()
    }
}

async fn samples(pair: &mut Pair, side: Side, interval_ms: u64, window_ms: u64) -> Streaming<MemorySample> {
    let request = SampleMemoryRequest {
        interval_ms,
        window_ms,
    };
    let answer = pair.side(side).client.sample_memory(request).await;
    answer.expect("samples").into_inner()
}

async fn next(samples: &mut Streaming<MemorySample>) -> MemorySample {
    let sample = timeout(LIMIT, samples.message()).await;
    sample.expect("in time").expect("no error").expect("it goes on")
}

/// What was sampled, and what the guest says that it did meanwhile.
#[derive(Debug)]
struct Measured {
    rate: u64,
    truth: u64,
    set: u64,
}

impl Measured {
    fn is_right(&self, set: u64) -> bool {
        let near = |sampled: u64, truth: u64| (truth / 2..=truth * 2).contains(&sampled);
        near(self.rate, self.truth) && near(self.set, set)
    }
}

/// Of eight windows. The guest has only as much CPU as the host gives it, so it is asked what it wrote.
async fn measured(pair: &mut Pair) -> Measured {
    let before = guest::heartbeats(&pair.source.console().await);
    let mut stream = samples(pair, Side::Source, 600, 200).await;
    let (mut written, mut watched_us, mut last) = (0, 0, MemorySample::default());
    for _ in 0..8 {
        last = next(&mut stream).await;
        written += last.dirty_rate_bytes_per_second * last.window_us / 1_000_000;
        watched_us += last.window_us;
    }
    drop(stream);
    let seen = before.len();
    let more = pair
        .source
        .follow_console(|text| guest::heartbeats(text).len() > seen + 1);
    let after = guest::heartbeats(&timeout(LIMIT, more).await.expect("heartbeats"));
    let (first, end) = (before.last().expect("a beat"), after.last().expect("a beat"));
    Measured {
        rate: written * 1_000_000 / watched_us,
        truth: (end.dirtied - first.dirtied) * PAGE * 1000 / (end.uptime_ms - first.uptime_ms).max(1),
        set: last.working_set_bytes,
    }
}

#[test]
fn the_sample_is_what_the_guest_was_told_to_write() {
    on_runtime("the sample", async {
        for (backing, memory, set_mib, rate) in [
            (MemoryBacking::Anonymous, 96 << 20, 48, 12_000),
            (MemoryBacking::Shared, 512 << 20, 128, 20_000),
            (MemoryBacking::Anonymous, 256 << 20, 32, 4000),
        ] {
            let probe = format!("fill={set_mib}MiB wss={set_mib}MiB rate={rate} pattern=random");
            let mut pair = Pair::start(setup(memory, &probe, set_mib << 20, backing)).await;
            // On a host that is busy a guest may get nothing to do in the windows: another time it does.
            let mut tries = Vec::new();
            while tries.len() < 6
                && !tries
                    .last()
                    .is_some_and(|last: &Measured| last.is_right(set_mib << 20))
            {
                tries.push(measured(&mut pair).await);
            }
            println!("{probe}: {tries:?}");
            assert!(
                tries.last().is_some_and(|last| last.is_right(set_mib << 20)),
                "{probe}: {tries:?}"
            );
            guest::assert_unharmed(&pair.source.console().await);
        }
    });
}

#[test]
fn a_guest_that_writes_nothing_has_no_dirty_rate() {
    on_runtime("no writes", async {
        let quiet = setup(96 << 20, "fill=32MiB rate=1", 32 << 20, MemoryBacking::Auto);
        let mut pair = Pair::start(quiet).await;
        let seen = measured(&mut pair).await;
        // What the probe itself writes of its own state.
        assert!(seen.rate < 4 << 20 && seen.set < 4 << 20, "{seen:?}");
    });
}

/// As many samples as there can be, and a migration into the middle of a window: all memory arrives, and is right.
#[test]
fn a_migration_goes_before_samples() {
    on_runtime("migration and samples", async {
        for round in 0..3 {
            let probe = "fill=48MiB wss=24MiB rate=6000 pattern=random";
            let busy = setup(96 << 20, probe, 48 << 20, MemoryBacking::Auto);
            let mut pair = Pair::start(busy).await;
            // Windows are open nearly half of the time.
            let mut before = samples(&mut pair, Side::Source, 100, 50).await;
            for _ in 0..=round {
                next(&mut before).await;
            }
            let to = pair.prepare().await;
            let request = vmm::outgoing(to.to_string(), 2, Duration::from_millis(200));
            let report = pair.migrate(request).await.expect("a report");
            assert_eq!(report.result(), MigrationResult::Completed, "{}", report.reason);
            assert!(report.passes > 1, "pages that were written meanwhile were found");
            assert_eq!(pair.settle(Some(&report)).await, Runner::Destination);
            // The source has nothing left to sample; the destination has, at once.
            let mut after = samples(&mut pair, Side::Destination, 100, 50).await;
            // In a short window of a busy host the guest may not have run at all.
            while next(&mut after).await.dirty_rate_bytes_per_second == 0 {}
            guest::assert_unharmed(&pair.destination.console().await);
        }
    });
}

#[test]
fn what_cannot_be_is_refused() {
    on_runtime("refusals of samples", async {
        let quiet = setup(64 << 20, "fill=1MiB", 1 << 20, MemoryBacking::Auto);
        let mut pair = Pair::start(quiet).await;
        for (interval_ms, window_ms, field) in [
            (99, 0, "interval_ms"),
            (1000, 501, "window_ms"),
            (1000, 5, "window_ms"),
        ] {
            let request = SampleMemoryRequest {
                interval_ms,
                window_ms,
            };
            let refused = pair.source.client.sample_memory(request).await;
            let refused = refused.expect_err("refused");
            assert_eq!(refused.code(), Code::InvalidArgument);
            assert!(refused.message().starts_with(field), "{refused}");
        }
    });
}
