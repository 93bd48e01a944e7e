//! VMs that wait for room. Each second those whose turn it is, and that fit, are started; the planner says which, and of the
//! others why not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shoal_plan::{Turn, take_turns};
use shoal_proto::cluster::QueuedVm;
use shoal_proto::{NodeName, VmName};

use crate::events::{Kind, NewEvent};
use crate::execute::launch::{self, LaunchError};
use crate::limits;
use crate::observe;
use crate::record::{QueuedRecord, VmRecord, now_unix_ms};
use crate::scheduler::Shared;
use crate::store::{StoreError, Write};
use crate::vms::NameTaken;

/// So many may wait.
const MOST: usize = 10_000;

/// One that waits.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// As it is stored.
    pub record: Arc<QueuedRecord>,
    /// Why it does not start; empty until it was looked at.
    pub reason: String,
    /// From 1.
    pub place: usize,
}

impl Waiting {
    /// For people.
    pub fn message(&self) -> String {
        if self.reason.is_empty() {
            format!("place {} in the queue", self.place)
        } else {
            format!("place {} in the queue: {}", self.place, self.reason)
        }
    }
}

/// All that wait, in memory; the store is written first.
#[derive(Debug, Default)]
pub struct Queue {
    /// In the order in which they are to start.
    waiting: Mutex<Vec<Waiting>>,
}

impl Queue {
    /// From what was stored, in order of arrival.
    pub fn new(stored: Vec<QueuedRecord>) -> Self {
        let waiting = stored.into_iter().enumerate().map(|(index, record)| Waiting {
            record: Arc::new(record),
            reason: String::new(),
            place: index + 1,
        });
        Self {
            waiting: Mutex::new(waiting.collect()),
        }
    }

    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// All, in the order in which they are to start.
    pub fn list(&self) -> Vec<Waiting> {
        self.lock().clone()
    }

    /// By id or name, as users write it.
    pub fn find(&self, id_or_name: &str) -> Option<Waiting> {
        let waiting = self.lock();
        let found = waiting.iter().find(|waiting| {
            let vm = &waiting.record.vm;
            vm.name.to_string() == id_or_name || vm.id.to_string() == id_or_name
        });
        found.cloned()
    }

    /// Whether a name is free.
    pub fn check_name(&self, name: &VmName) -> Result<(), NameTaken> {
        if self.lock().iter().any(|waiting| waiting.record.vm.name == *name) {
            Err(NameTaken(name.clone()))
        } else {
            Ok(())
        }
    }

    fn push(&self, record: Arc<QueuedRecord>) -> Waiting {
        let mut all = self.lock();
        let waiting = Waiting {
            record,
            reason: String::new(),
            place: all.len() + 1,
        };
        all.push(waiting.clone());
        waiting
    }

    fn remove(&self, sequence: u64) {
        let mut all = self.lock();
        all.retain(|waiting| waiting.record.sequence != sequence);
        for (index, waiting) in all.iter_mut().enumerate() {
            waiting.place = index + 1;
        }
    }

    fn next_sequence(&self) -> u64 {
        let all = self.lock();
        all.iter()
            .map(|waiting| waiting.record.sequence + 1)
            .max()
            .unwrap_or(0)
    }

