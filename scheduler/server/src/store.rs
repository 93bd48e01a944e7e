//! The durable state. It is read once, when this scheduler begins to lead; afterwards it is only written, each batch
//! whole or not at all, and durable before [`Store::apply`] returns.
//!
//! - `backend`: what keeps the bytes has to do no more than this
//! - `file` (redb, one scheduler) and `etcd` (several) do it
//! - `records`: what the bytes are, the same for both; `upgrade`: what older schedulers wrote
//! - `backup`: all of a store in a file, and back, into either kind

pub mod backend;
pub mod backup;
pub mod etcd;
mod file;
mod records;
mod upgrade;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message as _;
use shoal_cpuid::Table as CpuTable;
use shoal_proto::{NodeName, VmId, cluster, vm};
use tokio::sync::{RwLock, watch};

use crate::cpus::{CpuDigest, StoredCpus};
use crate::moves::MoveOrder;
use crate::record::{ImageRecord, Intent, NodeRecord, QueuedRecord, VmRecord};

pub use backend::Backend;
use backend::{Change, Table};
pub use file::FileBackend;

/// Raised with every change that an older scheduler could not read.
pub const SCHEMA_VERSION: u64 = 3;
/// Changes in one batch. etcd takes 128 operations in one transaction unless it is told otherwise, and two are its fence.
const MOST_CHANGES: usize = 120;
/// Bytes in one batch. etcd takes 1.5 MiB in one request unless it is told otherwise.
const MOST_BYTES: usize = 1 << 20;

/// Which lead of a scheduler this is. It rises with each; what was decided in an older one counts no more.
///
/// It is one more than the last, or the seconds since 1970 if that is more: so it rises also where a store was put back to an
/// old state, or was lost, which agents that have heard of later terms do not know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Term(pub u64);

impl Term {
    /// The one after this.
    pub fn next(self) -> Self {
        let now = crate::record::now_unix_ms() / 1000;
        Self(self.0.saturating_add(1).max(u64::try_from(now).unwrap_or(0)))
    }
}

