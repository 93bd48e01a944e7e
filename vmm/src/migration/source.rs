//! The source's side of a migration: each phase one function, in order. Until Commit is sent any failure resumes the VM.

mod error;
mod passes;
mod pause_guard;
mod postcopy;
mod workers;

use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use shoal_proto::vm::{MigrationPhase, MigrationProgress, MigrationReport, MigrationResult, Verify};
use shoal_proto::{Epoch, MigrationId};
use tokio::sync::watch;

use super::controls::Controls;
use super::negotiate;
use super::pages::PageCounts;
use super::policy::Policy;
use super::report::{Downtime, Recorder};
use super::sched;
use super::transport::{Address, Closer, Identity, Transport, TransportError};
use super::verify::{self};
use super::wire::{
    self, Abort, Attach, Connection, Digest, Empty, FrameKind, HelloAck, PEER_TIMEOUT, Role, Step, WireError,
};
use crate::dirty::{Bitmap, DirtyLog};
use crate::spec::VmSpec;
use crate::throttle::Throttle;
use crate::vm::Vm;
pub use error::SourceError;
use pause_guard::{Guarded, PauseGuard};
pub use postcopy::Serving;
use workers::{Context, Shared, Workers};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A pause may take at least this long before it is given up.
const LEAST_PAUSE_LIMIT: Duration = Duration::from_secs(1);
/// Time that digesting a GiB may take on a busy host.
const DIGEST_TIME_PER_GIB: Duration = Duration::from_secs(2);
/// A step may take as long as the pause may; after so many times that the guest goes on, whatever the thread that paused
/// it does.
const PAUSE_LIMITS_GUARDED: u32 = 2;
const ABORT_REASON_WAIT: Duration = Duration::from_secs(1);
/// Connections for pages, at most, where the policy leaves it to the link.
const MOST_BY_ITSELF: usize = 4;

/// What is asked of the source.
#[derive(Debug)]
pub struct Outgoing {
    /// The migration.
    pub migration_id: MigrationId,
    /// Its secret.
    pub token: String,
    /// Where the destination VMM listens.
    pub destination: Address,
    /// The epoch it will run at.
    pub destination_epoch: Epoch,
    /// How it is to go, at its start.
    pub policy: Policy,
    /// What the two sides know each other by; without, nothing is encrypted.
    pub identity: Option<Identity>,
    /// The VM is paused and stays so, here and there.
    pub paused: bool,
}

/// The last progress of a migration whose thread ended without one.
#[must_use]
pub fn broken_off(id: MigrationId, result: MigrationResult, reason: &str) -> MigrationProgress {
    let report = MigrationReport {
        migration_id: id.to_string(),
        result: result.into(),
        reason: reason.to_owned(),
        ..Default::default()
    };
    MigrationProgress {
        migration_id: id.to_string(),
        report: Some(report),
        ..Default::default()
    }
}

/// Migrates a VM that runs, or is paused. Afterwards, by the report's result: COMPLETED, the VM must never run here again;
/// IN_DOUBT, it is paused and must not run unless the destination is known never to have committed; else it runs, unharmed,
/// unless the guest has ended. One that was paused is paused in any case. The last progress, which carries the report, is
/// returned and not yet published.
#[must_use]
pub fn migrate(
    vm: &Vm,
    spec: &VmSpec,
    kvm: &Kvm,
    request: &Outgoing,
    controls: &Controls,
    progress: watch::Sender<Option<MigrationProgress>>,
    tell: &(dyn Fn(Serving) + Sync),
) -> MigrationProgress {
    let mut recorder = Recorder::new(request.migration_id, vm.memory().len(), progress);
    recorder.policy(&request.policy);
    recorder.facts.paused = request.paused;
    recorder.phase(MigrationPhase::Negotiate);
    let (outcome, bytes_sent) = run(vm, spec, kvm, request, controls, &mut recorder, tell);
    recorder.policy(&controls.policy());
    if request.paused {
        // It stood still before, and does so after.
        recorder.downtime = Downtime::default();
    }
    let (result, reason) = match outcome {
        Ok(()) => (MigrationResult::Completed, String::new()),
        Err(error @ (SourceError::EndedThere(_) | SourceError::ServingStopped)) => {
            (MigrationResult::Completed, error.to_string())
        }
        Err(SourceError::InDoubt(error)) => {
            (MigrationResult::InDoubt, SourceError::InDoubt(error).to_string())
        }
        Err(error) => {
            recorder.downtime = Downtime::default();
            match error {
                _ if controls.is_pause_given_up() => {
                    (MigrationResult::Failed, SourceError::PauseGivenUp.to_string())
                }
                _ if controls.is_cancelled() => {
                    (MigrationResult::Cancelled, SourceError::Cancelled.to_string())
                }
                error => (MigrationResult::Failed, error.to_string()),
            }
        }
    };
    tracing::info!(migration = %request.migration_id, ?result, %reason, "migration ended");
    if result == MigrationResult::Completed {
        recorder.phase(MigrationPhase::Done);
    }
    recorder.finish(result, reason, bytes_sent)
}

