//! The store of one scheduler: one redb file, which no other process can open meanwhile.
//!
//! After a write that the disk did not take, redb does nothing more with the file until it is opened again: that is done here,
//! and the file then tells whether the write is in it.

use std::ops::Bound;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::backend::{Backend, Change, Record, Snapshot, Table};
use super::{SCHEMA_VERSION, StoreError, Term, upgrade};
use crate::pool::Pool;

pub type Bytes = TableDefinition<'static, &'static [u8], &'static [u8]>;

pub const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// In META.
pub const SCHEMA: &str = "schema";
/// In META: rises whenever the store is opened.
const TERM: &str = "term";
/// In META: of the last batch, made up at random.
const MARK: &str = "mark";
/// Of a page.
const PAGE_RECORDS: usize = 1000;
const PAGE_BYTES: usize = 4 << 20;
/// Of the store. Commits wait for each other, reads do not.
const THREADS: usize = 4;

/// An open file.
#[derive(Debug, Clone)]
pub struct FileBackend {
    open: Arc<RwLock<Open>>,
    path: Arc<Path>,
    name: Arc<str>,
    threads: Pool,
}

#[derive(Debug)]
struct Open {
    /// None: it could not be opened again yet.
    database: Option<Database>,
    /// How often it was opened again.
    generation: u64,
    /// Of the last batch that was in it then.
    mark: u64,
}

/// A batch that failed.
#[derive(Debug)]
struct Failed {
    error: redb::Error,
    generation: u64,
}

/// Where a table is in a file.
pub const fn definition(table: Table) -> Bytes {
    TableDefinition::new(table.name())
}

impl FileBackend {
    /// Opens or creates a file, and begins a term.
    pub fn open(path: &Path) -> Result<(Self, Term), StoreError> {
        let name = path.display().to_string();
        let database = Database::create(path).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(path.to_owned()),
            redb::DatabaseError::UpgradeRequired(_) => StoreError::corrupt(&name, "the database format"),
            redb::DatabaseError::Storage(redb::StorageError::Corrupted(what)) => {
                StoreError::corrupt(&name, what)
            }
            redb::DatabaseError::Storage(redb::StorageError::Io(error))
                if error.kind() == std::io::ErrorKind::InvalidData =>
            {
                StoreError::corrupt(&name, "the database file")
            }
            other => StoreError::database(&name, other),
        })?;
        let backend = Self {
            open: Arc::new(RwLock::new(Open {
                database: Some(database),
                generation: 0,
                mark: 0,
            })),
            path: path.into(),
            threads: Pool::new("shoal-store", THREADS).map_err(|error| StoreError::database(&name, error))?,
            name: name.into(),
        };
        let term = backend.prepare()?;
        Ok((backend, term))
    }

    /// Gives the next term at least this number.
    pub fn set_term(&self, term: Term) -> Result<(), StoreError> {
        let transaction = self.begin_write()?;
        {
            let mut meta = transaction.open_table(META).map_err(|e| self.error(e))?;
            meta.insert(TERM, term.0).map_err(|e| self.error(e))?;
        }
        transaction.commit().map_err(|e| self.error(e))
    }

    fn prepare(&self) -> Result<Term, StoreError> {
        let transaction = self.begin_write()?;
        let fresh = transaction
            .list_tables()
            .map_err(|e| self.error(e))?
            .next()
            .is_none();
        let term = {
            let mut meta = transaction.open_table(META).map_err(|e| self.error(e))?;
            let read = |key| {
                let value = meta.get(key).map_err(|e| self.error(e))?;
                Ok::<_, StoreError>(value.map(|value| value.value()))
            };
            let (found, term) = (read(SCHEMA)?, Term(read(TERM)?.unwrap_or(0)).next());
            match found {
                Some(SCHEMA_VERSION) => {}
                Some(found) if found > SCHEMA_VERSION => {
                    return Err(StoreError::NewerSchema {
                        store: self.name.to_string(),
                        found,
                    });
                }
                Some(found) => upgrade::file(&transaction, &self.name, found)?,
                None if fresh => {}
                None => return Err(StoreError::corrupt(&self.name, "the schema version")),
            }
            meta.insert(SCHEMA, SCHEMA_VERSION).map_err(|e| self.error(e))?;
            meta.insert(TERM, term.0).map_err(|e| self.error(e))?;
            term
        };
        for table in Table::ALL {
            transaction
                .open_table(definition(table))
                .map_err(|e| self.error(e))?;
        }
        transaction.commit().map_err(|e| self.error(e))?;
        Ok(term)
    }

    /// For changes beside the batches.
    pub fn begin_write(&self) -> Result<WriteTransaction, StoreError> {
        self.with(|database| Ok(database.begin_write()?))
            .1
            .map_err(|e| self.error(e))
    }

    /// Does something with the file; answers how often it had been opened again.
    fn with<T>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> (u64, Result<T, redb::Error>) {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let done = match &open.database {
            Some(database) => work(database),
            None => Err(redb::Error::PreviousIo),
        };
        (open.generation, done)
    }

    fn commit_blocking(&self, changes: &[Change]) -> Result<(), StoreError> {
        let mark = uuid::Uuid::new_v4().as_u64_pair().0;
        let Err(failed) = self.try_commit(changes, mark) else {
            return Ok(());
        };
        if !matches!(failed.error, redb::Error::Io(_) | redb::Error::PreviousIo) {
            return Err(self.error(failed.error));
        }
        tracing::error!(store = %self.name, error = %failed.error, "a write failed: the store is opened again");
        if self.reopen(failed.generation)? == mark {
            return Ok(());
        }
        self.try_commit(changes, mark)
            .map_err(|failed| self.error(failed.error))
    }

    fn try_commit(&self, changes: &[Change], mark: u64) -> Result<(), Failed> {
        let (generation, done) = self.with(|database| {
            let transaction = database.begin_write()?;
            for change in changes {
                make(&transaction, change)?;
            }
            transaction.open_table(META)?.insert(MARK, mark)?;
            Ok(transaction.commit()?)
        });
        done.map_err(|error| Failed { error, generation })
    }

    /// Opens the file again, unless that was done since. Answers the mark of the last batch that was in it then.
    fn reopen(&self, generation: u64) -> Result<u64, StoreError> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.generation == generation {
            // The file is let go first.
            open.database = None;
            let database = Database::open(&*self.path).map_err(|e| self.error(e))?;
            open.mark = read_mark(&database).map_err(|e| self.error(e))?;
            open.database = Some(database);
            open.generation += 1;
        }
        Ok(open.mark)
    }

    fn get_blocking(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let found = self.with(|database| {
            let table = database.begin_read()?.open_table(definition(table))?;
            Ok(table.get(key)?.map(|value| value.value().to_vec()))
        });
        found.1.map_err(|e| self.error(e))
    }

    fn error(&self, source: impl Into<redb::Error>) -> StoreError {
        StoreError::database(&self.name, source.into())
    }
}

