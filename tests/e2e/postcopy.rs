//! Post-copy, between two VMMs without a cluster around them: a guest that writes faster than the link takes runs at the
//! destination first, and fetches what is missing from the source.

use std::net::SocketAddr;
use std::sync::Arc;

use shoal_proto::vm::vmm_client::VmmClient;
use shoal_proto::vm::{
    GetStatusRequest, MigrationPhase, MigrationPolicy, MigrationProgress, MigrationReport, MigrationResult,
    MigrationTls, OnStall, PrepareIncomingRequest, ResumeRequest, SetMigrationRequest, StopRequest, VmState,
    VmStatus,
};
use shoal_tests::guest;
use shoal_tests::machine::Machine;
use shoal_tests::proxy::{Proxy, Trouble};
use shoal_tests::vmm::{self, Vmm, probe_spec};
use shoal_tests::wait;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Duration, timeout};
use tonic::Status;
use tonic::transport::Channel;

const MEMORY: u64 = 96 << 20;
const FILL: u64 = 48 << 20;
/// Writes faster than [`BANDWIDTH`] takes.
const FAST: &str = "beat=200 fill=48MiB wss=48MiB rate=12000 pattern=random";
/// Writes a good part of its memory while all of it is sent, and takes seconds to touch it all.
const SLOW: &str = "beat=200 fill=48MiB wss=48MiB rate=3000 pattern=random";
const BANDWIDTH: u64 = 24 << 20;
/// In post-copy: what is not waited for hardly comes.
const TRICKLE: u64 = 1 << 20;
const VM: &str = "5c2f0c1d-0a0e-4a86-9b0b-61f3a1f0c0de";
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn on_runtime(test: &str, body: impl Future<Output = ()>) {
    let Some(_machine) = Machine::alone_with_kvm(test) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async { timeout(3 * LIMIT, body).await.expect("in time") });
}

/// A source that runs a probe, a destination that waits for it, and what lies between.
pub(crate) struct Pair {
    pub(crate) source: Vmm,
    pub(crate) destination: Vmm,
    pub(crate) proxy: Proxy,
    /// Where the destination itself listens.
    pub(crate) listens: SocketAddr,
}

impl Pair {
    pub(crate) async fn start() -> Self {
        Self::with(SLOW, "", "").await
    }

    async fn with(probe: &str, source: &str, destination: &str) -> Self {
        Self::new(probe, source, destination, None).await
    }

    /// With a destination that wants TLS, if it has an identity.
    pub(crate) async fn with_identity(identity: Option<MigrationTls>) -> Self {
        Self::new(SLOW, "", "", identity).await
    }

    async fn new(probe: &str, source: &str, destination: &str, identity: Option<MigrationTls>) -> Self {
        let under = |fault: &str| -> Vec<String> {
            ["env".to_owned(), format!("SHOAL_FAULT={fault}")]
                .into_iter()
                .filter(|_| !fault.is_empty())
                .collect()
        };
        let mut source = Vmm::start_under(&under(source)).await;
        let mut destination = Vmm::start_under(&under(destination)).await;
        source.boot(probe_spec(VM, 1, MEMORY, probe)).await;
        heartbeats_after(&mut source, 0, FILL).await;
        let incoming = PrepareIncomingRequest {
            tls: identity,
            ..vmm::incoming(probe_spec(VM, 2, MEMORY, probe))
        };
        let listens = destination.prepare(incoming).await.expect("prepared");
        let listens = listens.parse().expect("an address");
        let proxy = Proxy::start(listens, Trouble::None);
        Self {
            source,
            destination,
            proxy,
            listens,
        }
    }

    /// Starts a migration that goes on in post-copy after its first pass.
    pub(crate) fn migrate(&self, connections: u32) -> Moving {
        self.migrate_within(Duration::from_millis(1), connections)
    }

