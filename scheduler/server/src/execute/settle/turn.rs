//! A migration that does not begin before the network has room for it.

use std::time::Duration;

use super::Settlement;
use crate::bandwidth::Share;
use crate::events::Kind;
use crate::execute::decide::{Source, Then, source_view};
use crate::execute::migrate::AttemptError;

/// How often the VM is looked at while its migration waits.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

impl Settlement {
    /// Returns when the network has room for it.
    ///
    /// # Errors
    /// What makes it needless: somebody cancels it, one of its nodes is declared lost, or the guest ends.
    pub async fn wait_for_turn(&self) -> Result<(), AttemptError> {
        if let Some(why) = self.open.waits() {
            self.publish(Kind::MigrationWaits, why);
        }
        let (mut shares, mut wishes) = (self.open.share(), self.open.wishes());
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        loop {
            self.check_nodes()?;
            if wishes.borrow_and_update().cancel {
                return Err(AttemptError::Cancelled);
            }
            if matches!(*shares.borrow_and_update(), Share::Rate(_)) {
                return Ok(());
            }
            tokio::select! {
                _ = shares.changed() => {}
                _ = wishes.changed() => {}
                _ = looks.tick() => {
                    if self.guest_has_ended() {
                        return Err(AttemptError::GuestEnded);
                    }
                }
            }
        }
    }

    /// Closes one that did not get its turn: neither node was told anything of it.
    pub async fn never_began(mut self, error: &AttemptError) {
        self.start_failed(error);
        let then = match error {
            AttemptError::GuestEnded => Then::Exited,
            AttemptError::Lost(node) if *node == self.open.intent.from => Then::Lost,
            _ => Then::Stays,
        };
        self.close(then).await;
        self.give_back();
    }

    /// Where it is, by what its node last reported.
    fn guest_has_ended(&self) -> bool {
        let intent = &self.open.intent;
        let node = self.scheduler.nodes.get(&intent.from);
        let seen = node.and_then(|node| node.observed_vm(intent.vm, intent.from_epoch));
        seen.is_some_and(|seen| {
            let view = source_view(Some(&seen.facts), intent.migration, false);
            matches!(view, Source::Exited | Source::Gone)
        })
    }
}
