//! VMs are stopped so that another has room, and go back to the queue to begin anew. Who is stopped for whom is stored, in one
//! batch, before any node is told; from then on each of them ends in the queue, whichever scheduler brings it there: its end and
//! its place in the queue are one batch, too. The room is kept for the VM it was made for ([`crate::queue::held`]).

use std::pin::Pin;
use std::sync::Arc;

use shoal_plan::Preemption;
use shoal_proto::NodeName;

use super::{finish, stop};
use crate::events::{Kind, NewEvent};
use crate::limits;
use crate::queue;
use crate::record::{GivingWay, Outcome, Phase, QueuedRecord, Runs, VmRecord, now_unix_ms};
use crate::scheduler::{Scheduler, Shared};
use crate::store::{StoreError, Write};
use crate::vms::{VmEntry, VmGuard};

/// Why nobody is stopped. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum PreemptError {
    /// Something else goes on with one of them.
    #[error("VM {0} is to give way and is busy")]
    Busy(String),
    /// It is not as it was planned with.
    #[error("VM {0} is to give way and has changed")]
    Changed(String),
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Stores who is stopped for a VM that waits, together with that VM, and has them stopped. The caller holds the planning lock
/// since the snapshot was taken. Answers the VM's new record, which the queue is to show.
pub async fn begin(
    scheduler: &Shared,
    waiting: &QueuedRecord,
    preemption: &Preemption,
) -> Result<Arc<QueuedRecord>, PreemptError> {
    let changed = || PreemptError::Changed(preemption.node.to_string());
    let node: NodeName = preemption.node.as_str().parse().map_err(|_| changed())?;
    let giving_way = GivingWay {
        to: waiting.vm.id,
        name: waiting.vm.name.to_string(),
        priority: waiting.vm.wishes.priority,
        since_unix_ms: now_unix_ms(),
    };
    let mut victims: Vec<(Arc<VmEntry>, VmGuard, Arc<VmRecord>)> = Vec::new();
    for id in &preemption.victims {
        let entry = id.as_str().parse().ok().and_then(|id| scheduler.vms.get(id));
        let entry = entry.ok_or_else(|| PreemptError::Changed(id.to_string()))?;
        let name = entry.record().name.to_string();
        let guard = entry.try_lock().ok_or(PreemptError::Busy(name))?;
        let record = stopping(scheduler, &entry.record(), &node, &giving_way)?;
        victims.push((entry, guard, Arc::new(record)));
    }
    let waiting = Arc::new(QueuedRecord {
        room: Some(node),
        ..waiting.clone()
    });
    let mut writes = vec![Write::PutQueued(Arc::clone(&waiting))];
    writes.extend(
        victims
            .iter()
            .map(|(.., record)| Write::PutVm(Arc::clone(record))),
    );
    scheduler.store.apply(writes).await?;
    scheduler.metrics.count_preemptions(victims.len());
    for (entry, guard, record) in victims {
        scheduler.vms.publish(&record);
        let event = NewEvent::new(Kind::VmPreempted, limits::shorten(&preemption.reason));
        scheduler.events.publish(event.vm(&record));
        tokio::spawn(give_way(Arc::clone(scheduler), entry, guard));
    }
    Ok(waiting)
}

/// The record of a VM that is to give way, if it still may be asked to.
fn stopping(
    scheduler: &Scheduler,
    record: &VmRecord,
    node: &NodeName,
    giving_way: &GivingWay,
) -> Result<VmRecord, PreemptError> {
    let may = record.phase == Phase::Running
        && record.wishes.preemptible
        && record.wishes.priority < giving_way.priority
        && record.node == *node
        && scheduler.migrations.get(record.id).is_none();
    if !may {
        return Err(PreemptError::Changed(record.name.to_string()));
    }
    Ok(VmRecord {
        phase: Phase::Stopping,
        message: format!(
            "gives way to '{}' (priority {}), and begins anew when there is room",
            giving_way.name, giving_way.priority
        ),
        giving_way: Some(giving_way.clone()),
        ..record.clone()
    })
}

/// Has one stopped, then lets those that wait take the room. What does not succeed is gone on with when its node reports. Boxed,
/// as it ends with what it may have begun with.
fn give_way(
    scheduler: Shared,
    entry: Arc<VmEntry>,
    guard: VmGuard,
) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(async move {
        let record = entry.record();
        let stopped = match scheduler.agent(&record.node) {
            Ok(agent) => stop::power_off(&agent, &record).await,
            Err(error) => Err(error),
        };
        match stopped {
            Ok(outcome) => finish::end_vm(&scheduler, &entry, outcome, &guard).await,
            Err(error) => tracing::info!(vm = %record.id, %error, "gives way later"),
        }
        drop(guard);
        queue::advance(&scheduler).await;
    })
}

/// Whether a VM that has ended so is to begin anew: it was stopped for another, and had not come to its own end before.
pub fn comes_back(record: &VmRecord, outcome: &Outcome) -> bool {
    record.giving_way.is_some() && !matches!(outcome, Outcome::Exited { status: Some(_), .. })
}

/// A VM that has ended for another, of which nothing is left on any node, goes back to the queue: at the next epoch, and in the
/// order of its first submission. Should the store not take it, its node's next report brings it back here.
pub async fn requeue(scheduler: &Scheduler, entry: &VmEntry, record: &VmRecord) {
    let Some(giving_way) = record.giving_way.clone() else {
        return;
    };
    let _planning = scheduler.planning.lock().await;
    let Some(entry) = scheduler
        .vms
        .get(record.id)
        .filter(|found| std::ptr::eq(found.as_ref(), entry))
    else {
        return;
    };
    let console_end = match scheduler.logs.settle(record.id).await {
        Ok(end) => end.max(record.runs.console_offset),
        Err(error) => {
            tracing::error!(vm = %record.id, %error, "console log cannot be read");
            record.runs.console_offset
        }
    };
    let again = VmRecord {
        suspended: None,
        giving_way: None,
        runs: Runs {
            started_unix_ms: 0,
            console_offset: console_end,
            preempted: record.runs.preempted.saturating_add(1),
            last_preempted: Some(giving_way.clone()),
            ..record.runs.clone()
        },
        ..record.to_begin_anew()
    };
    let queued = Arc::new(QueuedRecord {
        sequence: scheduler.queue.next_sequence(),
        pinned: record.runs.pinned.clone(),
        vm: again,
        since_unix_ms: now_unix_ms(),
        room: None,
    });
    let writes = vec![Write::DeleteVm(record.id), Write::PutQueued(Arc::clone(&queued))];
    if let Err(error) = scheduler.store.apply(writes).await {
        tracing::error!(vm = %record.id, error = &error as &dyn std::error::Error,
            "a VM that gave way is not in the queue yet");
        return;
    }
    let line = format!(
        "\n[shoal: stopped for '{}' (priority {}); what follows is another run]\n",
        giving_way.name, giving_way.priority
    );
    if let Err(error) = scheduler
        .logs
        .append(record.id, console_end, line.into_bytes())
        .await
    {
        tracing::warn!(vm = %record.id, %error, "console log cannot be written");
    }
    let waits = VmRecord {
        phase: Phase::Queued,
        ..queued.vm.clone()
    };
    scheduler.vms.set_aside(&entry, waits);
    let waiting = scheduler.queue.push(queued, entry);
    scheduler.queue.one_has_given_way(giving_way.to);
    let message = format!("{}: {}", record.name, waiting.message());
    scheduler
        .events
        .publish(NewEvent::new(Kind::VmQueued, message).vm(record));
}
