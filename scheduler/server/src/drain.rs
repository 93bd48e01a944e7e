//! The operator's will about nodes, and how far a drain has come.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_plan::Plan;
use shoal_proto::NodeName;

use crate::control::{self, Wanted};
use crate::events::NewEvent;
use crate::nodes::NodeEntry;
use crate::record::{Cordon, NodeRecord};
use crate::scheduler::{Scheduler, Shared};
use crate::store::{StoreError, Write};

/// A plan that is older says nothing of a drain.
const FRESH: Duration = Duration::from_secs(1);

/// How a drain stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// VMs are moving or will be.
    Moving,
    /// No VM is left.
    Empty,
    /// Those that are left cannot go; the text says why.
    Stuck(String),
}

/// A plan that is made for all who watch drains, however many they are.
#[derive(Debug, Default)]
pub struct SharedPlan(tokio::sync::Mutex<Option<(Instant, Arc<Plan>)>>);

impl SharedPlan {
    /// The latest, unless it is too old.
    async fn get(&self, scheduler: &Shared) -> Arc<Plan> {
        let mut latest = self.0.lock().await;
        if let Some((_, plan)) = latest.as_ref().filter(|(made, _)| made.elapsed() < FRESH) {
            return Arc::clone(plan);
        }
        let plan = Arc::new(control::plan(scheduler, Wanted::Drains).await);
        *latest = Some((Instant::now(), Arc::clone(&plan)));
        plan
    }
}

/// Stores and shows whether a node takes VMs.
pub async fn set_cordon(
    scheduler: &Scheduler,
    entry: &NodeEntry,
    cordon: Cordon,
    event: NewEvent,
) -> Result<(), StoreError> {
    let _planning = scheduler.planning.lock().await;
    let record = NodeRecord {
        cordon,
        ..entry.record()
    };
    scheduler.store.apply(vec![Write::PutNode(record)]).await?;
    entry.set_cordon(cordon);
    scheduler.events.publish(event);
    Ok(())
}

/// No VM is on the node or on its way to it, and none elsewhere still fetches memory from it.
pub fn is_empty(scheduler: &Scheduler, node: &NodeName) -> bool {
    scheduler.vms.count_on_node(node) == 0 && !scheduler.migrations.any_at(node)
}

/// How the drain of a node stands, by what the planner would do now.
pub async fn progress(scheduler: &Shared, entry: &NodeEntry) -> Progress {
    let name = entry.record().name;
    let vms = scheduler.vms.on_node(&name);
    if is_empty(scheduler, &name) {
        return Progress::Empty;
    }
    if scheduler.awaits_reports() {
        return Progress::Moving;
    }
    if !entry.is_reachable() {
        return Progress::Stuck(format!("{name} does not answer; it is drained when it does"));
    }
    let leaving = vms
        .iter()
        .any(|vm| scheduler.migrations.get(vm.record().id).is_some());
    if leaving || vms.is_empty() {
        return Progress::Moving;
    }
    let plan = scheduler.drain_plan.get(scheduler).await;
    if plan
        .actions
        .iter()
        .any(|action| action.from.as_str() == name.as_str())
    {
        return Progress::Moving;
    }
    let notes = plan
        .notes
        .iter()
        .filter(|note| note.node.as_str() == name.as_str());
    let stuck: Vec<&str> = notes
        .clone()
        .filter(|note| note.kind == shoal_plan::NoteKind::DrainStuck)
        .map(|note| note.text.as_str())
        .collect();
    if stuck.is_empty()
        || notes
            .clone()
            .any(|note| note.kind == shoal_plan::NoteKind::DrainWaiting)
    {
        return Progress::Moving;
    }
    Progress::Stuck(stuck.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Cluster;

    #[tokio::test]
    async fn those_who_watch_drains_share_a_plan() {
        let cluster = Cluster::start(2, 1 << 30).await;
        let shared = &cluster.scheduler.drain_plan;
        let mut watchers = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let scheduler = Arc::clone(&cluster.scheduler);
            watchers.spawn(async move { scheduler.drain_plan.get(&scheduler).await });
        }
        let plans = watchers.join_all().await;
        let last = shared.0.lock().await.clone().expect("made").1;
        let same = plans.iter().filter(|plan| Arc::ptr_eq(plan, &last)).count();
        assert!(same > 1, "each made its own");
    }
}
