//! Pre-copy: pass after pass while the guest runs, until what is left fits the pause; and the pass in the pause.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use shoal_proto::vm::{MigrationPhase, OnStall};

use super::workers::{PassKind, PassPlan, PassShare, Shared, Unsent, Workers};
use super::{Source, SourceError};
use crate::dirty::{self, Bitmap, DirtyLog};
use crate::migration::precopy::{self, Decision, Limits, PassFacts};
use crate::migration::widen::Widen;
use crate::migration::wire::{Empty, FrameKind, KEEP_ALIVE, Pass};
use crate::spec::PAGE_SIZE;
use crate::throttle::{self, Measured, Throttle};

/// What the pause takes with nothing to send and no network: stop, save, load.
const LOCAL_FIXED_COST: Duration = Duration::from_millis(1);
/// State and Commit each wait for an answer.
const ROUND_TRIPS_IN_PAUSE: u32 = 2;
/// A pass with fewer bytes measures latency, not throughput.
const RATE_SAMPLE_BYTES: u64 = 256 * 1024;
/// After a pass too small to matter the next one waits a little: what keeps the pause from fitting is not the pages.
const SMALL_PASS_PACE: Duration = Duration::from_millis(20);
/// How often a pass under way is looked at.
const TICK: Duration = Duration::from_millis(10);

/// How pre-copy has gone so far.
#[derive(Default)]
struct Course {
    previous_dirty_bytes: Option<u64>,
    passes_within_limit: u32,
    passes_stalled: u32,
}

/// One pass, sent.
struct Sent {
    /// On the wire.
    bytes: u64,
    /// Of guest memory dealt with, zero pages included.
    handled: u64,
    duration: Duration,
    /// What has to go again.
    damaged: Vec<u64>,
    /// What did not go.
    unsent: Vec<Unsent>,
}

impl Sent {
    fn seconds(&self) -> f64 {
        self.duration.as_secs_f64().max(1e-6)
    }
}

