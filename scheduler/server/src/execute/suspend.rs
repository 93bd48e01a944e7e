//! A VM's vCPUs are stopped in place, and run again. What is wanted is stored before the node is told; if telling it fails
//! half-way, [`crate::reconcile`] goes on. A move of the VM is waited for: it ends with the VM as it began, and what is wanted
//! holds wherever that is.

use std::sync::Arc;
use std::time::Duration;

use shoal_plan::{Hold, Plan};

use crate::agent::AgentError;
use crate::events::{Kind, NewEvent};
use crate::record::{Phase, Suspension, VmRecord, now_unix_ms};
use crate::scheduler::Shared;
use crate::store::StoreError;
use crate::vms::{VmEntry, VmGuard};

/// How long another operation with the VM is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a VM was not suspended or resumed.
#[derive(Debug, thiserror::Error)]
pub enum SuspendError {
    /// It moves, and that takes longer than is waited for.
    #[error("VM {vm} is being migrated to {to}; try again when that has ended, or cancel it")]
    Migrating {
        /// The VM's name.
        vm: String,
        /// Where to.
        to: String,
    },
    /// It is starting, stopping or over.
    #[error("VM {vm} cannot be {what}: it does not run")]
    NotRunning {
        /// The VM's name.
        vm: String,
        /// What was asked for.
        what: &'static str,
    },
    /// Something else goes on for too long.
    #[error("VM {0} is busy; try again")]
    Busy(String),
    /// The node does not do it; nothing has changed.
    #[error("{0}")]
    Refused(AgentError),
    /// The node did not answer.
    #[error("VM {vm} will be {what} once its node answers: {source}")]
    Later {
        /// The VM's name.
        vm: String,
        /// What was asked for.
        what: &'static str,
        /// What the node said.
        source: AgentError,
    },
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Carries out what a plan says of VMs in place, each on a task of its own: the next round sees what has become of it.
pub fn begin_planned(scheduler: &Shared, plan: &Plan) {
    let entry = |hold: &Hold| {
        let id = hold.vm.as_str().parse().ok()?;
        scheduler.vms.get(id)
    };
    for hold in &plan.suspend {
        let Some(entry) = entry(hold) else { continue };
        let (shared, hold) = (Arc::clone(scheduler), hold.clone());
        tokio::spawn(async move {
            let done = suspend_planned(&shared, &entry, hold).await;
            tell(&entry, done);
        });
    }
    for hold in &plan.resume {
        let Some(entry) = entry(hold) else { continue };
        let (shared, hold) = (Arc::clone(scheduler), hold.clone());
        tokio::spawn(async move {
            let done = resume_planned(&shared, &entry, &hold).await;
            tell(&entry, done);
        });
    }
}

fn tell(entry: &VmEntry, done: Result<(), SuspendError>) {
    if let Err(error) = done {
        tracing::warn!(vm = %entry.record().id, %error, "a plan is not carried out");
    }
}

/// Stops the vCPUs of a VM, because a user asks for it. Good if they are stopped. It stays so until a user takes it back.
pub async fn suspend(scheduler: &Shared, entry: &Arc<VmEntry>, reason: String) -> Result<(), SuspendError> {
    let guard = lock(scheduler, entry).await?;
    hold(scheduler, entry, &guard, reason, None).await
}

/// The same because a plan says so; it may take it back.
async fn suspend_planned(
    scheduler: &Shared,
    entry: &Arc<VmEntry>,
    planned: Hold,
) -> Result<(), SuspendError> {
    let Some(guard) = lock_as_planned(scheduler, entry, &planned).await? else {
        return Ok(());
    };
    hold(scheduler, entry, &guard, planned.reason, Some(planned.growth.0)).await
}

/// `planned_growth`: how fast it grows, if a plan asks for it.
async fn hold(
    scheduler: &Shared,
    entry: &Arc<VmEntry>,
    _guard: &VmGuard,
    reason: String,
    planned_growth: Option<u64>,
) -> Result<(), SuspendError> {
    let record = running(entry, "suspended")?;
    let suspension = Suspension {
        reason: reason.clone(),
        since_unix_ms: now_unix_ms(),
        planned_growth,
    };
    match &record.suspended {
        None => {}
        Some(now) if now.planned_growth.is_some() && planned_growth.is_none() => {
            let since_unix_ms = now.since_unix_ms;
            let suspension = Suspension {
                since_unix_ms,
                ..suspension
            };
            return Ok(set(scheduler, &record, Some(suspension)).await?);
        }
        Some(_) => return Ok(()),
    }
    set(scheduler, &record, Some(suspension)).await?;
    let told = match scheduler.agent(&record.node) {
        Ok(agent) => agent.pause(record.id, record.epoch).await,
        Err(error) => Err(error),
    };
    match told {
        Ok(()) => {}
        Err(error @ AgentError::Refused(_)) => {
            set(scheduler, &record, None).await?;
            return Err(SuspendError::Refused(error));
        }
        Err(source) => {
            let (vm, what) = (record.name.to_string(), "suspended");
            return Err(SuspendError::Later { vm, what, source });
        }
    }
    let event = NewEvent::new(Kind::VmSuspended, reason).vm(&record);
    scheduler.events.publish(event);
    Ok(())
}

/// Lets a VM run on. Good if it runs.
pub async fn resume(scheduler: &Shared, entry: &Arc<VmEntry>) -> Result<(), SuspendError> {
    let _guard = lock(scheduler, entry).await?;
    let record = running(entry, "resumed")?;
    match record.suspended.clone() {
        Some(suspension) => run_on(scheduler, &record, &suspension, &suspension.reason).await,
        None => Ok(()),
    }
}

/// The same for a plan, which does not take back what a user asked for.
async fn resume_planned(
    scheduler: &Shared,
    entry: &Arc<VmEntry>,
    planned: &Hold,
) -> Result<(), SuspendError> {
    let Some(_guard) = lock_as_planned(scheduler, entry, planned).await? else {
        return Ok(());
    };
    let record = running(entry, "resumed")?;
    match record.suspended.clone() {
        Some(suspension) if suspension.planned_growth.is_some() => {
            run_on(scheduler, &record, &suspension, &planned.reason).await
        }
        _ => Ok(()),
    }
}

async fn run_on(
    scheduler: &Shared,
    record: &VmRecord,
    suspension: &Suspension,
    reason: &str,
) -> Result<(), SuspendError> {
    set(scheduler, record, None).await?;
    let told = match scheduler.agent(&record.node) {
        Ok(agent) => agent.resume(record.id, record.epoch).await,
        Err(error) => Err(error),
    };
    if let Err(source) = told {
        let (vm, what) = (record.name.to_string(), "resumed");
        return Err(SuspendError::Later { vm, what, source });
    }
    let seconds = now_unix_ms().saturating_sub(suspension.since_unix_ms).max(0) / 1000;
    let message = format!("runs on after {seconds} s ({reason})");
    scheduler
        .events
        .publish(NewEvent::new(Kind::VmResumed, message).vm(record));
    Ok(())
}

async fn lock(scheduler: &Shared, entry: &Arc<VmEntry>) -> Result<VmGuard, SuspendError> {
    let busy = |_| {
        let record = entry.record();
        let vm = record.name.to_string();
        match scheduler.migrations.get(record.id) {
            Some(open) => {
                let to = open.intent.to.to_string();
                SuspendError::Migrating { vm, to }
            }
            None => SuspendError::Busy(vm),
        }
    };
    tokio::time::timeout(PATIENCE, entry.lock()).await.map_err(busy)
}

/// A plan is about a VM where it was seen: none, if it has moved or is about to. The next one sees it as it is then.
async fn lock_as_planned(
    scheduler: &Shared,
    entry: &Arc<VmEntry>,
    planned: &Hold,
) -> Result<Option<VmGuard>, SuspendError> {
    if scheduler.migrations.get(entry.record().id).is_some() {
        return Ok(None);
    }
    let guard = lock(scheduler, entry).await?;
    let is_there = entry.record().node.as_str() == planned.node.as_str();
    Ok(is_there.then_some(guard))
}

fn running(entry: &VmEntry, what: &'static str) -> Result<Arc<VmRecord>, SuspendError> {
    let record = entry.record();
    if record.phase == Phase::Running {
        return Ok(record);
    }
    let vm = record.name.to_string();
    Err(SuspendError::NotRunning { vm, what })
}

async fn set(scheduler: &Shared, record: &VmRecord, suspended: Option<Suspension>) -> Result<(), StoreError> {
    let record = VmRecord {
        suspended,
        ..record.clone()
    };
    scheduler.save_vm(record, Vec::new()).await.map(drop)
}
