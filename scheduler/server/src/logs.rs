//! Console logs of all VMs: who sent which bytes is decided by the caller, the rest by [`file::LogFile`].

mod file;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use shoal_proto::VmId;
use tokio::sync::watch;

use crate::pool::Pool;

use file::LogFile;
pub use file::Piece;

#[derive(Debug)]
struct VmLog {
    file: Mutex<LogFile>,
    end: watch::Sender<u64>,
}

/// The directory of console logs.
#[derive(Debug, Clone)]
pub struct LogStore {
    directory: PathBuf,
    /// A disk that hangs holds up these, and nothing else.
    threads: Pool,
    logs: Arc<Mutex<HashMap<VmId, Arc<VmLog>>>>,
    /// Logs with bytes that wait for those before them.
    waiting: Arc<Mutex<HashSet<VmId>>>,
}

impl LogStore {
    /// Logs under this directory, one directory a VM.
    pub fn new(directory: PathBuf, threads: Pool) -> Self {
        Self {
            directory,
            threads,
            logs: Arc::default(),
            waiting: Arc::default(),
        }
    }

    /// Stores bytes, and returns the offset up to which the sender may forget them: those before it are on the disk.
    pub async fn append(&self, vm: VmId, offset: u64, data: Vec<u8>) -> io::Result<u64> {
        let store = self.clone();
        self.blocking(move || {
            let log = store.get(vm)?;
            let mut file = log.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.append(offset, &data, Instant::now())?;
            if file.has_early() {
                store
                    .waiting
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(vm);
            }
            let end = file.end();
            log.end.send_replace(end);
            Ok(end)
        })
        .await
    }

    /// Gives up waiting for bytes that did not come in time; returns the logs that went on, and their ends.
    pub async fn expire_early(&self) -> Vec<(VmId, u64)> {
        if self
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
        {
            return Vec::new();
        }
        let store = self.clone();
        let expired = self.blocking(move || Ok(store.expire_early_blocking())).await;
        expired.unwrap_or_default()
    }

    /// What has not come by now is lost; returns where the log ends.
    pub async fn settle(&self, vm: VmId) -> io::Result<u64> {
        let store = self.clone();
        self.blocking(move || {
            let log = store.get(vm)?;
            let mut file = log.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.accept_gaps()?;
            log.end.send_replace(file.end());
            Ok(file.end())
        })
        .await
    }

    /// Reads from an offset on; None if there is nothing yet.
    pub async fn read(&self, vm: VmId, from: u64, limit: usize) -> io::Result<Option<Piece>> {
        let store = self.clone();
        self.blocking(move || {
            let log = store.get(vm)?;
            let file = log.file.lock().unwrap_or_else(PoisonError::into_inner);
            file.read(from, limit)
        })
        .await
    }

    /// Tells when the log grows.
    pub async fn follow(&self, vm: VmId) -> io::Result<watch::Receiver<u64>> {
        let store = self.clone();
        self.blocking(move || Ok(store.get(vm)?.end.subscribe())).await
    }

    /// Deletes the log of a VM that was removed.
    pub async fn remove(&self, vm: VmId) -> io::Result<()> {
        self.logs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&vm);
        match tokio::fs::remove_dir_all(self.directory.join(vm.to_string())).await {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Where a VM's log is.
    #[cfg(test)]
    pub fn directory_of(&self, vm: VmId) -> PathBuf {
        self.directory.join(vm.to_string())
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        self.threads.run(work).await.map_err(io::Error::other)?
    }

    fn get(&self, vm: VmId) -> io::Result<Arc<VmLog>> {
        let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(log) = logs.get(&vm) {
            return Ok(Arc::clone(log));
        }
        let file = LogFile::open(self.directory.join(vm.to_string()))?;
        let end = watch::Sender::new(file.end());
        let log = Arc::new(VmLog {
            file: Mutex::new(file),
            end,
        });
        logs.insert(vm, Arc::clone(&log));
        Ok(log)
    }

    fn expire_early_blocking(&self) -> Vec<(VmId, u64)> {
        let waiting: Vec<VmId> = self
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .copied()
            .collect();
        let mut expired = Vec::new();
        for vm in waiting {
            let Ok(log) = self.get(vm) else { continue };
            let mut file = log.file.lock().unwrap_or_else(PoisonError::into_inner);
            match file.expire_early(Instant::now()) {
                Ok(true) => {
                    log.end.send_replace(file.end());
                    expired.push((vm, file.end()));
                }
                Ok(false) => {}
                Err(error) => tracing::warn!(%vm, %error, "console log cannot be written"),
            }
            if !file.has_early() {
                self.waiting
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&vm);
            }
        }
        expired
    }
}