    /// Starts a migration that goes on in post-copy when it stalls, or when the time is up.
    fn migrate_within(&self, limit: Duration, connections: u32) -> Moving {
        let mut request = vmm::outgoing(self.proxy.address().to_string(), 2, Duration::from_millis(5));
        let policy = MigrationPolicy {
            on_stall: OnStall::PostCopy.into(),
            timeout_ms: Some(u64::try_from(limit.as_millis()).expect("a sane duration")),
            bandwidth_bytes_per_second: Some(BANDWIDTH),
            connections: Some(connections),
            ..request.policy.take().unwrap_or_default()
        };
        request.policy = Some(policy);
        let in_post_copy = Arc::new(Notify::new());
        let (client, told) = (self.source.client.clone(), Arc::clone(&in_post_copy));
        let mut for_task = client.clone();
        let watched = tokio::spawn(async move {
            vmm::migrate(&mut for_task, request, |progress: &MigrationProgress| {
                if progress.phase() == MigrationPhase::PostCopy {
                    told.notify_one();
                }
            })
            .await
        });
        Moving {
            client,
            in_post_copy,
            watched,
        }
    }

    /// Waits for one more heartbeat at the destination and that nothing it saw was wrong.
    pub(crate) async fn assert_unharmed_there(&mut self) {
        let seen = guest::heartbeats(&self.destination.console().await).len();
        heartbeats_after(&mut self.destination, seen, 0).await;
        guest::assert_unharmed(&self.destination.console().await);
    }
}

pub(crate) struct Moving {
    client: VmmClient<Channel>,
    in_post_copy: Arc<Notify>,
    watched: JoinHandle<Result<MigrationReport, Status>>,
}

impl Moving {
    /// Waits until it is in post-copy, and has it last.
    pub(crate) async fn wait_for_post_copy(&mut self) {
        timeout(LIMIT, self.in_post_copy.notified())
            .await
            .expect("post-copy begins");
        self.hold_to(TRICKLE).await;
    }

    /// Changes its bandwidth; 0: as fast as it goes.
    pub(crate) async fn hold_to(&mut self, bandwidth: u64) {
        let policy = MigrationPolicy {
            bandwidth_bytes_per_second: Some(bandwidth),
            ..MigrationPolicy::default()
        };
        let request = SetMigrationRequest {
            migration_id: vmm::MIGRATION.into(),
            policy: Some(policy),
        };
        self.client
            .set_migration(request)
            .await
            .expect("it still goes on");
    }

    pub(crate) async fn report(self) -> MigrationReport {
        timeout(LIMIT, self.watched)
            .await
            .expect("the migration ends")
            .expect("no panic")
            .expect("a report")
    }
}

async fn heartbeats_after(vmm: &mut Vmm, seen: usize, filled: u64) {
    let more = |text: &str| {
        let beats = guest::heartbeats(text);
        beats.len() > seen && beats.last().is_some_and(|beat| beat.filled >= filled)
    };
    timeout(LIMIT, vmm.follow_console(more))
        .await
        .expect("heartbeats");
}

async fn status(vmm: &mut Vmm) -> VmStatus {
    let answer = vmm.client.get_status(GetStatusRequest {}).await;
    answer.expect("a status").into_inner()
}

#[test]
fn a_guest_that_outruns_the_link_moves_at_once_and_fetches_the_rest() {
    on_runtime("post-copy", async {
        for connections in [1, 3] {
            let mut pair = Pair::with(FAST, "", "").await;
            let report = pair.migrate_within(LIMIT, connections).report().await;
            assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
            assert!(report.post_copy && report.reason.is_empty(), "{report:?}");
            assert!(report.faults > 0 && report.post_copy_pages > 0, "{report:?}");
            assert!(
                report.mean_fault_us <= report.worst_fault_us && report.worst_fault_us > 0,
                "{report:?}"
            );
            assert_eq!(report.recoveries, 0, "{report:?}");
            assert_eq!(pair.source.state().await, VmState::Migrated);
            let arrived = status(&mut pair.destination).await;
            assert_eq!(
                (arrived.state(), arrived.missing_bytes, arrived.link_lost),
                (VmState::Running, 0, false),
                "{arrived:?}"
            );
            pair.assert_unharmed_there().await;
        }
    });
}