    /// Shows a new order. Those that came meanwhile are last.
    fn arrange(&self, order: Vec<(u64, String)>) {
        let mut all = self.lock();
        let known: HashMap<u64, (usize, String)> = order
            .into_iter()
            .enumerate()
            .map(|(index, (sequence, reason))| (sequence, (index, reason)))
            .collect();
        all.sort_by_key(|waiting| {
            known
                .get(&waiting.record.sequence)
                .map_or(usize::MAX, |known| known.0)
        });
        for (index, waiting) in all.iter_mut().enumerate() {
            waiting.place = index + 1;
            if let Some((_, reason)) = known.get(&waiting.record.sequence) {
                waiting.reason.clone_from(reason);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has a VM wait. It may have started when this returns.
pub async fn enqueue(
    scheduler: &Shared,
    draft: VmRecord,
    pinned: Option<NodeName>,
) -> Result<Waiting, LaunchError> {
    let waiting = {
        let _planning = scheduler.planning.lock().await;
        scheduler.vms.check_name(&draft.name)?;
        scheduler.queue.check_name(&draft.name)?;
        if scheduler.queue.list().len() >= MOST {
            return Err(LaunchError::QueueFull);
        }
        let record = Arc::new(QueuedRecord {
            sequence: scheduler.queue.next_sequence(),
            vm: draft,
            pinned,
        });
        let write = Write::PutQueued(Arc::clone(&record));
        scheduler.store.apply(vec![write]).await?;
        let waiting = scheduler.queue.push(record);
        let message = format!("{}: {}", waiting.record.vm.name, waiting.message());
        scheduler.events.publish(NewEvent::new(Kind::VmQueued, message));
        waiting
    };
    // So that the answer says why it waits; or it is its turn.
    advance(scheduler).await;
    let id = waiting.record.vm.id.to_string();
    Ok(scheduler.queue.find(&id).unwrap_or(waiting))
}

/// Takes one out of the queue; false if it has left it meanwhile.
pub async fn withdraw(scheduler: &Shared, sequence: u64) -> Result<bool, StoreError> {
    let _planning = scheduler.planning.lock().await;
    let waits = |waiting: &Waiting| waiting.record.sequence == sequence;
    if !scheduler.queue.list().iter().any(waits) {
        return Ok(false);
    }
    scheduler.store.apply(vec![Write::DeleteQueued(sequence)]).await?;
    scheduler.queue.remove(sequence);
    Ok(true)
}

/// Starts those whose turn it is and that fit, and tells of the others why not.
pub async fn advance(scheduler: &Shared) {
    if scheduler.queue.is_empty() {
        return;
    }
    let _planning = scheduler.planning.lock().await;
    let mut all = scheduler.queue.list();
    all.sort_by_key(|waiting| waiting.record.sequence);
    let shared = Arc::clone(scheduler);
    let waiting: Vec<shoal_plan::Waiting> = all
        .iter()
        .map(|waiting| for_planner(scheduler, waiting))
        .collect();
    let planned = tokio::task::spawn_blocking(move || {
        take_turns(&observe::snapshot(&shared), &shared.policy.get(), &waiting)
    });
    let turns = match planned.await {
        Ok(turns) => turns,
        Err(error) => return tracing::error!(%error, "the planner failed"),
    };
    let mut order = Vec::with_capacity(turns.len());
    for (number, turn) in turns {
        let Some(waiting) = all.get(number) else { continue };
        let sequence = waiting.record.sequence;
        match turn {
            Turn::Start(place) => {
                if let Err(error) = start(scheduler, waiting, place).await {
                    tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "a queued VM does not start"
                    );
                    order.push((sequence, error.to_string()));
                }
            }
            Turn::Refused(error) => order.push((sequence, limits::shorten(&error.to_string()))),
            Turn::Later => order.push((sequence, "others are before it".to_owned())),
            Turn::Behind { name } => order.push((
                sequence,
                format!("{name} has waited long and is not overtaken any more"),
            )),
        }
    }
    scheduler.queue.arrange(order);
}

async fn start(
    scheduler: &Shared,
    waiting: &Waiting,
    place: shoal_plan::Placement,
) -> Result<(), LaunchError> {
    let sequence = waiting.record.sequence;
    let draft = waiting.record.vm.clone();
    let others = vec![Write::DeleteQueued(sequence)];
    let (entry, guard) = launch::submit_at(scheduler, draft, place, others).await?;
    scheduler.queue.remove(sequence);
    let scheduler = Arc::clone(scheduler);
    tokio::spawn(async move {
        // What comes of it is an event.
        if let Err(error) = launch::start(&scheduler, &entry, &guard).await {
            tracing::info!(vm = %entry.record().id, %error, "a queued VM was not started");
        }
    });
    Ok(())
}

fn for_planner(scheduler: &Shared, waiting: &Waiting) -> shoal_plan::Waiting {
    let record = &waiting.record;
    let since_ms = now_unix_ms().saturating_sub(record.vm.created_unix_ms);
    shoal_plan::Waiting {
        name: record.vm.name.to_string(),
        request: launch::request(scheduler, &record.vm, record.pinned.as_ref()),
        priority: record.vm.wishes.priority,
        since: Duration::from_millis(u64::try_from(since_ms).unwrap_or(0)),
    }
}

/// One that waits, as users see it.
pub fn view(waiting: &Waiting) -> QueuedVm {
    let vm = &waiting.record.vm;
    QueuedVm {
        place: u32::try_from(waiting.place).unwrap_or(u32::MAX),
        name: vm.name.to_string(),
        user: vm
            .wishes
            .labels
            .get(shoal_plan::queue::USER)
            .unwrap_or_default()
            .to_owned(),
        priority: vm.wishes.priority,
        cpus: vm.cpus,
        memory_bytes: vm.memory_bytes,
        since_unix_ms: vm.created_unix_ms,
        reason: waiting.reason.clone(),
    }
}