impl std::fmt::Display for Term {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Why the store cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the file open.
    #[error(
        "store {0}: another scheduler uses this state directory; stop it first or give another --state-dir"
    )]
    InUse(PathBuf),
    /// It is not where etcd is.
    #[error("store: '{text}' {why}; the form is etcd://HOST:PORT[,HOST:PORT...][/PREFIX]")]
    Location {
        /// As it was given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Written by a newer program.
    #[error(
        "store {store}: schema version {found}, this scheduler reads up to {SCHEMA_VERSION}; use a newer shoal"
    )]
    NewerSchema {
        /// Which store.
        store: String,
        /// Its version.
        found: u64,
    },
    /// A record does not decode, or the file is no store.
    #[error(
        "store {store}: {what} is damaged; restore a backup (`shoal restore`), or move it away to start empty"
    )]
    Corrupt {
        /// Which store.
        store: String,
        /// Which part.
        what: String,
    },
    /// A restore was interrupted.
    #[error("store {0}: a restore did not come to its end; run `shoal restore` again, with --force")]
    HalfRestored(String),
    /// The database reports an error.
    #[error("store {store}")]
    Database {
        /// Which store.
        store: String,
        /// What it says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// More than a store takes at once.
    #[error("store: {what} is more than can be stored at once ({MOST_CHANGES} changes, {MOST_BYTES} bytes)")]
    TooLarge {
        /// What is.
        what: String,
    },
    /// A record cannot be encoded.
    #[error("record cannot be encoded")]
    Encode(#[from] serde_json::Error),
    /// Another scheduler leads, or may. Nothing was stored, or the next leader finds it.
    #[error("this scheduler does not lead any more; the one that does goes on with what was stored")]
    Deposed,
    /// Opened for reading.
    #[error("this scheduler does not lead, and stores nothing")]
    ReadOnly,
    /// The writer task was cancelled, which happens only at shutdown.
    #[error("store write was interrupted by shutdown")]
    Interrupted,
}

impl StoreError {
    /// Whether the same may be stored by this scheduler later.
    pub fn can_pass(&self) -> bool {
        match self {
            Self::Database { .. } => true,
            Self::InUse(_)
            | Self::Location { .. }
            | Self::NewerSchema { .. }
            | Self::Corrupt { .. }
            | Self::HalfRestored(_)
            | Self::TooLarge { .. }
            | Self::Encode(_)
            | Self::Deposed
            | Self::ReadOnly
            | Self::Interrupted => false,
        }
    }

    fn corrupt(store: &str, what: impl Into<String>) -> Self {
        Self::Corrupt {
            store: store.to_owned(),
            what: what.into(),
        }
    }

    fn database(store: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Database {
            store: store.to_owned(),
            source: source.into(),
        }
    }
}

/// One change. A batch of them is atomic.
#[derive(Debug, Clone)]
pub enum Write {
    /// Inserts or replaces a VM.
    PutVm(Arc<VmRecord>),
    /// Removes a VM; the history of its migrations stays.
    DeleteVm(VmId),
    /// Opens an intent.
    PutIntent(Arc<Intent>),
    /// Replaces an intent, if it is still open.
    ReplaceIntent(Arc<Intent>),
    /// Closes the VM's intent.
    DeleteIntent(VmId),
    /// Adds an ended migration to the history, at this number.
    PutMigration(u64, Box<cluster::Migration>),
    /// Adds to a migration in the history, if it is still there, what its guest missed, in microseconds.
    SetGuestGap(u64, u64),
    /// Drops one from the history.
    DeleteMigration(u64),
    /// Drops the samples of one.
    DeleteSamples(u64),
    /// Replaces the cluster's defaults for migrations.
    PutMigrationDefaults(Box<cluster::MigrationDefaults>),
    /// Replaces what operators have set of the planner's policy.
    PutSchedulingPolicy(BTreeMap<String, String>),
    /// Inserts or replaces a VM that waits.
    PutQueued(Arc<QueuedRecord>),
    /// Removes one from the queue.
    DeleteQueued(u64),
    /// Keeps what someone asked for until it is done.
    PutMoveOrder(MoveOrder),
    /// It is done.
    DeleteMoveOrder(MoveOrder),
    /// Inserts or replaces a node.
    PutNode(NodeRecord),
    /// Removes a node.
    DeleteNode(NodeName),
    /// Keeps a kind of CPU.
    PutCpu(CpuDigest, CpuTable),
    /// Changes or removes the CPU baseline.
    SetCpuBaseline(Option<CpuDigest>),
    /// Inserts or replaces an image.
    PutImage(Arc<ImageRecord>),
    /// Appends an event.
    PutEvent(cluster::Event),
    /// Drops every event up to this sequence number.
    TrimEvents(u64),
}

/// All that was stored when the scheduler began to lead.
#[derive(Debug, Default)]
pub struct Contents {
    /// VMs.
    pub vms: Vec<VmRecord>,
    /// Open intents.
    pub intents: Vec<Intent>,
    /// Ended migrations by number, without what makes them big.
    pub history: Vec<(u64, cluster::Migration)>,
    /// Numbers of those whose samples are kept.
    pub sampled: Vec<u64>,
    /// The cluster's defaults for migrations.
    pub migration_defaults: cluster::MigrationDefaults,
    /// What operators have set of the planner's policy.
    pub scheduling_policy: BTreeMap<String, String>,
    /// VMs that wait, in order of arrival.
    pub queue: Vec<QueuedRecord>,
    /// Moves that someone asked for and that are not done.
    pub orders: Vec<MoveOrder>,
    /// Nodes.
    pub nodes: Vec<NodeRecord>,
    /// Kinds of CPUs.
    pub cpus: StoredCpus,
    /// Images.
    pub images: Vec<ImageRecord>,
    /// Events in order.
    pub events: Vec<cluster::Event>,
}

/// The open store.
#[derive(Debug, Clone)]
pub struct Store {
    backend: Arc<dyn Backend>,
    term: Term,
    /// The last batch was stored.
    well: Arc<watch::Sender<bool>>,
    /// Held alone by a batch that reads what it changes, and shared by all others.
    turn: Arc<RwLock<()>>,
}

impl Store {
    /// A store that is kept so.
    pub fn new(backend: Arc<dyn Backend>, term: Term) -> Self {
        Self {
            backend,
            term,
            well: Arc::new(watch::Sender::new(true)),
            turn: Arc::default(),
        }
    }

    /// Opens or creates a file and reads all of it.
    pub async fn open_file(path: &Path) -> Result<(Self, Contents), StoreError> {
        let (backend, term) = FileBackend::open(path)?;
        let store = Self::new(Arc::new(backend), term);
        let contents = store.load().await?;
        Ok((store, contents))
    }

    /// Which lead this is.
    pub fn term(&self) -> Term {
        self.term
    }

    /// Reads all of it, as it is at one moment, in pages.
    pub async fn load(&self) -> Result<Contents, StoreError> {
        records::load(self.backend.as_ref()).await
    }

    /// Reads the images alone.
    pub async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        records::images(self.backend.as_ref()).await
    }

    /// Writes all of it, as it is at one moment, as a backup.
    pub async fn back_up(&self, sink: &mut dyn backup::Sink) -> Result<backup::Summary, backup::BackupError> {
        backup::write(self.backend.as_ref(), self.term, sink).await
    }

    /// Writes a batch durably. All of it or, on an error, nothing is stored.
    pub async fn apply(&self, writes: Vec<Write>) -> Result<(), StoreError> {
        let depends = |write: &Write| matches!(write, Write::ReplaceIntent(_) | Write::SetGuestGap(..));
        if writes.iter().any(depends) {
            let _alone = self.turn.write().await;
            self.commit(writes).await
        } else {
            let _beside_others = self.turn.read().await;
            self.commit(writes).await
        }
    }

    async fn commit(&self, writes: Vec<Write>) -> Result<(), StoreError> {
        let mut changes = Vec::with_capacity(writes.len());
        for write in writes {
            records::encode(self.backend.as_ref(), write, &mut changes).await?;
        }
        let bytes: usize = changes.iter().map(Change::bytes).sum();
        if changes.len() > MOST_CHANGES || bytes > MOST_BYTES {
            let what = format!("a batch of {} changes and {bytes} bytes", changes.len());
            return Err(StoreError::TooLarge { what });
        }
        let stored = self.backend.commit(changes).await;
        let well = !matches!(stored, Err(StoreError::Database { .. }));
        self.well
            .send_if_modified(|known| std::mem::replace(known, well) != well);
        stored
    }

    /// Tells whether what was to be stored last could be.
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.well.subscribe()
    }

    /// Stores nothing, to see whether it could.
    pub async fn probe(&self) {
        let _ = self.commit(Vec::new()).await;
    }

    /// An ended migration with all that was kept of it. None if it has made room meanwhile.
    pub async fn migration(&self, number: u64) -> Result<Option<cluster::Migration>, StoreError> {
        let key = number.to_be_bytes();
        let Some(whole) = self.backend.get(Table::History, &key).await? else {
            return Ok(None);
        };
        let damaged = |_| {
            let what = format!("migration {number} of the history");
            StoreError::corrupt(self.backend.name(), what)
        };
        let mut migration = cluster::Migration::decode(whole.as_slice()).map_err(damaged)?;
        if let (Some(report), Some(samples)) = (
            &mut migration.report,
            self.backend.get(Table::Samples, &key).await?,
        ) {
            let samples = vm::MigrationReport::decode(samples.as_slice()).map_err(damaged)?;
            report.samples = samples.samples;
        }
        Ok(Some(migration))
    }
}

#[cfg(test)]
mod tests;
