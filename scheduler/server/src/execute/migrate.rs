//! One migration: decide where to, store the intent, prepare the destination, start the source. Whatever comes of it
//! is brought to its end by [`super::settle`], which also is the undo of every step here.

use std::sync::Arc;
use std::time::Duration;

use shoal_plan as plan;
use shoal_proto::{MigrationId, NodeName, vm};

use super::settle::Settlement;
use crate::agent::AgentError;
use crate::events::{Kind, NewEvent};
use crate::migrations::OpenMigration;
use crate::observe;
use crate::policy::{self, Cause};
use crate::record::{Intent, Phase, VmRecord, now_unix_ms};
use crate::scheduler::{Scheduler, Shared};
use crate::store::{StoreError, Write};
use crate::vms::{VmEntry, VmGuard};

/// Why a migration does not begin. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// There is one already.
    #[error("VM {vm} is being migrated to {to} already; follow it with `shoal inspect {vm}`")]
    AlreadyMigrating {
        /// The VM's name.
        vm: String,
        /// Where to.
        to: NodeName,
    },
    /// The VM neither runs nor is suspended.
    #[error("VM {vm} cannot be moved: {why}")]
    NotRunning {
        /// The VM's name.
        vm: String,
        /// What it does.
        why: &'static str,
    },
    /// Only its node can send it.
    #[error(
        "VM {vm} cannot be moved while node {node} does not answer: only {node} has its memory. If its host is off and stays off, \
         say so with `shoal node lost {node}`: then VM {vm} has failed, and can be removed and run again"
    )]
    NodeSilent {
        /// The VM's name.
        vm: String,
        /// The node.
        node: NodeName,
    },
    /// Something else is done with the VM; only for planned moves, which do not wait.
    #[error("VM {0} is busy")]
    Busy(String),
    /// The planner refuses.
    #[error(transparent)]
    Refused(#[from] plan::MigrateError),
    /// The intent cannot be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Where to and why.
#[derive(Debug)]
struct Decision {
    to: NodeName,
    reason: String,
    policy: vm::MigrationPolicy,
    expected: Option<Duration>,
}

/// Begins a migration that someone asked for; waits until nothing else is done with the VM.
pub async fn begin_requested(
    scheduler: &Shared,
    entry: &Arc<VmEntry>,
    to: Option<&NodeName>,
    asked_policy: &vm::MigrationPolicy,
) -> Result<Arc<OpenMigration>, BeginError> {
    let record = entry.record();
    if let Some(open) = scheduler.migrations.get(record.id) {
        return Err(BeginError::AlreadyMigrating {
            vm: record.name.to_string(),
            to: open.intent.to.clone(),
        });
    }
    let guard = entry.lock().await;
    let record = movable(entry)?;
    let node = scheduler.nodes.get(&record.node);
    if !node.is_some_and(|node| node.is_reachable()) {
        return Err(BeginError::NodeSilent {
            vm: record.name.to_string(),
            node: record.node.clone(),
        });
    }
    let _planning = scheduler.planning.lock().await;
    let id = plan::VmId::new(&record.id.to_string());
    let asked = to.map(|to| plan::NodeName::new(to.as_str()));
    let snapshot = observe::snapshot(scheduler);
    let policy = scheduler.policy.get();
    let place = if to == Some(&record.node) {
        plan::place_handover(&snapshot, &policy, &id, has_shared_memory(scheduler, &record))?
    } else {
        plan::place_migration(&snapshot, &policy, &id, asked.as_ref())?
    };
    let decision = Decision {
        to: node_name(&place.node)?,
        reason: format!("requested; {}", place.reason),
        policy: policy::resolve(asked_policy, &scheduler.defaults.policy(), Cause::Requested),
        expected: None,
    };
    open(scheduler, entry, guard, &record, decision).await
}

/// Begins a migration that the planner wants. The caller holds the planning lock since the snapshot was taken.
pub async fn begin_planned(
    scheduler: &Shared,
    action: &plan::Action,
) -> Result<Arc<OpenMigration>, BeginError> {
    let gone = || plan::MigrateError::UnknownVm(action.vm.clone());
    let entry = action
        .vm
        .as_str()
        .parse()
        .ok()
        .and_then(|id| scheduler.vms.get(id))
        .ok_or_else(gone)?;
    let guard = entry
        .try_lock()
        .ok_or_else(|| BeginError::Busy(entry.record().name.to_string()))?;
    let record = movable(&entry)?;
    let reason = format!("{}: {}", action.kind, action.reason);
    let decision = Decision {
        to: node_name(&action.to)?,
        reason,
        policy: policy::resolve(
            &vm::MigrationPolicy::default(),
            &scheduler.defaults.policy(),
            Cause::Planned(action.kind),
        ),
        expected: Some(action.expected),
    };
    open(scheduler, &entry, guard, &record, decision).await
}

fn movable(entry: &VmEntry) -> Result<Arc<VmRecord>, BeginError> {
    let record = entry.record();
    let why = match record.phase {
        Phase::Running => return Ok(record),
        Phase::Starting => "it is starting",
        Phase::Queued => "it waits for room",
        Phase::Stopping => "it is stopping",
        Phase::Ending(_) | Phase::Ended(_) => "it has ended",
    };
    Err(BeginError::NotRunning {
        vm: record.name.to_string(),
        why,
    })
}

/// Its guest memory can be handed to another VMM on its node without a copy.
fn has_shared_memory(scheduler: &Scheduler, record: &VmRecord) -> bool {
    let node = scheduler.nodes.get(&record.node);
    let seen = node.and_then(|node| node.observed_vm(record.id, record.epoch));
    seen.and_then(|seen| seen.facts.status.clone())
        .is_some_and(|status| status.memory_backing() == vm::MemoryBacking::Shared)
}

fn node_name(name: &plan::NodeName) -> Result<NodeName, plan::MigrateError> {
    name.as_str()
        .parse()
        .map_err(|_| plan::MigrateError::UnknownNode(name.clone()))
}

/// Stores the intent with the next epoch, then lets the migration run on its own.
async fn open(
    scheduler: &Shared,
    entry: &Arc<VmEntry>,
    guard: VmGuard,
    record: &VmRecord,
    decision: Decision,
) -> Result<Arc<OpenMigration>, BeginError> {
    let epoch = record.last_epoch.next();
    let intent = Arc::new(Intent {
        vm: record.id,
        migration: MigrationId::new(),
        from: record.node.clone(),
        from_epoch: record.epoch,
        to: decision.to,
        epoch,
        reason: decision.reason,
        started_unix_ms: now_unix_ms(),
        policy: decision.policy,
        expected: decision.expected,
    });
    let record = VmRecord {
        last_epoch: epoch,
        ..record.clone()
    };
    let record = scheduler
        .save_vm(record, vec![Write::PutIntent(Arc::clone(&intent))])
        .await?;
    let migration = scheduler.migrations.open(Arc::clone(&intent));
    scheduler.share_bandwidth();
    let message = format!("{} to {}: {}", intent.from, intent.to, intent.reason);
    scheduler.events.publish(
        NewEvent::new(Kind::MigrationPlanned, message)
            .vm(&record)
            .migration(intent.migration),
    );
    let settlement = Settlement::new(
        Arc::clone(scheduler),
        Arc::clone(entry),
        Arc::clone(&migration),
        guard,
    );
    tokio::spawn(run(settlement));
    Ok(migration)
}

async fn run(mut settlement: Settlement) {
    if let Err(error) = settlement.wait_for_turn().await {
        return settlement.never_began(&error).await;
    }
    if let Err(error) = attempt(&settlement).await {
        settlement.start_failed(&error);
    }
    settlement.settle().await;
}

/// Why an attempt did not get as far as a running migration.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The destination was not prepared.
    #[error(transparent)]
    NotPrepared(AgentError),
    /// The source refused to start, or was never told to.
    #[error(transparent)]
    NotStarted(AgentError),
    /// Whether it started is not known: its answer was lost.
    #[error(transparent)]
    Unclear(AgentError),
    /// Someone cancelled it before that.
    #[error("cancelled on request, before it began")]
    Cancelled,
    /// One of its nodes was declared lost before that.
    #[error("node {0} was declared lost before it began")]
    Lost(NodeName),
    /// There is nothing left to move.
    #[error("the guest ended before it began")]
    GuestEnded,
}

