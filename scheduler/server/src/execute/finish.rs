//! The end of a VM's life, and writes that must not fail.

use std::sync::Arc;

use super::{Backoff, preempt};
use crate::events::{Kind, NewEvent};
use crate::record::{Outcome, Phase, Runs, VmRecord, now_unix_ms};
use crate::scheduler::Scheduler;
use crate::store::{StoreError, Write};
use crate::vms::{VmEntry, VmGuard};

/// Stores what has already happened on the nodes, and so cannot be taken back: tries until the disk takes it. What can never be
/// stored is told, and does not return: its caller holds the VM, with which nothing may be done that the store does not know of.
/// The next scheduler finds what was stored before, and asks the nodes.
pub async fn save_at_last(scheduler: &Scheduler, record: VmRecord, writes: Vec<Write>) -> Arc<VmRecord> {
    let mut backoff = Backoff::new();
    loop {
        match scheduler.save_vm(record.clone(), writes.clone()).await {
            Ok(record) => return record,
            Err(error) if error.can_pass() => {
                tracing::error!(vm = %record.id, error = &error as &dyn std::error::Error, "store; trying again");
                backoff.pause().await;
            }
            Err(error) => {
                tell_that_it_is_refused(scheduler, &record, &error);
                return std::future::pending().await;
            }
        }
    }
}

fn tell_that_it_is_refused(scheduler: &Scheduler, record: &VmRecord, error: &StoreError) {
    tracing::error!(vm = %record.id, error = error as &dyn std::error::Error, "store; not tried again");
    // A scheduler that does not lead has nothing to tell: the one that does goes on.
    if !matches!(
        error,
        StoreError::Deposed | StoreError::ReadOnly | StoreError::Interrupted
    ) {
        let message = format!(
            "what has become of it cannot be stored: {error}; it is left alone until the scheduler is started again, which asks its nodes"
        );
        let event = NewEvent::new(Kind::StoreRefused, message);
        scheduler.events.publish(event.vm(record));
    }
}

/// Records how a VM ended, then has its VMM destroyed, which also hands over the last of its console.
pub async fn end_vm(scheduler: &Scheduler, entry: &VmEntry, outcome: Outcome, guard: &VmGuard) {
    let record = entry.record();
    if record.phase.is_over() {
        return clean_up(scheduler, entry, guard).await;
    }
    let message = match &outcome {
        _ if preempt::comes_back(&record, &outcome) => record.message.clone(),
        Outcome::Exited { how, .. } => how.clone(),
        Outcome::Failed { reason } => reason.clone(),
    };
    let ending = VmRecord {
        phase: Phase::Ending(outcome),
        message,
        fenced_through: record.last_epoch,
        ..record.as_ref().clone()
    };
    save_at_last(scheduler, ending, Vec::new()).await;
    clean_up(scheduler, entry, guard).await;
}

/// Destroys the VMM of a VM that is ending. If its node does not answer, the node's next report brings it back here.
pub async fn clean_up(scheduler: &Scheduler, entry: &VmEntry, _guard: &VmGuard) {
    let record = entry.record();
    let Phase::Ending(outcome) = &record.phase else {
        return;
    };
    let destroyed = match scheduler.agent(&record.node) {
        // Its operator's word is all that there will ever be; should it come back, [`super::lost`] sees to it.
        _ if scheduler.nodes.is_lost(&record.node) => Ok(()),
        Ok(agent) => agent.destroy(record.id, record.epoch).await,
        Err(error) => Err(error),
    };
    if let Err(error) = destroyed {
        tracing::info!(vm = %record.id, node = %record.node, %error, "VMM is cleaned up later");
        return;
    }
    if let Some(node) = scheduler.nodes.get(&record.node) {
        node.forget_vm(record.id, record.epoch);
    }
    if preempt::comes_back(&record, outcome) {
        return preempt::requeue(scheduler, entry, &record).await;
    }
    let event = match outcome {
        Outcome::Exited {
            status: Some(status), ..
        } => NewEvent::new(Kind::VmExited, format!("ended with status {status}")),
        Outcome::Exited { how, .. } => {
            NewEvent::new(Kind::VmExited, format!("ended without a status: {how}"))
        }
        Outcome::Failed { reason } => NewEvent::new(Kind::VmFailed, reason.clone()),
    };
    let ended = VmRecord {
        phase: Phase::Ended(outcome.clone()),
        giving_way: None,
        runs: Runs {
            ended_unix_ms: now_unix_ms(),
            ..record.runs.clone()
        },
        ..record.as_ref().clone()
    };
    let ended = save_at_last(scheduler, ended, Vec::new()).await;
    scheduler.events.publish(event.vm(&ended));
}
