//! A node is off for good by its operator's word. Nobody else can say so: a node that is silent may be well and cut off.
//!
//! What may run there, and up to which epoch, is stored with that word before anything follows from it. Its VMs then fail as if
//! it had said that they are gone, and migrations from and to it end as if it had. Should it come back all the same, each of
//! those epochs is destroyed there, and used up, before it counts as reachable again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use shoal_proto::{Epoch, NodeName, VmId};
use tokio::task::JoinSet;

use super::finish;
use crate::events::{Kind, NewEvent};
use crate::nodes::{Liveness, NodeEntry};
use crate::record::{Lost, NodeRecord, Outcome, Phase, now_unix_ms};
use crate::scheduler::{Scheduler, Shared};
use crate::store::{StoreError, Write};
use crate::vms::{VmEntry, VmGuard};

/// How long what else is done with a VM is waited for.
const PATIENCE: Duration = Duration::from_secs(40);
/// VMs that are destroyed at a time on a node that has come back.
const PARALLEL: usize = 16;

/// Why an operator's word about a node is not taken.
#[derive(Debug, thiserror::Error)]
pub enum LostError {
    /// It is not lost.
    #[error("node {node} reports, so it is not lost; `shoal drain {node}` moves its VMs away")]
    Reports {
        /// The node.
        node: NodeName,
    },
    /// Nobody can know yet.
    #[error("this scheduler has only begun, and node {node} may report yet; try again in some seconds")]
    TooEarly {
        /// The node.
        node: NodeName,
    },
    /// It may run VMs.
    #[error("node {node} is connected; end its agent first")]
    Connected {
        /// The node.
        node: NodeName,
    },
    /// There are VMs that only it can tell of.
    #[error(
        "node {node} has VMs that have not ended ({vms}); `shoal drain {node}` moves them away while it answers, \
         `shoal node lost {node}` gives them up if it never will"
    )]
    HasVms {
        /// The node.
        node: NodeName,
        /// So many, and those that are on their way.
        vms: usize,
    },
    /// The store cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What became of the VMs of a node that was declared lost, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// They have failed.
    pub up: Vec<String>,
    /// Something else is done with them; they follow.
    pub later: Vec<String>,
}

/// Takes an operator's word that a node is off and stays off.
pub async fn declare(scheduler: &Shared, entry: &NodeEntry) -> Result<Given, LostError> {
    let (node, is_new) = store(scheduler, entry).await?;
    for open in scheduler.migrations.list() {
        let intent = &open.intent;
        if intent.from == node || intent.to == node {
            // One that comes from there only has to look: it may have all of the VM.
            open.ask(|wish| wish.cancel |= intent.to == node);
        }
    }
    let mut ends = JoinSet::new();
    for vm in scheduler.vms.on_node(&node) {
        let scheduler = Arc::clone(scheduler);
        ends.spawn(async move {
            let name = vm.record().name.to_string();
            if let Ok(guard) = tokio::time::timeout(PATIENCE, vm.lock()).await {
                end(&scheduler, &vm, &guard).await;
            }
            (name, vm.record().phase.is_over())
        });
    }
    let mut given = Given::default();
    for (name, ended) in ends.join_all().await {
        let which = if ended { &mut given.up } else { &mut given.later };
        which.push(name);
    }
    // One whose migration has brought it elsewhere meanwhile is not.
    let still = |name: &String| {
        let vm = scheduler.vms.find(name);
        vm.is_some_and(|vm| vm.record().node == node)
    };
    given.later.retain(still);
    given.up.sort_unstable();
    given.later.sort_unstable();
    if is_new {
        let message = in_figures(&node, given.up.len(), given.later.len());
        let event = NewEvent::new(Kind::NodeDeclaredLost, message).node(&node);
        scheduler.events.publish(event);
    }
    Ok(given)
}

fn in_figures(node: &NodeName, failed: usize, busy: usize) -> String {
    let vms = |count: usize| {
        if count == 1 {
            "1 VM".to_owned()
        } else {
            format!("{count} VMs")
        }
    };
    let become_of = match (failed, busy) {
        (0, 0) => "it had no VMs".to_owned(),
        (failed, 0) => format!("{} failed by that", vms(failed)),
        (0, busy) => format!("{} busy with something else, and to fail after that", vms(busy)),
        (failed, busy) => format!(
            "{} failed by that, {} busy with something else and to fail after that",
            vms(failed),
            vms(busy)
        ),
    };
    format!("{node} was declared lost; {become_of}")
}

/// Stores it with all that may run there: no plan that is made from now on brings a VM there. Answers the node's name, and whether
/// anything was new.
async fn store(scheduler: &Shared, entry: &NodeEntry) -> Result<(NodeName, bool), LostError> {
    let _planning = scheduler.planning.lock().await;
    let record = entry.record();
    let node = record.name.clone();
    if entry.has_reported() && entry.liveness() == Liveness::Live {
        return Err(LostError::Reports { node });
    }
    if !entry.has_reported() && scheduler.awaits_reports() {
        return Err(LostError::TooEarly { node });
    }
    let fenced = may_run(scheduler, &record);
    let before = record.lost.as_ref();
    // Said again, it changes nothing, unless there are VMs that were on their way when it was said first.
    if before.is_some_and(|before| before.fenced == fenced) {
        return Ok((node, false));
    }
    let since_unix_ms = before.map_or_else(now_unix_ms, |before| before.since_unix_ms);
    let lost = Lost {
        since_unix_ms,
        fenced,
    };
    let stored = NodeRecord {
        lost: Some(lost.clone()),
        ..record
    };
    scheduler.store.apply(vec![Write::PutNode(stored)]).await?;
    entry.set_lost(Some(lost));
    Ok((node, true))
}

