//! VMs that wait for room. Each second those whose turn it is, and that fit, are started; the planner says which, for which
//! others are stopped, and of the rest why not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shoal_plan::{Held, PlaceError, Preemption, Turn, make_room, place_launch, take_turns};
use shoal_proto::cluster::QueuedVm;
use shoal_proto::{NodeName, VmId, VmName};

use crate::events::{Kind, NewEvent};
use crate::execute::launch::{self, LaunchError};
use crate::execute::preempt;
use crate::limits;
use crate::observe;
use crate::record::{Outcome, Phase, QueuedRecord, Runs, VmRecord, now_unix_ms};
use crate::scheduler::{Scheduler, Shared};
use crate::store::{StoreError, Write};
use crate::view;
use crate::vms::{NameTaken, VmEntry};

/// So many may wait. Those that were stopped for others come on top.
const MOST: usize = 10_000;
/// A start that has to wait until one that is to give way is not busy tries so often more, after such pauses.
const ASK_AGAIN: usize = 25;
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// One that waits.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// As it is stored.
    pub record: Arc<QueuedRecord>,
    /// Why it does not start; empty until it was looked at.
    pub reason: String,
    /// From 1.
    pub place: usize,
    /// By which it is watched while it waits, and that it will have.
    pub entry: Arc<VmEntry>,
    /// When room was last made for it, by this scheduler.
    room_made: Instant,
}

impl Waiting {
    fn new(record: Arc<QueuedRecord>, entry: Arc<VmEntry>, place: usize) -> Self {
        Self {
            record,
            entry,
            place,
            reason: String::new(),
            room_made: Instant::now(),
        }
    }

    /// For people.
    pub fn message(&self) -> String {
        let place = format!("place {} in the queue", self.place);
        match self.why().as_str() {
            "" => place,
            why => format!("{place}: {why}"),
        }
    }

