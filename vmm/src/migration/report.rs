//! What a migration did, while it runs (progress) and afterwards (report).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use shoal_proto::MigrationId;
use shoal_proto::vm::{
    MigrationPass, MigrationPhase, MigrationProgress, MigrationReport, MigrationResult, MigrationSample,
    Verify,
};
use tokio::sync::watch;

use super::codec::CodecCounts;
use super::pages::PageCounts;
use super::policy::Policy;
use super::postcopy::frames::Status;
use crate::spec::PAGE_SIZE;

/// Progress is published at most this often, but for a change of phase.
const INTERVAL: Duration = Duration::from_millis(50);
/// Passes of which the report tells: the first and the last so many. A migration that will not converge makes thousands.
const FIRST_PASSES: usize = 16;
const LAST_PASSES: usize = 48;

/// The passes of a migration, bounded.
#[derive(Debug, Clone, Default)]
struct PassTable {
    count: u32,
    first: Vec<MigrationPass>,
    last: VecDeque<MigrationPass>,
}

impl PassTable {
    fn push(&mut self, pass: MigrationPass) {
        self.count += 1;
        if self.first.len() < FIRST_PASSES {
            self.first.push(pass);
            return;
        }
        if self.last.len() == LAST_PASSES {
            self.last.pop_front();
        }
        self.last.push_back(pass);
    }
}

impl PassTable {
    fn dirtied(&mut self, pages: u64) {
        if let Some(pass) = self.last.back_mut().or(self.first.last_mut()) {
            pass.dirtied_pages = pages;
        }
    }
}

/// The pause and its parts.
#[derive(Debug, Clone, Copy, Default)]
pub struct Downtime {
    /// From the request to stop until no vCPU runs.
    pub stop: Duration,
    /// Sending the last dirty pages.
    pub pages: Duration,
    /// Saving, sending and loading the rest.
    pub state: Duration,
    /// From Commit until the destination says that it runs.
    pub start: Duration,
}

impl Downtime {
    /// The whole pause.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.stop + self.pages + self.state + self.start
    }
}

/// Samples of a migration's life, so many at most: when they are full every other one goes and they become rarer.
const MAX_SAMPLES: usize = 512;

/// What a plot of a migration is made from.
#[derive(Debug, Clone)]
struct Samples {
    taken: Vec<MigrationSample>,
    interval: Duration,
    last: Option<(Instant, u64)>,
}

impl Default for Samples {
    fn default() -> Self {
        Self {
            taken: vec![],
            interval: Duration::from_millis(5),
            last: None,
        }
    }
}

impl Samples {
    fn take(&mut self, now: Instant, elapsed: Duration, progress: &MigrationProgress, forced: bool) {
        let (since, bytes) = self.last.unwrap_or((now.checked_sub(elapsed).unwrap_or(now), 0));
        let passed = now.saturating_duration_since(since);
        if passed < self.interval && !forced {
            return;
        }
        if self.taken.len() == MAX_SAMPLES {
            let mut odd = false;
            self.taken.retain(|_| {
                odd = !odd;
                odd
            });
            self.interval *= 2;
        }
        self.last = Some((now, progress.bytes_sent));
        let rate = progress.bytes_sent.saturating_sub(bytes) as f64 / passed.as_secs_f64().max(1e-6);
        self.taken.push(MigrationSample {
            elapsed_us: micros(elapsed),
            rate_bytes_per_second: to_u64(rate),
            dirty_rate_bytes_per_second: progress.dirty_rate_bytes_per_second,
            remaining_bytes: progress.remaining_bytes,
            throttle_percent: progress.throttle_percent,
            phase: progress.phase,
        });
    }
}

/// Keeps the figures of one outgoing migration and publishes them.
#[derive(Debug, Clone)]
pub struct Recorder {
    started: Instant,
    published: Instant,
    progress: MigrationProgress,
    publisher: watch::Sender<Option<MigrationProgress>>,
    passes: PassTable,
    pass_started: Instant,
    counts_before: PageCounts,
    bytes_before: u64,
    samples: Samples,
    /// The pause, filled in as it goes.
    pub downtime: Downtime,
    /// What else the report says, filled in as it goes.
    pub facts: MigrationReport,
}

