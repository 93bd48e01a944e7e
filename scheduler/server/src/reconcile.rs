//! Makes nodes and records agree again: guests that ended, VMMs that died, copies that should not be, operations that a
//! crash of the scheduler interrupted. A subject that cannot be dealt with now comes again with its node's next report.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shoal_proto::{Epoch, MigrationId, NodeName, VmId, vm};
use tokio::sync::{Semaphore, mpsc};

use crate::events::{Kind, NewEvent};
use crate::execute::settle::Settlement;
use crate::execute::stop::{self, outcome};
use crate::execute::{finish, launch, lost};
use crate::policy::{self, Cause};
use crate::record::{Intent, Outcome, Phase, VmRecord, now_unix_ms};
use crate::scheduler::{Scheduler, Shared};
use crate::store::{StoreError, Write};
use crate::vms::{VmEntry, VmGuard};

/// Subjects dealt with at a time.
const PARALLEL: usize = 64;
/// How long a stray copy waits for what else is done with its VM.
const STRAY_PATIENCE: Duration = Duration::from_secs(1);
/// A node that has not reported this long after the scheduler's start is not waited for before a VM counts as lost.
const ALL_REPORT: Duration = Duration::from_secs(60);
/// Starts and moves of one VM that this scheduler may not know of, as its store was put back to an old state.
const BELIEVED: u64 = 1 << 20;
/// VMs that no record knows are announced once each, up to this many.
const ANNOUNCED_STRANGERS: usize = 10_000;

/// Something to look at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A VM that its owner reports otherwise than its record says, or does not report.
    Vm(VmId),
    /// A copy of a VM that its node should not have.
    Stray {
        /// Where it is.
        node: NodeName,
        /// The VM.
        vm: VmId,
        /// The copy's epoch.
        epoch: Epoch,
    },
    /// A node that was declared lost, and reports.
    Returned(NodeName),
}

/// Subjects waiting, each once.
#[derive(Debug)]
pub struct ReconcileQueue {
    sender: mpsc::UnboundedSender<Subject>,
    waiting: Mutex<HashSet<Subject>>,
    strangers: Mutex<HashSet<(NodeName, VmId)>>,
}

impl ReconcileQueue {
    /// The queue and its other end, for [`run`].
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Subject>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (
            Self {
                sender,
                waiting: Mutex::default(),
                strangers: Mutex::default(),
            },
            receiver,
        )
    }

    /// Adds a subject unless it waits already.
    pub fn push(&self, subject: Subject) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.insert(subject.clone()) {
            // It fails only when the scheduler ends.
            let _ = self.sender.send(subject);
        }
    }

    fn taken(&self, subject: &Subject) {
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(subject);
    }

    fn is_new_stranger(&self, node: &NodeName, vm: VmId) -> bool {
        let mut strangers = self.strangers.lock().unwrap_or_else(PoisonError::into_inner);
        strangers.len() < ANNOUNCED_STRANGERS && strangers.insert((node.clone(), vm))
    }
}

/// Deals with subjects as they come.
pub async fn run(scheduler: Shared, mut subjects: mpsc::UnboundedReceiver<Subject>) {
    let parallel = Arc::new(Semaphore::new(PARALLEL));
    while let Some(subject) = subjects.recv().await {
        let Ok(permit) = Arc::clone(&parallel).acquire_owned().await else {
            return;
        };
        let scheduler = Arc::clone(&scheduler);
        tokio::spawn(async move {
            scheduler.reconcile.taken(&subject);
            match subject {
                Subject::Vm(vm) => reconcile_vm(&scheduler, vm).await,
                Subject::Stray { node, vm, epoch } => reconcile_stray(&scheduler, &node, vm, epoch).await,
                Subject::Returned(node) => lost::clear(&scheduler, &node).await,
            }
            drop(permit);
        });
    }
}

async fn reconcile_vm(scheduler: &Shared, vm: VmId) {
    let Some(entry) = scheduler.vms.get(vm) else {
        return;
    };
    // Whoever has the guard deals with the VM already.
    let Some(guard) = entry.try_lock() else { return };
    if lost::end(scheduler, &entry, &guard).await {
        return;
    }
    match &entry.record().phase {
        Phase::Starting => launch::resume_start(scheduler, &entry, &guard).await,
        Phase::Running => check_running(scheduler, &entry, &guard).await,
        Phase::Stopping => finish_stop(scheduler, &entry, &guard).await,
        Phase::Ending(_) => finish::clean_up(scheduler, &entry, &guard).await,
        Phase::Ended(_) => destroy_leftover(scheduler, &entry).await,
        Phase::Queued => {}
    }
}

