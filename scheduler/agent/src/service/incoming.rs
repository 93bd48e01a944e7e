//! PrepareIncoming and AbortIncoming: the destination's side of a migration.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use shoal_proto::node::{
    AbortIncomingRequest, AbortIncomingResponse, PrepareIncomingRequest, PrepareIncomingResponse,
};
use shoal_proto::{MigrationId, vm};
use tonic::{Code, Status};

use super::workload::Workload;
use super::{Refusal, discard, key_of, predecessor, refuse_company};
use crate::key::VmKey;
use crate::node::Node;
use crate::retire::{self, Console, retire};
use crate::vm::{ANSWER_LIMIT, Vm};

/// How long a VMM may take to build a VM and listen.
const PREPARE_LIMIT: Duration = Duration::from_secs(30);

/// How long the threads of a VMM may take to stop: signals arrive at once, unless a thread waits in the kernel for a disk.
const FREEZE_LIMIT: Duration = Duration::from_secs(1);

/// Of a VMM, seen by itself: each runs in its directory. A socket's path holds 108 bytes (unix(7)), and that of a state
/// directory may be longer.
const OWN_DIRECTORY: &str = "/proc/self/cwd";
const MIGRATION_SOCKET: &str = "migration.sock";

/// A checked [`PrepareIncomingRequest`].
#[derive(Debug)]
pub(super) struct Preparation {
    workload: Workload,
    migration: MigrationId,
    token: String,
    source_node: String,
}

impl Preparation {
    pub(super) fn parse(request: PrepareIncomingRequest) -> Result<Self, Refusal> {
        Ok(Self {
            workload: Workload::parse(request.spec)?,
            migration: request.migration_id.parse()?,
            token: request.token,
            source_node: request.source_node,
        })
    }
}

pub(super) async fn prepare(
    node: Arc<Node>,
    preparation: Preparation,
) -> Result<PrepareIncomingResponse, Refusal> {
    let Preparation {
        workload,
        migration,
        token,
        source_node,
    } = preparation;
    let key = workload.key;
    let _launching = node.begin_launch(key);
    let _turn = node.turns.lock(&key.id).await;
    let within_node = source_node == node.name.as_str();
    if within_node {
        let from = predecessor(&node, key)?;
        node.epochs.claim_handover(from, key).await?;
    } else {
        refuse_company(&node, key)?;
        node.epochs.claim(key).await?;
    }
    let vm = Arc::new(node.spawn_vmm(key, &workload.record(Some(migration)))?);
    let request = vm::PrepareIncomingRequest {
        spec: Some(workload.vm_spec(node.memory_backing, None)),
        migration_id: migration.to_string(),
        token,
        listen_address: if within_node {
            format!("unix:{OWN_DIRECTORY}/{MIGRATION_SOCKET}")
        } else {
            SocketAddr::new(node.migration_ip, 0).to_string()
        },
        commit_timeout_ms: 0,
        accept_timeout_ms: 0,
        tls: node.migration_tls(&source_node),
    };
    match listen(&node, &vm, request).await {
        Ok(address) => {
            tracing::info!(vm = %key.id, epoch = %key.epoch, %migration, %address, "prepared for a migration");
            node.keep(vm);
            Ok(PrepareIncomingResponse { address })
        }
        Err(status) => Err(discard(&node, vm, status).await),
    }
}

/// Has the VMM listen; answers where the source reaches it.
async fn listen(node: &Node, vm: &Vm, request: vm::PrepareIncomingRequest) -> Result<String, Status> {
    let mut client = vm.client();
    let within_node = request.listen_address.starts_with("unix:");
    let answer = vm.call(PREPARE_LIMIT, client.prepare_incoming(request)).await?;
    vm.refresh_status().await?;
    if within_node {
        return Ok(beside(vm.key));
    }
    let address = reachable(&answer.address, node.reachable_ip);
    address.map(|address| address.to_string()).ok_or_else(|| {
        Status::internal(format!(
            "the VMM listens on '{}', which is no address",
            answer.address
        ))
    })
}

/// Where another VMM of this node reaches the migration socket of a VMM.
fn beside(key: VmKey) -> String {
    format!("unix:{OWN_DIRECTORY}/../{key}/{MIGRATION_SOCKET}")
}