impl Recorder {
    /// Starts the clock.
    #[must_use]
    pub fn new(
        id: MigrationId,
        total_bytes: u64,
        publisher: watch::Sender<Option<MigrationProgress>>,
    ) -> Self {
        let now = Instant::now();
        let progress = MigrationProgress {
            migration_id: id.to_string(),
            total_bytes,
            ..Default::default()
        };
        Self {
            started: now,
            published: now,
            progress,
            publisher,
            passes: PassTable::default(),
            pass_started: now,
            counts_before: PageCounts::default(),
            bytes_before: 0,
            samples: Samples::default(),
            downtime: Downtime::default(),
            facts: MigrationReport::default(),
        }
    }

    /// Since the start.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Passes begun so far.
    #[must_use]
    pub fn pass(&self) -> u32 {
        self.progress.pass
    }

    /// Enters a phase.
    pub fn phase(&mut self, phase: MigrationPhase) {
        self.progress.phase = phase.into();
        tracing::debug!(migration = %self.progress.migration_id, phase = phase.as_str_name(), "migration phase");
        self.samples
            .take(Instant::now(), self.started.elapsed(), &self.progress, true);
        self.publish();
    }

    /// What is in force, which may change at any time.
    pub fn policy(&mut self, policy: &Policy) {
        self.progress.policy = Some(policy.into());
    }

    /// How it is sent.
    pub fn settings(&mut self, connections: usize, tls: bool) {
        self.progress.connections = u32::try_from(connections).unwrap_or(u32::MAX);
        self.facts.connections = self.progress.connections;
        self.facts.tls = tls;
    }

    /// Share of vCPU time that is taken from the guest now.
    pub fn throttle(&mut self, percent: u32, taken: Duration) {
        self.progress.throttle_percent = percent;
        self.facts.max_throttle_percent = self.facts.max_throttle_percent.max(percent);
        self.facts.throttled_us = micros(taken);
    }

    /// What encoding saved so far.
    pub fn codec(&mut self, counts: &CodecCounts, pages_with_bytes: u64) {
        let plain = pages_with_bytes * PAGE_SIZE;
        let saved = counts.compression_saved_bytes + counts.delta_saved_bytes;
        self.progress.compression_ratio = if plain == 0 {
            1.0
        } else {
            plain.saturating_sub(saved) as f64 / plain as f64
        };
        self.facts.compressed_pages = counts.compressed_pages;
        self.facts.compression_saved_bytes = counts.compression_saved_bytes;
        self.facts.delta_pages = counts.delta_pages;
        self.facts.delta_saved_bytes = counts.delta_saved_bytes;
    }

    /// Memory was compared, and was equal.
    pub fn verified(&mut self, mode: Verify, took: Duration) {
        self.facts.verified = mode.into();
        self.facts.verify_us = micros(took);
    }

    /// Begins a pass over `pages` pages.
    pub fn begin_pass(&mut self, pages: u64) {
        self.progress.pass += 1;
        self.progress.remaining_bytes = pages * PAGE_SIZE;
        self.pass_started = Instant::now();
        self.publish_if_due();
    }

    /// Some of the pass has been sent.
    pub fn within_pass(&mut self, remaining_pages: u64, bytes_sent: u64) {
        self.progress.remaining_bytes = remaining_pages * PAGE_SIZE;
        self.progress.bytes_sent = bytes_sent;
        self.samples
            .take(Instant::now(), self.started.elapsed(), &self.progress, false);
        self.publish_if_due();
    }