#[test]
fn a_guest_whose_source_cannot_be_reached_waits_and_then_goes_on_unharmed() {
    on_runtime("post-copy over a link that breaks", async {
        let mut pair = Pair::start().await;
        let mut moving = pair.migrate(2);
        moving.wait_for_post_copy().await;
        pair.proxy.cut();
        pair.destination
            .wait_for_status("the destination to notice", |status| status.link_lost)
            .await;
        let waiting = status(&mut pair.destination).await;
        assert_eq!(waiting.state(), VmState::Running, "{waiting:?}");
        assert!(waiting.missing_bytes > 0, "{waiting:?}");
        assert!(
            waiting.status_message.contains("still at its source"),
            "{waiting:?}"
        );
        pair.source
            .wait_for_status("the source to notice", |status| {
                status.state() == VmState::PostCopy && status.status_message.contains("cannot be reached")
            })
            .await;
        // It cannot move on while a part of it is elsewhere.
        let request = vmm::outgoing("127.0.0.1:1".into(), 3, Duration::from_millis(50));
        let refused = pair.destination.client.start_migration(request).await;
        let refused = refused.expect_err("refused").message().to_owned();
        assert!(refused.contains("once all of its memory is here"), "{refused}");

        pair.proxy.heal();
        pair.destination
            .wait_for_status("the two to be connected again", |status| !status.link_lost)
            .await;
        moving.hold_to(0).await;
        let report = moving.report().await;
        assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
        assert!(report.recoveries >= 1, "{report:?}");
        assert_eq!(status(&mut pair.destination).await.missing_bytes, 0);
        pair.assert_unharmed_there().await;
    });
}

#[test]
fn a_vm_whose_source_died_says_so_and_can_be_stopped() {
    on_runtime("post-copy whose source dies", async {
        let mut pair = Pair::start().await;
        let mut moving = pair.migrate(1);
        moving.wait_for_post_copy().await;
        pair.source.kill();
        pair.destination
            .wait_for_status("the destination to notice", |status| status.link_lost)
            .await;
        let waiting = status(&mut pair.destination).await;
        assert_eq!(waiting.state(), VmState::Running, "{waiting:?}");
        assert!(waiting.missing_bytes > 0, "{waiting:?}");
        // Its vCPU waits for a page that will never come.
        let stopped = timeout(LIMIT, pair.destination.client.stop(StopRequest {})).await;
        let stopped = stopped.expect("it stops").expect("stopped").into_inner();
        assert_eq!(stopped.state(), VmState::Exited, "{stopped:?}");
        assert_eq!(status(&mut pair.destination).await.missing_bytes, 0);
        moving.watched.abort();
    });
}

#[test]
fn a_source_keeps_the_memory_of_a_destination_that_died_until_it_is_told() {
    on_runtime("post-copy whose destination dies", async {
        let mut pair = Pair::start().await;
        let mut moving = pair.migrate(1);
        moving.wait_for_post_copy().await;
        pair.destination.kill();
        pair.source
            .wait_for_status("the source to notice", |status| {
                status.state() == VmState::PostCopy && status.status_message.contains("cannot be reached")
            })
            .await;
        let resumed = pair.source.client.resume(ResumeRequest { epoch: 1 }).await;
        resumed.expect_err("it has run elsewhere");
        let stopped = timeout(LIMIT, pair.source.client.stop(StopRequest {})).await;
        let stopped = stopped.expect("it stops").expect("stopped").into_inner();
        assert_eq!(stopped.state(), VmState::Exited, "{stopped:?}");
        let report = moving.report().await;
        assert!(report.reason.contains("is lost"), "{report:?}");
    });
}

#[test]
fn a_source_that_is_stopped_takes_the_memory_with_it_and_the_destination_says_so() {
    on_runtime("post-copy whose source is stopped", async {
        let mut pair = Pair::start().await;
        let mut moving = pair.migrate(1);
        moving.wait_for_post_copy().await;
        let stopped = pair.source.client.stop(StopRequest {}).await;
        assert_eq!(stopped.expect("stopped").into_inner().state(), VmState::Exited);
        pair.destination.wait_for_state(VmState::Failed).await;
        let lost = status(&mut pair.destination).await;
        assert!(lost.status_message.contains("memory lost"), "{lost:?}");
        moving.report().await;
    });
}