fn run(
    vm: &Vm,
    spec: &VmSpec,
    kvm: &Kvm,
    request: &Outgoing,
    controls: &Controls,
    recorder: &mut Recorder,
    tell: &(dyn Fn(Serving) + Sync),
) -> (Result<(), SourceError>, u64) {
    let connected = crate::fault::point("source.connect")
        .map_err(SourceError::from)
        .and_then(|()| connect(request, controls));
    let transport = match connected {
        Ok(transport) => transport,
        Err(error) => return (Err(error), 0),
    };
    let handover = transport.local_host() && vm.memory().file().is_some();
    let guard = PauseGuard::default();
    let mut source = Source {
        vm,
        spec,
        request,
        controls,
        tell,
        recorder,
        control: Connection::new(transport),
        data: vec![],
        connections: wanted_connections(&request.policy),
        shared: Shared::new(1),
        handover,
        round_trip: Duration::MAX,
        rate: 0.0,
        counts: PageCounts::default(),
        kept_alive: Instant::now(),
        paused_at: None,
        forced: false,
        peer_has_post_copy: false,
        post_copy: false,
        recent: vec![],
        commit_sent: false,
        guard: &guard,
        throttle: None,
    };
    let outcome = std::thread::scope(|scope| {
        let _guarded = Guarded(&guard);
        let watch = || {
            if guard.wait() && controls.give_up_pause() {
                vm.resume();
                tell(Serving::PauseGivenUp);
            }
        };
        std::thread::Builder::new()
            .name("pause-guard".into())
            .spawn_scoped(scope, watch)
            .map_err(SourceError::Thread)?;
        let outcome = source.phases(kvm);
        source.resume_unless_committed(&outcome);
        outcome
    });
    let bytes_sent = source.bytes_sent();
    (outcome.map_err(|error| source.explain(error)), bytes_sent)
}

fn connect(request: &Outgoing, controls: &Controls) -> Result<Transport, SourceError> {
    let failed = |source: TransportError| SourceError::Connect {
        address: request.destination.clone(),
        source,
    };
    let transport = Transport::connect(&request.destination, request.identity.as_ref(), CONNECT_TIMEOUT)
        .map_err(failed)?;
    transport
        .set_timeouts(Some(PEER_TIMEOUT))
        .and_then(|()| controls.watch(&transport))
        .map_err(|error| failed(error.into()))?;
    Ok(transport)
}

/// One more thread than there are idle CPUs would not send sooner, and takes a CPU from a vCPU.
fn wanted_connections(policy: &Policy) -> usize {
    match policy.connections {
        0 => sched::idle_cpus().min(MOST_BY_ITSELF),
        asked => usize::try_from(asked).unwrap_or(1),
    }
}

