//! The previous protocol's stream and state still load.

use std::time::Duration;

use shoal_proto::vm::{MigrationResult, PrepareIncomingRequest, VmState};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::protocol1::{self, Recorded};
use shoal_tests::proxy::Proxy;
use shoal_tests::vmm::{Vmm, probe_spec};

const VM: &str = "9d0f3c52-6a3e-4a7c-8a51-1d2c3b4a5f60";
const MEMORY: u64 = 4 << 20;
const PROBE: &str = "fill=48KiB wss=16KiB rate=50 pattern=random";

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_migration_of_protocol_1_ends_in_a_running_unharmed_vm() {
    let Some(_machine) = Machine::with_kvm("the previous protocol") else {
        return;
    };
    let mut recorded = Recorded::load();
    recorded.fit_to_this_host();
    let hello = recorded.hello();
    let mut destination = Vmm::start().await;
    let mut spec = probe_spec(&hello.vm(), hello.epoch, hello.memory_bytes, PROBE);
    spec.cpus = hello.cpus;
    let request = PrepareIncomingRequest {
        spec: Some(spec),
        migration_id: hello.migration(),
        token: hello.token,
        listen_address: "127.0.0.1:0".into(),
        ..PrepareIncomingRequest::default()
    };
    let address = destination.prepare(request).await.expect("prepared");
    let address = address.parse().expect("an address");

    let playing = tokio::task::spawn_blocking(move || recorded.play(address));
    playing.await.expect("no panic").expect("the destination follows");

    destination.wait_for_state(VmState::Running).await;
    let so_far = guest::heartbeats(&destination.console().await);
    let last = so_far.last().expect("the console came along").clone();
    // All of its memory is looked at once in 4 s.
    let more = |text: &str| {
        guest::heartbeats(text)
            .last()
            .is_some_and(|beat| beat.n >= last.n + 6)
    };
    let limit = Duration::from_secs(60);
    let console = tokio::time::timeout(limit, destination.follow_console(more));
    let console = console.await.expect("heartbeats");
    guest::assert_unharmed(&console);
    let beats = guest::heartbeats(&console);
    let now = beats.last().expect("more than before");
    assert!(
        now.dirtied > last.dirtied && now.checked > last.checked,
        "{last:?} {now:?}"
    );
}

/// Not a test: makes the recording again, from programs that speak protocol 1. See the fixture's README.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "writes tests/fixtures/migration-v1/stream.zst; needs a shoal-vmm of protocol 1 in SHOAL_TEST_BIN"]
async fn record_protocol_1() {
    let (mut source, mut destination) = (Vmm::start().await, Vmm::start().await);
    source.boot(probe_spec(VM, 1, MEMORY, PROBE)).await;
    let filled = |text: &str| {
        guest::heartbeats(text)
            .last()
            .is_some_and(|beat| beat.filled == 48 << 10 && beat.n >= 2)
    };
    source.follow_console(filled).await;
    let prepared = destination
        .prepare_incoming(probe_spec(VM, 2, MEMORY, PROBE))
        .await;
    let proxy = Proxy::recording(prepared);
    let report = source
        .migrate(proxy.address(), 2, Duration::from_millis(500), |_| {})
        .await;
    assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
    let recorded = proxy.recorded();
    assert_eq!(recorded.len(), 1, "protocol 1 has one connection");
    let stream = &recorded[0].to_destination;
    drop(Recorded::parse(stream)); // checks it
    let compressed = zstd::encode_all(stream.as_slice(), 19).expect("compressed");
    println!("{} bytes, compressed {}", stream.len(), compressed.len());
    std::fs::write(protocol1::fixture(), compressed).expect("written");
}