impl Source<'_> {
    /// Sends passes while the guest runs. Gives what was dirty at the decision to stop.
    pub(super) fn pre_copy(
        &mut self,
        log: &DirtyLog<'_>,
        shared: &Shared,
        workers: &mut Workers,
    ) -> Result<Vec<Bitmap>, SourceError> {
        self.recorder.phase(MigrationPhase::PreCopy);
        let mut course = Course::default();
        let mut dirty: Option<Vec<Bitmap>> = None;
        loop {
            let later = dirty.is_some();
            let sent = match dirty {
                None => self.pass(PassKind::First, vec![], shared, workers)?,
                Some(dirty) => self.pass(PassKind::Later, dirty, shared, workers)?,
            };
            crate::fault::point("source.pre_copy")?;
            let mut found = self.dirty_pages(log)?;
            self.add_damaged(&mut found, &sent.damaged);
            self.add_unsent(&mut found, &sent.unsent);
            let dirty_bytes = found.iter().map(Bitmap::count).sum::<u64>() * PAGE_SIZE;
            self.sample_rate(&sent, later);
            let facts = PassFacts {
                dirty_bytes,
                previous_dirty_bytes: course.previous_dirty_bytes,
                rate: self.rate,
                fixed_cost: LOCAL_FIXED_COST + self.round_trip * ROUND_TRIPS_IN_PAUSE,
                elapsed: self.recorder.elapsed(),
                passes_within_limit: course.passes_within_limit,
                passes_stalled: course.passes_stalled,
            };
            let predicted = precopy::predicted_downtime(&facts);
            let dirty_rate = dirty_bytes as f64 / sent.seconds();
            self.recorder
                .rates(facts.rate, dirty_rate, predicted, dirty_bytes);
            let (pass, bytes) = (self.recorder.pass(), sent.bytes);
            tracing::debug!(pass, bytes, ?sent.duration, dirty_bytes, ?predicted, "pass sent");
            if self.is_last(&facts, &mut course)? {
                return Ok(found);
            }
            let limit = self.policy().max_downtime;
            self.set_throttle(&facts, dirty_rate, limit);
            if predicted <= limit {
                course.passes_within_limit += 1;
            } else if dirty_bytes < RATE_SAMPLE_BYTES {
                std::thread::sleep(SMALL_PASS_PACE);
            }
            course.previous_dirty_bytes = Some(dirty_bytes);
            if self.policy().on_stall == OnStall::PostCopy {
                self.recent.clone_from(&found);
            }
            dirty = Some(found);
        }
    }

    /// Whether the guest is to be paused now, by the policy in force. What it says of a stall is begun.
    fn is_last(&mut self, facts: &PassFacts, course: &mut Course) -> Result<bool, SourceError> {
        if self.request.paused {
            // Nobody writes and nobody waits. What did not arrive as it was sent goes again.
            return Ok(facts.dirty_bytes == 0);
        }
        let policy = self.policy();
        let limits = Limits {
            max_downtime: policy.max_downtime,
            timeout: policy.timeout,
        };
        course.passes_stalled = if precopy::is_stalled(facts) {
            course.passes_stalled + 1
        } else {
            0
        };
        match (precopy::decide(&limits, facts), policy.on_stall) {
            (Decision::Stop, _) => Ok(true),
            (Decision::Stalled(_) | Decision::TimedOut(_), OnStall::Force) => {
                self.forced = true;
                Ok(true)
            }
            (Decision::Stalled(why) | Decision::TimedOut(why), OnStall::PostCopy) => {
                if !self.peer_has_post_copy {
                    return Err(SourceError::NoPostCopy(why));
                }
                self.post_copy = true;
                Ok(true)
            }
            (Decision::TimedOut(why), _) => Err(SourceError::NotConverging(why)),
            (Decision::Stalled(_), OnStall::Throttle) => {
                if self.throttle.is_none() {
                    self.throttle = Some(Throttle::start(self.vm).map_err(SourceError::Thread)?);
                }
                Ok(false)
            }
            (Decision::Continue | Decision::Stalled(_), _) => Ok(false),
        }
    }

    fn set_throttle(&mut self, facts: &PassFacts, dirty_rate: f64, limit: Duration) {
        let Some(throttle) = &self.throttle else { return };
        let permille = throttle::needed(&Measured {
            dirty_rate,
            link_rate: self.rate,
            permille: throttle.permille(),
            budget: limit.saturating_sub(facts.fixed_cost),
            shortest_pass: self.round_trip,
        });
        throttle.set(permille);
        self.recorder.throttle(permille / 10, throttle.taken());
    }

    /// A large pass tells the rate; a small one, whose time is mostly latency, only a least bound of it. Later passes count
    /// the pages they dealt with, zero pages included, because that is what the prediction counts.
    fn sample_rate(&mut self, sent: &Sent, later: bool) {
        let bytes = if later { sent.handled } else { sent.bytes };
        let sample = bytes as f64 / sent.seconds();
        self.rate = if bytes >= RATE_SAMPLE_BYTES && self.rate > 0.0 {
            f64::midpoint(self.rate, sample)
        } else {
            self.rate.max(sample)
        };
    }

    pub(super) fn dirty_pages(&self, log: &DirtyLog<'_>) -> Result<Vec<Bitmap>, SourceError> {
        let regions = self.vm.memory().regions();
        let dirty = regions
            .iter()
            .map(|region| log.get(region))
            .collect::<Result<_, _>>()?;
        Ok(dirty)
    }

    /// Pages that did not arrive as they were sent go again. The dirty log has those that the guest wrote meanwhile.
    fn add_damaged(&mut self, dirty: &mut [Bitmap], damaged: &[u64]) {
        for region in self.vm.memory().regions() {
            let Some(bitmap) = usize::try_from(region.slot)
                .ok()
                .and_then(|slot| dirty.get_mut(slot))
            else {
                continue;
            };
            let inside = damaged.iter().filter_map(|gpa| gpa.checked_sub(region.start.0));
            for offset in inside.filter(|offset| *offset < region.len) {
                bitmap.set_run(offset / PAGE_SIZE, 1);
            }
        }
        self.recorder.facts.resent_pages += damaged.len() as u64;
    }

    /// Pages that a pass cut short has left.
    fn add_unsent(&self, dirty: &mut [Bitmap], unsent: &[Unsent]) {
        for region in self.vm.memory().regions() {
            let slot = usize::try_from(region.slot).ok();
            let Some(bitmap) = slot.and_then(|slot| dirty.get_mut(slot)) else {
                continue;
            };
            for part in unsent.iter().filter(|part| part.slot == region.slot) {
                for (start, pages) in dirty::runs(&part.words) {
                    let start = part.first + start;
                    bitmap.set_run(start, pages.min(region.pages().saturating_sub(start)));
                }
            }
        }
    }

    /// Whether the time is over and what follows is not the end of the migration but the pause, so that the pass is to end.
    fn is_out_of_time(&self) -> bool {
        let policy = self.policy();
        !self.request.paused
            && matches!(policy.on_stall, OnStall::Force | OnStall::PostCopy)
            && self.recorder.elapsed() > policy.timeout
    }

    /// One pass over all workers.
    fn pass(
        &mut self,
        kind: PassKind,
        dirty: Vec<Bitmap>,
        shared: &Shared,
        workers: &mut Workers,
    ) -> Result<Sent, SourceError> {
        let pages = match kind {
            PassKind::First => self.vm.memory().len() / PAGE_SIZE,
            PassKind::Later | PassKind::Last => dirty.iter().map(Bitmap::count).sum(),
        };
        self.recorder.begin_pass(pages);
        shared.handled.store(0, Ordering::Relaxed);
        let mut widen = (kind == PassKind::First && self.request.policy.connections == 0)
            .then(|| Widen::up_to(workers.count()));
        workers.begin(PassPlan::new(self.recorder.pass(), kind, self.vm.memory(), dirty));
        let mut share = PassShare::default();
        while !workers.wait(&mut share, TICK)? {
            let handled = shared.handled.load(Ordering::Relaxed);
            let sent = shared.bytes.load(Ordering::Relaxed);
            if let Some(active) = widen.as_mut().and_then(|widen| widen.look(sent)) {
                shared.active.store(active, Ordering::Relaxed);
            }
            self.recorder.policy(&self.controls.policy());
            self.recorder
                .within_pass(pages.saturating_sub(handled), self.control.bytes_sent() + sent);
            self.go_on(pages.saturating_sub(handled))?;
            if kind != PassKind::Last && self.is_out_of_time() {
                workers.cut_short();
            }
        }
        if kind != PassKind::Last {
            self.go_on(0)?;
        }
        self.counts += share.counts;
        if let Some(round_trip) = share.round_trip {
            self.round_trip = self.round_trip.min(round_trip);
        }
        self.recorder.codec(&workers.codec(), self.counts.raw);
        let sent = self.control.bytes_sent() + shared.bytes.load(Ordering::Relaxed);
        let (bytes, duration) = self.recorder.end_pass(self.counts, sent);
        Ok(Sent {
            bytes,
            handled: share.counts.pages() * PAGE_SIZE,
            duration,
            damaged: share.damaged,
            unsent: share.unsent,
        })
    }

    /// Whether the migration may go on; asked all the time.
    fn go_on(&mut self, remaining_pages: u64) -> Result<(), SourceError> {
        if self.controls.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        if self.vm.guest_end().is_some() {
            return Err(SourceError::GuestEnded);
        }
        let remaining = remaining_pages * PAGE_SIZE;
        let policy = self.policy();
        match self.paused_at {
            Some(since) => {
                let limit = self.pause_limit(&policy);
                if since.elapsed() > limit {
                    return Err(SourceError::PauseTooLong { limit, remaining });
                }
            }
            // The other policies cut the pass short and do then what they do about it; a paused guest never stalls.
            None if self.request.paused || matches!(policy.on_stall, OnStall::Cancel | OnStall::Throttle) => {
                let elapsed = self.recorder.elapsed();
                if elapsed > policy.timeout {
                    let pass = self.recorder.pass();
                    return Err(SourceError::TimedOut {
                        elapsed,
                        pass,
                        remaining,
                    });
                }
            }
            None => {}
        }
        if self.kept_alive.elapsed() >= KEEP_ALIVE {
            self.kept_alive = Instant::now();
            self.control.send(FrameKind::KeepAlive, &Empty {})?;
        }
        Ok(())
    }

    /// What is left, while the guest is paused.
    pub(super) fn final_pages(
        &mut self,
        log: &DirtyLog<'_>,
        unsent: Vec<Bitmap>,
        shared: &Shared,
        workers: &mut Workers,
    ) -> Result<(), SourceError> {
        self.recorder.phase(MigrationPhase::FinalPages);
        crate::fault::point("source.final_pages")?;
        let mut dirty = unsent;
        for (region, bitmap) in self.vm.memory().regions().iter().zip(&mut dirty) {
            bitmap.merge(log.get(region)?.words());
        }
        self.pass(PassKind::Last, dirty, shared, workers)?;
        let end = Pass {
            pass: self.recorder.pass(),
            pages: self.counts.raw,
            last: true,
        };
        Ok(self.control.send(FrameKind::PassEnd, &end)?)
    }
}
