//! The durable state: one redb file. It is read once, at start; afterwards it is only written, each batch in one
//! transaction that is on the disk before [`Store::apply`] returns.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message as _;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use shoal_proto::{Epoch, VmId, cluster};

use crate::record::{ImageRecord, Intent, NodeRecord, VmRecord};

/// Raised with every change that an older scheduler could not read.
const SCHEMA_VERSION: u64 = 1;

type Bytes = TableDefinition<'static, &'static [u8], &'static [u8]>;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const VMS: Bytes = TableDefinition::new("vms");
const INTENTS: Bytes = TableDefinition::new("intents");
/// Key: VM id, then epoch (big endian).
const MIGRATIONS: Bytes = TableDefinition::new("migrations");
const NODES: Bytes = TableDefinition::new("nodes");
const IMAGES: Bytes = TableDefinition::new("images");
/// Key: sequence number (big endian).
const EVENTS: Bytes = TableDefinition::new("events");

/// Why the store cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the file open.
    #[error(
        "store {0}: another scheduler uses this state directory; stop it first or give another --state-dir"
    )]
    InUse(PathBuf),
    /// Written by a newer program.
    #[error(
        "store {path}: schema version {found}, this scheduler reads up to {SCHEMA_VERSION}; use a newer shoal"
    )]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// A record does not decode, or the file is no store.
    #[error(
        "store {path}: {what} is damaged; restore the file from a backup, or move it away to start empty"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Which part.
        what: String,
    },
    /// The database reports an error.
    #[error("store {path}")]
    Database {
        /// The file.
        path: PathBuf,
        /// What it says.
        source: Box<redb::Error>,
    },
    /// A record cannot be encoded.
    #[error("record cannot be encoded")]
    Encode(#[from] serde_json::Error),
    /// The writer task was cancelled, which happens only at shutdown.
    #[error("store write was interrupted by shutdown")]
    Interrupted,
}

/// One change. A batch of them is atomic.
#[derive(Debug, Clone)]
pub enum Write {
    /// Inserts or replaces a VM.
    PutVm(Arc<VmRecord>),
    /// Removes a VM and the history of its migrations.
    DeleteVm(VmId),
    /// Opens an intent.
    PutIntent(Arc<Intent>),
    /// Closes the VM's intent.
    DeleteIntent(VmId),
    /// Adds an ended migration to the history.
    PutMigration(VmId, Box<cluster::Migration>),
    /// Drops one from the history.
    DeleteMigration(VmId, Epoch),
    /// Inserts or replaces a node.
    PutNode(NodeRecord),
    /// Inserts or replaces an image.
    PutImage(Arc<ImageRecord>),
    /// Appends an event.
    PutEvent(cluster::Event),
    /// Drops every event up to this sequence number.
    TrimEvents(u64),
}

/// All that was stored when the scheduler started.
#[derive(Debug, Default)]
pub struct Contents {
    /// VMs.
    pub vms: Vec<VmRecord>,
    /// Open intents.
    pub intents: Vec<Intent>,
    /// Ended migrations, oldest first for each VM.
    pub migrations: Vec<(VmId, cluster::Migration)>,
    /// Nodes.
    pub nodes: Vec<NodeRecord>,
    /// Images.
    pub images: Vec<ImageRecord>,
    /// Events in order.
    pub events: Vec<cluster::Event>,
}

/// The open store.
#[derive(Debug, Clone)]
pub struct Store {
    database: Arc<Database>,
    path: Arc<PathBuf>,
}

