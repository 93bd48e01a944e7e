//! The source's side of a migration: each phase one function, in order. Until Commit is sent any failure resumes the VM.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use shoal_proto::vm::{MigrationPhase, MigrationProgress, MigrationReport, MigrationResult};
use shoal_proto::{Epoch, MigrationId};
use tokio::sync::watch;

use super::cancel::CancelSwitch;
use super::negotiate;
use super::pages::{PageCounts, PageSender, PagesError, ZeroPages};
use super::precopy::{self, Decision, Limits, PassFacts};
use super::report::Recorder;
use super::wire::{self, Abort, Connection, FrameKind, HelloAck, Pass, Step, WireError};
use crate::dirty::{Bitmap, DirtyError, DirtyLog};
use crate::memory::{GuestMemory, MemoryError, Region};
use crate::spec::VmSpec;
use crate::vm::{Vm, VmError};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Pages whose write protection is re-armed at once, right before they are read (256 MiB).
const CHUNK_PAGES: u64 = 64 * 1024;
/// What the pause takes with nothing to send and no network: stop, save, load.
const LOCAL_FIXED_COST: Duration = Duration::from_millis(1);
/// State and Commit each wait for an answer.
const ROUND_TRIPS_IN_PAUSE: u32 = 2;
/// A pass with fewer bytes measures latency, not throughput.
const RATE_SAMPLE_BYTES: u64 = 256 * 1024;
/// A pause may take at least this long before it is given up.
const LEAST_PAUSE_LIMIT: Duration = Duration::from_secs(1);
/// After a pass too small to matter the next one waits a little: what keeps the pause from fitting is not the pages.
const SMALL_PASS_PACE: Duration = Duration::from_millis(20);
const ABORT_REASON_WAIT: Duration = Duration::from_secs(1);

/// What is asked of the source.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// The migration.
    pub migration_id: MigrationId,
    /// Its secret.
    pub token: String,
    /// Where the destination VMM listens.
    pub destination: SocketAddr,
    /// The epoch it will run at.
    pub destination_epoch: Epoch,
    /// Bounds on pause and duration.
    pub limits: Limits,
}

/// Why a migration ended before Commit.
#[derive(Debug, thiserror::Error)]
enum SourceError {
    #[error("cannot connect to the destination {address}: {source}")]
    Connect {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("cancelled")]
    Cancelled,
    #[error("the guest ended during the migration")]
    GuestEnded,
    #[error("{0}")]
    NotConverging(String),
    #[error("timed out after {:.1} s, in pass {pass}, with {remaining} bytes of it to send; allow more with --timeout", elapsed.as_secs_f64())]
    TimedOut {
        elapsed: Duration,
        pass: u32,
        remaining: u64,
    },
    #[error(
        "the pause took longer than {} ms with {remaining} bytes to send, so the VM goes on here; the link became slower",
        limit.as_millis()
    )]
    PauseTooLong { limit: Duration, remaining: u64 },
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Pages(#[from] PagesError),
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error("Commit was sent and not answered: {0}")]
    InDoubt(WireError),
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