/// Asks the owner about a VM that should be running, and acts on what it says.
pub async fn check_running(scheduler: &Scheduler, entry: &VmEntry, guard: &VmGuard) {
    let record = entry.record();
    let Ok(agent) = scheduler.agent(&record.node) else {
        return;
    };
    let facts = match agent.describe(record.id, record.epoch).await {
        Ok(facts) => facts,
        Err(error) if error.is_not_found() && is_nowhere_else(scheduler, &record) => {
            let reason = format!(
                "node {} no longer knows it; was the host started again, or its state directory removed?",
                record.node
            );
            return finish::end_vm(scheduler, entry, Outcome::Failed { reason }, guard).await;
        }
        Err(_) => return,
    };
    if let Some(outcome) = outcome(&facts) {
        return finish::end_vm(scheduler, entry, outcome, guard).await;
    }
    let status = facts.status.unwrap_or_default();
    let migration = status.outgoing_migration_id.as_str();
    let result = match status.state() {
        // The migration it waits for was closed after the destination said, or an operator decided, that it never runs.
        vm::VmState::InDoubt if entry.has_ended_migration(migration) => {
            agent.resume(record.id, record.epoch).await
        }
        // The record is what is wanted; the call that should have told the node was lost.
        vm::VmState::Paused if record.suspended.is_none() => agent.resume(record.id, record.epoch).await,
        vm::VmState::Running if record.suspended.is_some() => agent.pause(record.id, record.epoch).await,
        // A start that was given up arrived late. It cannot succeed: its destination was told to abort.
        vm::VmState::Migrating => agent.cancel_migration(record.id, record.epoch, migration).await,
        _ => Ok(()),
    };
    if let Err(error) = result {
        tracing::info!(vm = %record.id, node = %record.node, %error, "reconcile: later");
    }
}

/// No node has a newer copy, as far as can be known: with a store put back to an old state, the VM may have moved on.
fn is_nowhere_else(scheduler: &Scheduler, record: &VmRecord) -> bool {
    let nodes = scheduler.nodes.list();
    let all_heard = nodes.iter().all(|node| node.has_reported()) || scheduler.started.elapsed() > ALL_REPORT;
    let newer = |epoch: &Epoch| *epoch > record.epoch && *epoch > record.fenced_through;
    all_heard
        && !nodes
            .iter()
            .any(|node| node.epochs_of(record.id).iter().any(newer))
}

async fn finish_stop(scheduler: &Scheduler, entry: &VmEntry, guard: &VmGuard) {
    let record = entry.record();
    let Ok(agent) = scheduler.agent(&record.node) else {
        return;
    };
    if let Ok(outcome) = stop::power_off(&agent, &record).await {
        finish::end_vm(scheduler, entry, outcome, guard).await;
    }
}

async fn destroy_leftover(scheduler: &Scheduler, entry: &VmEntry) {
    let record = entry.record();
    if let Some(node) = scheduler.nodes.get(&record.node)
        && node.observed_vm(record.id, record.epoch).is_some()
        && node.agent().destroy(record.id, record.epoch).await.is_ok()
    {
        node.forget_vm(record.id, record.epoch);
    }
}

/// A copy that the record does not know of is destroyed if it is fenced or never ran; if it runs at a newer epoch, it
/// is what a lost message left behind, and the migration that brought it there is taken up again.
async fn reconcile_stray(scheduler: &Shared, node: &NodeName, vm: VmId, epoch: Epoch) {
    let Some(entry) = scheduler.vms.get(vm) else {
        if let Some(waiting) = scheduler.queue.find(&vm.to_string()) {
            return destroy_former_run(scheduler, node, vm, epoch, &waiting.record.vm).await;
        }
        if scheduler.reconcile.is_new_stranger(node, vm) {
            let message =
                format!("{node} runs VM {vm}, which this scheduler has no record of; it is left alone");
            scheduler
                .events
                .publish(NewEvent::new(Kind::VmUnknown, message).node(node));
        }
        return;
    };
    if scheduler.nodes.is_lost(node) {
        return;
    }
    // A look at the same VM's owner, which may come with every report, must not crowd this out.
    let Ok(guard) = tokio::time::timeout(STRAY_PATIENCE, entry.lock()).await else {
        return;
    };
    let record = entry.record();
    if scheduler.migrations.get(vm).is_some() || (record.node == *node && record.epoch == epoch) {
        return;
    }
    let Some(place) = scheduler.nodes.get(node) else {
        return;
    };
    let agent = place.agent();
    let seen = place
        .observed_vm(vm, epoch)
        .and_then(|seen| seen.facts.status.clone())
        .unwrap_or_default();
    let migration: MigrationId = seen
        .incoming_migration_id
        .parse()
        .unwrap_or_else(|_| MigrationId::new());
    if seen.state() == vm::VmState::PostCopy && owner_misses_memory(scheduler, &record) {
        return;
    }
    if epoch.0 > record.last_epoch.0.saturating_add(BELIEVED) {
        if scheduler.reconcile.is_new_stranger(node, vm) {
            let message = format!(
                "{node} says that it has VM {} at epoch {epoch}, which no scheduler can have given it; it is left alone",
                record.name
            );
            let event = NewEvent::new(Kind::VmUnknown, message).vm(&record);
            scheduler.events.publish(event.node(node));
        }
        return;
    }
    if epoch > record.epoch && epoch > record.fenced_through && !record.phase.is_over() {
        match agent.abort_incoming(vm, epoch, migration).await {
            Ok(false) => {}
            Ok(true) => {
                let found = (node.clone(), epoch, migration);
                if let Err(error) = take_up(scheduler, &entry, guard, found).await {
                    tracing::error!(%vm, error = &error as &dyn std::error::Error, "intent not stored");
                }
                return;
            }
            Err(_) => return,
        }
    }
    if agent.destroy(vm, epoch).await.is_ok() {
        tracing::info!(%vm, %node, %epoch, "destroyed a stale copy");
        place.forget_vm(vm, epoch);
    }
}

