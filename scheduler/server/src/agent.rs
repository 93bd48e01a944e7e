//! Calls to one node's agent. Each has a deadline, and each error says whether the agent refused or did not answer:
//! after a refusal nothing has changed; without an answer the node has to be asked what happened.

use std::net::SocketAddr;
use std::time::Duration;

use shoal_proto::node::agent_client::AgentClient;
use shoal_proto::node::{
    AbortIncomingRequest, CancelMigrationRequest, LaunchVmRequest, PrepareIncomingRequest,
    SetMigrationRequest, StartMigrationRequest, VmFacts, VmRef, WatchMigrationRequest, WorkloadSpec,
    WriteConsoleRequest,
};
use shoal_proto::{Epoch, MigrationId, NodeName, VmId, vm};
use shoal_secret::{ClusterSecret, Prove};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::nodes::InvalidAddress;
use crate::record::NodeRecord;
use crate::store::Term;

const CONNECT_TIME: Duration = Duration::from_secs(3);
/// Questions and small commands.
const CALL_TIME: Duration = Duration::from_secs(10);
/// Launching and preparing may fetch gigabytes of image first; a dead link is noticed by keep-alive long before.
const FETCH_TIME: Duration = Duration::from_secs(900);

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AgentError {
    /// No answer, or one that does not tell what happened.
    #[error("node {node} gave no clear answer ({what})")]
    NoAnswer {
        /// The node.
        node: NodeName,
        /// What the transport says, or the agent.
        what: String,
        /// The node answers, the process of the VM does not.
        vmm_is_silent: bool,
        /// There was no connection to send the call through: the agent has never seen it.
        unsent: bool,
    },
    /// The agent says no.
    #[error("{}", .0.message())]
    Refused(Box<Status>),
}

impl AgentError {
    /// The agent says that there is no such thing.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(Code::NotFound)
    }

    /// The node answers, the process of the VM does not.
    pub fn vmm_is_silent(&self) -> bool {
        matches!(
            self,
            Self::NoAnswer {
                vmm_is_silent: true,
                ..
            }
        )
    }

    /// The agent has certainly not done what it was called for: it refused, or never saw the call.
    pub fn is_without_effect(&self) -> bool {
        match self {
            Self::Refused(_) => true,
            Self::NoAnswer { unsent, .. } => *unsent,
        }
    }

    /// The code of a refusal.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused(status) => Some(status.code()),
            Self::NoAnswer { .. } => None,
        }
    }
}

/// A node's agent. Cheap to clone; connects when first used and again after the connection broke.
#[derive(Debug, Clone)]
pub struct Agent {
    node: NodeName,
    client: AgentClient<InterceptedService<Channel, Caller>>,
}

/// Who calls: adds to each call the secret of the cluster and in which term it is made, so that agents can refuse those of a
/// stranger, and of a scheduler that does not lead any more.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The term.
    pub term: Term,
    prove: Prove,
}

impl Caller {
    /// In this term, with the secret if there is one.
    pub fn new(term: Term, secret: Option<&ClusterSecret>) -> Self {
        Self {
            term,
            prove: Prove::new(secret),
        }
    }
}

impl Interceptor for Caller {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let mut request = self.prove.call(request)?;
        request
            .metadata_mut()
            .insert(shoal_proto::TERM_HEADER, self.term.0.into());
        Ok(request)
    }
}

/// A VM at an epoch, as agents are told.
pub fn vm_ref(vm: VmId, epoch: Epoch) -> VmRef {
    VmRef {
        vm_id: vm.to_string(),
        epoch: epoch.0,
    }
}

