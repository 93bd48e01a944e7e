//! The connections of a migration are cut at the frames that decide who runs the VM, and before, between two VMMs without a
//! cluster around them.

use shoal_proto::vm::{AbortIncomingRequest, MigrationReport, MigrationResult, ResumeRequest, VmState};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::proxy::{ControlFrame, Part, Proxy, Towards, Trouble};
use shoal_tests::vmm::{MIGRATION, Vmm, probe_spec};
use tokio::time::{Duration, timeout};

const MEMORY: u64 = 64 << 20;
const FILL: u64 = 24 << 20;
const PROBE: &str = "beat=200 fill=24MiB wss=1MiB rate=50 pattern=random";
const VM: &str = "0b6a3f5e-5df7-4f55-9e5c-8c1f5d1f1a02";

const PASS_END: ControlFrame = to_destination(4);
const STATE: ControlFrame = to_destination(6);
const READY: ControlFrame = to_source(7);
const COMMIT: ControlFrame = to_destination(8);
const RUNNING: ControlFrame = to_source(9);

const fn to_destination(kind: u8) -> ControlFrame {
    let towards = Towards::Destination;
    ControlFrame { kind, towards }
}

const fn to_source(kind: u8) -> ControlFrame {
    let towards = Towards::Source;
    ControlFrame { kind, towards }
}

/// How a migration ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The source knows that it has not happened.
    Stays,
    /// The source is in doubt, and the destination has never had Commit.
    DoubtStays,
    /// The source is in doubt, and the destination runs the VM.
    DoubtMoved,
    /// Both know that it has happened.
    Moves,
}

#[test]
fn wherever_the_connection_is_cut_exactly_one_vm_runs() {
    let Some(_machine) = Machine::with_kvm("a connection cut at many places") else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    // Well before all of its 24 MiB, which do not compress, are there.
    let early = [0, 60, 4_096, 1 << 20].map(|bytes| (Trouble::CutAfter(bytes), End::Stays));
    let at_frames = [
        (PASS_END, Part::Whole, End::Stays),
        (STATE, Part::Nothing, End::Stays),
        (STATE, Part::AllButOne, End::Stays),
        (READY, Part::AllButOne, End::Stays),
        (READY, Part::Whole, End::DoubtStays),
        (COMMIT, Part::Nothing, End::DoubtStays),
        (COMMIT, Part::Bytes(1), End::DoubtStays),
        (COMMIT, Part::AllButOne, End::DoubtStays),
        (COMMIT, Part::Whole, End::DoubtMoved),
        (RUNNING, Part::Nothing, End::DoubtMoved),
        (RUNNING, Part::AllButOne, End::DoubtMoved),
        (RUNNING, Part::Whole, End::Moves),
    ];
    let at_frames = at_frames.map(|(frame, part, end)| (Trouble::CutAtFrame(frame, part), end));
    for (trouble, end) in early.into_iter().chain(at_frames) {
        runtime.block_on(move_with_cut(trouble, end));
    }
}

/// Moves a probe through a proxy that cuts; settles what is in doubt as an agent would; checks that it ended as it should, that
/// exactly one side runs and that at no time two did.
async fn move_with_cut(trouble: Trouble, expected: End) {
    let (mut source, mut destination) = (Vmm::start().await, Vmm::start().await);
    source.boot(probe_spec(VM, 1, MEMORY, PROBE)).await;
    heartbeats_after(&mut source, 0, FILL).await;
    let prepared = destination
        .prepare_incoming(probe_spec(VM, 2, MEMORY, PROBE))
        .await;
    let proxy = Proxy::start(prepared, trouble);

    let max_downtime = Duration::from_millis(500);
    let report = source.migrate(proxy.address(), 2, max_downtime, |_| {}).await;
    if let Trouble::CutAtFrame(..) = trouble {
        assert!(proxy.frame_came(), "{trouble:?}: no such frame came: {report:?}");
    }
    let end = settle(&mut source, &mut destination, &report).await;
    assert_eq!(end, expected, "{trouble:?}: {report:?}");

    let seen = guest::heartbeats(&source.console().await).len();
    let (runner, other) = if matches!(end, End::DoubtMoved | End::Moves) {
        let in_doubt = end == End::DoubtMoved;
        let state = if in_doubt {
            VmState::InDoubt
        } else {
            VmState::Migrated
        };
        source.wait_for_state(state).await;
        (&mut destination, &mut source)
    } else {
        assert!(!destination.has_run(), "{trouble:?}: both sides ran");
        assert!(!report.reason.is_empty(), "the report must say why");
        (&mut source, &mut destination)
    };
    runner.wait_for_state(VmState::Running).await;
    heartbeats_after(runner, seen + 1, 0).await;
    guest::assert_unharmed(&runner.console().await);
    guest::assert_ran_once(&[runner.console_part().await, other.console_part().await]);
}

/// Has whoever is to run the VM run it, as an agent would. Answers how it ended.
async fn settle(source: &mut Vmm, destination: &mut Vmm, report: &MigrationReport) -> End {
    match report.result() {
        MigrationResult::Completed => End::Moves,
        MigrationResult::Failed => {
            let committed = has_committed(destination).await;
            assert!(!committed, "a failed move must not be committed: {report:?}");
            End::Stays
        }
        MigrationResult::InDoubt => {
            source.wait_for_state(VmState::InDoubt).await;
            if has_committed(destination).await {
                return End::DoubtMoved;
            }
            let resumed = source.client.resume(ResumeRequest { epoch: 1 }).await;
            resumed.expect("resumed");
            End::DoubtStays
        }
        other => panic!("{other:?}: {report:?}"),
    }
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