/// A VM that waits runs nowhere: what is left of an earlier run is destroyed. Should it start meanwhile, that is a newer epoch.
async fn destroy_former_run(
    scheduler: &Scheduler,
    node: &NodeName,
    vm: VmId,
    epoch: Epoch,
    record: &VmRecord,
) {
    if epoch > record.fenced_through {
        return;
    }
    if let Some(place) = scheduler.nodes.get(node)
        && place.agent().destroy(vm, epoch).await.is_ok()
    {
        tracing::info!(%vm, %node, %epoch, "destroyed what was left of an earlier run");
        place.forget_vm(vm, epoch);
    }
}

/// By its last report; unless that is there and says no, it may.
fn owner_misses_memory(scheduler: &Scheduler, record: &VmRecord) -> bool {
    let owner = scheduler.nodes.get(&record.node);
    let seen = owner.and_then(|node| node.observed_vm(record.id, record.epoch));
    let status = seen.and_then(|seen| seen.facts.vmm_alive.then(|| seen.facts.status.clone()).flatten());
    !record.phase.is_over() && status.is_none_or(|status| status.missing_bytes > 0)
}

async fn take_up(
    scheduler: &Shared,
    entry: &Arc<VmEntry>,
    guard: VmGuard,
    (to, epoch, migration): (NodeName, Epoch, MigrationId),
) -> Result<(), StoreError> {
    let _planning = scheduler.planning.lock().await;
    if scheduler.nodes.is_lost(&to) {
        return Ok(());
    }
    let record = entry.record();
    let intent = Arc::new(Intent {
        vm: record.id,
        migration,
        from: record.node.clone(),
        from_epoch: record.epoch,
        to,
        epoch,
        reason: "found running at a newer epoch".to_owned(),
        started_unix_ms: now_unix_ms(),
        policy: policy::resolve(
            &vm::MigrationPolicy::default(),
            &scheduler.defaults.policy(),
            Cause::Requested,
        ),
        expected: None,
    });
    let last_epoch = record.last_epoch.max(epoch);
    let record = VmRecord {
        last_epoch,
        ..record.as_ref().clone()
    };
    scheduler
        .save_vm(record, vec![Write::PutIntent(Arc::clone(&intent))])
        .await?;
    let open = scheduler.migrations.take_up(intent);
    scheduler.share_bandwidth();
    let settlement = Settlement::new(Arc::clone(scheduler), Arc::clone(entry), open, guard);
    tokio::spawn(settlement.settle());
    Ok(())
}

/// At start, before anything is served: every open intent is taken up where it was left.
pub fn recover(scheduler: &Shared, intents: Vec<Intent>) {
    for intent in intents {
        let Some(entry) = scheduler.vms.get(intent.vm) else {
            tracing::error!(vm = %intent.vm, migration = %intent.migration, "intent without a VM is ignored");
            continue;
        };
        let Some(guard) = entry.try_lock() else { continue };
        tracing::info!(vm = %intent.vm, migration = %intent.migration, "taking up a migration");
        let open = scheduler.migrations.take_up(Arc::new(intent));
        tokio::spawn(Settlement::inherit(Arc::clone(scheduler), entry, open, guard).settle());
    }
    scheduler.share_bandwidth();
}