impl Agent {
    /// The agent at the node's address, as this scheduler calls it.
    pub fn new(node: &NodeRecord, caller: &Caller) -> Result<Self, InvalidAddress> {
        let invalid = || InvalidAddress(crate::limits::shorten(&node.address));
        let address: SocketAddr = node.address.parse().map_err(|_| invalid())?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|_| invalid())?
            .connect_timeout(CONNECT_TIME)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3));
        Ok(Self {
            node: node.name.clone(),
            client: AgentClient::with_interceptor(endpoint.connect_lazy(), caller.clone()),
        })
    }

    /// What the node knows of the VM.
    pub async fn describe(&self, vm: VmId, epoch: Epoch) -> Result<VmFacts, AgentError> {
        let mut client = self.client.clone();
        self.call(CALL_TIME, client.describe_vm(vm_ref(vm, epoch))).await
    }

    /// Starts a VM.
    pub async fn launch(&self, spec: WorkloadSpec) -> Result<vm::VmStatus, AgentError> {
        let mut client = self.client.clone();
        self.call(FETCH_TIME, client.launch_vm(LaunchVmRequest { spec: Some(spec) }))
            .await
    }

    /// Prepares to receive a VM; answers the address for the source.
    pub async fn prepare_incoming(
        &self,
        spec: WorkloadSpec,
        migration: MigrationId,
        token: String,
        source: &NodeName,
    ) -> Result<String, AgentError> {
        let request = PrepareIncomingRequest {
            spec: Some(spec),
            migration_id: migration.to_string(),
            token,
            source_node: source.to_string(),
        };
        let mut client = self.client.clone();
        Ok(self
            .call(FETCH_TIME, client.prepare_incoming(request))
            .await?
            .address)
    }

    /// Ends an incoming migration unless it was committed; true if it was. After false it never will be.
    pub async fn abort_incoming(
        &self,
        vm: VmId,
        epoch: Epoch,
        migration: MigrationId,
    ) -> Result<bool, AgentError> {
        let request = AbortIncomingRequest {
            vm: Some(vm_ref(vm, epoch)),
            migration_id: migration.to_string(),
        };
        let mut client = self.client.clone();
        Ok(self
            .call(CALL_TIME, client.abort_incoming(request))
            .await?
            .committed)
    }

    /// Starts to send a VM.
    pub async fn start_migration(
        &self,
        vm: VmId,
        epoch: Epoch,
        migration: vm::StartMigrationRequest,
        destination: &NodeName,
    ) -> Result<(), AgentError> {
        let request = StartMigrationRequest {
            vm: Some(vm_ref(vm, epoch)),
            migration: Some(migration),
            destination_node: destination.to_string(),
        };
        let mut client = self.client.clone();
        self.call(CALL_TIME, client.start_migration(request))
            .await
            .map(drop)
    }

    /// Progress of the latest outgoing migration, and its report at the end.
    pub async fn watch_migration(
        &self,
        vm: VmId,
        epoch: Epoch,
        migration: MigrationId,
    ) -> Result<Streaming<vm::MigrationProgress>, AgentError> {
        let request = WatchMigrationRequest {
            vm: Some(vm_ref(vm, epoch)),
            migration_id: migration.to_string(),
        };
        let mut client = self.client.clone();
        self.call(CALL_TIME, client.watch_migration(request)).await
    }

    /// Cancels an outgoing migration if Commit has not been sent.
    pub async fn cancel_migration(&self, vm: VmId, epoch: Epoch, migration: &str) -> Result<(), AgentError> {
        let request = CancelMigrationRequest {
            vm: Some(vm_ref(vm, epoch)),
            migration_id: migration.to_owned(),
        };
        let mut client = self.client.clone();
        self.call(CALL_TIME, client.cancel_migration(request))
            .await
            .map(drop)
    }

    /// Changes the policy of an outgoing migration; answers the one that now holds.
    pub async fn set_migration(
        &self,
        vm: VmId,
        epoch: Epoch,
        migration: MigrationId,
        policy: vm::MigrationPolicy,
    ) -> Result<vm::MigrationPolicy, AgentError> {
        let change = vm::SetMigrationRequest {
            migration_id: migration.to_string(),
            policy: Some(policy),
        };
        let request = SetMigrationRequest {
            vm: Some(vm_ref(vm, epoch)),
            change: Some(change),
        };
        let mut client = self.client.clone();
        let answer = self.call(CALL_TIME, client.set_migration(request)).await?;
        Ok(answer.policy.unwrap_or_default())
    }

    /// Stops a VM's vCPUs. Good if they are stopped.
    pub async fn pause(&self, vm: VmId, epoch: Epoch) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        self.call(CALL_TIME, client.pause_vm(vm_ref(vm, epoch)))
            .await
            .map(drop)
    }

    /// Runs a VM that is paused, or in doubt, again.
    pub async fn resume(&self, vm: VmId, epoch: Epoch) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        self.call(CALL_TIME, client.resume_vm(vm_ref(vm, epoch)))
            .await
            .map(drop)
    }

    /// Powers a VM off.
    pub async fn stop(&self, vm: VmId, epoch: Epoch) -> Result<vm::VmStatus, AgentError> {
        let mut client = self.client.clone();
        self.call(CALL_TIME, client.stop_vm(vm_ref(vm, epoch))).await
    }

    /// Ends the VMM after its console was handed over. Good if there is none; the epoch never starts there again.
    pub async fn destroy(&self, vm: VmId, epoch: Epoch) -> Result<(), AgentError> {
        let mut client = self.client.clone();
        self.call(2 * CALL_TIME, client.destroy_vm(vm_ref(vm, epoch)))
            .await
            .map(drop)
    }

    /// Types on the console.
    pub async fn write_console(&self, vm: VmId, epoch: Epoch, data: Vec<u8>) -> Result<(), AgentError> {
        let request = WriteConsoleRequest {
            vm: Some(vm_ref(vm, epoch)),
            data,
        };
        let mut client = self.client.clone();
        self.call(CALL_TIME, client.write_console(request))
            .await
            .map(drop)
    }

    async fn call<T>(
        &self,
        deadline: Duration,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, AgentError> {
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.error(status)),
            Err(_) => Err(AgentError::NoAnswer {
                node: self.node.clone(),
                what: format!("nothing within {deadline:?}"),
                vmm_is_silent: false,
                unsent: false,
            }),
        }
    }

    /// What a failed call or a broken stream means.
    pub fn error(&self, status: Status) -> AgentError {
        match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal => {
                AgentError::NoAnswer {
                    node: self.node.clone(),
                    what: crate::limits::shorten(status.message()),
                    // Only agents set this code: calls to them have their deadline here.
                    vmm_is_silent: status.code() == Code::DeadlineExceeded,
                    unsent: never_connected(&status),
                }
            }
            _ => AgentError::Refused(Box::new(status)),
        }
    }
}

/// The transport could not connect. A call whose connection broke later may have arrived, and has another error.
fn never_connected(status: &Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}
