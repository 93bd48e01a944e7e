//! The migration connection is cut after every so many bytes, between two VMMs without a cluster around them.

use std::net::SocketAddr;

use shoal_proto::vm::{
    AbortIncomingRequest, BootRequest, MigrationReport, MigrationResult, PrepareIncomingRequest,
    ReadConsoleRequest, ResumeRequest, StartMigrationRequest, VmState, WatchMigrationRequest,
};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::proxy::CuttingProxy;
use shoal_tests::vmm::{Vmm, probe_spec};
use tokio::time::{Duration, sleep, timeout};

const MEMORY: u64 = 64 << 20;
const PROBE: &str = "fill=24MiB wss=1MiB rate=50 pattern=random";
const MIGRATION: &str = "6d1d3f60-9d0e-4a6e-8f3b-3f6d7f3f0a01";
const VM: &str = "0b6a3f5e-5df7-4f55-9e5c-8c1f5d1f1a02";

#[test]
fn wherever_the_connection_is_cut_exactly_one_vm_runs() {
    let Some(_machine) = Machine::with_kvm("a connection cut at many places") else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (whole, report) = move_with_cut(u64::MAX).await;
        assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");

        let in_pre_copy = whole / 2;
        let near_the_end =
            [100_000, 20_000, 5_000, 1_000, 200, 50, 1].map(|bytes| whole.saturating_sub(bytes));
        for cut in [0, 1, 60, 300, 4_096, in_pre_copy]
            .into_iter()
            .chain(near_the_end)
        {
            let (_, report) = move_with_cut(cut).await;
            if cut <= in_pre_copy {
                assert_eq!(
                    report.result(),
                    MigrationResult::Failed,
                    "cut after {cut} bytes: {report:?}"
                );
                assert!(!report.reason.is_empty(), "the report must say why");
            }
        }
    });
}

/// Moves a probe through a proxy that cuts; settles what is in doubt as an agent would; checks that exactly one side
/// runs and that the guest is unharmed. Answers the bytes that passed and the source's report.
async fn move_with_cut(cut_after: u64) -> (u64, MigrationReport) {
    let (mut source, mut destination) = (Vmm::start().await, Vmm::start().await);
    let spec = probe_spec(VM, 1, MEMORY, PROBE);
    source
        .client
        .boot(BootRequest { spec: Some(spec) })
        .await
        .expect("booted");
    heartbeats_after(&mut source, 0, 24 << 20).await;
    let proxy = CuttingProxy::start(prepare(&mut destination).await, cut_after);

    let report = migrate(&mut source, proxy.address()).await;

    let runs_at_destination = match report.result() {
        MigrationResult::Completed => true,
        MigrationResult::Failed => {
            assert!(
                !has_committed(&mut destination).await,
                "cut after {cut_after}: a failed move must not be committed"
            );
            false
        }
        MigrationResult::InDoubt => {
            assert_eq!(source.state().await, VmState::InDoubt, "cut after {cut_after}");
            let committed = has_committed(&mut destination).await;
            if !committed {
                source
                    .client
                    .resume(ResumeRequest { epoch: 1 })
                    .await
                    .expect("resumed");
            }
            committed
        }
        other => panic!("cut after {cut_after}: {other:?}"),
    };
    let seen = guest::heartbeats(&console(&mut source).await).len();
    let runner = if runs_at_destination {
        assert_eq!(
            source.state().await,
            if report.result() == MigrationResult::InDoubt {
                VmState::InDoubt
            } else {
                VmState::Migrated
            }
        );
        &mut destination
    } else {
        assert!(!destination.has_run(), "cut after {cut_after}: both sides ran");
        &mut source
    };
    assert_eq!(runner.state().await, VmState::Running, "cut after {cut_after}");
    heartbeats_after(runner, seen, 0).await;
    guest::assert_unharmed(&console(runner).await);
    (proxy.passed(), report)
}

async fn prepare(destination: &mut Vmm) -> SocketAddr {
    let request = PrepareIncomingRequest {
        spec: Some(probe_spec(VM, 2, MEMORY, PROBE)),
        migration_id: MIGRATION.into(),
        token: "a secret of this migration".into(),
        listen_address: "127.0.0.1:0".into(),
        commit_timeout_ms: 30_000,
    };
    let answer = destination
        .client
        .prepare_incoming(request)
        .await
        .expect("prepared")
        .into_inner();
    answer.address.parse().expect("an address")
}

async fn migrate(source: &mut Vmm, to: SocketAddr) -> MigrationReport {
    let request = StartMigrationRequest {
        migration_id: MIGRATION.into(),
        token: "a secret of this migration".into(),
        destination_address: to.to_string(),
        destination_epoch: 2,
        max_downtime_ms: 500,
        timeout_ms: 60_000,
    };
    source.client.start_migration(request).await.expect("started");
    let request = WatchMigrationRequest {
        migration_id: MIGRATION.into(),
    };
    let mut stream = source
        .client
        .watch_migration(request)
        .await
        .expect("watched")
        .into_inner();
    while let Some(progress) = stream.message().await.expect("progress") {
        if let Some(report) = progress.report {
            return report;
        }
    }
    panic!("the stream of progress ended without a report");
}

/// Whether Commit came first. A destination whose process is gone never got it, unless it left its mark.
async fn has_committed(destination: &mut Vmm) -> bool {
    let request = AbortIncomingRequest {
        migration_id: MIGRATION.into(),
    };
    match destination.client.abort_incoming(request).await {
        Ok(answer) => answer.into_inner().committed,
        Err(_) => destination.has_run(),
    }
}

async fn console(vmm: &mut Vmm) -> String {
    let request = ReadConsoleRequest {
        from_offset: 0,
        follow: false,
    };
    let mut stream = vmm
        .client
        .read_console(request)
        .await
        .expect("the console")
        .into_inner();
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.message().await.expect("a chunk") {
        bytes.extend(chunk.data);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits for more than so many heartbeats, the last of which says that so many bytes are filled.
async fn heartbeats_after(vmm: &mut Vmm, seen: usize, filled: u64) {
    let wait = async {
        loop {
            let beats = guest::heartbeats(&console(vmm).await);
            if beats.len() > seen && beats.last().is_some_and(|beat| beat.filled >= filled) {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(Duration::from_secs(30), wait).await.expect("heartbeats");
}