impl Store {
    /// Opens or creates the store and reads all of it.
    pub fn open(path: &Path) -> Result<(Self, Contents), StoreError> {
        let database = Database::create(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(path.to_owned()),
            redb::DatabaseError::UpgradeRequired(_) => corrupt(path, "the database format"),
            redb::DatabaseError::Storage(redb::StorageError::Corrupted(what)) => corrupt(path, &what),
            redb::DatabaseError::Storage(redb::StorageError::Io(error))
                if error.kind() == std::io::ErrorKind::InvalidData =>
            {
                corrupt(path, "the database file")
            }
            other => database_error(path, other),
        })?;
        let store = Self {
            database: Arc::new(database),
            path: Arc::new(path.to_owned()),
        };
        store.check_schema()?;
        let contents = store.load()?;
        Ok((store, contents))
    }

    /// Writes a batch durably, off the async threads. All of it or, on an error, nothing is stored.
    pub async fn apply(&self, writes: Vec<Write>) -> Result<(), StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || store.apply_blocking(&writes))
            .await
            .map_err(|_| StoreError::Interrupted)?
    }

    fn check_schema(&self) -> Result<(), StoreError> {
        let path = self.path.as_path();
        let transaction = self.database.begin_write().map_err(|e| database_error(path, e))?;
        let fresh = transaction
            .list_tables()
            .map_err(|e| database_error(path, e))?
            .next()
            .is_none();
        {
            let mut meta = transaction
                .open_table(META)
                .map_err(|e| database_error(path, e))?;
            let found = meta
                .get("schema")
                .map_err(|e| database_error(path, e))?
                .map(|v| v.value());
            match found {
                Some(SCHEMA_VERSION) => {}
                Some(found) if found > SCHEMA_VERSION => {
                    return Err(StoreError::NewerSchema {
                        path: path.to_owned(),
                        found,
                    });
                }
                None if fresh => {
                    meta.insert("schema", SCHEMA_VERSION)
                        .map_err(|e| database_error(path, e))?;
                }
                _ => return Err(corrupt(path, "the schema version")),
            }
        }
        for table in [VMS, INTENTS, MIGRATIONS, NODES, IMAGES, EVENTS] {
            transaction
                .open_table(table)
                .map_err(|e| database_error(path, e))?;
        }
        transaction.commit().map_err(|e| database_error(path, e))
    }

    fn load(&self) -> Result<Contents, StoreError> {
        let events = self.scan(EVENTS, "events", |_, value| cluster::Event::decode(value).ok())?;
        let migrations = self.scan(MIGRATIONS, "migrations", |key, value| {
            let vm = uuid::Uuid::from_slice(key.get(..16)?).ok()?;
            Some((
                vm.to_string().parse().ok()?,
                cluster::Migration::decode(value).ok()?,
            ))
        })?;
        Ok(Contents {
            vms: self.scan(VMS, "vms", json)?,
            intents: self.scan(INTENTS, "intents", json)?,
            migrations,
            nodes: self.scan(NODES, "nodes", json)?,
            images: self.scan(IMAGES, "images", json)?,
            events,
        })
    }

    fn scan<T>(
        &self,
        table: Bytes,
        name: &str,
        decode: impl Fn(&[u8], &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, StoreError> {
        let path = self.path.as_path();
        let transaction = self.database.begin_read().map_err(|e| database_error(path, e))?;
        let table = transaction
            .open_table(table)
            .map_err(|e| database_error(path, e))?;
        let mut found = Vec::new();
        for (index, entry) in table.iter().map_err(|e| database_error(path, e))?.enumerate() {
            let (key, value) = entry.map_err(|e| database_error(path, e))?;
            let record = decode(key.value(), value.value())
                .ok_or_else(|| corrupt(path, &format!("record {index} of table '{name}'")))?;
            found.push(record);
        }
        Ok(found)
    }

    fn apply_blocking(&self, writes: &[Write]) -> Result<(), StoreError> {
        let path = self.path.as_path();
        let transaction = self.database.begin_write().map_err(|e| database_error(path, e))?;
        for write in writes {
            self.write_one(&transaction, write)?;
        }
        transaction.commit().map_err(|e| database_error(path, e))
    }

    fn write_one(&self, transaction: &redb::WriteTransaction, write: &Write) -> Result<(), StoreError> {
        let path = self.path.as_path();
        let put = |table: Bytes, key: &[u8], value: Vec<u8>| -> Result<(), StoreError> {
            let mut table = transaction
                .open_table(table)
                .map_err(|e| database_error(path, e))?;
            table
                .insert(key, value.as_slice())
                .map_err(|e| database_error(path, e))?;
            Ok(())
        };
        let remove = |table: Bytes, from: &[u8], through: &[u8]| -> Result<(), StoreError> {
            let mut table = transaction
                .open_table(table)
                .map_err(|e| database_error(path, e))?;
            table
                .retain_in(from..=through, |_, _| false)
                .map_err(|e| database_error(path, e))
        };
        match write {
            Write::PutVm(vm) => put(VMS, vm.id.as_bytes(), serde_json::to_vec(vm.as_ref())?),
            Write::DeleteVm(id) => {
                remove(VMS, id.as_bytes(), id.as_bytes())?;
                remove(
                    MIGRATIONS,
                    &migration_key(*id, Epoch(0)),
                    &migration_key(*id, Epoch(u64::MAX)),
                )
            }
            Write::PutIntent(intent) => put(
                INTENTS,
                intent.vm.as_bytes(),
                serde_json::to_vec(intent.as_ref())?,
            ),
            Write::DeleteIntent(vm) => remove(INTENTS, vm.as_bytes(), vm.as_bytes()),
            Write::PutMigration(vm, migration) => put(
                MIGRATIONS,
                &migration_key(*vm, Epoch(migration.epoch)),
                migration.encode_to_vec(),
            ),
            Write::DeleteMigration(vm, epoch) => {
                let key = migration_key(*vm, *epoch);
                remove(MIGRATIONS, &key, &key)
            }
            Write::PutNode(node) => put(NODES, node.name.as_str().as_bytes(), serde_json::to_vec(node)?),
            Write::PutImage(image) => put(IMAGES, image.name.as_bytes(), serde_json::to_vec(image.as_ref())?),
            Write::PutEvent(event) => put(EVENTS, &event.sequence.to_be_bytes(), event.encode_to_vec()),
            Write::TrimEvents(through) => remove(EVENTS, &0u64.to_be_bytes(), &through.to_be_bytes()),
        }
    }
}

fn migration_key(vm: VmId, epoch: Epoch) -> [u8; 24] {
    let mut key = [0; 24];
    key[..16].copy_from_slice(vm.as_bytes());
    key[16..].copy_from_slice(&epoch.0.to_be_bytes());
    key
}

fn json<T: DeserializeOwned>(_key: &[u8], value: &[u8]) -> Option<T> {
    serde_json::from_slice(value).ok()
}

fn corrupt(path: &Path, what: &str) -> StoreError {
    StoreError::Corrupt {
        path: path.to_owned(),
        what: what.to_owned(),
    }
}

fn database_error(path: &Path, source: impl Into<redb::Error>) -> StoreError {
    StoreError::Database {
        path: path.to_owned(),
        source: Box::new(source.into()),
    }
}

#[cfg(test)]
mod tests;
