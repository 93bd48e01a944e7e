//! Migrations under way, in memory: what those who watch one see, and what they may ask of it.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use shoal_proto::{NodeName, VmId, cluster, vm};
use tokio::sync::watch;

use crate::record::Intent;

/// What is known of a migration now.
#[derive(Debug, Clone, Default)]
pub struct MigrationView {
    /// The latest from the source.
    pub progress: Option<vm::MigrationProgress>,
    /// Why it is not known which node runs the VM, while that is so.
    pub in_doubt: Option<String>,
    /// Set at the end.
    pub outcome: Option<cluster::Migration>,
}

/// What someone wants of a migration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// To be cancelled, if it still can be.
    pub cancel: bool,
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
    /// Adds a migration whose intent has been stored.
    pub fn open(&self, intent: Arc<Intent>) -> Arc<OpenMigration> {
        let vm = intent.vm;
        let migration = Arc::new(OpenMigration {
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

    /// A VM is on its way to this node.
    pub fn any_to(&self, node: &NodeName) -> bool {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        open.values().any(|migration| migration.intent.to == *node)
    }

    /// Drops one whose intent has been closed.
    pub fn close(&self, vm: VmId) {
        self.open
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&vm);
    }
}
