//! Brings an open migration to its end: after a normal run, after any error, and when the scheduler starts and finds
//! the intent. Asks both nodes, has [`decide`] say what follows, does it, until the intent is closed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_proto::vm::{MigrationReport, MigrationResult};
use shoal_proto::{Epoch, NodeName, cluster};

use super::decide::{Destination, Source, Step, Then, Waiting, decide, destination_view, source_view};
use super::migrate::Start;
use super::{Backoff, finish};
use crate::agent::{Agent, AgentError};
use crate::events::{Kind, NewEvent};
use crate::migrations::OpenMigration;
use crate::reconcile::{self, Subject};
use crate::record::{Intent, Outcome, VmRecord, now_unix_ms};
use crate::scheduler::Shared;
use crate::store::Write;
use crate::vms::{VmEntry, VmGuard};

/// After this long a start whose answer was lost is not under way any more: its connection is closed.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long the end of a migration waits for the source's cleaning up, which goes on by itself if it takes longer.
const CLEANUP_TIME: Duration = Duration::from_secs(8);
/// How long the source's report is waited for once it is known how the migration ended.
const REPORT_TIME: Duration = Duration::from_secs(3);

/// A migration on its way to its end.
#[derive(Debug)]
pub struct Settlement {
    scheduler: Shared,
    entry: Arc<VmEntry>,
    open: Arc<OpenMigration>,
    guard: VmGuard,
    /// The source's own report, once it came.
    report: Option<MigrationReport>,
    /// What went wrong first, if the source cannot report it.
    error: Option<String>,
    start_refused: bool,
    /// The destination's VMM process had died when that was last asked.
    destination_died: bool,
    since: Instant,
}

impl Settlement {
    /// For an intent that has been stored. The guard is given back at the end.
    pub fn new(scheduler: Shared, entry: Arc<VmEntry>, open: Arc<OpenMigration>, guard: VmGuard) -> Self {
        let since = Instant::now();
        Self {
            scheduler,
            entry,
            open,
            guard,
            report: None,
            error: None,
            start_refused: false,
            destination_died: false,
            since,
        }
    }

    /// What was stored.
    pub fn intent(&self) -> Arc<Intent> {
        Arc::clone(&self.open.intent)
    }

    /// The VM.
    pub fn record(&self) -> Arc<VmRecord> {
        self.entry.record()
    }

    /// A node's agent.
    pub fn agent(&self, node: &NodeName) -> Result<Agent, AgentError> {
        self.scheduler.agent(node)
    }

    /// Notes that the attempt did not get as far as a running migration.
    pub fn start_failed(&mut self, error: &AgentError, start: Start) {
        self.error = Some(error.to_string());
        self.start_refused = start == Start::Refused;
    }

    /// Goes on until the intent is closed.
    pub async fn settle(mut self) {
        let mut backoff = Backoff::new();
        let mut wishes = self.open.wishes();
        loop {
            let keep = wishes.borrow_and_update().keep.clone();
            if let Some(keep) = keep {
                self.resolve(&keep).await;
                break;
            }
            // The source first: it never ceases to be in doubt by itself, so what the destination says later still holds.
            let source = self.ask_source().await;
            let destination = self.ask_destination().await;
            let step = decide(source, destination, self.since.elapsed() < START_PATIENCE);
            tracing::debug!(vm = %self.open.intent.vm, migration = %self.open.intent.migration,
                ?source, ?destination, ?step, "settling");
            match step {
                Step::Complete => {
                    self.complete().await;
                    break;
                }
                Step::Close(then) => {
                    self.close(then).await;
                    break;
                }
                Step::Abandon(then) => {
                    if self.abandon(then).await {
                        break;
                    }
                }
                Step::Watch => {
                    self.clear_doubt();
                    if self.watch().await.is_ok() {
                        backoff = Backoff::new();
                        continue;
                    }
                }
                Step::Wait(Waiting::InDoubt(why)) => self.show_doubt(why),
                Step::Wait(Waiting::ForAnswer) => self.clear_doubt(),
            }
            let _ = tokio::time::timeout(backoff.next(), wishes.changed()).await;
        }
        let vm = self.open.intent.vm;
        drop(self.guard);
        self.scheduler.reconcile.push(Subject::Vm(vm));
    }

    async fn ask_source(&self) -> Source {
        let intent = &self.open.intent;
        match self.describe(&intent.from, intent.from_epoch).await {
            Ok(facts) => source_view(facts.as_ref(), intent.migration, self.start_refused),
            Err(_) => Source::Silent,
        }
    }

    async fn ask_destination(&mut self) -> Destination {
        let intent = self.intent();
        match self.describe(&intent.to, intent.epoch).await {
            Ok(facts) => {
                self.destination_died = facts.as_ref().is_some_and(|facts| !facts.vmm_alive);
                destination_view(facts.as_ref())
            }
            Err(_) => Destination::Silent,
        }
    }

