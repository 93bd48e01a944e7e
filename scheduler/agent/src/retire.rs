//! The end of a VMM: asked to quit, killed if it does not, reaped, and its directory removed.

use std::time::Duration;

use shoal_proto::vm::QuitRequest;
use tonic::Status;

use crate::console;
use crate::node::Node;
use crate::vm::Vm;

/// How long the scheduler may take to accept the rest of the console.
const DRAIN_LIMIT: Duration = Duration::from_secs(3);
/// How long a VMM may take to answer Quit, and then to end.
const QUIT_LIMIT: Duration = Duration::from_secs(2);
/// How long the kernel may take to end a killed process: it may have much memory to free.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// What becomes of console bytes that the scheduler does not have yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Console {
    /// They are handed over first, as far as that goes in a bounded time.
    Drain,
    /// There are none, or nobody wants them.
    Drop,
}

/// Ends the VMM and removes all of it. On error it is still there, and this can be called again.
pub(crate) async fn retire(node: &Node, vm: &Vm, console: Console) -> Result<(), Status> {
    if console == Console::Drain && !vm.process.is_gone() {
        console::drain(vm, DRAIN_LIMIT).await;
    }
    vm.set_retiring(true);
    let ended = end(vm).await;
    if ended.is_err() {
        vm.set_retiring(false);
        return ended;
    }
    let removed = vm.dir.remove();
    removed.map_err(|error| {
        Status::internal(format!(
            "the VMM has ended, but its directory {:?} stays: {error}",
            vm.dir.path()
        ))
    })?;
    node.forget(vm.key);
    Ok(())
}

async fn end(vm: &Vm) -> Result<(), Status> {
    if vm.process.is_gone() {
        return Ok(());
    }
    let mut client = vm.client();
    if let Err(status) = vm.call(QUIT_LIMIT, client.quit(QuitRequest {})).await {
        tracing::debug!(vm = %vm.key.id, %status, "Quit was not answered");
    }
    if tokio::time::timeout(QUIT_LIMIT, vm.process.exited())
        .await
        .is_ok()
    {
        return Ok(());
    }
    tracing::warn!(vm = %vm.key.id, pid = vm.process.identity().pid, "the VMM does not quit; killing it");
    kill(vm).await
}

/// Kills the VMM and waits until it has ended.
pub(crate) async fn kill(vm: &Vm) -> Result<(), Status> {
    let pid = vm.process.identity().pid;
    vm.process
        .kill()
        .map_err(|error| Status::internal(format!("the VMM {pid} cannot be killed: {error}")))?;
    match tokio::time::timeout(KILL_LIMIT, vm.process.exited()).await {
        Ok(_) => Ok(()),
        Err(_) => Err(Status::unavailable(format!(
            "the VMM {pid} was killed but has not ended yet; try again"
        ))),
    }
}