    /// Why it waits, and why it does again.
    fn why(&self) -> String {
        let runs = &self.record.vm.runs;
        let Some(last) = &runs.last_preempted else {
            return self.reason.clone();
        };
        let times = match runs.preempted {
            1 => "once".to_owned(),
            times => format!("{times} times"),
        };
        let stopped = format!(
            "stopped for others {times}, the last time for '{}' (priority {})",
            last.name, last.priority
        );
        if self.reason.is_empty() {
            stopped
        } else {
            format!("{stopped}; {}", self.reason)
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
        let waiting = stored.into_iter().enumerate().map(|(index, record)| {
            let entry = VmEntry::waiting(&record.vm);
            Waiting::new(Arc::new(record), entry, index + 1)
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

    /// Adds one that has been stored, at the end until the next look.
    pub fn push(&self, record: Arc<QueuedRecord>, entry: Arc<VmEntry>) -> Waiting {
        let mut all = self.lock();
        let waiting = Waiting::new(record, entry, all.len() + 1);
        all.push(waiting.clone());
        waiting
    }

    /// Room is being made for one that waits, as its record says, which has been stored.
    fn room_is_made(&self, record: &Arc<QueuedRecord>) {
        for waiting in self.lock().iter_mut() {
            if waiting.record.sequence == record.sequence {
                waiting.record = Arc::clone(record);
                waiting.room_made = Instant::now();
            }
        }
    }

    /// One of those that were stopped for a VM has ended.
    pub fn one_has_given_way(&self, to: VmId) {
        for waiting in self.lock().iter_mut() {
            if waiting.record.vm.id == to {
                waiting.room_made = Instant::now();
            }
        }
    }

    fn remove(&self, sequence: u64) {
        let mut all = self.lock();
        all.retain(|waiting| waiting.record.sequence != sequence);
        for (index, waiting) in all.iter_mut().enumerate() {
            waiting.place = index + 1;
        }
    }

    /// A number that none has.
    pub fn next_sequence(&self) -> u64 {
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
        // To wait is of no use for one that no node can ever take.
        let request = launch::request(scheduler, &draft, pinned.as_ref());
        let placed = place_launch(&observe::snapshot(scheduler), &scheduler.policy.get(), &request);
        if let Some(error) = placed.err().filter(PlaceError::is_final) {
            return Err(error.into());
        }
        let runs = Runs {
            queued_unix_ms: now_unix_ms(),
            ..draft.runs
        };
        let record = Arc::new(QueuedRecord {
            sequence: scheduler.queue.next_sequence(),
            vm: VmRecord { runs, ..draft },
            pinned,
            since_unix_ms: 0,
            room: None,
        });
        let write = Write::PutQueued(Arc::clone(&record));
        scheduler.store.apply(vec![write]).await?;
        let entry = VmEntry::waiting(&record.vm);
        let waiting = scheduler.queue.push(record, entry);
        let message = format!("{}: {}", waiting.record.vm.name, waiting.message());
        scheduler.events.publish(NewEvent::new(Kind::VmQueued, message));
        waiting
    };
    // So that the answer says why it waits; or it is its turn.
    advance(scheduler).await;
    let id = waiting.record.vm.id.to_string();
    Ok(scheduler.queue.find(&id).unwrap_or(waiting))
}

/// Has others stopped for a VM that fits nowhere, and lets it wait for their room. None if there are none to stop. If one of
/// them is busy it is asked again for a while.
pub async fn enqueue_with_room(
    scheduler: &Shared,
    draft: &VmRecord,
    pinned: Option<&NodeName>,
) -> Result<Option<Waiting>, LaunchError> {
    let mut asked_again = 0;
    loop {
        match try_enqueue_with_room(scheduler, draft, pinned).await? {
            Room::Made(waiting) => return Ok(Some(waiting)),
            Room::None => return Ok(None),
            Room::NotNow if asked_again == ASK_AGAIN => return Ok(None),
            Room::NotNow => tokio::time::sleep(ASK_AGAIN_AFTER).await,
        }
        asked_again += 1;
    }
}

enum Room {
    Made(Waiting),
    None,
    NotNow,
}

async fn try_enqueue_with_room(
    scheduler: &Shared,
    draft: &VmRecord,
    pinned: Option<&NodeName>,
) -> Result<Room, LaunchError> {
    let _planning = scheduler.planning.lock().await;
    scheduler.vms.check_name(&draft.name)?;
    scheduler.queue.check_name(&draft.name)?;
    let shared = Arc::clone(scheduler);
    let (name, request) = (draft.name.to_string(), launch::request(scheduler, draft, pinned));
    let planned = scheduler
        .planner
        .run(move || make_room(&observe::snapshot(&shared), &shared.policy.get(), &name, &request));
    let Some(preemption) = planned.await.unwrap_or_else(|error| {
        tracing::error!(%error, "the planner failed");
        None
    }) else {
        return Ok(Room::None);
    };
    let record = QueuedRecord {
        sequence: scheduler.queue.next_sequence(),
        vm: draft.clone(),
        pinned: pinned.cloned(),
        since_unix_ms: 0,
        room: None,
    };
    match preempt::begin(scheduler, &record, &preemption).await {
        Ok(record) => {
            let entry = VmEntry::waiting(&record.vm);
            Ok(Room::Made(scheduler.queue.push(record, entry)))
        }
        Err(preempt::PreemptError::Store(error)) => Err(error.into()),
        Err(error) => {
            tracing::info!(vm = %draft.name, %error, "no room is made yet");
            Ok(Room::NotNow)
        }
    }
}

/// Has a VM wait again that its node could not start, in its old place: nothing of it is left there. The caller holds its guard.
pub async fn put_back(
    scheduler: &Scheduler,
    entry: &VmEntry,
    record: &VmRecord,
    why: &str,
) -> Result<(), StoreError> {
    let _planning = scheduler.planning.lock().await;
    let Some(entry) = scheduler
        .vms
        .get(record.id)
        .filter(|found| std::ptr::eq(found.as_ref(), entry))
    else {
        return Ok(());
    };
    let queued = Arc::new(QueuedRecord {
        sequence: scheduler.queue.next_sequence(),
        pinned: record.runs.pinned.clone(),
        since_unix_ms: record.runs.queued_unix_ms,
        room: None,
        vm: record.to_begin_anew(),
    });
    let writes = vec![Write::DeleteVm(record.id), Write::PutQueued(Arc::clone(&queued))];
    scheduler.store.apply(writes).await?;
    let waits = VmRecord {
        phase: Phase::Queued,
        ..queued.vm.clone()
    };
    scheduler.vms.set_aside(&entry, waits);
    scheduler.queue.push(queued, entry);
    let message = format!(
        "{}: waits again, as {} could not start it: {why}",
        record.name, record.node
    );
    let event = NewEvent::new(Kind::VmQueued, limits::shorten(&message)).vm(record);
    scheduler.events.publish(event.node(&record.node));
    Ok(())
}

/// Takes one out of the queue; false if it has left it meanwhile.
pub async fn withdraw(scheduler: &Shared, vm: VmId) -> Result<bool, StoreError> {
    let _planning = scheduler.planning.lock().await;
    let all = scheduler.queue.list();
    let Some(waiting) = all.iter().find(|waiting| waiting.record.vm.id == vm) else {
        return Ok(false);
    };
    let sequence = waiting.record.sequence;
    scheduler.store.apply(vec![Write::DeleteQueued(sequence)]).await?;
    scheduler.queue.remove(sequence);
    let vm = &waiting.record.vm;
    let reason = "taken out of the queue".to_owned();
    waiting.entry.tell(VmRecord {
        phase: Phase::Ended(Outcome::Failed {
            reason: reason.clone(),
        }),
        message: reason,
        ..vm.clone()
    });
    if let Err(error) = scheduler.logs.remove(vm.id).await {
        tracing::warn!(vm = %vm.id, %error, "console log is left over");
    }
    Ok(true)
}

/// Starts those whose turn it is and that fit, and tells of the others why not.
pub async fn advance(scheduler: &Shared) {
    if scheduler.queue.is_empty() {
        return;
    }
    let _planning = scheduler.planning.lock().await;
    let mut all = scheduler.queue.list();
    // One that has run before is where it was first submitted.
    all.sort_by_key(|waiting| (waiting.record.vm.created_unix_ms, waiting.record.sequence));
    let shared = Arc::clone(scheduler);
    let waiting: Vec<shoal_plan::Waiting> = all
        .iter()
        .map(|waiting| for_planner(scheduler, waiting))
        .collect();
    let planned = scheduler
        .planner
        .run(move || take_turns(&observe::snapshot(&shared), &shared.policy.get(), &waiting));
    let turns = match planned.await {
        Ok(turns) => turns,
        Err(error) => return tracing::error!(%error, "the planner failed"),
    };
    let mut order = Vec::with_capacity(turns.len());
    for (number, turn) in turns {
        let Some(waiting) = all.get(number) else { continue };
        let sequence = waiting.record.sequence;
        // The planner lets it go to the node that it is for, also where starts fail; that is not tried each second.
        if let Turn::Start(place) = &turn
            && let Some(why) = starts_fail(scheduler, waiting, place)
        {
            order.push((sequence, why));
            continue;
        }
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
            Turn::Preempt(preemption) => {
                order.push((sequence, have_room_made(scheduler, waiting, &preemption).await));
            }
            Turn::Awaits { reason } => order.push((sequence, limits::shorten(&reason))),
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

fn starts_fail(scheduler: &Scheduler, waiting: &Waiting, place: &shoal_plan::Placement) -> Option<String> {
    waiting.record.pinned.as_ref()?;
    let node: NodeName = place.node.as_str().parse().ok()?;
    let failing = scheduler.failures.of(&node);
    let starts = failing.iter().find(|(from, _)| from.is_none());
    starts.map(|(_, why)| format!("{node}: {why}"))
}

/// Has others stopped for one that waits; answers what it waits for.
async fn have_room_made(scheduler: &Shared, waiting: &Waiting, preemption: &Preemption) -> String {
    match preempt::begin(scheduler, &waiting.record, preemption).await {
        Ok(record) => {
            scheduler.queue.room_is_made(&record);
            format!("room is being made on {}", preemption.node)
        }
        Err(error) => {
            tracing::info!(vm = %waiting.record.vm.id, %error, "no room is made yet");
            error.to_string()
        }
    }
}

/// Room that others were, or are being, stopped for.
pub fn held(scheduler: &Scheduler) -> Vec<Held> {
    let all = scheduler.queue.lock();
    let held = all.iter().filter_map(|waiting| {
        let record = &waiting.record;
        Some(Held {
            vm: planner_id(&record.vm),
            node: shoal_plan::NodeName::new(record.room.as_ref()?.as_str()),
            request: launch::request(scheduler, &record.vm, record.pinned.as_ref()),
            quiet: waiting.room_made.elapsed(),
        })
    });
    held.collect()
}

fn planner_id(vm: &VmRecord) -> shoal_plan::VmId {
    shoal_plan::VmId::new(&vm.id.to_string())
}

async fn start(
    scheduler: &Shared,
    waiting: &Waiting,
    place: shoal_plan::Placement,
) -> Result<(), LaunchError> {
    let QueuedRecord {
        sequence, vm, pinned, ..
    } = waiting.record.as_ref();
    let entry = Arc::clone(&waiting.entry);
    // Who has it may wait for a plan to end, and does nothing with a VM that waits.
    let Some(guard) = entry.try_lock() else {
        return Ok(());
    };
    let others = vec![Write::DeleteQueued(*sequence)];
    launch::submit_at(scheduler, vm.clone(), pinned.as_ref(), place, others, &entry).await?;
    scheduler.queue.remove(*sequence);
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
    let since_ms = now_unix_ms().saturating_sub(record.since());
    shoal_plan::Waiting {
        id: planner_id(&record.vm),
        name: record.vm.name.to_string(),
        request: launch::request(scheduler, &record.vm, record.pinned.as_ref()),
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
        since_unix_ms: waiting.record.since(),
        reason: waiting.why(),
        preempted: view::preempted(vm),
    }
}
