//! What a guest's clocks show across a move: they go on, by as much as time went on, and never back.

use std::time::{Duration, Instant};

use shoal_proto::vm::MigrationResult;
use shoal_tests::guest::{self, last_word as word};
use shoal_tests::machine::Machine;
use shoal_tests::pair::{Pair, Runner, Setup};
use shoal_tests::vmm::outgoing;

/// How long the pause is made, in ms: longer than anything else here, so that a clock that stood still is found out.
const PAUSE: u64 = 2_000;
const MAX_DOWNTIME: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn the_guests_clocks_go_on_by_the_length_of_the_pause() {
    let Some(_machine) = Machine::with_kvm("clocks across a long pause") else {
        return;
    };
    let began = Instant::now();
    let mut pair = Pair::start(Setup {
        destination_under: vec![
            "env".into(),
            format!("SHOAL_FAULT=destination.state=delay:{PAUSE}"),
        ],
        memory: 64 << 20,
        probe: "fill=8MiB wss=256KiB rate=50".into(),
        fill: 8 << 20,
        ..Setup::default()
    })
    .await;
    let before = pair.source.console().await;
    let stops = word(&before, "stops");

    let address = pair.prepare().await;
    let request = outgoing(address.to_string(), 2, MAX_DOWNTIME);
    let report = pair.migrate(request).await.expect("a report");
    assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
    assert!(report.downtime_us >= PAUSE * 1000, "{report:?}");
    pair.check(Runner::Destination).await;

    let after = pair.destination.console().await;
    let elapsed_ms = u64::try_from(began.elapsed().as_millis()).expect("not so long");
    assert_eq!(word(&after, "tsc_backwards"), 0);
    assert_eq!(word(&after, "clock_backwards"), 0);
    // A clock that stood still in the pause would not have shown it to the guest.
    assert!(
        word(&after, "worst_gap_us") >= PAUSE * 1000,
        "{}",
        guest::tail(&after)
    );
    let moved = |name| word(&after, name) - word(&before, name);
    for clock in ["uptime_ms", "clock_ms"] {
        assert!(moved(clock) >= PAUSE, "{clock}: {}", guest::tail(&after));
        // Nor may it have gone further than time itself, the difference of the two hosts' frequencies apart.
        assert!(
            moved(clock) <= elapsed_ms + elapsed_ms / 1000 + 1,
            "{clock}: {}",
            guest::tail(&after)
        );
    }
    assert!(
        word(&after, "stops") > stops,
        "the guest is told that it was stopped"
    );

    let status = pair.destination.status().await.expect("alive");
    let missed = u64::from(status.guest_gap_us.expect("the probe says what it missed"));
    assert!(missed >= PAUSE * 1000, "{status:?}");
}
