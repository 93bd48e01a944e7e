//! One task for each VMM: follows its status, moves its console, notices its end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use shoal_proto::vm::GetStatusRequest;
use tonic::Status;

use crate::console;
use crate::node::Node;
use crate::sampling;
use crate::vm::Vm;

/// Pause before asking again after the VMM's stream has broken.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// How often the length of the VMM's log is looked at.
const LOG_LOOK: Duration = Duration::from_secs(10);

/// Runs until the VMM's process has ended.
pub(crate) async fn supervise(node: Arc<Node>, vm: Arc<Vm>) {
    let how = tokio::select! {
        how = vm.process.exited() => how,
        never = follow_status(&node, &vm) => match never {},
        never = console::pump(&vm, node.uplink.sessions()) => match never {},
        never = sampling::follow(&vm, node.memory_sampling) => match never {},
        never = keep_log_short(&vm) => match never {},
    };
    vm.set_gone(&how);
    if vm.is_retiring() {
        tracing::debug!(vm = %vm.key.id, epoch = %vm.key.epoch, how, "VMM ended");
    } else {
        tracing::warn!(vm = %vm.key.id, epoch = %vm.key.epoch, how, "VMM ended by itself");
        node.uplink.vm_changed(vm.key);
    }
}

async fn keep_log_short(vm: &Vm) -> Infallible {
    loop {
        tokio::time::sleep(LOG_LOOK).await;
        if let Err(error) = vm.dir.shorten_log() {
            tracing::debug!(vm = %vm.key.id, %error, "the VMM's log");
        }
    }
}

async fn follow_status(node: &Node, vm: &Vm) -> Infallible {
    loop {
        if let Err(status) = watch_status(node, vm).await {
            tracing::debug!(vm = %vm.key.id, %status, "status stream ended");
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn watch_status(node: &Node, vm: &Vm) -> Result<(), Status> {
    let mut changes = vm.client().watch_status(GetStatusRequest {}).await?.into_inner();
    while let Some(status) = changes.message().await? {
        tracing::info!(vm = %vm.key.id, epoch = %vm.key.epoch, state = status.state().as_str_name(), "VM state");
        vm.set_status(status);
        node.uplink.vm_changed(vm.key);
    }
    Ok(())
}
