//! The migration connection is cut after every so many bytes, between two VMMs without a cluster around them.

use shoal_proto::vm::{AbortIncomingRequest, MigrationReport, MigrationResult, ResumeRequest, VmState};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::proxy::{Proxy, Towards, Trouble};
use shoal_tests::vmm::{MIGRATION, Vmm, probe_spec};
use tokio::time::{Duration, timeout};

const MEMORY: u64 = 64 << 20;
const PROBE: &str = "beat=200 fill=24MiB wss=1MiB rate=50 pattern=random";
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
    source.boot(probe_spec(VM, 1, MEMORY, PROBE)).await;
    heartbeats_after(&mut source, 0, 24 << 20).await;
    let prepared = destination
        .prepare_incoming(probe_spec(VM, 2, MEMORY, PROBE))
        .await;
    let proxy = Proxy::start(prepared, Trouble::CutAfter(cut_after));

    let max_downtime = Duration::from_millis(500);
    let report = source.migrate(proxy.address(), 2, max_downtime, |_| {}).await;

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
    let seen = guest::heartbeats(&source.console().await).len();
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
    runner.wait_for_state(VmState::Running).await;
    heartbeats_after(runner, seen, 0).await;
    guest::assert_unharmed(&runner.console().await);
    (proxy.passed(Towards::Destination), report)
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

/// Waits for more than so many heartbeats, the last of which says that so many bytes are filled.
async fn heartbeats_after(vmm: &mut Vmm, seen: usize, filled: u64) {
    let more = |text: &str| {
        let beats = guest::heartbeats(text);
        beats.len() > seen && beats.last().is_some_and(|beat| beat.filled >= filled)
    };
    let limit = Duration::from_secs(30);
    timeout(limit, vmm.follow_console(more))
        .await
        .expect("heartbeats");
}
