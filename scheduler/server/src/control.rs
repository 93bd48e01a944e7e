//! The control loop: each second observe, plan, execute.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_plan::{Action, ActionKind, Automation, Note, NoteKind, Plan, Policy};
use tokio::time::MissedTickBehavior;

use crate::drain;
use crate::events::{Kind, NewEvent};
use crate::execute::{migrate, stop, suspend};
use crate::migrations::OpenMigration;
use crate::observe;
use crate::pool::Pool;
use crate::queue;
use crate::reconcile::Subject;
use crate::record::Cordon;
use crate::scheduler::Shared;

const INTERVAL: Duration = Duration::from_secs(1);

/// What of a plan is begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// All of it.
    All,
    /// What someone asked for: VMs leave nodes that are drained, nothing else moves.
    Drains,
}

/// Goes on until the scheduler ends. What of its plans is done is in the policy.
pub async fn run(scheduler: Shared) {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = BTreeSet::new();
    let mut advised = BTreeSet::new();
    loop {
        ticks.tick().await;
        housekeeping(&scheduler).await;
        let automation = scheduler.policy.get().automation;
        let wanted = match automation {
            Automation::Automatic => Wanted::All,
            Automation::Advise | Automation::Manual => Wanted::Drains,
        };
        let (mut plan, _) = round(&scheduler, wanted).await;
        if automation == Automation::Advise {
            plan = plan_on(
                &scheduler.planner,
                &scheduler,
                Wanted::All,
                scheduler.policy.get(),
            )
            .await;
        }
        advise(&scheduler, automation, &plan, &mut advised);
        announce_stuck(&scheduler, &plan.notes, &mut told);
        finish_drains(&scheduler).await;
        queue::advance(&scheduler).await;
    }
}

/// Plans without doing anything, for someone who asks.
pub async fn plan(scheduler: &Shared, wanted: Wanted) -> Plan {
    let policy = scheduler.policy.get();
    plan_with(scheduler, wanted, policy).await
}

/// The same with another policy.
pub async fn plan_with(scheduler: &Shared, wanted: Wanted, policy: Arc<Policy>) -> Plan {
    plan_on(&scheduler.questions, scheduler, wanted, policy).await
}

/// Off the async threads: a large cluster takes a while.
async fn plan_on(threads: &Pool, scheduler: &Shared, wanted: Wanted, policy: Arc<Policy>) -> Plan {
    let shared = Arc::clone(scheduler);
    let planned = threads.run(move || {
        let started = Instant::now();
        let snapshot = observe::snapshot(&shared);
        let plan = match wanted {
            Wanted::All => shoal_plan::round(&snapshot, &policy),
            Wanted::Drains => drains(shoal_plan::urgent(&snapshot, &policy)),
        };
        shared.metrics.count_planning(started.elapsed());
        plan
    });
    planned.await.unwrap_or_else(|error| {
        tracing::error!(%error, "the planner failed");
        Plan::default()
    })
}

fn drains(mut plan: Plan) -> Plan {
    plan.actions.retain(|action| action.kind == ActionKind::Drain);
    plan.suspend.clear();
    plan.resume.clear();
    plan.notes
        .retain(|note| matches!(note.kind, NoteKind::DrainStuck | NoteKind::DrainWaiting));
    plan
}

/// Plans, and begins what is planned.
pub async fn round(scheduler: &Shared, wanted: Wanted) -> (Plan, Vec<Arc<OpenMigration>>) {
    let policy = scheduler.policy.get();
    round_with(scheduler, wanted, policy).await
}

/// The same with another policy.
pub async fn round_with(
    scheduler: &Shared,
    wanted: Wanted,
    policy: Arc<Policy>,
) -> (Plan, Vec<Arc<OpenMigration>>) {
    let _planning = scheduler.planning.lock().await;
    let plan = plan_on(&scheduler.planner, scheduler, wanted, policy).await;
    let begun = begin(scheduler, &plan).await;
    (plan, begun)
}

