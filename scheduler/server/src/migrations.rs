//! Migrations under way, in memory: what those who watch one see, and what they may ask of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use shoal_proto::{NodeName, VmId, cluster, vm};
use tokio::sync::watch;

use crate::bandwidth::{self, Caps, Share, Sharer};
use crate::record::Intent;

/// What is known of a migration now.
#[derive(Debug, Clone, Default)]
pub struct MigrationView {
    /// The latest from the source.
    pub progress: Option<vm::MigrationProgress>,
    /// Why it is not known which node runs the VM, while that is so.
    pub in_doubt: Option<String>,
    /// The VM runs at its destination, and the source still has memory that it needs.
    pub post_copy: bool,
    /// In post-copy: the two have no connection.
    pub link_lost: bool,
    /// Set at the end.
    pub outcome: Option<cluster::Migration>,
}

/// What someone wants of a migration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// To be cancelled, if it still can be.
    pub cancel: bool,
    /// In post-copy: the VM is to be powered off, and does not need the rest of its memory.
    pub stop: bool,
    /// An operator decides which node keeps the VM.
    pub keep: Option<NodeName>,
}

/// A migration whose intent is open.
#[derive(Debug)]
pub struct OpenMigration {
    /// What was stored before it began.
    pub intent: Arc<Intent>,
    view: watch::Sender<MigrationView>,
    wish: watch::Sender<Wish>,
    policy: Mutex<vm::MigrationPolicy>,
    /// What it may use of the network. Only one that has not begun waits.
    share: watch::Sender<Share>,
    /// The cap that its source was told last. Held while the source is told anything, so that nothing overtakes.
    pub told: tokio::sync::Mutex<Option<u64>>,
}

impl OpenMigration {
    /// What is known now.
    pub fn view(&self) -> MigrationView {
        self.view.borrow().clone()
    }

    /// Follows it to its outcome.
    pub fn watch(&self) -> watch::Receiver<MigrationView> {
        self.view.subscribe()
    }

    /// How it is to go, as it holds now; its bandwidth is its own cap, not its share.
    pub fn policy(&self) -> vm::MigrationPolicy {
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a policy that has been stored.
    pub fn set_policy(&self, policy: vm::MigrationPolicy) {
        *self.policy.lock().unwrap_or_else(PoisonError::into_inner) = policy;
    }

    /// What it may use of the network, and changes of that.
    pub fn share(&self) -> watch::Receiver<Share> {
        self.share.subscribe()
    }

    /// The bytes per second that it may use now, 0 for no cap; none while it waits.
    pub fn rate(&self) -> Option<u64> {
        match *self.share.borrow() {
            Share::Rate(rate) => Some(rate),
            Share::Waits(_) => None,
        }
    }

    /// Why it has not begun.
    pub fn waits(&self) -> Option<String> {
        match &*self.share.borrow() {
            Share::Waits(why) => Some(why.clone()),
            Share::Rate(_) => None,
        }
    }

    /// As users see it while it runs.
    pub fn to_wire(&self, vm_name: &str) -> cluster::Migration {
        let intent = &self.intent;
        cluster::Migration {
            id: intent.migration.to_string(),
            vm: intent.vm.to_string(),
            vm_name: vm_name.to_owned(),
            from_node: intent.from.to_string(),
            to_node: intent.to.to_string(),
            epoch: intent.epoch.0,
            reason: intent.reason.clone(),
            started_unix_ms: intent.started_unix_ms,
            report: None,
            progress: self.view().progress,
            policy: Some(self.policy()),
            waits: self.waits().unwrap_or_default(),
        }
    }

    /// Changes what is known.
    pub fn update(&self, change: impl FnOnce(&mut MigrationView)) {
        self.view.send_modify(change);
    }

    /// Asks for something.
    pub fn ask(&self, change: impl FnOnce(&mut Wish)) {
        self.wish.send_modify(change);
    }

    /// Hears what is asked for.
    pub fn wishes(&self) -> watch::Receiver<Wish> {
        self.wish.subscribe()
    }
}

/// All migrations under way, at most one a VM.
#[derive(Debug, Default)]
pub struct MigrationTable {
    open: RwLock<HashMap<VmId, Arc<OpenMigration>>>,
}

impl MigrationTable {
    /// Adds a migration whose intent has been stored. It waits until the network has been shared again.
    pub fn open(&self, intent: Arc<Intent>) -> Arc<OpenMigration> {
        self.add(intent, Share::Waits("it is about to begin".to_owned()))
    }

    /// Adds a migration that may have begun, under an earlier scheduler or unknown to this one.
    pub fn take_up(&self, intent: Arc<Intent>) -> Arc<OpenMigration> {
        self.add(intent, Share::Rate(0))
    }

    fn add(&self, intent: Arc<Intent>, share: Share) -> Arc<OpenMigration> {
        let vm = intent.vm;
        let migration = Arc::new(OpenMigration {
            policy: Mutex::new(intent.policy),
            share: watch::Sender::new(share),
            told: tokio::sync::Mutex::default(),
            intent,
            view: watch::Sender::default(),
            wish: watch::Sender::default(),
        });
        self.open
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(vm, Arc::clone(&migration));
        migration
    }

    /// The migration of a VM.
    pub fn get(&self, vm: VmId) -> Option<Arc<OpenMigration>> {
        self.open
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&vm)
            .cloned()
    }

    /// All of them, latest first.
    pub fn list(&self) -> Vec<Arc<OpenMigration>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = open.values().cloned().collect();
        all.sort_by_key(|migration| {
            std::cmp::Reverse((migration.intent.started_unix_ms, migration.intent.vm))
        });
        all
    }

    /// A VM is on its way to this node, or the memory of one is still on its way from it.
    pub fn any_at(&self, node: &NodeName) -> bool {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.values()
            .any(|migration| migration.intent.to == *node || migration.intent.from == *node)
    }

    /// Shares the network among all of them again: to be called when one begins, ends or changes, and when a cap does.
    pub fn share_bandwidth(&self, defaults: &cluster::MigrationDefaults) {
        // The lock keeps a later call from being overtaken by an earlier one.
        let open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = open
            .values()
            .map(|migration| (migration, migration.policy()))
            .collect();
        all.sort_by_key(|(migration, _)| (migration.intent.started_unix_ms, migration.intent.vm));
        let sharers: Vec<Sharer<'_>> = all
            .iter()
            .map(|(migration, policy)| Sharer {
                from: migration.intent.from.as_str(),
                to: migration.intent.to.as_str(),
                own: policy.bandwidth_bytes_per_second.unwrap_or(0),
                priority: policy.priority.unwrap_or(5),
                begun: migration.waits().is_none(),
            })
            .collect();
        let caps = Caps {
            cluster: defaults.cluster_bandwidth_bytes_per_second.unwrap_or(0),
            link: defaults.link_bandwidth_bytes_per_second.unwrap_or(0),
        };
        let shares = bandwidth::shares(&sharers, caps);
        for ((migration, _), share) in all.iter().zip(shares) {
            migration.share.send_if_modified(|now| {
                let changes = *now != share;
                *now = share;
                changes
            });
        }
    }

    /// Drops one whose intent has been closed.
    pub fn close(&self, vm: VmId) {
        self.open
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&vm);
    }
}
