//! What happened, in order, for people and scripts to follow: a bounded ring in memory, copied to the store.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use shoal_proto::{MigrationId, cluster};
use tokio::sync::watch;

use crate::record::{VmRecord, now_unix_ms};
use crate::store::{Store, StoreError, Write};

/// Events kept.
const KEPT: usize = 10_000;
/// Events given to a reader, or stored, at a time: one batch of the store.
const BATCH: usize = 100;

/// The kind of an event: a word that scripts can compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A VM runs for the first time.
    VmStarted,
    /// A VM waits for room.
    VmQueued,
    /// A VM that waited is not to be started any more.
    VmWithdrawn,
    /// A VM is stopped for another, and will wait to begin anew.
    VmPreempted,
    /// A VM could not be started.
    VmLaunchFailed,
    /// The guest ended.
    VmExited,
    /// The VM ended by a fault.
    VmFailed,
    /// A VM was removed.
    VmRemoved,
    /// A node runs a VM the store has never heard of.
    VmUnknown,
    /// It is not known which of two nodes runs the VM.
    VmInDoubt,
    /// What was in doubt was decided.
    VmResolved,
    /// What has become of a VM cannot be stored.
    StoreRefused,
    /// A move was decided on; the message is its reason.
    MigrationPlanned,
    /// A move was decided on, and does not begin yet; the message is the reason.
    MigrationWaits,
    /// The planner would move a VM, and is to advise only.
    MigrationAdvised,
    /// The VM runs on its new node.
    MigrationCompleted,
    /// The VM stayed, or was lost; the message says which.
    MigrationFailed,
    /// The VM runs on its new node and fetches memory from the old one.
    MigrationPostCopy,
    /// In post-copy the two nodes have lost each other; the VM waits.
    MigrationLinkLost,
    /// They are connected again.
    MigrationLinkBack,
    /// A node answers (again).
    NodeReady,
    /// A node has not reported for a while.
    NodeUnreachable,
    /// A node has not reported for long: what it was like is forgotten.
    NodeLost,
    /// An operator has said that a node is off and stays off.
    NodeDeclaredLost,
    /// Such a node has come back, and what it had then is ended there.
    NodeReturned,
    /// An operator has removed a node.
    NodeRemoved,
    /// A node is being drained.
    NodeDraining,
    /// A drained node is empty.
    NodeDrained,
    /// A node takes VMs again.
    NodeUncordoned,
    /// Something the planner wants cannot be done.
    PlanStuck,
    /// An image was imported.
    ImageImported,
    /// An operator changed labels, taints or reserves of a node.
    NodeUpdated,
    /// The owner of a VM changed what is wished for it.
    VmUpdated,
    /// A VM's vCPUs were stopped; the message is the reason.
    VmSuspended,
    /// They run again.
    VmResumed,
    /// An operator changed the planner's policy.
    PolicyChanged,
}

impl Kind {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VmStarted => "vm-started",
            Self::VmQueued => "vm-queued",
            Self::VmWithdrawn => "vm-withdrawn",
            Self::VmPreempted => "vm-preempted",
            Self::VmLaunchFailed => "vm-launch-failed",
            Self::VmExited => "vm-exited",
            Self::VmFailed => "vm-failed",
            Self::VmRemoved => "vm-removed",
            Self::VmUnknown => "vm-unknown",
            Self::VmInDoubt => "vm-in-doubt",
            Self::VmResolved => "vm-resolved",
            Self::StoreRefused => "store-refused",
            Self::MigrationPlanned => "migration-planned",
            Self::MigrationWaits => "migration-waits",
            Self::MigrationAdvised => "migration-advised",
            Self::MigrationCompleted => "migration-completed",
            Self::MigrationFailed => "migration-failed",
            Self::MigrationPostCopy => "migration-post-copy",
            Self::MigrationLinkLost => "migration-link-lost",
            Self::MigrationLinkBack => "migration-link-back",
            Self::NodeReady => "node-ready",
            Self::NodeUnreachable => "node-unreachable",
            Self::NodeLost => "node-lost",
            Self::NodeDeclaredLost => "node-declared-lost",
            Self::NodeReturned => "node-returned",
            Self::NodeRemoved => "node-removed",
            Self::NodeDraining => "node-draining",
            Self::NodeDrained => "node-drained",
            Self::NodeUncordoned => "node-uncordoned",
            Self::PlanStuck => "plan-stuck",
            Self::ImageImported => "image-imported",
            Self::NodeUpdated => "node-updated",
            Self::VmUpdated => "vm-updated",
            Self::VmSuspended => "vm-suspended",
            Self::VmResumed => "vm-resumed",
            Self::PolicyChanged => "policy-changed",
        }
    }
}

