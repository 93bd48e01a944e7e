//! Starting a VMM process: its directory, its listening socket as standard input, a process group of its own.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use crate::cgroup::Cgroup;
use crate::key::VmKey;
use crate::process::WatchedProcess;
use crate::runtime_dir::{RuntimeDir, VmRecord};
use crate::vm::Vm;

/// Why there is no VMM.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}: {source}")]
pub(crate) struct SpawnError {
    step: &'static str,
    source: io::Error,
}

trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, SpawnError>;
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, step: &'static str) -> Result<T, SpawnError> {
        self.map_err(|source| SpawnError { step, source })
    }
}

/// Starts a VMM that holds no VM yet. After an error nothing of it is left.
pub(crate) fn spawn(
    vmm_binary: &Path,
    vms: &Path,
    cgroup: Option<&Cgroup>,
    key: VmKey,
    record: &VmRecord,
) -> Result<Vm, SpawnError> {
    let dir = RuntimeDir::create(vms, key).step("create the VMM's directory")?;
    let path = dir.path().to_owned();
    start(vmm_binary, dir, cgroup, key, record).inspect_err(|_| {
        if let Err(error) = std::fs::remove_dir_all(&path) {
            tracing::warn!(%error, vm = %key.id, "a VMM's directory was left behind");
        }
    })
}

fn start(
    vmm_binary: &Path,
    dir: RuntimeDir,
    cgroup: Option<&Cgroup>,
    key: VmKey,
    record: &VmRecord,
) -> Result<Vm, SpawnError> {
    dir.write_record(record).step("write the VMM's record")?;
    let listener = dir.bind_socket().step("bind the VMM's socket")?;
    let log = dir.create_log().step("create the VMM's log")?;
    let log_too = log.try_clone().step("share the VMM's log")?;
    let child = Command::new(vmm_binary)
        .args(["--api-fd", "0"])
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(log)
        .stderr(log_too)
        .current_dir(dir.path())
        .process_group(0) // signals to the agent's group, such as Ctrl-C, are not for the VMs
        .kill_on_drop(false)
        .spawn()
        .step("start the VMM")?;
    let process = WatchedProcess::from_child(child).step("watch the VMM")?;
    let identity = process.identity();
    let recorded = dir.write_identity(identity).step("write the VMM's pid");
    // It holds no VM yet, so that all of the VM's work is counted there.
    let placed = cgroup.map_or(Ok(()), |cgroup| cgroup.add(identity.pid));
    let ready = recorded.and(placed.step("put the VMM into its cgroup"));
    let vm = ready.and_then(|()| Vm::new(key, dir, process, record).step("name the VMM's socket"));
    vm.inspect_err(|_| {
        if let Err(error) = identity.kill() {
            tracing::warn!(%error, pid = identity.pid, "a VMM could not be killed");
        }
    })
}
