//! Following a migration at its source.

use std::time::Duration;

use shoal_proto::vm::{MigrationPhase, MigrationPolicy};

use super::Settlement;
use crate::agent::{Agent, AgentError};
use crate::execute::decide::{Destination, destination_view};

/// How often the destination is looked at meanwhile.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// How long the source's report is waited for once it is known how the migration ended.
const REPORT_TIME: Duration = Duration::from_secs(3);

impl Settlement {
    /// Follows the source until its stream ends, whatever the end is.
    pub(super) async fn watch(&mut self) -> Result<(), AgentError> {
        let intent = self.intent();
        let agent = self.agent(&intent.from)?;
        let mut wishes = self.open.wishes();
        let mut shares = self.open.share();
        let mut looks = tokio::time::interval(LOOK_INTERVAL);
        looks.reset();
        let mut cancelled = false;
        let mut stream = agent
            .watch_migration(intent.vm, intent.from_epoch, intent.migration)
            .await?;
        loop {
            self.check_watched()?;
            self.tell_share(&agent).await;
            let wish = wishes.borrow_and_update().clone();
            if wish.stop && self.owned() {
                return Ok(());
            }
            if !cancelled && (wish.cancel || self.is_lost(&intent.to)) {
                cancelled = true;
                self.cancel(&agent).await?;
            }
            tokio::select! {
                message = stream.message() => match message.map_err(|status| agent.error(status))? {
                    Some(progress) => {
                        let post_copy = progress.phase() == MigrationPhase::PostCopy;
                        self.take_progress(progress);
                        // The destination owns it from now on, which is to be recorded at once.
                        if post_copy && !self.owned() && !std::mem::replace(&mut self.ran_by_source, true) {
                            return Ok(());
                        }
                    }
                    None => return Ok(()),
                },
                changed = wishes.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                }
                changed = shares.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                }
                _ = looks.tick() => {
                    if self.destination_has_news() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Asks the source to cancel.
    ///
    /// # Errors
    /// It may not have heard of it, so that it has to be said again.
    async fn cancel(&self, agent: &Agent) -> Result<(), AgentError> {
        let intent = &self.open.intent;
        let id = intent.migration.to_string();
        match agent.cancel_migration(intent.vm, intent.from_epoch, &id).await {
            Err(AgentError::Refused(status)) => {
                tracing::info!(vm = %intent.vm, migration = %id, %status, "cannot be cancelled");
                Ok(())
            }
            said => said,
        }
    }

    /// Tells the source how much of the network it may use, if that has changed.
    async fn tell_share(&self, agent: &Agent) {
        let mut told = self.open.told.lock().await;
        let Some(share) = self.open.rate().filter(|share| *told != Some(*share)) else {
            return;
        };
        let intent = &self.open.intent;
        let policy = MigrationPolicy {
            bandwidth_bytes_per_second: Some(share),
            ..MigrationPolicy::default()
        };
        let set = agent.set_migration(intent.vm, intent.from_epoch, intent.migration, policy);
        match set.await {
            Err(error @ AgentError::NoAnswer { .. }) => {
                tracing::info!(vm = %intent.vm, migration = %intent.migration, %error, "share not told yet");
            }
            Err(error) => {
                tracing::debug!(vm = %intent.vm, migration = %intent.migration, %error, "share not taken");
                *told = Some(share);
            }
            Ok(_) => *told = Some(share),
        }
    }

    /// By what its node last reported, without asking it.
    fn destination_has_news(&self) -> bool {
        let intent = &self.open.intent;
        let Some(node) = self.scheduler.nodes.get(&intent.to) else {
            return false;
        };
        let seen = node.observed_vm(intent.vm, intent.epoch);
        match destination_view(seen.as_ref().map(|seen| &*seen.facts)) {
            Destination::Ended => true,
            Destination::Gone => self.owned() && node.is_reachable(),
            Destination::Ran | Destination::Fetching { .. } => !self.owned() || self.open.view().link_lost,
            Destination::Silent | Destination::Waiting => false,
        }
    }

    fn take_progress(&mut self, progress: shoal_proto::vm::MigrationProgress) {
        if self.owned() {
            self.show_link(progress.link_lost);
        }
        if progress.dirty_rate_bytes_per_second > 0 {
            self.entry.set_dirty_rate(progress.dirty_rate_bytes_per_second);
        }
        if let Some(report) = &progress.report {
            self.report = Some(report.clone());
        }
        self.open.update(|view| view.progress = Some(progress));
    }

    /// The report, if the source still has it and it did not come yet.
    pub(super) async fn fetch_report(&mut self) {
        if self.report.is_none() && !self.start_refused {
            let _ = tokio::time::timeout(REPORT_TIME, self.watch()).await;
        }
    }
}
