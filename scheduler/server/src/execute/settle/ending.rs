//! What is told, and learnt, of a migration that has ended.

use std::time::Duration;

use shoal_proto::cluster;
use shoal_proto::vm::{MigrationReport, MigrationResult};

use super::Settlement;
use crate::execute::decide::Then;

impl Settlement {
    pub(super) fn is_to_be_cancelled(&self) -> bool {
        self.open.wishes().borrow().cancel
    }

    /// One that was cancelled while its source was silent: nobody but the destination was told.
    pub(super) fn note_cancelled(&mut self, then: Then) {
        if then == Then::Unknown && !self.cancelled && self.is_to_be_cancelled() {
            self.cancelled = true;
            let why = self.error.take().unwrap_or_else(|| reason(then).to_owned());
            self.error = Some(format!("cancelled on request: {why}"));
        }
    }

    /// What failed before anything was copied is a fault of the way, or of its end, unless the source or the guest is to blame.
    /// Later it may be the guest's.
    pub(super) fn learn(&self, migration: &cluster::Migration) {
        let (intent, failures) = (&self.open.intent, &self.scheduler.failures);
        let Some(report) = migration.report.as_ref().filter(|_| intent.from != intent.to) else {
            return;
        };
        match report.result() {
            MigrationResult::Completed => {
                failures.clear(&intent.to, Some(&intent.from));
                if let Some(expected) = intent.expected {
                    let took = Duration::from_micros(report.total_us);
                    self.scheduler.predictions.moved(expected, took);
                }
            }
            MigrationResult::Failed if report.passes == 0 && self.blames_the_way => {
                failures.note(&intent.to, Some(&intent.from), &report.reason);
            }
            _ => {}
        }
    }
}

/// Why a migration that is closed did not come to its end.
pub(super) fn reason(then: Then) -> &'static str {
    match then {
        Then::Stays => "the migration did not come to its end; the VM was not harmed",
        Then::Resume => "the destination never ran the VM; the source has it as before",
        Then::Exited => "the guest ended while it was being moved",
        Then::Lost => "the source's VMM is gone, and the destination did not have all of the VM",
        Then::Unknown => "the destination does not have the VM, and the source's node does not answer",
    }
}

/// What an event tells of a report.
pub(super) fn figures(report: &MigrationReport) -> String {
    if report.passes == 0 {
        return report.reason.clone();
    }
    #[expect(clippy::cast_precision_loss, reason = "microseconds, for people to read")]
    let (downtime, total) = (report.downtime_us as f64 / 1e3, report.total_us as f64 / 1e6);
    format!(
        "downtime {downtime:.1} ms, total {total:.2} s, {} passes, {} sent",
        report.passes,
        bytesize::ByteSize::b(report.bytes_sent)
    )
}

/// Bytes of memory per second that a migration got through its link; none where it was too short to tell, was held back by a
/// cap, or used no link.
pub(super) fn link_rate(report: &MigrationReport) -> Option<u64> {
    const TELLING_BYTES: u64 = 64 << 20;
    let bytes = report.pages_sent.saturating_mul(4096);
    let cap = report.policy.and_then(|policy| policy.bandwidth_bytes_per_second);
    if report.handed_over || report.post_copy || cap.is_some_and(|cap| cap > 0) || bytes < TELLING_BYTES {
        return None;
    }
    let rate = u128::from(bytes) * 1_000_000 / u128::from(report.total_us.max(1));
    u64::try_from(rate).ok()
}
