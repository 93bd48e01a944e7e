//! All VMs off a node, or back to it, because someone asked (MOSIX's expel and bring): in steps that the limits allow, each
//! planned anew. What was asked for is stored until it is done: the next scheduler goes on with it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shoal_plan::{NoteKind, Plan, VmId};
use shoal_proto::NodeName;
use shoal_proto::vm::MigrationResult;
use tokio::sync::{Mutex, watch};

use crate::control;
use crate::migrations::OpenMigration;
use crate::observe;
use crate::scheduler::Shared;
use crate::store::{StoreError, Write};

const INTERVAL: Duration = Duration::from_millis(500);

/// Where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// Off the node, to where they fit.
    Expel,
    /// Back to the node, of those that were started there.
    Bring,
}

/// What someone asked for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MoveOrder {
    /// Off, or back to.
    pub node: NodeName,
    /// Which of the two.
    pub direction: Direction,
}

/// All that are under way.
#[derive(Debug, Default)]
pub struct Moves {
    running: Mutex<HashMap<MoveOrder, watch::Receiver<Progress>>>,
}

/// How far it has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// VMs that have gone where they should.
    pub moved: usize,
    /// VMs that have not, yet or at all.
    pub remaining: usize,
    /// What just happened, or why some remain.
    pub message: String,
    /// No more will happen.
    pub done: bool,
}

/// Begins it, or joins it if the same is under way. It goes on whether or not someone follows it.
pub async fn begin(
    scheduler: &Shared,
    node: NodeName,
    direction: Direction,
) -> Result<watch::Receiver<Progress>, StoreError> {
    let order = MoveOrder { node, direction };
    let mut running = scheduler.moves.running.lock().await;
    if let Some(known) = running.get(&order) {
        let mut joined = known.clone();
        joined.mark_changed();
        return Ok(joined);
    }
    scheduler
        .store
        .apply(vec![Write::PutMoveOrder(order.clone())])
        .await?;
    let (sender, receiver) = watch::channel(Progress::default());
    running.insert(order.clone(), receiver.clone());
    tokio::spawn(run(Arc::clone(scheduler), order, sender));
    Ok(receiver)
}

/// Goes on with what a former scheduler had begun.
pub async fn resume(scheduler: &Shared, orders: Vec<MoveOrder>) {
    for order in orders {
        tracing::info!(node = %order.node, direction = ?order.direction, "going on with moves that were asked for");
        let (sender, receiver) = watch::channel(Progress::default());
        scheduler
            .moves
            .running
            .lock()
            .await
            .insert(order.clone(), receiver);
        tokio::spawn(run(Arc::clone(scheduler), order, sender));
    }
}

async fn run(scheduler: Shared, order: MoveOrder, sender: watch::Sender<Progress>) {
    let mut begun: Vec<Arc<OpenMigration>> = Vec::new();
    while scheduler.awaits_reports() {
        tokio::time::sleep(INTERVAL).await;
    }
    loop {
        let failed = failed(&begun);
        let mut plan;
        {
            let _planning = scheduler.planning.lock().await;
            plan = self::plan(&scheduler, &order.node, order.direction).await;
            // A VM whose move has failed is not tried again.
            plan.actions.retain(|action| !failed.contains(&action.vm));
            begun.extend(control::begin(&scheduler, &plan).await);
        }
        let progress = progress(&plan, &begun, &failed);
        if progress.done {
            end(&scheduler, &order).await;
            sender.send_replace(progress);
            return;
        }
        sender.send_if_modified(|shown| {
            let changed = *shown != progress;
            *shown = progress;
            changed
        });
        tokio::time::sleep(INTERVAL).await;
    }
}

async fn end(scheduler: &Shared, order: &MoveOrder) {
    let mut running = scheduler.moves.running.lock().await;
    running.remove(order);
    let deleted = scheduler
        .store
        .apply(vec![Write::DeleteMoveOrder(order.clone())])
        .await;
    if let Err(error) = deleted {
        // The next scheduler finds nothing left to do.
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "moves that are done stay in the store"
        );
    }
}

async fn plan(scheduler: &Shared, node: &NodeName, direction: Direction) -> Plan {
    let (shared, node) = (Arc::clone(scheduler), shoal_plan::NodeName::new(node.as_str()));
    let planned = scheduler.planner.run(move || {
        let (snapshot, policy) = (observe::snapshot(&shared), shared.policy.get());
        match direction {
            Direction::Expel => shoal_plan::expel(&snapshot, &policy, &node),
            Direction::Bring => shoal_plan::bring(&snapshot, &policy, &node),
        }
    });
    planned.await.unwrap_or_else(|error| {
        tracing::error!(%error, "the planner failed");
        Plan::default()
    })
}

fn result(migration: &OpenMigration) -> Option<MigrationResult> {
    let outcome = migration.view().outcome?;
    Some(
        outcome
            .report
            .map_or(MigrationResult::Failed, |report| report.result()),
    )
}

fn failed(begun: &[Arc<OpenMigration>]) -> BTreeSet<VmId> {
    let failed = begun
        .iter()
        .filter(|migration| result(migration).is_some_and(|result| result != MigrationResult::Completed));
    failed
        .map(|migration| VmId::new(&migration.intent.vm.to_string()))
        .collect()
}

/// In words, with the reason of the first.
fn what_failed(begun: &[Arc<OpenMigration>], count: usize) -> String {
    let report = |migration: &Arc<OpenMigration>| {
        let outcome = migration.view().outcome?;
        let report = outcome.report?;
        (report.result() != MigrationResult::Completed).then(|| {
            let (vm, why) = (outcome.vm_name, report.reason);
            format!("'{vm}' stays on {}: {why}", migration.intent.from)
        })
    };
    let first = begun.iter().find_map(report).unwrap_or_default();
    match count {
        1 => first,
        _ => format!("{count} moves failed, the first: {first}; see `shoal migrations`"),
    }
}

fn progress(plan: &Plan, begun: &[Arc<OpenMigration>], failed: &BTreeSet<VmId>) -> Progress {
    let under_way = begun
        .iter()
        .filter(|migration| result(migration).is_none())
        .count();
    let moved = begun
        .iter()
        .filter(|migration| result(migration) == Some(MigrationResult::Completed))
        .count();
    let open = plan
        .notes
        .iter()
        .filter(|note| !note.vm.as_ref().is_some_and(|vm| failed.contains(vm)));
    let waiting = open
        .clone()
        .filter(|note| note.kind == NoteKind::DrainWaiting)
        .count();
    let stuck: Vec<&str> = open
        .filter(|note| note.kind == NoteKind::DrainStuck)
        .map(|note| note.text.as_str())
        .collect();
    let done = plan.actions.is_empty() && under_way == 0 && waiting == 0;
    let mut message = format!("{moved} moved, {under_way} under way");
    if done && !stuck.is_empty() {
        message = stuck.join("; ");
    }
    if done && !failed.is_empty() {
        message = format!("{message}; {}", what_failed(begun, failed.len()));
    }
    Progress {
        moved,
        remaining: under_way + waiting + stuck.len() + failed.len(),
        message,
        done,
    }
}
