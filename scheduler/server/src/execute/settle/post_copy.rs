//! A VM that runs at its destination while the source still has memory that it needs. The destination is the owner on
//! record from the first word of that on; the migration stays open, and the source untouched, until nothing is missing.

use shoal_proto::vm::MigrationResult;

use super::Settlement;
use crate::events::Kind;
use crate::execute::decide::{Destination, Source};
use crate::execute::finish;
use crate::record::{Outcome, VmRecord};

impl Settlement {
    /// The destination is on record as the owner.
    pub(super) fn owned(&self) -> bool {
        let record = self.record();
        let intent = &self.open.intent;
        record.epoch == intent.epoch && record.node == intent.to
    }

    /// Records the destination as the owner, then follows the source to the end of its stream. True when something new
    /// was heard, so that both should be asked again at once.
    pub(super) async fn follow(&mut self, source: Source) -> bool {
        self.take_over().await;
        if source != Source::PostCopy {
            let lost = matches!(self.destination, Destination::Fetching { lost: true });
            self.show_link(lost);
        }
        let heard = self.report.is_some();
        let watched = self.watch().await;
        watched.is_ok() && self.report.is_some() && !heard
    }

    async fn take_over(&mut self) {
        if self.owned() {
            return;
        }
        let intent = self.intent();
        let moved = VmRecord {
            node: intent.to.clone(),
            epoch: intent.epoch,
            message: String::new(),
            ..self.record().as_ref().clone()
        };
        finish::save_at_last(&self.scheduler, moved, Vec::new()).await;
        self.open.update(|view| view.post_copy = true);
        let message = format!(
            "runs on {} and fetches the rest of its memory from {}",
            intent.to, intent.from
        );
        self.publish(Kind::MigrationPostCopy, message);
    }

    /// Tells when the two lose each other and when they are back.
    pub(super) fn show_link(&self, lost: bool) {
        if self.open.view().link_lost == lost {
            return;
        }
        self.open.update(|view| view.link_lost = lost);
        let intent = &self.open.intent;
        let (kind, message) = if lost {
            let message = format!(
                "{} has no connection to {}, which still has memory of the VM: it waits until they are connected again",
                intent.to, intent.from
            );
            (Kind::MigrationLinkLost, message)
        } else {
            let message = format!("{} is connected to {} again", intent.to, intent.from);
            (Kind::MigrationLinkBack, message)
        };
        self.publish(kind, message);
    }

    /// Powers the VM off at its destination; what is missing is not needed then.
    pub(super) async fn stop_there(&mut self) {
        if !self.owned() {
            return;
        }
        let intent = self.intent();
        let Ok(agent) = self.agent(&intent.to) else { return };
        if let Err(error) = agent.stop(intent.vm, intent.epoch).await {
            tracing::info!(vm = %intent.vm, migration = %intent.migration, %error, "cannot be stopped yet");
        }
    }

    /// The source is gone, and with it memory that the destination needs: what runs there is of no use.
    pub(super) async fn lose(&mut self) {
        self.take_over().await;
        let intent = self.intent();
        let reason = format!(
            "memory lost with node {}: its VMM ended before all memory had reached {}",
            intent.from, intent.to
        );
        let report = self.own_report(MigrationResult::Failed, &reason);
        let record = VmRecord::clone(&self.record());
        let migration = self.record_end(record, report).await;
        self.publish(
            Kind::MigrationFailed,
            format!("{} to {}: {reason}", intent.from, intent.to),
        );
        self.forget(&intent.from, intent.from_epoch);
        let outcome = Outcome::Failed { reason };
        finish::end_vm(&self.scheduler, &self.entry, outcome, &self.guard).await;
        self.open.update(|view| view.outcome = Some(migration));
    }
}