impl AttemptError {
    /// It says something of the destination, or of the way there. A source that does not answer, or a guest that ended, does not.
    pub fn blames_the_way(&self) -> bool {
        match self {
            Self::NotPrepared(_) | Self::NotStarted(AgentError::Refused(_)) => true,
            Self::NotStarted(AgentError::NoAnswer { .. })
            | Self::Unclear(_)
            | Self::Cancelled
            | Self::Lost(_)
            | Self::GuestEnded => false,
        }
    }
}

async fn attempt(settlement: &Settlement) -> Result<(), AttemptError> {
    let (intent, open) = (&settlement.intent(), settlement.open());
    let spec = settlement.record().to_spec(intent.epoch);
    let token = MigrationId::new().to_string();
    let destination = settlement.agent(&intent.to).map_err(AttemptError::NotPrepared)?;
    let mut wishes = open.wishes();
    let destination_address = tokio::select! {
        prepared = destination.prepare_incoming(spec, intent.migration, token.clone(), &intent.from) => {
            prepared.map_err(AttemptError::NotPrepared)?
        }
        // Settling has it aborted there; should the preparation be the later one, it is refused.
        Ok(_) = wishes.wait_for(|wish| wish.cancel) => {
            settlement.check_nodes()?;
            return Err(AttemptError::Cancelled);
        }
    };
    settlement.check_nodes()?;
    if wishes.borrow().cancel {
        return Err(AttemptError::Cancelled);
    }
    let source = settlement.agent(&intent.from).map_err(AttemptError::NotStarted)?;
    let mut told = open.told.lock().await;
    let share = open.rate();
    let request = vm::StartMigrationRequest {
        migration_id: intent.migration.to_string(),
        token,
        destination_address,
        destination_epoch: intent.epoch.0,
        policy: Some(vm::MigrationPolicy {
            bandwidth_bytes_per_second: share,
            ..open.policy()
        }),
        tls: None,
    };
    *told = share;
    source
        .start_migration(intent.vm, intent.from_epoch, request, &intent.to)
        .await
        .map_err(|error| {
            if error.is_without_effect() {
                AttemptError::NotStarted(error)
            } else {
                AttemptError::Unclear(error)
            }
        })
}