    /// The pass is sent and acknowledged. Gives the bytes it took and how long.
    pub fn end_pass(&mut self, counts: PageCounts, bytes_sent: u64) -> (u64, Duration) {
        let duration = self.pass_started.elapsed();
        let bytes = bytes_sent - self.bytes_before;
        self.passes.push(MigrationPass {
            pass: self.progress.pass,
            pages: counts.raw - self.counts_before.raw,
            zero_pages: counts.zero - self.counts_before.zero,
            bytes,
            duration_us: micros(duration),
            dirtied_pages: 0,
            throttle_percent: self.progress.throttle_percent,
        });
        (self.counts_before, self.bytes_before) = (counts, bytes_sent);
        self.progress.remaining_bytes = 0;
        self.progress.bytes_sent = bytes_sent;
        (bytes, duration)
    }

    /// What the decision after a pass is made from.
    pub fn rates(&mut self, rate: f64, dirty_rate: f64, predicted: Duration, dirtied_bytes: u64) {
        self.passes.dirtied(dirtied_bytes / PAGE_SIZE);
        self.progress.rate_bytes_per_second = to_u64(rate);
        self.progress.dirty_rate_bytes_per_second = to_u64(dirty_rate);
        self.progress.predicted_downtime_us = micros(predicted);
        self.publish_if_due();
    }

    /// How post-copy goes, as the destination says.
    pub fn post_copy(&mut self, status: &Status, bytes_sent: u64) {
        self.progress.faults = status.faults;
        self.progress.worst_fault_us = status.worst_fault_us;
        self.facts.faults = status.faults;
        self.facts.worst_fault_us = status.worst_fault_us;
        self.facts.mean_fault_us = status.fault_us.checked_div(status.faults).unwrap_or(0);
        self.within_pass(status.missing_pages, bytes_sent);
    }

    /// Whether the two sides of post-copy are connected.
    pub fn link_lost(&mut self, lost: bool) {
        self.progress.link_lost = lost;
        self.publish();
    }

    /// The last progress, if it ended in doubt now. It does not end by that.
    #[must_use]
    pub fn in_doubt(&self, reason: String, bytes_sent: u64) -> MigrationProgress {
        self.clone().finish(MigrationResult::InDoubt, reason, bytes_sent)
    }

    fn publish_if_due(&mut self) {
        if self.published.elapsed() >= INTERVAL {
            self.publish();
        }
    }

    fn publish(&mut self) {
        self.published = Instant::now();
        self.progress.elapsed_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.publisher.send_replace(Some(self.progress.clone()));
    }

    /// Ends it: the last progress, with the report. It is for the owner of the VM to publish, once the VM's own state
    /// says the same.
    #[must_use]
    pub fn finish(mut self, result: MigrationResult, reason: String, bytes_sent: u64) -> MigrationProgress {
        let report = MigrationReport {
            migration_id: self.progress.migration_id.clone(),
            result: result.into(),
            reason,
            total_us: micros(self.started.elapsed()),
            downtime_us: micros(self.downtime.total()),
            downtime_stop_us: micros(self.downtime.stop),
            downtime_pages_us: micros(self.downtime.pages),
            downtime_state_us: micros(self.downtime.state),
            downtime_start_us: micros(self.downtime.start),
            passes: self.passes.count,
            bytes_sent,
            pages_sent: self.counts_before.raw,
            zero_pages: self.counts_before.zero,
            pass_table: self.passes.first.into_iter().chain(self.passes.last).collect(),
            samples: self.samples.taken,
            policy: self.progress.policy,
            ..self.facts
        };
        self.progress.bytes_sent = bytes_sent;
        self.progress.report = Some(report);
        self.progress.elapsed_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.progress
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturating, and never negative
fn to_u64(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_of_a_long_migration_stays_short() {
        let mut table = PassTable::default();
        for pass in 1..=10_000 {
            table.push(MigrationPass {
                pass,
                ..Default::default()
            });
        }
        assert_eq!(table.count, 10_000);
        assert_eq!(table.first.last().map(|pass| pass.pass), Some(16));
        assert_eq!(table.last.front().map(|pass| pass.pass), Some(10_000 - 47));
    }
}