/// An event before it has a number.
#[derive(Debug, Clone)]
pub struct NewEvent(cluster::Event);

impl NewEvent {
    /// An event of this kind, with its message.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(cluster::Event {
            kind: kind.as_str().to_owned(),
            message: message.into(),
            ..Default::default()
        })
    }

    /// About a VM, on its node.
    pub fn vm(mut self, vm: &VmRecord) -> Self {
        self.0.vm = vm.name.to_string();
        self.0.node = vm.node.to_string();
        self
    }

    /// About a node.
    pub fn node(mut self, node: &shoal_proto::NodeName) -> Self {
        self.0.node = node.to_string();
        self
    }

    /// About a migration.
    pub fn migration(mut self, migration: MigrationId) -> Self {
        self.0.migration_id = migration.to_string();
        self
    }
}

/// The ring of events.
#[derive(Debug)]
pub struct Events {
    ring: Mutex<VecDeque<cluster::Event>>,
    last: watch::Sender<u64>,
    stored: tokio::sync::Mutex<u64>,
}

impl Events {
    /// Goes on after those that were stored.
    pub fn new(stored: Vec<cluster::Event>) -> Self {
        let last = stored.last().map_or(0, |event| event.sequence);
        Self {
            ring: Mutex::new(stored.into()),
            last: watch::Sender::new(last),
            stored: last.into(),
        }
    }

    /// Numbers an event, shows it to followers and logs it.
    pub fn publish(&self, event: NewEvent) {
        let mut event = event.0;
        event.time_unix_ms = now_unix_ms();
        tracing::info!(kind = %event.kind, vm = %event.vm, node = %event.node, migration = %event.migration_id,
            "{}", event.message);
        let mut ring = self.ring();
        event.sequence = *self.last.borrow() + 1;
        let sequence = event.sequence;
        if ring.len() >= KEPT {
            ring.pop_front();
        }
        ring.push_back(event);
        self.last.send_replace(sequence);
    }

    /// Events after a number, oldest first; call again with the last one's until none come.
    pub fn after(&self, sequence: u64) -> Vec<cluster::Event> {
        let ring = self.ring();
        let start = ring.partition_point(|event| event.sequence <= sequence);
        ring.range(start..).take(BATCH).cloned().collect()
    }

    /// Tells when there are new events.
    pub fn follow(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    /// Copies what is new to the store.
    pub async fn persist(&self, store: &Store) -> Result<(), StoreError> {
        let mut stored = self.stored.lock().await;
        loop {
            let batch = self.after(*stored);
            let Some(last) = batch.last().map(|event| event.sequence) else {
                return Ok(());
            };
            let mut writes: Vec<Write> = batch.into_iter().map(Write::PutEvent).collect();
            if let Some(old) = last.checked_sub(KEPT as u64) {
                writes.push(Write::TrimEvents(old));
            }
            store.apply(writes).await?;
            *stored = last;
        }
    }

    fn ring(&self) -> MutexGuard<'_, VecDeque<cluster::Event>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_are_numbered_bounded_and_survive() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("store");
        let (store, _) = Store::open_file(&path).await.expect("opened");
        let events = Events::new(Vec::new());
        for index in 0..KEPT + 5 {
            events.publish(NewEvent::new(Kind::VmStarted, index.to_string()));
        }
        assert_eq!(events.after(0).first().map(|event| event.sequence), Some(6));
        events.persist(&store).await.expect("stored");
        drop(store);

        let (_, contents) = Store::open_file(&path).await.expect("opened again");
        assert_eq!(contents.events.len(), KEPT);
        let again = Events::new(contents.events);
        again.publish(NewEvent::new(Kind::VmExited, "more"));
        let last = again.after(KEPT as u64 + 5);
        assert_eq!(last.len(), 1);
        assert_eq!(last[0].sequence, KEPT as u64 + 6);
    }
}
