//! Power-off on request, and removal of what has ended.

use std::sync::Arc;
use std::time::Duration;

use shoal_proto::vm::{VmState, VmStatus};
use shoal_proto::{NodeName, node};

use super::finish;
use crate::agent::{Agent, AgentError};
use crate::events::{Kind, NewEvent};
use crate::record::{Outcome, Phase, VmRecord};
use crate::scheduler::Shared;
use crate::store::{StoreError, Write};
use crate::vms::{VmEntry, VmGuard};

/// How long a stop waits for the end of a migration that it has asked to cancel.
const CANCEL_TIME: Duration = Duration::from_secs(60);

/// VMs that have ended and are removed in one round.
const FORGOTTEN_AT_ONCE: usize = 100;

/// Why a VM was not stopped or removed.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// Two nodes may run it.
    #[error("VM {0} is in doubt: decide first with `shoal resolve {0} --keep NODE`")]
    InDoubt(String),
    /// Something else goes on for too long.
    #[error("VM {0} is busy; try again")]
    Busy(String),
    /// Its migration does not end.
    #[error("VM {vm} is being migrated to {to}, which can be neither cancelled nor ended now; try again")]
    Migrating {
        /// The VM's name.
        vm: String,
        /// Where to.
        to: String,
    },
    /// It has not ended.
    #[error("VM {0} has not ended; stop it first, or remove it with --force")]
    NotEnded(String),
    /// It has not ended as far as is known, and its node does not answer.
    #[error(
        "VM {vm} had not ended when node {node} answered last; remove it when {node} answers again. If its host is off and stays \
         off, say so with `shoal node lost {node}`: then VM {vm} has failed, and can be removed"
    )]
    NotKnown {
        /// The VM's name.
        vm: String,
        /// The node.
        node: String,
    },
    /// Its node does not answer.
    #[error(
        "{error}; VM {vm} is powered off as soon as {node} answers, and can be removed then. If its host is off and stays off, say \
         so with `shoal node lost {node}`: then VM {vm} has failed, and can be removed"
    )]
    Later {
        /// The VM's name.
        vm: String,
        /// The node.
        node: String,
        /// What was heard of it.
        error: AgentError,
    },
    /// It was stopped for another meanwhile.
    #[error("VM {0} waits for room: `shoal queue` shows it, `shoal rm {0}` takes it out")]
    Waits(String),
    /// Its node says no, or nothing.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// It has ended, but its node has not confirmed that nothing of it is left.
    #[error(
        "VM {vm} has ended, but node {node} has not confirmed that it is cleaned up; try again when it answers. If its host is off \
         and stays off, say so with `shoal node lost {node}`: then VM {vm} can be removed"
    )]
    NotConfirmed {
        /// The VM's name.
        vm: String,
        /// The node.
        node: String,
    },
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log cannot be deleted.
    #[error("console log cannot be deleted")]
    Log(#[from] std::io::Error),
}

/// Powers a VM off. Good if it has ended already.
pub async fn stop(scheduler: &Shared, entry: &Arc<VmEntry>) -> Result<(), StopError> {
    let guard = lock(scheduler, entry).await?;
    stop_guarded(scheduler, entry, &guard).await
}

/// Removes a VM that has ended; with `force` stops it first.
pub async fn remove(scheduler: &Shared, entry: &Arc<VmEntry>, force: bool) -> Result<(), StopError> {
    let record = entry.record();
    if !force && (!record.phase.is_over() || record.giving_way.is_some()) {
        let vm = record.name.to_string();
        return Err(if is_silent(scheduler, &record.node) {
            let node = record.node.to_string();
            StopError::NotKnown { vm, node }
        } else {
            StopError::NotEnded(vm)
        });
    }
    let guard = lock(scheduler, entry).await?;
    stop_guarded(scheduler, entry, &guard).await?;
    let record = entry.record();
    scheduler.store.apply(vec![Write::DeleteVm(record.id)]).await?;
    scheduler.vms.remove(record.id);
    scheduler.logs.remove(record.id).await?;
    scheduler
        .events
        .publish(NewEvent::new(Kind::VmRemoved, "removed").vm(&record));
    Ok(())
}

/// Removes those that ended first, with their logs, where more have ended than are kept.
pub async fn forget_ended(scheduler: &Shared) {
    let old = scheduler.vms.ended_but(scheduler.keep_ended, FORGOTTEN_AT_ONCE);
    for entry in old {
        let Some(_guard) = entry.try_lock() else { continue };
        let record = entry.record();
        if !matches!(record.phase, Phase::Ended(_)) {
            continue;
        }
        if let Err(error) = scheduler.store.apply(vec![Write::DeleteVm(record.id)]).await {
            return tracing::error!(
                error = &error as &dyn std::error::Error,
                "ended VMs are not removed"
            );
        }
        scheduler.vms.remove(record.id);
        if let Err(error) = scheduler.logs.remove(record.id).await {
            tracing::warn!(vm = %record.id, %error, "console log is left over");
        }
        let why = format!("removed, as {} others have ended since", scheduler.keep_ended);
        let event = NewEvent::new(Kind::VmRemoved, why);
        scheduler.events.publish(event.vm(&record));
    }
}

