//! Two VMMs, one migration between them, and the question who runs the VM afterwards, settled as a scheduler would.

use std::net::SocketAddr;
use std::time::Duration;

use shoal_proto::vm::{
    AbortIncomingRequest, GetStatusRequest, MigrationReport, MigrationResult, ResumeRequest,
    StartMigrationRequest, VmSpec, VmState, VmStatus,
};
use tokio::time::timeout;

use crate::guest;
use crate::vmm::{MIGRATION, Vmm, probe_spec};

const VM: &str = "0b6a3f5e-5df7-4f55-9e5c-8c1f5d1f1a02";
const PATIENCE: Duration = Duration::from_secs(60);
/// The probe looks at all of its memory once in four of its seconds.
const BEATS_TO_SEE_ALL_MEMORY: u64 = 5;
/// A guest that runs prints at least one line in this time.
const SILENCE_OF_A_STOPPED_GUEST: Duration = Duration::from_millis(2500);

/// What the two are like.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Words before the source's command.
    pub source_under: Vec<String>,
    /// Words before the destination's.
    pub destination_under: Vec<String>,
    /// Guest memory in bytes.
    pub memory: u64,
    /// The probe's options.
    pub probe: String,
    /// Bytes that its heartbeats must say are filled before it is moved.
    pub fill: u64,
}

/// Who runs the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runner {
    /// The source, as if nothing had happened.
    Source,
    /// The destination.
    Destination,
    /// Nobody, and whoever is left says so.
    Nobody,
}

/// A source with a probe that runs, and a destination that holds nothing yet.
#[derive(Debug)]
pub struct Pair {
    /// At epoch 1.
    pub source: Vmm,
    /// At epoch 2.
    pub destination: Vmm,
    setup: Setup,
}

impl Pair {
    /// Starts both and waits until the probe has filled its memory.
    pub async fn start(setup: Setup) -> Self {
        let mut source = Vmm::start_under(&setup.source_under).await;
        let destination = Vmm::start_under(&setup.destination_under).await;
        source.boot(probe_spec(VM, 1, setup.memory, &setup.probe)).await;
        let filled = |text: &str| {
            let beats = guest::heartbeats(text);
            beats.last().is_some_and(|beat| beat.filled >= setup.fill)
        };
        let console = timeout(PATIENCE, source.follow_console(filled));
        console.await.expect("the probe fills its memory");
        Self {
            source,
            destination,
            setup,
        }
    }

    /// The spec that the destination is prepared with.
    #[must_use]
    pub fn incoming_spec(&self) -> VmSpec {
        probe_spec(VM, 2, self.setup.memory, &self.setup.probe)
    }

    /// Makes the destination wait on loopback.
    pub async fn prepare(&mut self) -> SocketAddr {
        let spec = self.incoming_spec();
        self.destination.prepare_incoming(spec).await
    }

    /// Migrates, and waits for the source's report; or, where the source says nothing any more, until the destination has
    /// given up or taken over. `None` without a report.
    pub async fn migrate(&mut self, request: StartMigrationRequest) -> Option<MigrationReport> {
        let destination = async {
            let seen = self.destination.client.watch_status(GetStatusRequest {}).await;
            let Ok(seen) = seen else { return };
            let mut seen = seen.into_inner();
            while let Ok(Some(status)) = seen.message().await {
                if matches!(status.state(), VmState::Failed | VmState::Running) {
                    return;
                }
            }
        };
        let source = async { self.source.migrate_with(request, |_| {}).await.ok() };
        tokio::pin!(source);
        let both = async {
            tokio::select! {
                report = &mut source => report,
                // The source may say something still, within the time it gives a silent peer.
                () = destination => timeout(2 * PEER_TIMEOUT, &mut source).await.unwrap_or_default(),
            }
        };
        timeout(PATIENCE, both)
            .await
            .expect("an end of the migration at either side")
    }

    /// Settles what the migration has left open, by what both sides say, and answers who is to run the VM.
    pub async fn settle(&mut self, report: Option<&MigrationReport>) -> Runner {
        let result = report.map(MigrationReport::result);
        if result == Some(MigrationResult::Completed) {
            return if self.destination.status().await.is_some() {
                Runner::Destination
            } else {
                Runner::Nobody
            };
        }
        let committed = self.has_committed().await;
        if committed {
            assert!(
                !matches!(result, Some(MigrationResult::Failed | MigrationResult::Cancelled)),
                "the destination has committed a migration that the source says has not happened: {report:?}"
            );
            return if self.destination.status().await.is_some() {
                Runner::Destination
            } else {
                Runner::Nobody
            };
        }
        if self.source.status().await.is_none() {
            return Runner::Nobody;
        }
        if result == Some(MigrationResult::InDoubt) {
            self.source.wait_for_state(VmState::InDoubt).await;
            let resumed = self.source.client.resume(ResumeRequest { epoch: 1 }).await;
            resumed.expect("resumed");
        }
        Runner::Source
    }

    /// Whether Commit came first. A destination that is gone never got it, unless it left its mark.
    async fn has_committed(&mut self) -> bool {
        let request = AbortIncomingRequest {
            migration_id: MIGRATION.into(),
        };
        match self.destination.client.abort_incoming(request).await {
            Ok(answer) => answer.into_inner().committed,
            Err(_) => self.destination.has_run(),
        }
    }

    /// Checks that `runner`, and nobody else, runs the VM, and that the guest is unharmed; or that nobody does, and that it
    /// is said why.
    pub async fn check(&mut self, runner: Runner) {
        let (runs, other) = match runner {
            Runner::Source => (&mut self.source, &mut self.destination),
            Runner::Destination => (&mut self.destination, &mut self.source),
            Runner::Nobody => return self.check_nobody().await,
        };
        let before = other.status().await;
        if runner == Runner::Source {
            assert!(!other.has_run(), "vCPUs have run at the destination");
        }
        let at = guest::heartbeats(&runs.console().await);
        let at = at.last().map_or(0, |beat| beat.n);
        let enough = |text: &str| {
            let beats = guest::heartbeats(text);
            beats
                .last()
                .is_some_and(|beat| beat.n >= at + BEATS_TO_SEE_ALL_MEMORY)
        };
        let console = timeout(PATIENCE, runs.follow_console(enough)).await;
        guest::assert_unharmed(&console.expect("the guest goes on"));
        assert_stopped(before.as_ref(), other.status().await.as_ref());
    }

    async fn check_nobody(&mut self) {
        let before = [self.source.status().await, self.destination.status().await];
        tokio::time::sleep(SILENCE_OF_A_STOPPED_GUEST).await;
        let after = [self.source.status().await, self.destination.status().await];
        for (before, after) in before.iter().zip(&after) {
            assert_stopped(before.as_ref(), after.as_ref());
            if let Some(status) = after {
                let told = matches!(
                    status.state(),
                    VmState::Failed | VmState::InDoubt | VmState::Migrated
                );
                assert!(told && !status.status_message.is_empty(), "not clear: {status:?}");
            }
        }
    }
}

/// A peer that is silent for this long is taken for gone.
const PEER_TIMEOUT: Duration = Duration::from_secs(5);

fn assert_stopped(before: Option<&VmStatus>, after: Option<&VmStatus>) {
    if let (Some(before), Some(after)) = (before, after) {
        assert_ne!(after.state(), VmState::Running, "it runs twice: {after:?}");
        assert_eq!(
            before.console_offset, after.console_offset,
            "a guest that should be stopped writes: {after:?}"
        );
    }
}