/// VMs that a node has or was to get, and what it may still have if this was said of it before.
fn may_run(scheduler: &Scheduler, record: &NodeRecord) -> BTreeMap<VmId, Epoch> {
    let before = record.lost.iter().flat_map(|lost| lost.fenced.clone());
    let owned = scheduler.vms.on_node(&record.name).into_iter().map(|vm| {
        let record = vm.record();
        (record.id, record.last_epoch)
    });
    let moving = scheduler.migrations.list().into_iter().filter_map(|open| {
        let intent = &open.intent;
        if intent.to == record.name {
            Some((intent.vm, intent.epoch))
        } else {
            (intent.from == record.name).then_some((intent.vm, intent.from_epoch))
        }
    });
    let mut fenced = BTreeMap::new();
    for (vm, epoch) in before.chain(owned).chain(moving) {
        let newest = fenced.entry(vm).or_insert(epoch);
        *newest = epoch.max(*newest);
    }
    fenced
}

/// Ends a VM whose node was declared lost; false if that is not so.
pub async fn end(scheduler: &Scheduler, entry: &VmEntry, guard: &VmGuard) -> bool {
    let record = entry.record();
    if matches!(record.phase, Phase::Ended(_) | Phase::Queued) || !scheduler.nodes.is_lost(&record.node) {
        return false;
    }
    let reason = format!("node {} was declared lost", record.node);
    finish::end_vm(scheduler, entry, Outcome::Failed { reason }, guard).await;
    true
}

/// A node that was declared lost reports: what it must not run is destroyed there, then it is as any other. What cannot be done
/// now is done when it reports again.
pub async fn clear(scheduler: &Shared, node: &NodeName) {
    let Some((entry, lost)) = scheduler
        .nodes
        .get(node)
        .and_then(|entry| Some((Arc::clone(&entry), entry.lost()?)))
    else {
        return;
    };
    for vm in scheduler.vms.on_node(node) {
        if let Some(guard) = vm.try_lock() {
            end(scheduler, &vm, &guard).await;
        }
    }
    // A migration that is open may need what is left there, until it has ended.
    if scheduler.vms.count_on_node(node) > 0 || scheduler.migrations.any_at(node) {
        return;
    }
    if !destroy(&entry, &lost).await {
        return;
    }
    let _planning = scheduler.planning.lock().await;
    let record = entry.record();
    if record.lost.as_ref() != Some(&lost) {
        return;
    }
    let record = NodeRecord { lost: None, ..record };
    if let Err(error) = scheduler.store.apply(vec![Write::PutNode(record)]).await {
        tracing::error!(%node, error = &error as &dyn std::error::Error, "node cannot be stored");
        return;
    }
    entry.set_lost(None);
    let message = format!(
        "{node}, which was declared lost, is back; nothing is left there of the {} VMs that it had",
        lost.fenced.len()
    );
    let event = NewEvent::new(Kind::NodeReturned, message).node(node);
    scheduler.events.publish(event);
}

/// True when the agent has confirmed that nothing of all that is there, or can start there.
async fn destroy(entry: &NodeEntry, lost: &Lost) -> bool {
    let mut left = lost.fenced.iter();
    let mut calls = JoinSet::new();
    loop {
        while calls.len() < PARALLEL
            && let Some((&vm, &newest)) = left.next()
        {
            let agent = entry.agent();
            let mut epochs = entry.epochs_of(vm);
            epochs.retain(|&epoch| epoch < newest);
            epochs.push(newest);
            calls.spawn(async move {
                for epoch in epochs {
                    agent.destroy(vm, epoch).await?;
                }
                Ok::<(), crate::agent::AgentError>(())
            });
        }
        match calls.join_next().await {
            None => return true,
            Some(Ok(Ok(()))) => {}
            Some(Ok(Err(error))) => {
                tracing::info!(node = %entry.name(), %error, "what it must not run is ended later");
                return false;
            }
            Some(Err(_)) => return false,
        }
    }
}

/// Forgets a node that has no VMs and is not connected. What must not run there is kept, should it come back.
pub async fn remove(scheduler: &Shared, entry: &NodeEntry) -> Result<(), LostError> {
    let _planning = scheduler.planning.lock().await;
    let record = entry.record();
    let node = record.name.clone();
    if entry.is_connected() {
        return Err(LostError::Connected { node });
    }
    if !entry.has_reported() && scheduler.awaits_reports() {
        return Err(LostError::TooEarly { node });
    }
    let vms = scheduler.vms.count_on_node(&node);
    if vms > 0 || scheduler.migrations.any_at(&node) {
        return Err(LostError::HasVms {
            node,
            vms: vms.max(1),
        });
    }
    let write = match &record.lost {
        Some(lost) if !lost.fenced.is_empty() => Write::PutNode(NodeRecord {
            removed: true,
            ..record
        }),
        _ => Write::DeleteNode(node.clone()),
    };
    scheduler.store.apply(vec![write]).await?;
    scheduler.nodes.remove(&node);
    scheduler.failures.forget(&node);
    let event = NewEvent::new(Kind::NodeRemoved, format!("{node} was removed")).node(&node);
    scheduler.events.publish(event);
    Ok(())
}

/// What is to be said of such a node.
pub fn in_words(node: &NodeName, lost: &Lost, liveness: Liveness) -> String {
    let vms = lost.fenced.len();
    match liveness {
        Liveness::Live => {
            format!("was declared lost and is back: {vms} VMs that it had are ended there before it is ready")
        }
        Liveness::Suspect | Liveness::Lost => format!(
            "was declared lost; should it come back, {vms} VMs that it had are ended there first; `shoal node rm {node}` \
             removes it"
        ),
    }
}