    async fn describe(
        &self,
        node: &NodeName,
        epoch: Epoch,
    ) -> Result<Option<shoal_proto::node::VmFacts>, AgentError> {
        match self.agent(node)?.describe(self.open.intent.vm, epoch).await {
            Ok(facts) => Ok(Some(facts)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Follows the source until its stream ends, whatever the end is.
    async fn watch(&mut self) -> Result<(), AgentError> {
        let intent = self.intent();
        let agent = self.agent(&intent.from)?;
        let mut wishes = self.open.wishes();
        let mut cancelled = false;
        let mut stream = agent
            .watch_migration(intent.vm, intent.from_epoch, intent.migration)
            .await?;
        loop {
            if !cancelled && wishes.borrow_and_update().cancel {
                cancelled = true;
                let id = intent.migration.to_string();
                if let Err(error) = agent.cancel_migration(intent.vm, intent.from_epoch, &id).await {
                    tracing::info!(vm = %intent.vm, migration = %id, %error, "cannot be cancelled");
                }
            }
            tokio::select! {
                message = stream.message() => match message.map_err(|status| agent.error(status))? {
                    Some(progress) => self.take_progress(progress),
                    None => return Ok(()),
                },
                changed = wishes.changed(), if !cancelled => {
                    if changed.is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }

    fn take_progress(&mut self, progress: shoal_proto::vm::MigrationProgress) {
        if progress.dirty_rate_bytes_per_second > 0 {
            self.entry.set_dirty_rate(progress.dirty_rate_bytes_per_second);
        }
        if let Some(report) = &progress.report {
            self.report = Some(report.clone());
        }
        self.open.update(|view| view.progress = Some(progress));
    }

    /// The report, if the source still has it and it did not come yet.
    async fn fetch_report(&mut self) {
        if self.report.is_none() && !self.start_refused {
            let _ = tokio::time::timeout(REPORT_TIME, self.watch()).await;
        }
    }

    /// Has the destination say that it never runs the VM; true when the migration has ended one way or the other.
    async fn abandon(&mut self, then: Then) -> bool {
        let intent = self.intent();
        let Ok(agent) = self.agent(&intent.to) else {
            return false;
        };
        match agent
            .abort_incoming(intent.vm, intent.epoch, intent.migration)
            .await
        {
            Ok(true) => {
                self.complete().await;
                return true;
            }
            Ok(false) => {}
            Err(error) => {
                tracing::info!(vm = %intent.vm, migration = %intent.migration, %error, "abort not confirmed yet");
                return false;
            }
        }
        if let Err(error) = agent.destroy(intent.vm, intent.epoch).await {
            // It can never run; the node's next report has it destroyed.
            tracing::info!(vm = %intent.vm, migration = %intent.migration, %error, "incoming VM not cleaned up yet");
        }
        self.forget(&intent.to, intent.epoch);
        if then == Then::Resume
            && let Err(error) = self.resume_source().await
        {
            self.show_doubt(&format!(
                "the destination never ran it, but the source did not resume: {error}"
            ));
            return false;
        }
        self.close(then).await;
        true
    }

    async fn resume_source(&self) -> Result<(), AgentError> {
        let intent = &self.open.intent;
        self.agent(&intent.from)?
            .resume(intent.vm, intent.from_epoch)
            .await
    }

    /// The destination runs the VM, or has run it: that is recorded, then the source is destroyed.
    async fn complete(&mut self) {
        let intent = self.intent();
        self.fetch_report().await;
        let report = match self.report.take() {
            Some(report) if report.result() == MigrationResult::Completed => report,
            _ => self.own_report(
                MigrationResult::Completed,
                "completed; the source's report with its figures was lost",
            ),
        };
        let record = self.record();
        let moved = VmRecord {
            node: intent.to.clone(),
            epoch: intent.epoch,
            message: String::new(),
            ..record.as_ref().clone()
        };
        let migration = self.record_end(moved, report).await;
        let figures = migration.report.as_ref().map(figures).unwrap_or_default();
        self.publish(
            Kind::MigrationCompleted,
            format!("{} to {}: {figures}", intent.from, intent.to),
        );
        if let Ok(agent) = self.agent(&intent.from) {
            let destroy = agent.destroy(intent.vm, intent.from_epoch);
            match tokio::time::timeout(CLEANUP_TIME, destroy).await {
                Ok(Ok(())) => {}
                // The node's next report shows the old copy, and it is destroyed then.
                _ => tracing::info!(vm = %intent.vm, node = %intent.from, "source is cleaned up later"),
            }
        }
        self.forget(&intent.from, intent.from_epoch);
        self.open.update(|view| view.outcome = Some(migration));
    }

    /// The VM did not move.
    async fn close(&mut self, then: Then) {
        if then != Then::Unknown {
            self.fetch_report().await;
        }
        let report = match (self.report.take(), &self.error) {
            (Some(mut report), _) if report.result() == MigrationResult::Failed && self.destination_died => {
                report.reason = format!("{}; the VMM at the destination died", report.reason);
                report
            }
            (Some(report), _)
                if matches!(
                    report.result(),
                    MigrationResult::Failed | MigrationResult::Cancelled
                ) =>
            {
                report
            }
            (_, Some(error)) => self.own_report(MigrationResult::Failed, error),
            _ => self.own_report(MigrationResult::Failed, reason(then)),
        };
        self.close_with(then, report, |_| {}).await;
    }

    async fn close_with(&mut self, then: Then, report: MigrationReport, change: impl FnOnce(&mut VmRecord)) {
        let intent = self.intent();
        let mut record = self.record().as_ref().clone();
        record.message = String::new();
        change(&mut record);
        let words = report.reason.clone();
        let migration = self.record_end(record, report).await;
        let fate = match then {
            Then::Stays => "stays",
            Then::Resume => "resumed",
            Then::Exited => "has ended",
            Then::Lost => "is lost",
            Then::Unknown => "is unknown until its node answers",
        };
        let message = format!(
            "{} to {} failed, the VM {fate} on {}: {words}",
            intent.from, intent.to, intent.from
        );
        self.publish(Kind::MigrationFailed, message);
        match then {
            Then::Stays | Then::Resume => {}
            Then::Lost => {
                let reason = format!(
                    "lost during its migration from {} to {}: {words}",
                    intent.from, intent.to
                );
                finish::end_vm(
                    &self.scheduler,
                    &self.entry,
                    Outcome::Failed { reason },
                    &self.guard,
                )
                .await;
            }
            Then::Exited | Then::Unknown => {
                reconcile::check_running(&self.scheduler, &self.entry, &self.guard).await;
            }
        }
        self.open.update(|view| view.outcome = Some(migration));
    }

    /// An operator has decided. Every epoch but the kept one is fenced: whatever of it shows up is destroyed.
    async fn resolve(&mut self, keep: &NodeName) {
        let intent = self.intent();
        let why = format!("resolved by an operator: kept on {keep}");
        self.publish(Kind::VmResolved, why.clone());
        if *keep == intent.from {
            let report = self.own_report(MigrationResult::Failed, &why);
            let fence = |record: &mut VmRecord| record.fenced_through = record.last_epoch;
            self.close_with(Then::Unknown, report, fence).await;
        } else {
            self.error = None;
            self.complete().await;
        }
    }

    /// Stores the VM's record, the history and the end of the intent in one transaction, however long that takes.
    async fn record_end(&self, record: VmRecord, report: MigrationReport) -> cluster::Migration {
        let intent = &self.open.intent;
        let migration = cluster::Migration {
            id: intent.migration.to_string(),
            vm: record.name.to_string(),
            from_node: intent.from.to_string(),
            to_node: intent.to.to_string(),
            epoch: intent.epoch.0,
            reason: intent.reason.clone(),
            started_unix_ms: intent.started_unix_ms,
            report: Some(report),
        };
        let mut writes = vec![
            Write::DeleteIntent(intent.vm),
            Write::PutMigration(intent.vm, Box::new(migration.clone())),
        ];
        if let Some(oldest) = self.entry.remember_migration(migration.clone()) {
            writes.push(Write::DeleteMigration(intent.vm, Epoch(oldest)));
        }
        finish::save_at_last(&self.scheduler, record, writes).await;
        self.scheduler.migrations.close(intent.vm);
        migration
    }

    fn own_report(&self, result: MigrationResult, reason: &str) -> MigrationReport {
        let took_ms = now_unix_ms().saturating_sub(self.open.intent.started_unix_ms);
        MigrationReport {
            migration_id: self.open.intent.migration.to_string(),
            result: result.into(),
            reason: reason.to_owned(),
            total_us: u64::try_from(took_ms).unwrap_or(0).saturating_mul(1000),
            ..Default::default()
        }
    }

    fn show_doubt(&self, why: &str) {
        if self.open.view().in_doubt.as_deref() == Some(why) {
            return;
        }
        let intent = &self.open.intent;
        let advice = format!(
            "{why}; it goes on when a node answers, or decide with `shoal resolve {} --keep {}` (or {})",
            self.record().name,
            intent.from,
            intent.to
        );
        self.publish(Kind::VmInDoubt, advice);
        self.open.update(|view| view.in_doubt = Some(why.to_owned()));
    }

    fn clear_doubt(&self) {
        if self.open.view().in_doubt.is_some() {
            self.open.update(|view| view.in_doubt = None);
        }
    }

    fn forget(&self, node: &NodeName, epoch: Epoch) {
        if let Some(node) = self.scheduler.nodes.get(node) {
            node.forget_vm(self.open.intent.vm, epoch);
        }
    }

    fn publish(&self, kind: Kind, message: String) {
        let event = NewEvent::new(kind, message)
            .vm(&self.record())
            .migration(self.open.intent.migration);
        self.scheduler.events.publish(event);
    }
}

fn reason(then: Then) -> &'static str {
    match then {
        Then::Stays => "the migration did not come to its end; the VM was not harmed",
        Then::Resume => "the destination never ran the VM; the source resumed it",
        Then::Exited => "the guest ended while it was being moved",
        Then::Lost => "the source's VMM is gone, and the destination did not have all of the VM",
        Then::Unknown => "the destination does not have the VM, and the source's node does not answer",
    }
}

fn figures(report: &MigrationReport) -> String {
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