/// Says what a connection is for. Gives how long the answer took.
fn attach(
    request: &Outgoing,
    transport: Transport,
    role: Role,
    index: u32,
) -> Result<(Connection<Transport>, Duration), WireError> {
    let mut connection = Connection::new(transport);
    connection.send_preamble(role)?;
    let attach = Attach {
        migration_id: request.migration_id.as_bytes().to_vec(),
        token: request.token.clone(),
        index,
    };
    connection.send(FrameKind::Attach, &attach)?;
    let sent = Instant::now();
    let _: Empty = connection.expect(FrameKind::AttachAck, "AttachAck")?;
    Ok((connection, sent.elapsed()))
}

struct Source<'a> {
    vm: &'a Vm,
    spec: &'a VmSpec,
    request: &'a Outgoing,
    controls: &'a Controls,
    tell: &'a dyn Fn(Serving),
    recorder: &'a mut Recorder,
    control: Connection<Transport>,
    /// To end the data connections.
    data: Vec<Closer>,
    /// Data connections to make.
    connections: usize,
    shared: Shared,
    /// Memory goes by file descriptor.
    handover: bool,
    /// Shortest seen: one that met a busy host or a full queue says nothing about the next.
    round_trip: Duration,
    /// Bytes per second, smoothed over passes that are large enough to tell.
    rate: f64,
    counts: PageCounts,
    kept_alive: Instant,
    paused_at: Option<Instant>,
    /// The policy wants the pause, however long.
    forced: bool,
    peer_has_post_copy: bool,
    /// The VM is to run there before all of its memory is there.
    post_copy: bool,
    /// What was dirty after the pass before the last, where post-copy may follow.
    recent: Vec<Bitmap>,
    commit_sent: bool,
    /// Of the pause.
    guard: &'a PauseGuard,
    /// Slows the guest until it is paused, or the migration fails.
    throttle: Option<Throttle>,
}

