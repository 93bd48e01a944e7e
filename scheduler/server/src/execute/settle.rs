//! Brings an open migration to its end: after a normal run, after any error, and when the scheduler starts and finds
//! the intent. Asks both nodes, has [`decide`] say what follows, does it, until the intent is closed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_proto::vm::{MigrationReport, MigrationResult};
use shoal_proto::{Epoch, NodeName, cluster};

use super::decide::{Destination, Known, Source, Step, Then, Waiting, decide, destination_view, source_view};
use super::migrate::AttemptError;
use super::{Backoff, finish, guest_gap};
use crate::agent::{Agent, AgentError};
use crate::events::{Kind, NewEvent};
use crate::history;
use crate::migrations::OpenMigration;
use crate::reconcile::{self, Subject};
use crate::record::{Intent, Outcome, VmRecord, now_unix_ms};
use crate::scheduler::Shared;
use crate::store::Write;
use crate::vms::{VmEntry, VmGuard};
use ending::{figures, link_rate, reason};

/// When both nodes have said the same for this long, what was on its way has arrived or never will: a start whose answer
/// was lost, the last pages of a source that ended, the word that nothing is missing any more.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the end of a migration waits for the source's cleaning up, which goes on by itself if it takes longer.
const CLEANUP_TIME: Duration = Duration::from_secs(8);

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
    /// Someone cancelled it before it was started.
    cancelled: bool,
    /// An earlier scheduler stored the intent.
    is_inherited: bool,
    /// Should it fail, that says something of the destination or of the way there.
    blames_the_way: bool,
    /// What the destination said last.
    destination: Destination,
    /// The source has said that the VM runs at its destination.
    ran_by_source: bool,
    /// The destination's VMM process had died when that was last asked.
    destination_died: bool,
    /// The destination's agent has said that the VM has run there.
    has_run_there: bool,
    /// What both said last, and since when.
    said: (Source, Destination),
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
            cancelled: false,
            is_inherited: false,
            blames_the_way: true,
            destination: Destination::Silent,
            ran_by_source: false,
            destination_died: false,
            has_run_there: false,
            said: (Source::Silent, Destination::Silent),
            since,
        }
    }

    /// For an intent that an earlier scheduler has stored.
    pub fn inherit(scheduler: Shared, entry: Arc<VmEntry>, open: Arc<OpenMigration>, guard: VmGuard) -> Self {
        Self {
            is_inherited: true,
            ..Self::new(scheduler, entry, open, guard)
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

    /// What is known of it in memory.
    pub fn open(&self) -> &OpenMigration {
        &self.open
    }

    /// Notes that the attempt did not get as far as a running migration.
    pub fn start_failed(&mut self, error: &AttemptError) {
        self.error = Some(error.to_string());
        self.start_refused = !matches!(error, AttemptError::Unclear(_));
        self.cancelled = matches!(error, AttemptError::Cancelled | AttemptError::Lost(_));
        self.blames_the_way = error.blames_the_way();
    }

    /// Goes on until the intent is closed.
    pub async fn settle(mut self) {
        let mut backoff = Backoff::new();
        let mut wishes = self.open.wishes();
        let owned = self.owned();
        self.open.update(|view| view.post_copy = owned);
        loop {
            let wish = wishes.borrow_and_update().clone();
            if let Some(keep) = wish.keep {
                self.resolve(&keep).await;
                break;
            }
            if wish.stop {
                self.stop_there().await;
            }
            // The source first: it never ceases to be in doubt by itself, so what the destination says later still holds.
            let source = self.ask_source().await;
            let destination = self.ask_destination().await;
            let (source, destination) = self.with_operators_word(source, destination);
            let step = decide(source, destination, self.known((source, destination)));
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
                Step::Lose => {
                    self.lose().await;
                    break;
                }
                Step::Follow => {
                    self.clear_doubt();
                    if self.follow(source).await {
                        continue;
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
        self.give_back();
    }

    fn give_back(self) {
        drop(self.guard);
        self.scheduler.reconcile.push(Subject::Vm(self.open.intent.vm));
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
                self.destination = destination_view(facts.as_ref());
            }
            // Told to abort, its agent ends it unless it has run.
            Err(error) if error.vmm_is_silent() && !self.has_run_there => {
                self.destination = Destination::Waiting;
            }
            Err(_) => self.destination = Destination::Silent,
        }
        self.destination
    }

    fn known(&mut self, said: (Source, Destination)) -> Known {
        if self.said != said {
            self.said = said;
            self.since = Instant::now();
        }
        Known {
            patient: self.since.elapsed() < PATIENCE,
            owned: self.owned(),
            unwanted: self.start_refused || self.is_to_be_cancelled(),
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

    /// Has the destination say that it never runs the VM; true when the migration has ended one way or the other.
    async fn abandon(&mut self, then: Then) -> bool {
        let intent = self.intent();
        let Ok(agent) = self.agent(&intent.to) else {
            return false;
        };
        let lost = self.is_lost(&intent.to);
        let ran = match agent
            .abort_incoming(intent.vm, intent.epoch, intent.migration)
            .await
        {
            // It runs, or has run: the next look tells what that means.
            Ok(true) if !lost => {
                self.has_run_there = true;
                return false;
            }
            Ok(ran) => ran,
            Err(_) if lost => false,
            Err(error) => {
                tracing::info!(vm = %intent.vm, migration = %intent.migration, %error, "abort not confirmed yet");
                return false;
            }
        };
        if let Err(error) = agent.destroy(intent.vm, intent.epoch).await {
            // Unless it runs, it never can; the node's next report has it destroyed.
            tracing::info!(vm = %intent.vm, migration = %intent.migration, %error, "incoming VM not cleaned up yet");
            if ran {
                return false;
            }
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
            _ if self.owned() && self.destination == Destination::Ended => self.own_report(
                MigrationResult::Completed,
                "the VM ended at its destination before all of its memory had come",
            ),
            _ => self.own_report(
                MigrationResult::Completed,
                "completed; the source's report with its figures was lost",
            ),
        };
        if let (Some(rate), Some(node)) = (link_rate(&report), self.scheduler.nodes.get(&intent.from)) {
            node.measured_link(rate);
        }
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
        if !migration.report.as_ref().is_some_and(|report| report.paused) {
            guest_gap::note_later(&self.scheduler, intent);
        }
        self.open.update(|view| view.outcome = Some(migration));
    }

    /// The VM did not move.
    async fn close(&mut self, then: Then) {
        if then != Then::Unknown {
            self.fetch_report().await;
        }
        let never_began = self.is_inherited
            && then == Then::Stays
            && matches!(self.said.0, Source::Running { over: false });
        self.blames_the_way &= matches!(then, Then::Stays | Then::Resume);
        self.note_cancelled(then);
        let to = &self.open.intent.to;
        let report = match (self.report.take(), &self.error) {
            (Some(mut report), _) if report.result() == MigrationResult::Cancelled && self.is_lost(to) => {
                report.reason = format!("node {to} was declared lost");
                report
            }
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
            (_, Some(error)) if self.cancelled => self.own_report(MigrationResult::Cancelled, error),
            (_, Some(error)) => self.own_report(MigrationResult::Failed, error),
            _ if never_began => self.own_report(
                MigrationResult::Cancelled,
                "the scheduler was restarted before it began; the VM was not harmed",
            ),
            _ => self.own_report(MigrationResult::Failed, reason(then)),
        };
        self.close_with(then, report, |_| {}).await;
    }

    async fn close_with(&mut self, then: Then, report: MigrationReport, change: impl FnOnce(&mut VmRecord)) {
        let intent = self.intent();
        let mut record = self.record().as_ref().clone();
        record.message = String::new();
        if self.is_lost(&intent.to) {
            record.fenced_through = record.last_epoch;
        }
        change(&mut record);
        let words = report.reason.clone();
        let how = match report.result() {
            MigrationResult::Cancelled => "cancelled",
            _ => "failed",
        };
        let migration = self.record_end(record, report).await;
        let fate = match then {
            Then::Stays => "stays",
            Then::Resume if self.record().suspended.is_some() => "stays suspended",
            Then::Resume => "resumed",
            Then::Exited => "has ended",
            Then::Lost => "is lost",
            Then::Unknown => "is unknown until its node answers",
        };
        let message = format!(
            "{} to {} {how}, the VM {fate} on {}: {words}",
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
                if !crate::execute::lost::end(&self.scheduler, &self.entry, &self.guard).await {
                    let outcome = Outcome::Failed { reason };
                    finish::end_vm(&self.scheduler, &self.entry, outcome, &self.guard).await;
                }
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
            self.blames_the_way = false;
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
            report: Some(report),
            progress: None,
            waits: String::new(),
            ..self.open.to_wire(record.name.as_str())
        };
        let mut writes = self.scheduler.history.add(&migration);
        writes.push(Write::DeleteIntent(intent.vm));
        self.entry.remember_migration(history::light(migration.clone()));
        finish::save_at_last(&self.scheduler, record, writes).await;
        self.scheduler.migrations.close(intent.vm);
        self.scheduler.share_bandwidth();
        self.scheduler.metrics.count(&migration);
        self.learn(&migration);
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

mod ending;
mod lost;
mod post_copy;
mod turn;
mod watch;
