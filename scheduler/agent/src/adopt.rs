//! What an agent does first: finds the VMMs of the agent before it. They have not noticed that it was gone.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shoal_proto::vm::VmState;
use tokio::task::JoinSet;

use crate::epochs::{self, EpochError};
use crate::key::VmKey;
use crate::node::Node;
use crate::process::{ProcessIdentity, WatchedProcess};
use crate::retire::{Console, retire};
use crate::runtime_dir::{RuntimeDir, VmRecord};
use crate::vm::Vm;

/// Why one directory could not be taken over. The agent must not start then: it would not report a VM that may run.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The directory of all VMMs.
    #[error("the VMMs of an earlier agent cannot be listed in {path}: {source}")]
    List {
        /// Where they are.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// One VMM's directory.
    #[error(
        "the VMM of an earlier agent in {path} cannot be adopted: {reason}; repair or remove that directory"
    )]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What was wrong.
        reason: String,
    },
}

/// Adopts every VMM that lives, keeps the last facts of those that ran and died, and clears away the rest.
pub(crate) async fn adopt_all(node: &Arc<Node>) -> Result<(), AdoptError> {
    let list_error = |source| AdoptError::List {
        path: node.vms_dir().to_owned(),
        source,
    };
    let mut adoptions = JoinSet::new();
    let mut here = HashSet::new();
    for entry in std::fs::read_dir(node.vms_dir()).map_err(list_error)? {
        let path = entry.map_err(list_error)?.path();
        let Some(key) = path
            .file_name()
            .and_then(|name| name.to_str()?.parse::<VmKey>().ok())
        else {
            tracing::warn!(?path, "not the directory of a VMM; ignored");
            continue;
        };
        here.insert(key.id);
        let node = Arc::clone(node);
        adoptions.spawn(async move {
            let adopted = adopt(&node, key, path.clone()).await;
            adopted.map_err(|reason| AdoptError::Directory {
                path,
                reason: reason.to_string(),
            })
        });
    }
    while let Some(adoption) = adoptions.join_next().await {
        adoption.unwrap_or_else(|error| Err(list_error(io::Error::other(error))))?;
    }
    match node.epochs.forget_old(&here, epochs::KEPT) {
        Ok(0) => {}
        Ok(forgotten) => tracing::info!(forgotten, "epochs of VMs that went long ago"),
        Err(error) => tracing::warn!(%error, "epochs of VMs that went long ago are not forgotten"),
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum Reason {
    #[error(transparent)]
    Epoch(#[from] EpochError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{}", .0.message())]
    Retire(Box<tonic::Status>),
}

async fn adopt(node: &Arc<Node>, key: VmKey, path: PathBuf) -> Result<(), Reason> {
    node.epochs.fence(key).await?;
    let dir = RuntimeDir::open(path)?;
    let process = find_process(&dir).await?;
    let record = dir.read_record().unwrap_or_else(|error| {
        tracing::warn!(vm = %key.id, epoch = %key.epoch, %error, "no record of this VM");
        VmRecord::unknown()
    });
    let gone = process.is_gone();
    if gone && !dir.has_run() {
        tracing::info!(vm = %key.id, epoch = %key.epoch, "cleared away a VMM that died before it ran");
        return Ok(dir.remove()?);
    }
    let vm = Arc::new(Vm::new(key, dir, process, &record)?);
    if !gone {
        let pid = vm.process.identity().pid;
        if let Some(Err(error)) = node.cgroup.as_ref().map(|cgroup| cgroup.add(pid)) {
            tracing::warn!(vm = %key.id, epoch = %key.epoch, %error, "adopted, but not put into the cgroup");
        }
        match vm.refresh_status().await {
            Ok(status) if status.state() == VmState::Empty => {
                tracing::info!(vm = %key.id, epoch = %key.epoch, "ending a VMM that was started and never given its VM");
                return retire(node, &vm, Console::Drop)
                    .await
                    .map_err(|status| Reason::Retire(Box::new(status)));
            }
            Ok(status) => {
                tracing::info!(vm = %key.id, epoch = %key.epoch, state = status.state().as_str_name(), "adopted");
            }
            Err(status) => {
                tracing::warn!(vm = %key.id, epoch = %key.epoch, %status, "adopted, but it does not answer");
            }
        }
    }
    node.keep(vm);
    Ok(())
}

/// The VMM's process by its pid file. If that names none that runs, it is looked for among all that do: the agent may have died
/// before it wrote the file, and a file that is wrong must not leave a VMM without an agent.
async fn find_process(dir: &RuntimeDir) -> io::Result<WatchedProcess> {
    let written = dir.read_identity()?;
    let running = written.filter(ProcessIdentity::is_running);
    if let Some(identity) = running.filter(|identity| identity.boot_id.is_some()) {
        return WatchedProcess::adopt(identity);
    }
    let path = dir.path().to_owned();
    let found = tokio::task::spawn_blocking(move || find_server(&path)).await??;
    // An agent of before wrote the file, which leaves the boot open.
    match found.or(running) {
        Some(identity) => {
            dir.write_identity(identity)?;
            WatchedProcess::adopt(identity)
        }
        None => Ok(WatchedProcess::gone(written.unwrap_or(ProcessIdentity {
            pid: 0,
            start_ticks: 0,
            boot_id: None,
        }))),
    }
}

/// The process that was started as the VMM of a directory: it has that as its working directory, and a listening socket as
/// its standard input. It need not answer, nor have come so far that it could.
///
/// None is missed. The agent that started it held the lock of the state directory, and a process that it was about to become one
/// in holds that, too, until it executes the VMM; by then it is in the directory.
fn find_server(dir: &Path) -> io::Result<Option<ProcessIdentity>> {
    let sockets = vmm_sockets(&std::fs::read_to_string("/proc/net/unix")?);
    for entry in std::fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        // One that cannot be read has ended, or is another user's.
        let link = |what: &str| std::fs::read_link(format!("/proc/{pid}/{what}")).ok();
        if link("cwd").is_some_and(|cwd| cwd == dir)
            && link("fd/0").is_some_and(|stdin| sockets.contains(stdin.as_os_str()))
            && let Ok(identity) = ProcessIdentity::of(pid)
        {
            return Ok(Some(identity));
        }
    }
    Ok(None)
}

/// Sockets of VMMs in the text of `/proc/net/unix`, as `/proc/PID/fd` shows them.
fn vmm_sockets(table: &str) -> HashSet<OsString> {
    let inode = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let inode: u64 = fields.nth(6)?.parse().ok()?;
        let path = fields.next()?;
        path.ends_with("/vmm.sock")
            .then(|| format!("socket:[{inode}]").into())
    };
    table.lines().filter_map(inode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_vmms_are_found_in_the_kernels_table() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                     ffff9f2e: 00000002 00000000 00010000 0001 01 22222 /run/dbus\n\
                     ffff9f2e: 00000002 00000000 00010000 0001 01 33333 /proc/self/fd/12/vmm.sock\n\
                     ffff9f2e: 00000003 00000000 00000000 0001 03 44444\n\
                     ffff9f2e: garbage\n";
        assert_eq!(vmm_sockets(table), ["socket:[33333]".into()].into());
    }
}
