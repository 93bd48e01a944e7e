//! What a migration did, while it runs (progress) and afterwards (report).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use shoal_proto::MigrationId;
use shoal_proto::vm::{MigrationPass, MigrationPhase, MigrationProgress, MigrationReport, MigrationResult};
use tokio::sync::watch;

use super::pages::PageCounts;
use crate::spec::PAGE_SIZE;

/// Progress is published at most this often, but for a change of phase.
const INTERVAL: Duration = Duration::from_millis(50);
/// Passes of which the report tells: the first and the last so many. A migration that will not converge makes thousands.
const FIRST_PASSES: usize = 16;
const LAST_PASSES: usize = 48;

/// The passes of a migration, bounded.
#[derive(Debug, Default)]
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

/// Keeps the figures of one outgoing migration and publishes them.
#[derive(Debug)]
pub struct Recorder {
    started: Instant,
    published: Instant,
    progress: MigrationProgress,
    publisher: watch::Sender<Option<MigrationProgress>>,
    passes: PassTable,
    pass_started: Instant,
    counts_before: PageCounts,
    bytes_before: u64,
    /// The pause, filled in as it goes.
    pub downtime: Downtime,
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
            downtime: Downtime::default(),
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
        self.publish();
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
        });
        (self.counts_before, self.bytes_before) = (counts, bytes_sent);
        self.progress.remaining_bytes = 0;
        self.progress.bytes_sent = bytes_sent;
        (bytes, duration)
    }

    /// What the decision after a pass is made from.
    pub fn rates(&mut self, rate: f64, dirty_rate: f64, predicted: Duration) {
        self.progress.rate_bytes_per_second = to_u64(rate);
        self.progress.dirty_rate_bytes_per_second = to_u64(dirty_rate);
        self.progress.predicted_downtime_us = micros(predicted);
        self.publish_if_due();
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