/// Waits for the VM; a migration is asked to cancel, or in post-copy to end with its VM.
async fn lock(scheduler: &Shared, entry: &Arc<VmEntry>) -> Result<VmGuard, StopError> {
    let record = entry.record();
    if let Some(open) = scheduler.migrations.get(record.id) {
        if open.view().in_doubt.is_some() {
            return Err(StopError::InDoubt(record.name.to_string()));
        }
        open.ask(|wish| {
            wish.cancel = true;
            wish.stop = true;
        });
    }
    tokio::time::timeout(CANCEL_TIME, entry.lock())
        .await
        .map_err(|_| {
            let vm = record.name.to_string();
            match scheduler.migrations.get(record.id) {
                Some(open) => StopError::Migrating {
                    vm,
                    to: open.intent.to.to_string(),
                },
                None => StopError::Busy(vm),
            }
        })
}

async fn stop_guarded(scheduler: &Shared, entry: &Arc<VmEntry>, guard: &VmGuard) -> Result<(), StopError> {
    let mut record = entry.record();
    if record.phase == Phase::Queued {
        return Err(StopError::Waits(record.name.to_string()));
    }
    if record.giving_way.is_some() {
        // It is not to come back.
        let ends = VmRecord {
            giving_way: None,
            message: String::new(),
            ..record.as_ref().clone()
        };
        record = scheduler.save_vm(ends, Vec::new()).await?;
    }
    if record.phase.is_over() {
        finish::clean_up(scheduler, entry, guard).await;
    } else {
        let agent = scheduler.agent(&record.node)?;
        if record.phase != Phase::Stopping {
            let stopping = VmRecord {
                phase: Phase::Stopping,
                ..record.as_ref().clone()
            };
            scheduler.save_vm(stopping, Vec::new()).await?;
        }
        let later = |error: AgentError| match error {
            AgentError::NoAnswer {
                vmm_is_silent: false, ..
            } if is_silent(scheduler, &record.node) => StopError::Later {
                vm: record.name.to_string(),
                node: record.node.to_string(),
                error,
            },
            error => error.into(),
        };
        let outcome = power_off(&agent, &record).await.map_err(later)?;
        finish::end_vm(scheduler, entry, outcome, guard).await;
    }
    let record = entry.record();
    match record.phase {
        Phase::Ended(_) => Ok(()),
        _ => Err(StopError::NotConfirmed {
            vm: record.name.to_string(),
            node: record.node.to_string(),
        }),
    }
}

fn is_silent(scheduler: &Shared, node: &NodeName) -> bool {
    let entry = scheduler.nodes.get(node);
    !entry.is_some_and(|entry| entry.is_reachable())
}

/// Powers a VM off at its node, and says how it ended: it may have ended before.
pub async fn power_off(agent: &Agent, record: &VmRecord) -> Result<Outcome, AgentError> {
    let stopped = agent.stop(record.id, record.epoch).await;
    if let Ok(status) = &stopped
        && status.state() == VmState::Exited
    {
        return Ok(exited(status));
    }
    match agent.describe(record.id, record.epoch).await {
        Ok(facts) => match (outcome(&facts), stopped) {
            (Some(outcome), _) => Ok(outcome),
            (None, Err(error)) => Err(error),
            (None, Ok(_)) => Err(AgentError::NoAnswer {
                node: record.node.clone(),
                what: "the VM was told to stop and has not".to_owned(),
                vmm_is_silent: false,
                unsent: false,
            }),
        },
        Err(error) if error.is_not_found() => Ok(Outcome::Failed {
            reason: format!("node {} no longer had it when it was to be stopped", record.node),
        }),
        Err(error) => Err(error),
    }
}

fn exited(status: &VmStatus) -> Outcome {
    let how = match (status.exit_status, status.status_message.as_str()) {
        (Some(_), _) => String::new(),
        (None, "") => "its VMM does not say how".to_owned(),
        (None, said) => crate::limits::shorten(said),
    };
    Outcome::Exited {
        status: status.exit_status,
        how,
    }
}

/// How a VM ended by what its node knows; None if it has not.
pub fn outcome(facts: &node::VmFacts) -> Option<Outcome> {
    let status = facts.status.clone().unwrap_or_default();
    match status.state() {
        VmState::Exited => Some(exited(&status)),
        VmState::Failed if status.status_message.is_empty() => Some(Outcome::Failed {
            reason: "the VMM reported a fault without saying which".to_owned(),
        }),
        VmState::Failed => Some(Outcome::Failed {
            reason: crate::limits::shorten(&status.status_message),
        }),
        _ if !facts.vmm_alive => {
            let detail = match status.status_message.as_str() {
                "" => String::new(),
                said => format!(": {}", crate::limits::shorten(said)),
            };
            Some(Outcome::Failed {
                reason: format!("the VMM process ended unexpectedly{detail}"),
            })
        }
        _ => None,
    }
}