#[test]
fn a_vm_that_is_stopped_in_post_copy_needs_its_source_no_more() {
    on_runtime("a VM stopped in post-copy", async {
        let mut pair = Pair::start().await;
        let mut moving = pair.migrate(1);
        moving.wait_for_post_copy().await;
        let stopped = pair.destination.client.stop(StopRequest {}).await;
        assert_eq!(stopped.expect("stopped").into_inner().state(), VmState::Exited);
        let report = moving.report().await;
        assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
        assert!(report.reason.contains("ended at its destination"), "{report:?}");
        assert_eq!(pair.source.state().await, VmState::Migrated);
    });
}

#[test]
fn a_vm_that_is_stopped_before_its_source_knows_that_it_runs_stops() {
    on_runtime("a stop between Commit and its answer", async {
        let mut pair = Pair::with(SLOW, "", "destination.running=delay:2000").await;
        let moving = pair.migrate(1);
        wait::until_true("Commit to come", LIMIT, || pair.destination.has_run());
        let stopped = pair.destination.client.stop(StopRequest {}).await;
        assert_eq!(stopped.expect("stopped").into_inner().state(), VmState::Exited);
        let report = moving.report().await;
        assert_eq!(report.result(), MigrationResult::Completed, "{report:?}");
        assert_eq!(pair.source.state().await, VmState::Migrated);
    });
}

#[test]
fn a_commit_that_is_not_answered_is_settled_by_the_source_itself_if_the_vm_runs_there() {
    on_runtime("post-copy in doubt", async {
        let mut pair = Pair::with(SLOW, "source.commit=error", "").await;
        let moving = pair.migrate(1);
        // The report says in doubt; it is not the last word.
        let report = moving.report().await;
        assert_eq!(report.result(), MigrationResult::InDoubt, "{report:?}");
        pair.source.wait_for_state(VmState::Migrated).await;
        assert_eq!(status(&mut pair.destination).await.missing_bytes, 0);
        pair.assert_unharmed_there().await;
    });
}

#[test]
fn a_commit_that_did_not_arrive_lets_the_source_be_resumed() {
    on_runtime("post-copy that never began", async {
        let mut pair = Pair::with(SLOW, "", "destination.ran_mark=disk_full").await;
        let report = pair.migrate(1).report().await;
        assert_eq!(report.result(), MigrationResult::InDoubt, "{report:?}");
        assert_eq!(pair.source.state().await, VmState::InDoubt);
        pair.destination.wait_for_state(VmState::Failed).await;
        assert!(!pair.destination.has_run());
        let resumed = timeout(LIMIT, pair.source.client.resume(ResumeRequest { epoch: 1 })).await;
        let resumed = resumed.expect("it resumes").expect("resumed").into_inner();
        assert_eq!(resumed.state(), VmState::Running, "{resumed:?}");
        let seen = guest::heartbeats(&pair.source.console().await).len();
        heartbeats_after(&mut pair.source, seen, 0).await;
        guest::assert_unharmed(&pair.source.console().await);
    });
}

#[test]
fn what_fails_before_commit_leaves_the_guest_at_the_source() {
    on_runtime("post-copy that fails before Commit", async {
        for (source, destination) in [
            ("source.final_pages=error", ""),
            ("source.state=error", ""),
            ("", "destination.pause=error"),
            ("", "destination.state=kill"),
        ] {
            let mut pair = Pair::with(SLOW, source, destination).await;
            let report = pair.migrate(1).report().await;
            assert_eq!(
                report.result(),
                MigrationResult::Failed,
                "{source} {destination}: {report:?}"
            );
            let seen = guest::heartbeats(&pair.source.console().await).len();
            heartbeats_after(&mut pair.source, seen, 0).await;
            guest::assert_unharmed(&pair.source.console().await);
            assert!(!pair.destination.has_run(), "{source} {destination}");
        }
    });
}
