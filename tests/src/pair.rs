//! Two VMMs, one migration between them, and the question who runs the VM afterwards, settled as a scheduler would.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use shoal_proto::vm::{
    AbortIncomingRequest, GetStatusRequest, MemoryBacking, MigrationReport, MigrationResult, PauseRequest,
    PrepareIncomingRequest, ResumeRequest, StartMigrationRequest, VmSpec, VmState, VmStatus,
};
use tokio::time::timeout;

use crate::guest;
use crate::vmm::{self, MIGRATION, Vmm, incoming, probe_spec};

const VM: &str = "0b6a3f5e-5df7-4f55-9e5c-8c1f5d1f1a02";
/// Longer than a destination waits for a source that does not come.
const PATIENCE: Duration = Duration::from_secs(120);
/// A VMM that has not answered by then does not answer.
const ANSWER: Duration = Duration::from_secs(10);
/// The probe looks at all of its memory once in four heartbeats.
const BEATS_TO_SEE_ALL_MEMORY: u64 = 5;
/// A guest that runs prints several lines in this time, and on a busy host at least one.
const SILENCE_OF_A_STOPPED_GUEST: Duration = Duration::from_millis(1000);
const POLL: Duration = Duration::from_millis(20);

/// What the two are like.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Words before the source's command.
    pub source_under: Vec<String>,
    /// Words before the destination's.
    pub destination_under: Vec<String>,
    /// Where the destination's directory is to be; anywhere if unset.
    pub destination_below: Option<PathBuf>,
    /// Guest memory in bytes.
    pub memory: u64,
    /// What it is made of.
    pub backing: MemoryBacking,
    /// The probe's options.
    pub probe: String,
    /// Bytes that its heartbeats must say are filled before it is moved.
    pub fill: u64,
}

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the VM ran first.
    Source,
    /// Where it is to run.
    Destination,
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
        let directory = match &setup.destination_below {
            Some(parent) => tempfile::tempdir_in(parent),
            None => tempfile::tempdir(),
        };
        let directory = directory.expect("a temporary directory");
        let destination = Vmm::start_in(directory, &setup.destination_under).await;
        source.boot(spec(&setup, 1)).await;
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
        spec(&self.setup, 2)
    }

    /// One of the two.
    #[must_use]
    pub fn side(&mut self, side: Side) -> &mut Vmm {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }

    /// Makes the destination wait on loopback.
    pub async fn prepare(&mut self) -> SocketAddr {
        let spec = self.incoming_spec();
        self.destination.prepare_incoming(spec).await
    }

    /// Makes the destination wait as `change` says. Answers where.
    pub async fn prepare_with(&mut self, change: impl FnOnce(&mut PrepareIncomingRequest)) -> String {
        let mut request = incoming(self.incoming_spec());
        change(&mut request);
        self.destination.prepare(request).await.expect("prepared")
    }

    /// Migrates, and waits for the source's report and, without one, until the destination has given up or taken over.
    /// `None` without a report.
    pub async fn migrate(&self, request: StartMigrationRequest) -> Option<MigrationReport> {
        let mut client = self.source.client.clone();
        let source = async {
            let mut report = vmm::migrate(&mut client, request, |_| {}).await.ok()?;
            // For plots; a test that fails prints the rest.
            report.samples.clear();
            Some(report)
        };
        tokio::pin!(source);
        let both = async {
            tokio::select! {
                report = &mut source => {
                    if report.is_none() {
                        // It may have Commit, and not yet have come to it.
                        drop(timeout(2 * PEER_TIMEOUT, self.end_at_destination()).await);
                    }
                    report
                }
                // The source may say something still, within the time it gives a silent peer.
                () = self.end_at_destination() => timeout(2 * PEER_TIMEOUT, &mut source).await.unwrap_or_default(),
            }
        };
        timeout(PATIENCE, both)
            .await
            .expect("an end of the migration at either side")
    }

    /// Waits until the destination has given up, has taken over, or is gone.
    async fn end_at_destination(&self) {
        let mut client = self.destination.client.clone();
        let Ok(seen) = client.watch_status(GetStatusRequest {}).await else {
            // Gone; the source notices that by itself.
            return std::future::pending().await;
        };
        let mut seen = seen.into_inner();
        while let Ok(Some(status)) = seen.message().await {
            let there =
                matches!(status.state(), VmState::Running | VmState::Paused) && status.missing_bytes == 0;
            if there || status.state() == VmState::Failed {
                return;
            }
        }
    }

    /// Stops the guest where it runs first. Answers how much it has written to its console.
    pub async fn pause(&mut self) -> u64 {
        let paused = self.source.client.pause(PauseRequest { epoch: 1 }).await;
        paused.expect("paused");
        self.source.status().await.expect("it answers").console_offset
    }

    /// Checks that a guest that was paused is so after its migration too, at `runner`, and has written nothing since; then lets
    /// it run on.
    pub async fn resume(&mut self, runner: Runner, written: u64) {
        let (vmm, epoch) = match runner {
            Runner::Source => (&mut self.source, 1),
            Runner::Destination => (&mut self.destination, 2),
            Runner::Nobody => return,
        };
        vmm.wait_for_state(VmState::Paused).await;
        let status = vmm.status().await.expect("it answers");
        assert_eq!(status.console_offset, written, "it ran meanwhile: {status:?}");
        let resumed = vmm.client.resume(ResumeRequest { epoch }).await;
        resumed.expect("resumed");
    }

    /// Waits until a fault has struck there.
    pub async fn struck(&self, side: Side) {
        let vmm = match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        };
        let fault = async {
            while vmm.faults_struck() == 0 {
                tokio::time::sleep(POLL).await;
            }
        };
        let struck = timeout(PATIENCE, fault).await;
        assert!(struck.is_ok(), "no fault strikes at the {side:?}");
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

    /// Whether Commit came first. A destination that is gone never got it, unless it left its mark; one that does not
    /// answer is ended first.
    pub async fn has_committed(&mut self) -> bool {
        let request = AbortIncomingRequest {
            migration_id: MIGRATION.into(),
        };
        match timeout(ANSWER, self.destination.client.abort_incoming(request)).await {
            Ok(Ok(answer)) => return answer.into_inner().committed,
            Ok(Err(_)) => {}
            Err(_) => self.destination.kill(),
        }
        self.destination.has_run()
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
        let console = console.unwrap_or_else(|_| panic!("the guest does not go on: {runner:?}"));
        guest::assert_unharmed(&console);
        guest::assert_ran_once(&[runs.console_part().await, other.console_part().await]);
        let after = other.status().await;
        if runner == Runner::Source {
            // Its console may still be loaded with all else, for nothing.
            assert!(!other.has_run(), "vCPUs have run at the destination");
            let runs = after
                .as_ref()
                .is_some_and(|status| status.state() == VmState::Running);
            assert!(!runs, "it runs twice: {after:?}");
        } else {
            assert_stopped(before.as_ref(), after.as_ref());
        }
    }

    /// Checks that the guest stands still at a VMM that answers.
    pub async fn check_stands_still(&mut self, side: Side) -> VmStatus {
        let before = self.side(side).status().await;
        tokio::time::sleep(SILENCE_OF_A_STOPPED_GUEST).await;
        let after = self.side(side).status().await;
        assert_stopped(before.as_ref(), after.as_ref());
        after.expect("it answers")
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

fn spec(setup: &Setup, epoch: u64) -> VmSpec {
    VmSpec {
        memory_backing: setup.backing.into(),
        ..probe_spec(VM, epoch, setup.memory, &guest::with_quick_beat(&setup.probe))
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
