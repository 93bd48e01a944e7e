//! What keeps the store's bytes: ordered tables of keys and values, read as they were at one moment, and changed in
//! batches that are whole and durable or not there.

use std::fmt::Debug;

use super::StoreError;

/// The tables. Their names are in files and in etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Key: VM id.
    Vms,
    /// Migrations under way. Key: VM id.
    Intents,
    /// Ended migrations, without samples. Key: number (big endian), rising.
    History,
    /// Their samples, as a report with nothing else. The same key.
    Samples,
    /// What operators set. Key: name.
    Settings,
    /// CPUID tables, features only, by their digests; under `baseline` a digest.
    Cpus,
    /// VMs that wait for room. Key: sequence number (big endian).
    Queue,
    /// Moves that someone asked for and that are not done. Key: direction and node.
    Orders,
    /// Key: name.
    Nodes,
    /// Key: name.
    Images,
    /// Key: sequence number (big endian).
    Events,
}

impl Table {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Vms,
        Self::Intents,
        Self::History,
        Self::Samples,
        Self::Settings,
        Self::Cpus,
        Self::Queue,
        Self::Orders,
        Self::Nodes,
        Self::Images,
        Self::Events,
    ];

    /// As it is written.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vms => "vms",
            Self::Intents => "intents",
            Self::History => "history",
            Self::Samples => "samples",
            // `settings` is the table of schema 2, whose keys are of another type.
            Self::Settings => "options",
            Self::Cpus => "cpus",
            Self::Queue => "queue",
            Self::Orders => "orders",
            Self::Nodes => "nodes",
            Self::Images => "images",
            Self::Events => "events",
        }
    }
}

/// One change of bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Inserts or replaces.
    Put(Table, Vec<u8>, Vec<u8>),
    /// Removes, if it is there.
    Delete(Table, Vec<u8>),
    /// Removes all from one key to another, both included.
    DeleteThrough(Table, Vec<u8>, Vec<u8>),
}

impl Change {
    /// How much it is to send and to store.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Put(_, key, value) => key.len() + value.len(),
            Self::Delete(_, key) => key.len(),
            Self::DeleteThrough(_, from, through) => from.len() + through.len(),
        }
    }
}

/// A key and its value.
pub type Record = (Vec<u8>, Vec<u8>);

/// A record and its table.
pub type Placed = (Table, Vec<u8>, Vec<u8>);

/// Keeps the bytes.
#[tonic::async_trait]
pub trait Backend: Debug + Send + Sync + 'static {
    /// Which store this is, for people.
    fn name(&self) -> &str;

    /// The store as it is now, however it is changed later.
    async fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError>;

    /// One value as it is now.
    async fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// Makes all changes, in order, or none. They are durable when this returns.
    async fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError>;
}

/// A store as it was at one moment.
#[tonic::async_trait]
pub trait Snapshot: Send + Sync {
    /// The next records of a table after a key, in the order of their keys, so many that they fit into memory with ease;
    /// none at the end. With `keys_only` the values are empty.
    async fn page(
        &self,
        table: Table,
        after: Option<&[u8]>,
        keys_only: bool,
    ) -> Result<Vec<Record>, StoreError>;
}