/// A socket on the unspecified address is reached under the node's own.
fn reachable(address: &str, node_ip: IpAddr) -> Option<SocketAddr> {
    let mut address: SocketAddr = address.parse().ok()?;
    if address.ip().is_unspecified() {
        address.set_ip(node_ip);
    }
    Some(address)
}

pub(super) fn parse_abort(request: AbortIncomingRequest) -> Result<(VmKey, MigrationId), Refusal> {
    Ok((key_of(request.vm)?, request.migration_id.parse()?))
}

/// After `committed = false` nothing can run here at this epoch, now or later.
pub(super) async fn abort(
    node: Arc<Node>,
    (key, migration): (VmKey, MigrationId),
) -> Result<AbortIncomingResponse, Refusal> {
    let _turn = node.turns.lock(&key.id).await;
    let vm = node.vm(key);
    if let Some(vm) = &vm
        && was_committed(vm, migration).await?
    {
        return Ok(AbortIncomingResponse { committed: true });
    }
    node.epochs.fence(key).await?;
    if let Some(vm) = &vm {
        retire(&node, vm, Console::Drop).await?;
    }
    tracing::info!(vm = %key.id, epoch = %key.epoch, %migration, "incoming migration aborted");
    Ok(AbortIncomingResponse { committed: false })
}

/// The VMM decides, atomically against Commit. Once it is dead, the mark it leaves before its vCPUs first run does.
async fn was_committed(vm: &Vm, migration: MigrationId) -> Result<bool, Status> {
    if vm.process.is_gone() {
        return Ok(vm.dir.has_run());
    }
    let request = vm::AbortIncomingRequest {
        migration_id: migration.to_string(),
    };
    let mut client = vm.client();
    let refused = match vm.call(ANSWER_LIMIT, client.abort_incoming(request)).await {
        Ok(answer) => return Ok(answer.committed),
        Err(status) => status,
    };
    if vm.process.is_gone() || vm.dir.has_run() {
        return Ok(vm.dir.has_run());
    }
    match refused.code() {
        Code::NotFound | Code::FailedPrecondition => {
            let never_prepared = vm.refresh_status().await?.state() == vm::VmState::Empty;
            // Otherwise nobody knows: the caller asks again.
            if never_prepared { Ok(false) } else { Err(refused) }
        }
        Code::DeadlineExceeded => end_silent(vm).await,
        _ => Err(refused),
    }
}

/// Ends a VMM that does not answer, unless it has run the VM: it may hang with Commit in its hands, and the guest stands
/// still at the source until it is known that it never runs here. Frozen, it cannot begin to run between the look and
/// the end.
async fn end_silent(vm: &Vm) -> Result<bool, Status> {
    let pid = vm.process.identity().pid;
    let frozen = vm.process.freeze(FREEZE_LIMIT).await;
    let frozen =
        frozen.map_err(|error| Status::internal(format!("the VMM {pid} cannot be frozen: {error}")))?;
    if !vm.dir.has_run() {
        tracing::warn!(vm = %vm.key.id, pid, "the VMM does not answer and has not run the VM; killing it");
        retire::kill(vm).await?;
    }
    drop(frozen);
    // A thread that was in the kernel to leave the mark may have left it all the same.
    Ok(vm.dir.has_run())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_within_the_node_has_a_path_that_fits() {
        let key = VmKey {
            id: shoal_proto::VmId::new(),
            epoch: shoal_proto::Epoch(u64::MAX),
        };
        let address = beside(key);
        let path = address.strip_prefix("unix:").expect("a Unix socket");
        assert!(path.starts_with('/') && path.len() < 108, "{path}");
    }

    #[test]
    fn the_source_is_told_an_address_it_can_reach() {
        let node: IpAddr = "10.1.2.3".parse().expect("an address");
        let told = |address: &str| reachable(address, node).map(|address| address.to_string());
        assert_eq!(told("127.0.0.1:4000").as_deref(), Some("127.0.0.1:4000"));
        assert_eq!(told("0.0.0.0:4000").as_deref(), Some("10.1.2.3:4000"));
        assert_eq!(told("[::]:4000").as_deref(), Some("10.1.2.3:4000"));
        assert_eq!(told("somewhere"), None);
    }
}