#[tonic::async_trait]
impl Backend for FileBackend {
    fn name(&self) -> &str {
        &self.name
    }

    async fn snapshot(&self) -> Result<Box<dyn Snapshot>, StoreError> {
        let begun = self.with(|database| Ok(database.begin_read()?));
        let transaction = begun.1.map_err(|e| self.error(e))?;
        Ok(Box::new(FileSnapshot {
            transaction: Arc::new(transaction),
            name: Arc::clone(&self.name),
            threads: self.threads.clone(),
        }))
    }

    async fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let (backend, key) = (self.clone(), key.to_vec());
        blocking(&self.threads, move || backend.get_blocking(table, &key)).await
    }

    async fn commit(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        let backend = self.clone();
        blocking(&self.threads, move || backend.commit_blocking(&changes)).await
    }
}

fn make(transaction: &WriteTransaction, change: &Change) -> Result<(), redb::Error> {
    match change {
        Change::Put(table, key, value) => {
            let mut table = transaction.open_table(definition(*table))?;
            table.insert(key.as_slice(), value.as_slice())?;
        }
        Change::Delete(table, key) => {
            transaction
                .open_table(definition(*table))?
                .remove(key.as_slice())?;
        }
        Change::DeleteThrough(table, from, through) => {
            let mut table = transaction.open_table(definition(*table))?;
            table.retain_in(from.as_slice()..=through.as_slice(), |_, _| false)?;
        }
    }
    Ok(())
}

fn read_mark(database: &Database) -> Result<u64, redb::Error> {
    let meta = database.begin_read()?.open_table(META)?;
    Ok(meta.get(MARK)?.map_or(0, |mark| mark.value()))
}

struct FileSnapshot {
    transaction: Arc<ReadTransaction>,
    name: Arc<str>,
    threads: Pool,
}

#[tonic::async_trait]
impl Snapshot for FileSnapshot {
    async fn page(
        &self,
        table: Table,
        after: Option<&[u8]>,
        keys_only: bool,
    ) -> Result<Vec<Record>, StoreError> {
        let (transaction, name) = (Arc::clone(&self.transaction), Arc::clone(&self.name));
        let after = after.map(<[u8]>::to_vec);
        blocking(&self.threads, move || {
            page(&transaction, &name, table, after.as_deref(), keys_only)
        })
        .await
    }
}

fn page(
    transaction: &ReadTransaction,
    name: &str,
    table: Table,
    after: Option<&[u8]>,
    keys_only: bool,
) -> Result<Vec<Record>, StoreError> {
    let failed = |error: redb::Error| StoreError::database(name, error);
    let table = transaction
        .open_table(definition(table))
        .map_err(|e| failed(e.into()))?;
    let from = after.map_or(Bound::Unbounded, Bound::Excluded);
    let range = table
        .range::<&[u8]>((from, Bound::Unbounded))
        .map_err(|e| failed(e.into()))?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    for entry in range {
        let (key, value) = entry.map_err(|e| failed(e.into()))?;
        let value = if keys_only {
            Vec::new()
        } else {
            value.value().to_vec()
        };
        bytes += key.value().len() + value.len();
        found.push((key.value().to_vec(), value));
        if found.len() >= PAGE_RECORDS || bytes >= PAGE_BYTES {
            break;
        }
    }
    Ok(found)
}

/// Off the async threads, and not where anything else may keep it waiting.
async fn blocking<T: Send + 'static>(
    threads: &Pool,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    threads.run(work).await.map_err(|_| StoreError::Interrupted)?
}
