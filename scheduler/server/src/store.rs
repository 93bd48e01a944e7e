//! The durable state: one redb file. It is read once, at start; afterwards it is only written, each batch in one
//! transaction that is on the disk before [`Store::apply`] returns.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message as _;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;
use shoal_cpuid::Table;
use shoal_proto::{VmId, cluster, vm};

use crate::cpus::{CpuDigest, StoredCpus};
use crate::history;
use crate::record::{ImageRecord, Intent, NodeRecord, QueuedRecord, VmRecord};

/// Raised with every change that an older scheduler could not read.
const SCHEMA_VERSION: u64 = 2;

type Bytes = TableDefinition<'static, &'static [u8], &'static [u8]>;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const VMS: Bytes = TableDefinition::new("vms");
const INTENTS: Bytes = TableDefinition::new("intents");
/// Ended migrations, without samples. Key: number (big endian), rising.
const HISTORY: Bytes = TableDefinition::new("history");
/// Their samples, as a report with nothing else. The same key.
const SAMPLES: Bytes = TableDefinition::new("samples");
/// What operators set. Key: name.
const SETTINGS: TableDefinition<&str, &[u8]> = TableDefinition::new("settings");
const MIGRATION_DEFAULTS: &str = "migration-defaults";
const SCHEDULING_POLICY: &str = "scheduling-policy";
/// CPUID tables, features only, by their digests; under [`BASELINE`] a digest.
const CPUS: Bytes = TableDefinition::new("cpus");
const BASELINE: &[u8] = b"baseline";
/// VMs that wait for room. Key: sequence number (big endian).
const QUEUE: Bytes = TableDefinition::new("queue");
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
    /// Inserts or replaces a node.
    PutNode(NodeRecord),
    /// Keeps a kind of CPU.
    PutCpu(CpuDigest, Table),
    /// Changes or removes the CPU baseline.
    SetCpuBaseline(Option<CpuDigest>),
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
                Some(upgrade::HISTORY_BY_VM) => {
                    upgrade::history_by_vm(&transaction, path)?;
                    meta.insert("schema", SCHEMA_VERSION)
                        .map_err(|e| database_error(path, e))?;
                }
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
        for table in [VMS, INTENTS, HISTORY, SAMPLES, QUEUE, NODES, CPUS, IMAGES, EVENTS] {
            transaction
                .open_table(table)
                .map_err(|e| database_error(path, e))?;
        }
        transaction
            .open_table(SETTINGS)
            .map_err(|e| database_error(path, e))?;
        transaction.commit().map_err(|e| database_error(path, e))
    }

    fn load(&self) -> Result<Contents, StoreError> {
        let events = self.scan(EVENTS, "events", |_, value| cluster::Event::decode(value).ok())?;
        let history = self.scan(HISTORY, "history", |key, value| {
            let migration = cluster::Migration::decode(value).ok()?;
            Some((number(key)?, history::light(migration)))
        })?;
        let sampled = self.scan(SAMPLES, "samples", |key, _| number(key))?;
        Ok(Contents {
            vms: self.scan(VMS, "vms", json)?,
            intents: self.scan(INTENTS, "intents", json)?,
            history,
            sampled,
            migration_defaults: self.setting(MIGRATION_DEFAULTS, |value| {
                cluster::MigrationDefaults::decode(value).ok()
            })?,
            scheduling_policy: self.setting(SCHEDULING_POLICY, |value| serde_json::from_slice(value).ok())?,
            queue: self.scan(QUEUE, "queue", json)?,
            nodes: self.scan(NODES, "nodes", json)?,
            cpus: self.cpus()?,
            images: self.scan(IMAGES, "images", json)?,
            events,
        })
    }

    /// An ended migration with all that was kept of it. None if it has made room meanwhile.
    pub async fn migration(&self, number: u64) -> Result<Option<cluster::Migration>, StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || store.migration_blocking(number))
            .await
            .map_err(|_| StoreError::Interrupted)?
    }

    fn migration_blocking(&self, number: u64) -> Result<Option<cluster::Migration>, StoreError> {
        let Some(whole) = self.get(HISTORY, &number.to_be_bytes())? else {
            return Ok(None);
        };
        let damaged = |_| corrupt(&self.path, &format!("migration {number} of the history"));
        let mut migration = cluster::Migration::decode(whole.as_slice()).map_err(damaged)?;
        if let (Some(report), Some(samples)) =
            (&mut migration.report, self.get(SAMPLES, &number.to_be_bytes())?)
        {
            let samples = vm::MigrationReport::decode(samples.as_slice()).map_err(damaged)?;
            report.samples = samples.samples;
        }
        Ok(Some(migration))
    }

    fn get(&self, table: Bytes, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.path.as_path();
        let transaction = self.database.begin_read().map_err(|e| database_error(path, e))?;
        let table = transaction
            .open_table(table)
            .map_err(|e| database_error(path, e))?;
        let value = table.get(key).map_err(|e| database_error(path, e))?;
        Ok(value.map(|value| value.value().to_vec()))
    }

    /// What an operator has set, or the default.
    fn setting<T: Default>(&self, name: &str, decode: impl Fn(&[u8]) -> Option<T>) -> Result<T, StoreError> {
        let path = self.path.as_path();
        let transaction = self.database.begin_read().map_err(|e| database_error(path, e))?;
        let table = transaction
            .open_table(SETTINGS)
            .map_err(|e| database_error(path, e))?;
        let value = table.get(name).map_err(|e| database_error(path, e))?;
        value.map_or_else(
            || Ok(T::default()),
            |value| decode(value.value()).ok_or_else(|| corrupt(path, &format!("the setting '{name}'"))),
        )
    }

    fn cpus(&self) -> Result<StoredCpus, StoreError> {
        let mut stored = StoredCpus::default();
        let entries = self.scan(CPUS, "cpus", |key, value| {
            if key == BASELINE {
                let digest = std::str::from_utf8(value).ok()?;
                return Some((Some(CpuDigest(digest.to_owned())), None));
            }
            Some((None, Some(Table::from_bytes(value).ok()?)))
        })?;
        for (baseline, table) in entries {
            stored.baseline = stored.baseline.or(baseline);
            stored.tables.extend(table);
        }
        Ok(stored)
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
        let set = |name: &str, value: Vec<u8>| -> Result<(), StoreError> {
            let mut settings = transaction
                .open_table(SETTINGS)
                .map_err(|e| database_error(path, e))?;
            settings
                .insert(name, value.as_slice())
                .map_err(|e| database_error(path, e))?;
            Ok(())
        };
        match write {
            Write::PutVm(vm) => put(VMS, vm.id.as_bytes(), serde_json::to_vec(vm.as_ref())?),
            Write::DeleteVm(id) => remove(VMS, id.as_bytes(), id.as_bytes()),
            Write::PutIntent(intent) => put(
                INTENTS,
                intent.vm.as_bytes(),
                serde_json::to_vec(intent.as_ref())?,
            ),
            Write::ReplaceIntent(intent) => {
                let mut table = transaction
                    .open_table(INTENTS)
                    .map_err(|e| database_error(path, e))?;
                let found = table
                    .get(intent.vm.as_bytes().as_slice())
                    .map_err(|e| database_error(path, e))?
                    .and_then(|open| serde_json::from_slice::<Intent>(open.value()).ok());
                if found.is_some_and(|open| open.migration == intent.migration) {
                    table
                        .insert(
                            intent.vm.as_bytes().as_slice(),
                            serde_json::to_vec(intent.as_ref())?.as_slice(),
                        )
                        .map_err(|e| database_error(path, e))?;
                }
                Ok(())
            }
            Write::DeleteIntent(vm) => remove(INTENTS, vm.as_bytes(), vm.as_bytes()),
            Write::PutMigration(number, migration) => {
                let mut migration = migration.as_ref().clone();
                let samples = migration
                    .report
                    .as_mut()
                    .map(|report| std::mem::take(&mut report.samples))
                    .unwrap_or_default();
                put(HISTORY, &number.to_be_bytes(), migration.encode_to_vec())?;
                if samples.is_empty() {
                    return Ok(());
                }
                let samples = vm::MigrationReport {
                    samples,
                    ..Default::default()
                };
                put(SAMPLES, &number.to_be_bytes(), samples.encode_to_vec())
            }
            Write::SetGuestGap(number, us) => {
                let key = number.to_be_bytes();
                let mut table = transaction
                    .open_table(HISTORY)
                    .map_err(|e| database_error(path, e))?;
                let found = table
                    .get(key.as_slice())
                    .map_err(|e| database_error(path, e))?
                    .and_then(|stored| cluster::Migration::decode(stored.value()).ok());
                if let Some(mut migration) = found {
                    history::set_guest_gap(&mut migration, *us);
                    table
                        .insert(key.as_slice(), migration.encode_to_vec().as_slice())
                        .map_err(|e| database_error(path, e))?;
                }
                Ok(())
            }
            Write::DeleteMigration(number) => {
                let key = number.to_be_bytes();
                remove(HISTORY, &key, &key)?;
                remove(SAMPLES, &key, &key)
            }
            Write::DeleteSamples(number) => {
                let key = number.to_be_bytes();
                remove(SAMPLES, &key, &key)
            }
            Write::PutMigrationDefaults(defaults) => set(MIGRATION_DEFAULTS, defaults.encode_to_vec()),
            Write::PutSchedulingPolicy(fields) => set(SCHEDULING_POLICY, serde_json::to_vec(fields)?),
            Write::PutQueued(queued) => put(
                QUEUE,
                &queued.sequence.to_be_bytes(),
                serde_json::to_vec(queued.as_ref())?,
            ),
            Write::DeleteQueued(number) => remove(QUEUE, &number.to_be_bytes(), &number.to_be_bytes()),
            Write::PutNode(node) => put(NODES, node.name.as_str().as_bytes(), serde_json::to_vec(node)?),
            Write::PutCpu(digest, table) => put(CPUS, digest.0.as_bytes(), table.to_bytes()),
            Write::SetCpuBaseline(Some(digest)) => put(CPUS, BASELINE, digest.0.as_bytes().to_vec()),
            Write::SetCpuBaseline(None) => remove(CPUS, BASELINE, BASELINE),
            Write::PutImage(image) => put(IMAGES, image.name.as_bytes(), serde_json::to_vec(image.as_ref())?),
            Write::PutEvent(event) => put(EVENTS, &event.sequence.to_be_bytes(), event.encode_to_vec()),
            Write::TrimEvents(through) => remove(EVENTS, &0u64.to_be_bytes(), &through.to_be_bytes()),
        }
    }
}

fn number(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.try_into().ok()?))
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

mod upgrade;

#[cfg(test)]
mod tests;
