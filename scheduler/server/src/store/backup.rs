//! All records of a store in one file, and back, into either kind of store.
//!
//! ```text
//! "SHOALBAK"  format u32  header length u32  header (JSON: schema, term, created_unix_ms, store)
//! record:     1u8  table name length u8  key length u32  value length u32  table name  key  value
//! end:        0u8  number of records u64  SHA-256 of all that is before it
//! ```
//!
//! Numbers are little endian. A file is read to its end and every record decoded before anything is restored.

mod read;
mod tools;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::backend::{Backend, Table};
use super::{SCHEMA_VERSION, StoreError, Term};
use crate::record::now_unix_ms;

pub use tools::{StoreLocation, back_up, restore};

const MAGIC: &[u8; 8] = b"SHOALBAK";
const FORMAT: u32 = 1;
const RECORD: u8 = 1;
const END: u8 = 0;
const MAX_HEADER: u32 = 64 << 10;
const MAX_KEY: u32 = 4 << 10;
const MAX_VALUE: u32 = 16 << 20;
/// Bytes given on at a time, at least.
const CHUNK: usize = 64 << 10;

/// Why a backup is not made, or not restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// It is something else.
    #[error("backup {file}: this is no backup of a Shoal store (it does not begin with SHOALBAK)")]
    NoBackup {
        /// Which file.
        file: String,
    },
    /// Written by a newer program.
    #[error("backup {file}: {what} {found}, this shoal reads up to {known}; use a newer shoal")]
    Newer {
        /// Which file.
        file: String,
        /// Format version, or schema version.
        what: &'static str,
        /// As the file says.
        found: u64,
        /// As this program does.
        known: u64,
    },
    /// It is cut off.
    #[error("backup {file}: it ends in the middle of {part}; nothing was restored")]
    Truncated {
        /// Which file.
        file: String,
        /// Where.
        part: String,
    },
    /// It is damaged.
    #[error("backup {file}: {part} is damaged; nothing was restored")]
    Damaged {
        /// Which file.
        file: String,
        /// Which part.
        part: String,
    },
    /// It cannot be read or written.
    #[error("backup {file}")]
    Io {
        /// Which file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// There is something that would be lost.
    #[error("store {0}: it is not empty; give --force to replace all that is in it")]
    NotEmpty(String),
    /// The store cannot be read or written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Whoever took the backup has gone.
    #[error("nobody takes the backup any more")]
    Gone,
}

/// What a backup says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Of the records.
    pub schema: u64,
    /// The last in which the store was written.
    pub term: u64,
    /// When it was made.
    pub created_unix_ms: i64,
    /// Of which store, for people.
    pub store: String,
}

/// What was written or restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Records of all tables.
    pub records: u64,
    /// Of the file.
    pub bytes: u64,
    /// VMs among the records.
    pub vms: u64,
    /// Nodes among the records.
    pub nodes: u64,
}

impl Summary {
    fn count(&mut self, table: Table) {
        self.records += 1;
        match table {
            Table::Vms => self.vms += 1,
            Table::Nodes => self.nodes += 1,
            _ => {}
        }
    }
}

/// Takes the bytes of a backup.
#[tonic::async_trait]
pub trait Sink: Send {
    /// Takes the next bytes.
    async fn take(&mut self, bytes: Vec<u8>) -> Result<(), BackupError>;
}

struct Output<'a> {
    sink: &'a mut dyn Sink,
    digest: Sha256,
    waiting: Vec<u8>,
    bytes: u64,
}

impl Output<'_> {
    async fn add(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= CHUNK {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), BackupError> {
        let bytes = std::mem::take(&mut self.waiting);
        if bytes.is_empty() {
            return Ok(());
        }
        self.sink.take(bytes).await
    }
}

/// Writes a backup of a store as it is now.
pub async fn write(backend: &dyn Backend, term: Term, sink: &mut dyn Sink) -> Result<Summary, BackupError> {
    let snapshot = backend.snapshot().await?;
    let header = Header {
        schema: SCHEMA_VERSION,
        term: term.0,
        created_unix_ms: now_unix_ms(),
        store: backend.name().to_owned(),
    };
    let header = serde_json::to_vec(&header).map_err(StoreError::from)?;
    let mut output = Output {
        sink,
        digest: Sha256::new(),
        waiting: Vec::new(),
        bytes: 0,
    };
    let mut summary = Summary::default();
    output.add(MAGIC).await?;
    output.add(&FORMAT.to_le_bytes()).await?;
    output.add(&length(&header, MAX_HEADER, "the header")?).await?;
    output.add(&header).await?;
    for table in Table::ALL {
        let mut after: Option<Vec<u8>> = None;
        loop {
            let page = snapshot.page(table, after.as_deref(), false).await?;
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            for (key, value) in page {
                let name = table.name().as_bytes();
                let name_length = u8::try_from(name.len()).unwrap_or(u8::MAX);
                output.add(&[RECORD, name_length]).await?;
                output.add(&length(&key, MAX_KEY, table.name())?).await?;
                output.add(&length(&value, MAX_VALUE, table.name())?).await?;
                output.add(name).await?;
                output.add(&key).await?;
                output.add(&value).await?;
                summary.count(table);
            }
        }
    }
    output.add(&[END]).await?;
    output.add(&summary.records.to_le_bytes()).await?;
    let digest = output.digest.clone().finalize();
    output.add(&digest).await?;
    output.flush().await?;
    summary.bytes = output.bytes;
    Ok(summary)
}

fn length(bytes: &[u8], most: u32, what: &str) -> Result<[u8; 4], BackupError> {
    match u32::try_from(bytes.len()) {
        Ok(length) if length <= most => Ok(length.to_le_bytes()),
        _ => Err(BackupError::Store(StoreError::TooLarge {
            what: format!("a record of '{what}' of {} bytes", bytes.len()),
        })),
    }
}