impl Source<'_> {
    fn phases(&mut self, kvm: &Kvm) -> Result<(), SourceError> {
        self.negotiate(kvm)?;
        if self.handover {
            return self.hand_over();
        }
        let connections = self.connect_data()?;
        let vm = self.vm;
        let log = DirtyLog::start(vm.fd(), vm.memory(), vm.manual_dirty_protect())?;
        let shared = std::mem::replace(&mut self.shared, Shared::new(1));
        let outcome = std::thread::scope(|scope| {
            let context = Context {
                vm,
                log: &log,
                controls: self.controls,
                shared: &shared,
            };
            let outcome = Workers::start(scope, connections, self.request.policy.compression, context)
                .and_then(|mut workers| self.move_over(&log, &shared, &mut workers));
            // Before anything else: the guest waits.
            self.resume_unless_committed(&outcome);
            if outcome.is_err() {
                shared.stop();
                self.data.iter().for_each(Closer::close);
            }
            outcome
        });
        self.shared = shared;
        // The log goes off here: after the VM has resumed, there or here.
        outcome
    }

    fn move_over(
        &mut self,
        log: &DirtyLog<'_>,
        shared: &Shared,
        workers: &mut Workers,
    ) -> Result<(), SourceError> {
        let unsent = self.pre_copy(log, shared, workers)?;
        if self.post_copy {
            return self.run_there_first(log, &unsent, shared, workers);
        }
        let paused_at = self.pause()?;
        self.final_pages(log, unsent, shared, workers)?;
        self.recorder.downtime.pages = paused_at.elapsed();
        self.verify()?;
        self.state()?;
        self.recorder.downtime.state = paused_at.elapsed() - self.recorder.downtime.pages;
        self.commit()
    }

    /// Both VMMs are on one host and memory is a file: the destination maps the same.
    fn hand_over(&mut self) -> Result<(), SourceError> {
        self.recorder.facts.handed_over = true;
        let paused_at = self.pause()?;
        self.state()?;
        self.recorder.downtime.state = paused_at.elapsed();
        self.commit()
    }

    fn resume_unless_committed(&mut self, outcome: &Result<(), SourceError>) {
        if outcome.is_err() && !self.commit_sent {
            self.throttle = None;
            if self.paused_at.take().is_some() {
                self.vm.resume();
            }
        }
    }

    fn policy(&self) -> Policy {
        self.controls.policy()
    }

    fn bytes_sent(&self) -> u64 {
        self.control.bytes_sent() + self.shared.bytes.load(Ordering::Relaxed)
    }

    fn negotiate(&mut self, kvm: &Kvm) -> Result<(), SourceError> {
        crate::fault::point("source.negotiate")?;
        let mut hello = negotiate::hello(
            self.vm,
            self.spec,
            kvm,
            self.request.migration_id,
            &self.request.token,
            self.request.destination_epoch,
        );
        hello.handover = self.handover;
        hello.paused = self.request.paused;
        hello.connections = if self.handover {
            0
        } else {
            u32::try_from(self.connections).unwrap_or(1)
        };
        self.control.send_preamble(Role::Control)?;
        self.control.send(FrameKind::Hello, &hello)?;
        if let Some(file) = self.vm.memory().file().filter(|_| self.handover) {
            self.control
                .stream_mut()
                .send_descriptor(file.as_fd())
                .map_err(WireError::from)?;
        }
        let sent = Instant::now();
        let ack: HelloAck = self.control.expect(FrameKind::HelloAck, "HelloAck")?;
        if self.request.paused && !ack.paused {
            return Err(SourceError::WouldRunThere);
        }
        self.peer_has_post_copy = ack.post_copy;
        self.round_trip = sent.elapsed();
        Ok(())
    }

    fn connect_data(&mut self) -> Result<Vec<Connection<Transport>>, SourceError> {
        let count = self.connections;
        let by_link = self.request.policy.connections == 0;
        self.shared = Shared::new(if by_link { 1 } else { count });
        let mut connections = vec![];
        for index in 0..u32::try_from(count).unwrap_or(1) {
            connections.push(self.attach(Role::Data, index)?);
        }
        let tls = self.control.stream().is_tls();
        self.recorder.settings(count, tls);
        Ok(connections)
    }

    /// Makes one more connection of this migration.
    fn attach(&mut self, role: Role, index: u32) -> Result<Connection<Transport>, SourceError> {
        let transport = connect(self.request, self.controls)?;
        self.data.push(transport.closer().map_err(WireError::from)?);
        let (connection, round_trip) = attach(self.request, transport, role, index)?;
        self.round_trip = self.round_trip.min(round_trip);
        Ok(connection)
    }

    /// Longest pause before Commit, whatever was predicted: then the guest goes on here.
    fn pause_limit(&self, policy: &Policy) -> Duration {
        let least = if self.forced {
            policy.timeout
        } else {
            LEAST_PAUSE_LIMIT
        };
        let digest = match policy.verify {
            Verify::Full | Verify::Sampled => {
                let gib = u32::try_from(self.vm.memory().len() >> 30).unwrap_or(u32::MAX);
                DIGEST_TIME_PER_GIB.saturating_mul(gib.saturating_add(1))
            }
            _ => Duration::ZERO,
        };
        (policy.max_downtime * 4).max(least).saturating_add(digest)
    }

    fn pause(&mut self) -> Result<Instant, SourceError> {
        self.recorder.phase(MigrationPhase::Pause);
        let limit = self.pause_limit(&self.policy());
        if self.request.paused {
            // No guest waits, so nothing is to be let go: `paused_at` and the guard stay as they are.
            crate::fault::point("source.pause")?;
            self.wait_at_most(limit.max(PEER_TIMEOUT))?;
            return Ok(Instant::now());
        }
        // Before the guest stands still: it wakes a thread.
        self.guard.paused(limit * PAUSE_LIMITS_GUARDED);
        let asked = Instant::now();
        self.vm.pause();
        let paused_at = Instant::now();
        self.paused_at = Some(paused_at);
        self.recorder.downtime.stop = asked.elapsed();
        // Not before: what a guest wrote that ran free until it stood still would have to be sent in the pause.
        if let Some(throttle) = &self.throttle {
            throttle.set(0);
            self.recorder.throttle(0, throttle.taken());
        }
        if self.controls.is_cancelled() {
            // By the guard of the pause, maybe: then the vCPUs run.
            return Err(SourceError::Cancelled);
        }
        crate::fault::point("source.pause")?;
        if self.vm.guest_end().is_some() {
            return Err(SourceError::GuestEnded);
        }
        self.wait_at_most(limit)?;
        Ok(paused_at)
    }

    fn wait_at_most(&self, limit: Duration) -> Result<(), SourceError> {
        Ok(self
            .control
            .stream()
            .set_timeouts(Some(limit))
            .map_err(WireError::from)?)
    }

    /// Has both sides digest guest memory at once, and the destination compare.
    fn verify(&mut self) -> Result<(), SourceError> {
        let mode = self.request.policy.verify;
        if !matches!(mode, Verify::Sampled | Verify::Full) {
            return Ok(());
        }
        crate::fault::point("source.verify")?;
        let began = Instant::now();
        let seed = self
            .request
            .migration_id
            .as_bytes()
            .iter()
            .fold(0u64, |seed, byte| seed.rotate_left(8) ^ u64::from(*byte));
        let mut digest = Digest {
            mode: mode.into(),
            seed,
            digest: vec![],
        };
        self.control.send(FrameKind::Verify, &digest)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        digest.digest = verify::digest(self.vm.memory(), mode, seed, threads)?.encode();
        self.control.send(FrameKind::Digest, &digest)?;
        // Ready tells that it was equal.
        self.recorder.verified(mode, began.elapsed());
        Ok(())
    }

    fn state(&mut self) -> Result<(), SourceError> {
        self.recorder.phase(MigrationPhase::State);
        crate::fault::point("source.state")?;
        if self.controls.is_cancelled() {
            // By the guard of the pause, maybe: then the vCPUs run.
            return Err(SourceError::Cancelled);
        }
        let saved = self.vm.save()?;
        self.control.send_parts(FrameKind::State, &saved, &[])?;
        crate::fault::point("source.ready")?;
        let _: Step = self.control.expect(FrameKind::Ready, "Ready")?;
        Ok(())
    }

    fn commit(&mut self) -> Result<(), SourceError> {
        if !self.controls.enter_commit() {
            return Err(SourceError::Cancelled);
        }
        // From here on the answer matters more than the time.
        self.wait_at_most(PEER_TIMEOUT)?;
        self.commit_sent = true;
        let asked = Instant::now();
        let step = Step {
            migration_id: self.request.migration_id.as_bytes().to_vec(),
        };
        self.control
            .send(FrameKind::Commit, &step)
            .map_err(SourceError::InDoubt)?;
        if let Err(fault) = crate::fault::point("source.commit") {
            return Err(SourceError::InDoubt(WireError::Aborted(fault.to_string())));
        }
        let _: Step = self
            .control
            .expect(FrameKind::Running, "Running")
            .map_err(SourceError::InDoubt)?;
        self.recorder.downtime.start = asked.elapsed();
        self.recorder.phase(MigrationPhase::Commit);
        Ok(())
    }

    /// A destination that ends the migration says why before it closes; the source may notice the close first. And a
    /// source that ends it tells the destination.
    fn explain(&mut self, error: SourceError) -> SourceError {
        if self.commit_sent || matches!(error, SourceError::Wire(WireError::Aborted(_))) {
            return error;
        }
        if matches!(error, SourceError::Wire(WireError::Io(_))) {
            let waits = self.control.stream().set_timeouts(Some(ABORT_REASON_WAIT));
            return match waits
                .map_err(WireError::from)
                .and_then(|()| self.control.receive())
            {
                Ok((FrameKind::Abort, payload)) => wire::aborted(&payload).into(),
                _ => error,
            };
        }
        let told = self
            .control
            .send(FrameKind::Abort, &Abort::because(&error.to_string()));
        if let Err(error) = told {
            tracing::debug!(%error, "the destination will notice by the connection's end");
        }
        error
    }
}
