//! Calls about a VM that is here: describe, pause, resume, stop, destroy, and its console's input.

use std::sync::Arc;
use std::time::Duration;

use shoal_proto::node::{DestroyVmResponse, VmFacts, WriteConsoleRequest, WriteConsoleResponse};
use shoal_proto::vm::{self, VmState, VmStatus};

use super::{Refusal, check_current, find, key_of};
use crate::key::VmKey;
use crate::node::Node;
use crate::retire::{Console, retire};
use crate::vm::ANSWER_LIMIT;

/// How long a VMM may take to stop its vCPUs.
const STOP_LIMIT: Duration = Duration::from_secs(10);

pub(super) async fn describe(node: Arc<Node>, key: VmKey) -> Result<VmFacts, Refusal> {
    let Some(vm) = node.vm(key) else {
        // A launch that has begun will end in a VM or in an error: "not here" would be a guess.
        return if node.is_launching(key) {
            Ok(facts_of_launch(key))
        } else {
            Err(Refusal::NotHere(key))
        };
    };
    // The scheduler decides by this answer: while the VMM lives, an old status is none.
    if !vm.process.is_gone()
        && let Err(status) = vm.refresh_status().await
        && !vm.process.is_gone()
    {
        return Err(status.into());
    }
    Ok(vm.facts())
}

fn facts_of_launch(key: VmKey) -> VmFacts {
    let status = VmStatus {
        vm_id: key.id.to_string(),
        epoch: key.epoch.0,
        state: VmState::Empty.into(),
        status_message: "being started".to_owned(),
        ..VmStatus::default()
    };
    VmFacts {
        status: Some(status),
        vmm_alive: true,
        ..VmFacts::default()
    }
}

pub(super) async fn pause(node: Arc<Node>, key: VmKey) -> Result<VmStatus, Refusal> {
    let _turn = node.turns.lock(&key.id).await;
    check_current(&node, key).await?;
    let vm = find(&node, key)?;
    let mut client = vm.client();
    let status = vm
        .call(STOP_LIMIT, client.pause(vm::PauseRequest { epoch: key.epoch.0 }))
        .await?;
    tracing::info!(vm = %key.id, epoch = %key.epoch, "paused");
    vm.set_status(status);
    Ok(vm.status())
}

pub(super) async fn resume(node: Arc<Node>, key: VmKey) -> Result<VmStatus, Refusal> {
    let _turn = node.turns.lock(&key.id).await;
    check_current(&node, key).await?;
    let vm = find(&node, key)?;
    let mut client = vm.client();
    let status = vm
        .call(
            ANSWER_LIMIT,
            client.resume(vm::ResumeRequest { epoch: key.epoch.0 }),
        )
        .await?;
    tracing::info!(vm = %key.id, epoch = %key.epoch, "resumed");
    vm.set_status(status);
    Ok(vm.status())
}

pub(super) async fn stop(node: Arc<Node>, key: VmKey) -> Result<VmStatus, Refusal> {
    let _turn = node.turns.lock(&key.id).await;
    let vm = find(&node, key)?;
    if !vm.process.is_gone() {
        let mut client = vm.client();
        let status = vm.call(STOP_LIMIT, client.stop(vm::StopRequest {})).await?;
        tracing::info!(vm = %key.id, epoch = %key.epoch, "stopped");
        vm.set_status(status);
    }
    Ok(vm.status())
}

pub(super) async fn destroy(node: Arc<Node>, key: VmKey) -> Result<DestroyVmResponse, Refusal> {
    // First, and before its turn: a launch that is still fetching its image must find the epoch used up.
    node.epochs.fence(key).await?;
    let _turn = node.turns.lock(&key.id).await;
    if let Some(vm) = node.vm(key) {
        if vm.dir.has_run() {
            // Without its mark nothing else tells that what it took over must not go on.
            node.epochs.end_handover(key).await?;
        }
        retire(&node, &vm, Console::Drain).await?;
        tracing::info!(vm = %key.id, epoch = %key.epoch, "destroyed");
    }
    Ok(DestroyVmResponse {})
}

pub(super) fn parse_write(request: WriteConsoleRequest) -> Result<(VmKey, Vec<u8>), Refusal> {
    Ok((key_of(request.vm)?, request.data))
}

pub(super) async fn write_console(
    node: Arc<Node>,
    (key, data): (VmKey, Vec<u8>),
) -> Result<WriteConsoleResponse, Refusal> {
    let vm = find(&node, key)?;
    let mut client = vm.client();
    let write = vm::WriteConsoleRequest { data };
    vm.call(ANSWER_LIMIT, client.write_console(write)).await?;
    Ok(WriteConsoleResponse {})
}
