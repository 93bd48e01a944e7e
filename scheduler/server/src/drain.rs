//! The operator's will about nodes, and how far a drain has come.

use shoal_proto::NodeName;

use crate::control::{self, Wanted};
use crate::events::NewEvent;
use crate::nodes::NodeEntry;
use crate::record::{Cordon, NodeRecord};
use crate::scheduler::{Scheduler, Shared};
use crate::store::{StoreError, Write};

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
    let plan = control::plan(scheduler, Wanted::Drains).await;
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
