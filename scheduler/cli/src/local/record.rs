//! `up.json`: which processes make up the local cluster.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shoal_agent::ProcessIdentity;

use crate::error::CliError;

const FILE: &str = "up.json";
const LOCK: &str = "lock";

/// What `up` started.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UpRecord {
    /// Where the cluster answers.
    pub endpoint: String,
    /// The daemons, the scheduler first.
    pub processes: Vec<UpProcess>,
}

/// One daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct UpProcess {
    /// "scheduler", or the node's name.
    pub name: String,
    /// Its pid.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`: tells it from a later process with the same pid.
    pub start_ticks: u64,
    /// Which boot of the host it runs in; none in records of before.
    #[serde(default)]
    pub boot_id: Option<uuid::Uuid>,
    /// What it was started with, so that it can be started again.
    pub args: Vec<String>,
}

impl UpProcess {
    /// The process, if it still is that one.
    #[must_use]
    pub fn identity(&self) -> ProcessIdentity {
        ProcessIdentity {
            pid: self.pid,
            start_ticks: self.start_ticks,
            boot_id: self.boot_id,
        }
    }
}

impl UpRecord {
    /// Reads it; `None` if there is none.
    pub fn load(state_dir: &Path) -> Result<Option<Self>, CliError> {
        let path = state_dir.join(FILE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| {
                CliError::Failed(format!(
                    "{}: {error}; remove it once no shoal process is left",
                    path.display()
                ))
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(file_error(path, "cannot read", error)),
        }
    }

    /// Writes it in one step.
    pub fn save(&self, state_dir: &Path) -> Result<(), CliError> {
        let (path, new) = (state_dir.join(FILE), state_dir.join("up.json.new"));
        let text = serde_json::to_vec_pretty(self).map_err(|error| CliError::Failed(error.to_string()))?;
        fs::write(&new, text)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|error| file_error(path, "cannot write", error))
    }

    /// Forgets it.
    pub fn remove(state_dir: &Path) -> Result<(), CliError> {
        let path = state_dir.join(FILE);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(file_error(path, "cannot remove", error))
            }
            _ => Ok(()),
        }
    }

    /// True if all of its processes run.
    #[must_use]
    pub fn is_running(&self) -> bool {
        !self.processes.is_empty()
            && self
                .processes
                .iter()
                .all(|process| process.identity().is_running())
    }
}

/// Held while `up` or `down` changes a state directory, so that two do not mix.
#[derive(Debug)]
pub struct StateLock {
    file: File,
}

impl StateLock {
    /// Takes it, creating the directory; fails at once if another command holds it.
    pub fn take(state_dir: &Path) -> Result<Self, CliError> {
        fs::create_dir_all(state_dir)
            .map_err(|error| file_error(state_dir.to_owned(), "cannot create", error))?;
        let path = state_dir.join(LOCK);
        let file = File::create(&path).map_err(|error| file_error(path.clone(), "cannot create", error))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { file }),
            Err(TryLockError::WouldBlock) => Err(CliError::Failed(format!(
                "another `shoal up` or `shoal down` is at work in {}",
                state_dir.display()
            ))),
            Err(TryLockError::Error(error)) => Err(file_error(path, "cannot lock", error)),
        }
    }
}

impl Drop for StateLock {
    /// Closing the file would not do: a child that another thread has forked holds it open until its own exec.
    fn drop(&mut self) {
        // The lock goes with the last descriptor at the latest.
        let _ = self.file.unlock();
    }
}

/// An error about a file.
#[must_use]
pub fn file_error(path: PathBuf, what: &str, source: io::Error) -> CliError {
    CliError::File {
        path,
        what: what.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_its_file() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        assert!(UpRecord::load(dir.path()).expect("readable").is_none());
        let own = ProcessIdentity::of(std::process::id()).expect("own identity");
        let process = UpProcess {
            name: "scheduler".into(),
            pid: own.pid,
            start_ticks: own.start_ticks,
            boot_id: own.boot_id,
            args: Vec::new(),
        };
        let record = UpRecord {
            endpoint: "http://127.0.0.1:1".into(),
            processes: vec![process],
        };
        record.save(dir.path()).expect("written");
        let read = UpRecord::load(dir.path()).expect("readable").expect("there");
        assert!(read.is_running() && read.endpoint == record.endpoint);
        UpRecord::remove(dir.path()).expect("removed");
        UpRecord::remove(dir.path()).expect("nothing to do");
    }

    #[test]
    fn garbage_is_refused_and_named() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::write(dir.path().join(FILE), "{").expect("written");
        assert!(
            UpRecord::load(dir.path())
                .expect_err("refused")
                .to_string()
                .contains(FILE)
        );
    }

    #[test]
    fn only_one_command_at_a_time() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let first = StateLock::take(dir.path()).expect("free");
        assert!(StateLock::take(dir.path()).is_err());
        drop(first);
        StateLock::take(dir.path()).expect("free again");
    }
}
