//! Backups of stores that no scheduler has open, and of etcd at any time; and restoring.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::super::backend::{Backend, Change, Table};
use super::super::etcd::{Etcd, Location};
use super::super::file::FileBackend;
use super::super::{StoreError, Term};
use super::read::Reader;
use super::{BackupError, Sink, Summary, write};
use crate::server::STORE_FILE;

/// Changes in one transaction of a restore.
const BATCH: usize = 1000;

/// Which store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreLocation {
    /// The file in a scheduler's state directory.
    StateDir(PathBuf),
    /// `etcd://HOST:PORT[,HOST:PORT...][/PREFIX]`.
    Etcd(String),
}

struct FileSink {
    file: File,
    name: String,
}

#[tonic::async_trait]
impl Sink for FileSink {
    async fn take(&mut self, bytes: Vec<u8>) -> Result<(), BackupError> {
        self.file.write_all(&bytes).map_err(|source| BackupError::Io {
            file: self.name.clone(),
            source,
        })
    }
}

/// Writes a backup of a store to a file, which must not be there. A store in a file must not be in use.
///
/// # Errors
/// If the store cannot be read or the file not be written; then there is no file.
pub async fn back_up(from: &StoreLocation, to: &Path) -> Result<Summary, BackupError> {
    let name = to.display().to_string();
    let io = |source| BackupError::Io {
        file: name.clone(),
        source,
    };
    let (backend, term): (Box<dyn Backend>, Term) = match from {
        StoreLocation::StateDir(directory) => {
            let path = directory.join(STORE_FILE);
            // To open it would make an empty one.
            fs::metadata(&path)
                .map_err(|source| StoreError::database(&path.display().to_string(), source))?;
            let (backend, term) = FileBackend::open(&path)?;
            (Box::new(backend), term)
        }
        StoreLocation::Etcd(url) => {
            let etcd = Etcd::new(&Location::parse(url)?)?;
            if !etcd.check_schema().await? {
                return Err(StoreError::database(etcd.name(), "there is no store there").into());
            }
            let term = etcd.term().await?;
            (Box::new(etcd), term)
        }
    };
    let file = File::create_new(to).map_err(io)?;
    let mut sink = FileSink {
        file,
        name: name.clone(),
    };
    let written = write(backend.as_ref(), term, &mut sink).await;
    let written = match written {
        Ok(summary) => sink.file.sync_all().map_err(io).map(|()| summary),
        Err(error) => Err(error),
    };
    if written.is_err() {
        let _ = fs::remove_file(to);
    }
    written
}

/// Puts a backup into a store that no scheduler uses. One that is not empty is replaced only with `force`.
///
/// # Errors
/// If the backup is not whole, then nothing has changed; if the store is used, or cannot be written.
pub async fn restore(from: &Path, to: &StoreLocation, force: bool) -> Result<Summary, BackupError> {
    let (header, summary) = Reader::check(from)?;
    let term = Term(header.term);
    match to {
        StoreLocation::StateDir(directory) => {
            fs::create_dir_all(directory).map_err(|source| BackupError::Io {
                file: directory.display().to_string(),
                source,
            })?;
            restore_file(from, &directory.join(STORE_FILE), term, force).await?;
        }
        StoreLocation::Etcd(url) => restore_etcd(from, url, term, force).await?,
    }
    Ok(summary)
}

async fn restore_file(from: &Path, path: &Path, term: Term, force: bool) -> Result<(), BackupError> {
    let name = path.display().to_string();
    let io = |source| BackupError::Io {
        file: name.clone(),
        source,
    };
    let mut last = term;
    if path.exists() {
        match FileBackend::open(path) {
            Ok((backend, opened)) => {
                last = last.max(opened);
                if !force && !is_empty(&backend).await? {
                    return Err(BackupError::NotEmpty(name));
                }
            }
            // What cannot be read can be replaced, but not what another process has open.
            Err(error @ StoreError::InUse(_)) => return Err(error.into()),
            Err(_) if force => {}
            Err(error) => return Err(error.into()),
        }
    }
    let staged = path.with_extension("restoring");
    match fs::remove_file(&staged) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
        _ => {}
    }
    {
        let (backend, _) = FileBackend::open(&staged)?;
        let mut reader = Reader::open(from)?;
        loop {
            let mut batch = Vec::new();
            while batch.len() < BATCH {
                let Some((table, key, value)) = reader.next()? else {
                    break;
                };
                batch.push(Change::Put(table, key, value));
            }
            if batch.is_empty() {
                break;
            }
            backend.commit(batch).await?;
        }
        backend.set_term(last)?;
    }
    if path.exists() {
        fs::rename(path, path.with_extension("replaced")).map_err(io)?;
    }
    fs::rename(&staged, path).map_err(io)?;
    let directory = path.parent().unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(io)
}

async fn restore_etcd(from: &Path, url: &str, term: Term, force: bool) -> Result<(), BackupError> {
    let etcd = Etcd::new(&Location::parse(url)?)?;
    let found = etcd.check_schema().await;
    let is_empty = match found {
        Ok(false) => true,
        Ok(true) => is_empty(&etcd).await?,
        Err(error @ StoreError::Database { .. }) => return Err(error.into()),
        Err(_) if force => false,
        Err(error) => return Err(error.into()),
    };
    if !is_empty && !force {
        return Err(BackupError::NotEmpty(etcd.name().to_owned()));
    }
    let last = etcd.term().await.unwrap_or_default().max(term);
    let mut reader = Reader::open(from)?;
    etcd.replace(&mut || reader.next(), last).await
}

async fn is_empty(backend: &dyn Backend) -> Result<bool, StoreError> {
    let snapshot = backend.snapshot().await?;
    for table in Table::ALL {
        if !snapshot.page(table, None, true).await?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}