/// Migrates a running VM. Afterwards, by the report's result: COMPLETED, the VM must never run here again; IN_DOUBT, it
/// is paused and must not run unless the destination is known never to have committed; else it runs, unharmed, unless the
/// guest has ended. The last progress, which carries the report, is returned and not yet published.
#[must_use]
pub fn migrate(
    vm: &Vm,
    spec: &VmSpec,
    kvm: &Kvm,
    request: &Outgoing,
    cancel: &CancelSwitch,
    progress: watch::Sender<Option<MigrationProgress>>,
) -> MigrationProgress {
    let mut recorder = Recorder::new(request.migration_id, vm.memory().len(), progress);
    recorder.phase(MigrationPhase::Negotiate);
    let mut bytes_sent = 0;
    let outcome = run(vm, spec, kvm, request, cancel, &mut recorder, &mut bytes_sent);
    let (result, reason) = match outcome {
        Ok(()) => (MigrationResult::Completed, String::new()),
        Err(SourceError::InDoubt(error)) => {
            (MigrationResult::InDoubt, SourceError::InDoubt(error).to_string())
        }
        Err(error) => {
            recorder.downtime = super::report::Downtime::default();
            match error {
                _ if cancel.is_cancelled() => {
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
    cancel: &CancelSwitch,
    recorder: &mut Recorder,
    bytes_sent: &mut u64,
) -> Result<(), SourceError> {
    let address = request.destination;
    let stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT)
        .and_then(|stream| {
            wire::tune(&stream)
                .and_then(|()| cancel.watch(&stream))
                .map(|()| stream)
        })
        .map_err(|source| SourceError::Connect { address, source })?;
    let mut source = Source {
        vm,
        request,
        cancel,
        recorder,
        connection: Connection::new(stream),
        sender: PageSender::new(vm.memory()),
        regions: vm.memory().regions(),
        round_trip: Duration::MAX,
        rate: 0.0,
        paused_at: None,
        commit_sent: false,
    };
    let outcome = source.phases(spec, kvm);
    if outcome.is_err() && !source.commit_sent {
        // Before anything else: the guest waits.
        vm.resume();
    }
    *bytes_sent = source.connection.bytes_sent();
    outcome.map_err(|error| source.explain(error))
}

/// Longest pause before Commit, whatever was predicted: then the guest goes on here.
fn pause_limit(request: &Outgoing) -> Duration {
    (request.limits.max_downtime * 4).max(LEAST_PAUSE_LIMIT)
}

/// Whether a migration may go on, asked after each frame.
struct Check<'a> {
    vm: &'a Vm,
    cancel: &'a CancelSwitch,
    timeout: Duration,
    pause: Option<(Instant, Duration)>,
}

impl<'a> Check<'a> {
    fn of(vm: &'a Vm, cancel: &'a CancelSwitch, request: &Outgoing, paused_at: Option<Instant>) -> Self {
        let pause = paused_at.map(|since| (since, pause_limit(request)));
        Self {
            vm,
            cancel,
            timeout: request.limits.timeout,
            pause,
        }
    }

    fn go_on(&self, recorder: &Recorder, remaining_pages: u64) -> Result<(), SourceError> {
        if self.cancel.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        if self.vm.guest_end().is_some() {
            return Err(SourceError::GuestEnded);
        }
        let remaining = remaining_pages * crate::spec::PAGE_SIZE;
        match self.pause {
            Some((since, limit)) if since.elapsed() > limit => {
                Err(SourceError::PauseTooLong { limit, remaining })
            }
            None if recorder.elapsed() > self.timeout => Err(SourceError::TimedOut {
                elapsed: recorder.elapsed(),
                pass: recorder.pass(),
                remaining,
            }),
            _ => Ok(()),
        }
    }
}

struct Source<'a> {
    vm: &'a Vm,
    request: &'a Outgoing,
    cancel: &'a CancelSwitch,
    recorder: &'a mut Recorder,
    connection: Connection<TcpStream>,
    sender: PageSender<'a>,
    regions: Vec<Region>,
    /// Shortest seen: one that met a busy host or a full queue says nothing about the next.
    round_trip: Duration,
    /// Bytes per second, smoothed over passes that are large enough to tell.
    rate: f64,
    paused_at: Option<Instant>,
    commit_sent: bool,
}

impl Source<'_> {
    fn phases(&mut self, spec: &VmSpec, kvm: &Kvm) -> Result<(), SourceError> {
        self.negotiate(spec, kvm)?;
        let vm = self.vm;
        // Off again when this function returns: after the VM has resumed elsewhere, or before it resumes here.
        let log = DirtyLog::start(vm.fd(), vm.memory(), vm.manual_dirty_protect())?;
        let unsent = self.pre_copy(&log)?;
        let paused_at = self.pause()?;
        self.final_pages(&log, unsent)?;
        self.recorder.downtime.pages = paused_at.elapsed();
        self.state()?;
        self.recorder.downtime.state = paused_at.elapsed() - self.recorder.downtime.pages;
        self.commit()
    }

    fn negotiate(&mut self, spec: &VmSpec, kvm: &Kvm) -> Result<(), SourceError> {
        let hello = negotiate::hello(
            self.vm,
            spec,
            kvm,
            self.request.migration_id,
            &self.request.token,
            self.request.destination_epoch,
        );
        self.connection.send_preamble()?;
        self.connection.send(FrameKind::Hello, &hello)?;
        let _: HelloAck = self.connection.expect(FrameKind::HelloAck, "HelloAck")?;
        self.end_pass_on_wire(0)
    }

    /// Sends passes while the guest runs. Gives what was dirty at the decision to stop.
    fn pre_copy(&mut self, log: &DirtyLog<'_>) -> Result<Vec<Bitmap>, SourceError> {
        self.recorder.phase(MigrationPhase::PreCopy);
        let mut previous_dirty_bytes = None;
        let mut passes_within_limit = 0;
        let mut handled_before = 0;
        let mut dirty: Option<Vec<Bitmap>> = None;
        loop {
            let (bytes, duration) = match &dirty {
                None => self.first_pass(log)?,
                Some(dirty) => self.later_pass(log, dirty)?,
            };
            if self.vm.guest_end().is_some() {
                return Err(SourceError::GuestEnded);
            }
            let handled = self.sender.counts().pages() * crate::spec::PAGE_SIZE;
            let found = self.dirty_pages(log)?;
            let dirty_bytes = found.iter().map(Bitmap::count).sum::<u64>() * crate::spec::PAGE_SIZE;
            let seconds = duration.as_secs_f64().max(1e-6);
            self.sample_rate(
                bytes,
                dirty.is_some().then_some(handled - handled_before),
                seconds,
            );
            handled_before = handled;
            let facts = PassFacts {
                dirty_bytes,
                previous_dirty_bytes,
                rate: self.rate,
                fixed_cost: LOCAL_FIXED_COST + self.round_trip * ROUND_TRIPS_IN_PAUSE,
                elapsed: self.recorder.elapsed(),
                passes_within_limit,
            };
            let predicted = precopy::predicted_downtime(&facts);
            self.recorder
                .rates(facts.rate, dirty_bytes as f64 / seconds, predicted);
            tracing::debug!(
                pass = self.recorder.pass(),
                bytes,
                ?duration,
                dirty_bytes,
                ?predicted,
                "pass sent"
            );
            match precopy::decide(&self.request.limits, &facts) {
                Decision::Stop => return Ok(found),
                Decision::GiveUp(why) => return Err(SourceError::NotConverging(why)),
                Decision::Continue => {}
            }
            if predicted <= self.request.limits.max_downtime {
                passes_within_limit += 1;
            } else if dirty_bytes < RATE_SAMPLE_BYTES {
                std::thread::sleep(SMALL_PASS_PACE);
            }
            previous_dirty_bytes = Some(dirty_bytes);
            dirty = Some(found);
        }
    }

    /// A large pass tells the rate; a small one, whose time is mostly latency, only a least bound of it. Later passes count
    /// the pages they dealt with, zero pages included, because that is what the prediction counts.
    fn sample_rate(&mut self, bytes_sent: u64, handled: Option<u64>, seconds: f64) {
        let bytes = handled.unwrap_or(bytes_sent);
        let sample = bytes as f64 / seconds;
        self.rate = if bytes >= RATE_SAMPLE_BYTES && self.rate > 0.0 {
            f64::midpoint(self.rate, sample)
        } else {
            self.rate.max(sample)
        };
    }

    fn dirty_pages(&self, log: &DirtyLog<'_>) -> Result<Vec<Bitmap>, SourceError> {
        Ok(self
            .regions
            .iter()
            .map(|region| log.get(region))
            .collect::<Result<_, _>>()?)
    }

    /// Sends every page that the host has backed. Tracking is armed for a chunk before it is looked at, so that a page
    /// touched afterwards is found by the next pass.
    fn first_pass(&mut self, log: &DirtyLog<'_>) -> Result<(u64, Duration), SourceError> {
        let regions = self.regions.clone();
        let mut remaining = regions.iter().map(Region::pages).sum();
        self.recorder.begin_pass(remaining);
        let pagemap = GuestMemory::open_pagemap()?;
        for region in &regions {
            for first in (0..region.pages()).step_by(usize::try_from(CHUNK_PAGES).expect("64 Ki")) {
                let pages = CHUNK_PAGES.min(region.pages() - first);
                let mut all = Bitmap::clean(pages);
                all.set_run(0, pages);
                log.clear(region, first, &mut all.into_words())?;
                let backed = self
                    .vm
                    .memory()
                    .backed_pages(&pagemap, region.slot, first, pages)?;
                let count = Bitmap::from_words(backed.clone()).count();
                self.sender.count_untouched(pages - count);
                remaining -= pages - count;
                self.check(remaining)?;
                self.sender.keep_alive(&mut self.connection)?;
                self.send_pages(region, first, &backed, ZeroPages::Skip, remaining)?;
                remaining -= count;
            }
        }
        self.end_pass()
    }

    fn later_pass(&mut self, log: &DirtyLog<'_>, dirty: &[Bitmap]) -> Result<(u64, Duration), SourceError> {
        let regions = self.regions.clone();
        let mut remaining: u64 = dirty.iter().map(Bitmap::count).sum();
        self.recorder.begin_pass(remaining);
        for (region, bitmap) in regions.iter().zip(dirty) {
            for first in (0..region.pages()).step_by(usize::try_from(CHUNK_PAGES).expect("64 Ki")) {
                let mut words = bitmap.chunk(first, CHUNK_PAGES).to_vec();
                if words.iter().all(|&word| word == 0) {
                    continue;
                }
                log.clear(region, first, &mut words)?;
                self.send_pages(region, first, &words, ZeroPages::Send, remaining)?;
                remaining -= words.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
            }
        }
        self.end_pass()
    }

    fn send_pages(
        &mut self,
        region: &Region,
        first: u64,
        words: &[u64],
        zero_pages: ZeroPages,
        remaining: u64,
    ) -> Result<(), SourceError> {
        let before = self.sender.counts().pages();
        let check = Check::of(self.vm, self.cancel, self.request, self.paused_at);
        let recorder = &mut *self.recorder;
        self.sender.send(
            &mut self.connection,
            region,
            first,
            words,
            zero_pages,
            |connection, counts: PageCounts| {
                let remaining = remaining.saturating_sub(counts.pages() - before);
                recorder.within_pass(remaining, connection.bytes_sent());
                check.go_on(recorder, remaining)
            },
        )
    }

    fn check(&self, remaining_pages: u64) -> Result<(), SourceError> {
        Check::of(self.vm, self.cancel, self.request, self.paused_at).go_on(self.recorder, remaining_pages)
    }

    fn end_pass(&mut self) -> Result<(u64, Duration), SourceError> {
        self.sender.flush(&mut self.connection)?;
        self.end_pass_on_wire(self.recorder.pass())?;
        Ok(self
            .recorder
            .end_pass(self.sender.counts(), self.connection.bytes_sent()))
    }

    /// Waits until the destination has everything, so that the measured rate is true and the pause starts with empty queues.
    fn end_pass_on_wire(&mut self, pass: u32) -> Result<(), SourceError> {
        let pages = self.sender.counts().raw;
        let sent = Instant::now();
        self.connection.send(FrameKind::PassEnd, &Pass { pass, pages })?;
        let _: Pass = self.connection.expect(FrameKind::PassAck, "PassAck")?;
        self.round_trip = self.round_trip.min(sent.elapsed());
        Ok(())
    }

    fn pause(&mut self) -> Result<Instant, SourceError> {
        self.recorder.phase(MigrationPhase::Pause);
        let asked = Instant::now();
        self.vm.pause();
        let paused_at = Instant::now();
        self.paused_at = Some(paused_at);
        self.recorder.downtime.stop = asked.elapsed();
        if self.vm.guest_end().is_some() {
            return Err(SourceError::GuestEnded);
        }
        self.wait_at_most(pause_limit(self.request))?;
        Ok(paused_at)
    }

    fn wait_at_most(&self, limit: Duration) -> Result<(), SourceError> {
        let stream = self.connection.stream();
        let set = stream
            .set_read_timeout(Some(limit))
            .and_then(|()| stream.set_write_timeout(Some(limit)));
        Ok(set.map_err(WireError::from)?)
    }

    fn final_pages(&mut self, log: &DirtyLog<'_>, unsent: Vec<Bitmap>) -> Result<(), SourceError> {
        self.recorder.phase(MigrationPhase::FinalPages);
        let mut dirty = unsent;
        for (region, bitmap) in self.regions.iter().zip(&mut dirty) {
            bitmap.merge(log.get(region)?.words());
        }
        let mut remaining: u64 = dirty.iter().map(Bitmap::count).sum();
        self.recorder.begin_pass(remaining);
        for (region, bitmap) in self.regions.clone().iter().zip(&dirty) {
            self.send_pages(region, 0, bitmap.words(), ZeroPages::Send, remaining)?;
            remaining -= bitmap.count();
        }
        self.sender.flush(&mut self.connection)?;
        self.recorder
            .end_pass(self.sender.counts(), self.connection.bytes_sent());
        Ok(())
    }

    fn state(&mut self) -> Result<(), SourceError> {
        self.recorder.phase(MigrationPhase::State);
        let saved = self.vm.save()?;
        self.connection.send_parts(FrameKind::State, &saved, &[])?;
        let _: Step = self.connection.expect(FrameKind::Ready, "Ready")?;
        Ok(())
    }

    fn commit(&mut self) -> Result<(), SourceError> {
        if !self.cancel.enter_commit() {
            return Err(SourceError::Cancelled);
        }
        // From here on the answer matters more than the time.
        self.wait_at_most(wire::PEER_TIMEOUT)?;
        self.commit_sent = true;
        let asked = Instant::now();
        let step = Step {
            migration_id: self.request.migration_id.as_bytes().to_vec(),
        };
        self.connection
            .send(FrameKind::Commit, &step)
            .map_err(SourceError::InDoubt)?;
        let _: Step = self
            .connection
            .expect(FrameKind::Running, "Running")
            .map_err(SourceError::InDoubt)?;
        self.recorder.downtime.start = asked.elapsed();
        self.recorder.phase(MigrationPhase::Commit);
        Ok(())
    }

    /// A destination that ends the migration says why before it closes; the source may notice the close first. And a
    /// source that ends it tells the destination.
    fn explain(&mut self, error: SourceError) -> SourceError {
        let broken = matches!(
            error,
            SourceError::Wire(WireError::Io(_)) | SourceError::Pages(PagesError::Wire(WireError::Io(_)))
        );
        if self.commit_sent || matches!(error, SourceError::Wire(WireError::Aborted(_))) {
            return error;
        }
        if broken {
            let waits = self.connection.stream().set_read_timeout(Some(ABORT_REASON_WAIT));
            return match waits
                .map_err(WireError::from)
                .and_then(|()| self.connection.receive())
            {
                Ok((FrameKind::Abort, payload)) => wire::aborted(&payload).into(),
                _ => error,
            };
        }
        let told = self
            .connection
            .send(FrameKind::Abort, &Abort::because(&error.to_string()));
        if let Err(error) = told {
            tracing::debug!(%error, "the destination will notice by the connection's end");
        }
        error
    }
}
