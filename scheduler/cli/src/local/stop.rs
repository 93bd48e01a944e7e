//! Ends a local cluster: its VMs, its daemons, and whatever VMM is left.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use shoal_agent::ProcessIdentity;
use shoal_proto::cluster::{ListVmsRequest, RemoveVmRequest};
use tokio::time::{Instant, sleep, timeout};

use crate::client::connect;
use crate::error::CliError;
use crate::local::record::{UpRecord, file_error};
use crate::ring3;

/// How long the cluster may take to remove its VMs itself.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a process may take to end when asked, and when killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks.
const POLL: Duration = Duration::from_millis(20);

/// What was ended.
#[derive(Debug, Default, Serialize)]
pub struct Stopped {
    /// VMs that the cluster removed.
    pub vms: usize,
    /// Daemons that ran.
    pub daemons: usize,
    /// VMMs that had to be killed because no daemon ended them.
    pub killed_vmms: usize,
}

impl Stopped {
    /// Nothing ran.
    #[must_use]
    pub fn is_nothing(&self) -> bool {
        self.daemons + self.killed_vmms == 0
    }
}

/// Ends everything; `None` if nothing was up. Images and events stay unless `purge`.
pub async fn stop(state_dir: &Path, purge: bool) -> Result<Option<Stopped>, CliError> {
    let record = UpRecord::load(state_dir)?;
    let mut stopped = Stopped::default();
    if let Some(record) = &record {
        if record
            .processes
            .first()
            .is_some_and(|scheduler| scheduler.identity().is_running())
        {
            // What the cluster cannot end by itself is killed below.
            stopped.vms = timeout(REMOVE_TIMEOUT, remove_vms(&record.endpoint))
                .await
                .unwrap_or(Ok(0))
                .unwrap_or(0);
        }
        let daemons: Vec<_> = record
            .processes
            .iter()
            .map(|p| p.identity())
            .filter(|p| p.is_running())
            .collect();
        stopped.daemons = daemons.len();
        end(&daemons).await?;
    }
    stopped.killed_vmms = sweep(state_dir).await?;
    UpRecord::remove(state_dir)?;
    if purge {
        remove_state(state_dir)?;
    }
    Ok((record.is_some() || stopped.killed_vmms > 0).then_some(stopped))
}

async fn remove_vms(endpoint: &String) -> Result<usize, CliError> {
    let mut client = connect(std::slice::from_ref(endpoint)).await?;
    let vms = client.list_vms(ListVmsRequest {}).await?.into_inner().vms;
    let mut removed = 0;
    for vm in vms {
        let done = client
            .remove_vm(RemoveVmRequest {
                vm: vm.id,
                force: true,
            })
            .await;
        removed += usize::from(done.is_ok());
    }
    Ok(removed)
}

/// Asks processes to end, then makes them.
async fn end(processes: &[ProcessIdentity]) -> Result<(), CliError> {
    let failed = |error: io::Error| CliError::Failed(format!("cannot end a process: {error}"));
    for process in processes {
        process.terminate().map_err(failed)?;
    }
    if gone(processes).await {
        return Ok(());
    }
    for process in processes {
        process.kill().map_err(failed)?;
    }
    if gone(processes).await {
        Ok(())
    } else {
        let pids: Vec<String> = processes
            .iter()
            .filter(|p| p.is_running())
            .map(|p| p.pid.to_string())
            .collect();
        Err(CliError::Failed(format!(
            "processes {} do not end even when killed",
            pids.join(", ")
        )))
    }
}

async fn gone(processes: &[ProcessIdentity]) -> bool {
    let deadline = Instant::now() + END_TIMEOUT;
    loop {
        if !processes.iter().any(ProcessIdentity::is_running) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        sleep(POLL).await;
    }
}