/// Begins what is planned. The caller holds the planning lock since the snapshot was taken.
pub async fn begin(scheduler: &Shared, plan: &Plan) -> Vec<Arc<OpenMigration>> {
    suspend::begin_planned(scheduler, plan);
    let mut begun = Vec::new();
    for action in &plan.actions {
        match migrate::begin_planned(scheduler, action).await {
            Ok(migration) => begun.push(migration),
            // The next round sees the cluster as it is then.
            Err(error) => tracing::info!(vm = %action.vm, %error, "a planned move does not begin"),
        }
    }
    begun
}

async fn housekeeping(scheduler: &Shared) {
    for entry in scheduler.nodes.list() {
        observe::announce_liveness(scheduler, &entry);
        if entry.is_lost() {
            // Those that something else was done with when that was said.
            for vm in scheduler.vms.on_node(&entry.name()) {
                scheduler.reconcile.push(Subject::Vm(vm.record().id));
            }
        }
    }
    for (vm, end) in scheduler.logs.expire_early().await {
        let Some(entry) = scheduler.vms.get(vm) else {
            continue;
        };
        let mut nodes = vec![entry.record().node.clone()];
        nodes.extend(scheduler.migrations.get(vm).map(|open| open.intent.to.clone()));
        for node in nodes.iter().filter_map(|node| scheduler.nodes.get(node)) {
            node.acknowledge_console(vm, end);
        }
    }
    stop::forget_ended(scheduler).await;
    if let Err(error) = scheduler.events.persist(&scheduler.store).await {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "events cannot be stored"
        );
    }
}

/// Tells what the planner would do and is not to: each move once, while it goes on to be wanted.
fn advise(scheduler: &Shared, automation: Automation, plan: &Plan, advised: &mut BTreeSet<(String, String)>) {
    if automation != Automation::Advise {
        advised.clear();
        return;
    }
    let key = |action: &Action| (action.vm.to_string(), action.to.to_string());
    for action in plan
        .actions
        .iter()
        .filter(|action| !advised.contains(&key(action)))
    {
        let message = format!(
            "{} to {}: {}: {}",
            action.from, action.to, action.kind, action.reason
        );
        let event = NewEvent::new(Kind::MigrationAdvised, message);
        let vm = action
            .vm
            .as_str()
            .parse()
            .ok()
            .and_then(|id| scheduler.vms.get(id));
        scheduler.events.publish(match vm {
            Some(vm) => event.vm(&vm.record()),
            None => event,
        });
    }
    *advised = plan.actions.iter().map(key).collect();
}

/// Tells what the planner cannot do: once when it begins, not each second.
fn announce_stuck(
    scheduler: &Shared,
    notes: &[Note],
    told: &mut BTreeSet<(NoteKind, String, Option<String>)>,
) {
    let key = |note: &Note| {
        (
            note.kind,
            note.node.to_string(),
            note.vm.as_ref().map(ToString::to_string),
        )
    };
    let stuck = || notes.iter().filter(|note| note.kind != NoteKind::DrainWaiting);
    for note in stuck().filter(|note| !told.contains(&key(note))) {
        let event = NewEvent::new(Kind::PlanStuck, note.text.clone());
        let event = match note.node.as_str().parse() {
            Ok(node) => event.node(&node),
            Err(_) => event,
        };
        scheduler.events.publish(event);
    }
    *told = stuck().map(key).collect();
}

/// A node that was to be drained and is empty stays cordoned.
async fn finish_drains(scheduler: &Shared) {
    for entry in scheduler.nodes.list() {
        let node = entry.record();
        if node.cordon != Cordon::Draining || !drain::is_empty(scheduler, &node.name) {
            continue;
        }
        let event = NewEvent::new(Kind::NodeDrained, format!("{} is empty", node.name)).node(&node.name);
        if let Err(error) = drain::set_cordon(scheduler, &entry, Cordon::Cordoned, event).await {
            tracing::error!(error = &error as &dyn std::error::Error, "node cannot be stored");
        }
    }
}