/// Kills every VMM that a node's directory names, and removes what it left.
async fn sweep(state_dir: &Path) -> Result<usize, CliError> {
    let mut vmms = Vec::new();
    let mut directories = Vec::new();
    for node in node_dirs(state_dir)? {
        for directory in subdirectories(&node.join("vms"))? {
            let pid_file = fs::read_to_string(directory.join("pid")).unwrap_or_default();
            vmms.extend(
                pid_file
                    .parse::<ProcessIdentity>()
                    .ok()
                    .filter(ProcessIdentity::is_running),
            );
            directories.push(directory);
        }
    }
    for vmm in &vmms {
        vmm.kill()
            .map_err(|error| CliError::Failed(format!("cannot kill VMM {}: {error}", vmm.pid)))?;
    }
    end(&vmms).await?;
    for directory in directories {
        remove(&directory)?;
    }
    Ok(vmms.len())
}

/// Removes what `up` and its daemons made, and the directory if nothing else is in it.
fn remove_state(state_dir: &Path) -> Result<(), CliError> {
    for directory in node_dirs(state_dir)? {
        remove(&directory)?;
        remove(&directory.with_extension("log"))?;
    }
    for name in [
        "certs",
        "cluster.secret",
        "scheduler",
        "scheduler.log",
        "up.json",
        "lock",
        ring3::SAID,
    ] {
        remove(&state_dir.join(name))?;
    }
    match fs::remove_dir(state_dir) {
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound
            ) =>
        {
            Err(file_error(state_dir.to_owned(), "cannot remove", error))
        }
        _ => Ok(()),
    }
}

fn remove(path: &Path) -> Result<(), CliError> {
    let done = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(file_error(path.to_owned(), "cannot remove", error))
        }
        _ => Ok(()),
    }
}

/// The directories node1, node2, … of a state directory.
fn node_dirs(state_dir: &Path) -> Result<Vec<PathBuf>, CliError> {
    let mut nodes = subdirectories(state_dir)?;
    nodes.retain(|path| {
        let number = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix("node"));
        number.is_some_and(|digits| digits.parse::<u32>().is_ok())
    });
    Ok(nodes)
}

fn subdirectories(directory: &Path) -> Result<Vec<PathBuf>, CliError> {
    let failed = |error| file_error(directory.to_owned(), "cannot list", error);
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    fn vmm_dir(state_dir: &Path, node: &str) -> PathBuf {
        let directory = state_dir.join(node).join("vms/some-vm-1");
        fs::create_dir_all(&directory).expect("made");
        directory
    }

    #[tokio::test]
    async fn a_vmm_that_was_left_is_killed_and_a_stranger_is_not() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut left = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .expect("sleep runs");
        let identity = ProcessIdentity::of(left.id()).expect("identity");
        let own = ProcessIdentity::of(std::process::id()).expect("identity");
        let stranger = ProcessIdentity {
            start_ticks: own.start_ticks + 1,
            ..own
        };
        fs::write(vmm_dir(dir.path(), "node1").join("pid"), identity.to_string()).expect("written");
        fs::write(vmm_dir(dir.path(), "node2").join("pid"), stranger.to_string()).expect("written");

        let stopped = stop(dir.path(), false)
            .await
            .expect("stopped")
            .expect("something was up");
        assert_eq!(stopped.killed_vmms, 1);
        left.wait().expect("reaped");
        assert!(!dir.path().join("node1/vms/some-vm-1").exists());
    }

    #[tokio::test]
    async fn purging_leaves_what_is_not_ours() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        vmm_dir(dir.path(), "node1");
        fs::write(dir.path().join("node1.log"), "").expect("written");
        fs::write(dir.path().join("diary.txt"), "mine").expect("written");
        fs::create_dir(dir.path().join("nodes-of-mine")).expect("made");
        assert!(stop(dir.path(), true).await.expect("stopped").is_none());
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .expect("listed")
            .map(|e| e.expect("entry").file_name())
            .collect();
        left.sort();
        assert_eq!(left, ["diary.txt", "nodes-of-mine"]);
    }
}
