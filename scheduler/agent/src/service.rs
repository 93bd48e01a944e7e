//! The Agent service of `node.proto`, one file for each group of calls.
//!
//! Calls that change something run in a task of their own: a caller that goes away does not stop them half-way.

mod incoming;
mod launch;
mod lifecycle;
mod outgoing;
mod workload;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use shoal_proto::node::agent_server::Agent;
use shoal_proto::node::{
    AbortIncomingRequest, AbortIncomingResponse, CancelMigrationRequest, CancelMigrationResponse,
    DestroyVmResponse, LaunchVmRequest, PrepareIncomingRequest, PrepareIncomingResponse, SetMigrationRequest,
    StartMigrationRequest, StartMigrationResponse, VmFacts, VmRef, WatchMigrationRequest,
    WriteConsoleRequest, WriteConsoleResponse,
};
use shoal_proto::vm::{self, MigrationProgress, VmStatus};
use shoal_proto::{Epoch, IdError, VmId};
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status};

use crate::blobs::BlobError;
use crate::epochs::EpochError;
use crate::key::VmKey;
use crate::node::Node;
use crate::retire::{Console, retire};
use crate::spawn::SpawnError;
use crate::term::SaidTerm;
use crate::vm::Vm;
use workload::KernelError;

/// Serves a node.
#[derive(Debug)]
pub(crate) struct AgentService {
    node: Arc<Node>,
}

impl AgentService {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node }
    }

    /// Runs the call to its end, whether or not the caller waits for it. Its term counts from the moment when it is parsed.
    async fn run<T, P, R, Work>(
        &self,
        request: Request<T>,
        parse: impl FnOnce(T) -> Result<P, Refusal>,
        call: impl FnOnce(Arc<Node>, P) -> Work,
    ) -> Result<Response<R>, Status>
    where
        R: Send + 'static,
        Work: Future<Output = Result<R, Refusal>> + Send + 'static,
    {
        let parsed = self.hear(request, parse)?;
        match tokio::spawn(call(Arc::clone(&self.node), parsed)).await {
            Ok(Ok(answer)) => Ok(Response::new(answer)),
            Ok(Err(refusal)) => Err(refusal.into()),
            Err(error) => Err(Status::internal(format!(
                "the agent failed inside this call: {error}"
            ))),
        }
    }

    fn hear<T, P>(
        &self,
        request: Request<T>,
        parse: impl FnOnce(T) -> Result<P, Refusal>,
    ) -> Result<P, Status> {
        let term = request.extensions().get().copied();
        let parsed = parse(request.into_inner())?;
        if let Some(SaidTerm(term)) = term {
            self.node.terms.hear(term)?;
        }
        Ok(parsed)
    }
}

#[tonic::async_trait]
impl Agent for AgentService {
    async fn launch_vm(&self, request: Request<LaunchVmRequest>) -> Result<Response<VmStatus>, Status> {
        self.run(request, launch::parse, launch::launch).await
    }

    async fn prepare_incoming(
        &self,
        request: Request<PrepareIncomingRequest>,
    ) -> Result<Response<PrepareIncomingResponse>, Status> {
        self.run(request, incoming::Preparation::parse, incoming::prepare)
            .await
    }

    async fn abort_incoming(
        &self,
        request: Request<AbortIncomingRequest>,
    ) -> Result<Response<AbortIncomingResponse>, Status> {
        self.run(request, incoming::parse_abort, incoming::abort).await
    }

    async fn start_migration(
        &self,
        request: Request<StartMigrationRequest>,
    ) -> Result<Response<StartMigrationResponse>, Status> {
        self.run(request, outgoing::parse_start, outgoing::start).await
    }

    type WatchMigrationStream = Pin<Box<dyn Stream<Item = Result<MigrationProgress, Status>> + Send>>;

    async fn watch_migration(
        &self,
        request: Request<WatchMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        let watched = self.hear(request, outgoing::parse_watch)?;
        let progress = outgoing::watch(Arc::clone(&self.node), watched).await?;
        Ok(Response::new(Box::pin(progress)))
    }

    async fn cancel_migration(
        &self,
        request: Request<CancelMigrationRequest>,
    ) -> Result<Response<CancelMigrationResponse>, Status> {
        self.run(request, outgoing::parse_cancel, outgoing::cancel).await
    }

    async fn set_migration(
        &self,
        request: Request<SetMigrationRequest>,
    ) -> Result<Response<vm::SetMigrationResponse>, Status> {
        self.run(request, outgoing::parse_set, outgoing::set).await
    }

    async fn describe_vm(&self, request: Request<VmRef>) -> Result<Response<VmFacts>, Status> {
        self.run(request, parse_ref, lifecycle::describe).await
    }

    async fn pause_vm(&self, request: Request<VmRef>) -> Result<Response<VmStatus>, Status> {
        self.run(request, parse_ref, lifecycle::pause).await
    }

    async fn resume_vm(&self, request: Request<VmRef>) -> Result<Response<VmStatus>, Status> {
        self.run(request, parse_ref, lifecycle::resume).await
    }

    async fn stop_vm(&self, request: Request<VmRef>) -> Result<Response<VmStatus>, Status> {
        self.run(request, parse_ref, lifecycle::stop).await
    }

    async fn destroy_vm(&self, request: Request<VmRef>) -> Result<Response<DestroyVmResponse>, Status> {
        self.run(request, parse_ref, lifecycle::destroy).await
    }

    async fn write_console(
        &self,
        request: Request<WriteConsoleRequest>,
    ) -> Result<Response<WriteConsoleResponse>, Status> {
        self.run(request, lifecycle::parse_write, lifecycle::write_console)
            .await
    }
}

/// Why a call was not done.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("{0}: missing")]
    Missing(&'static str),
    #[error(transparent)]
    Id(#[from] IdError),
    #[error(transparent)]
    Epoch(#[from] EpochError),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error("VM {} at epoch {} is already on this node", .0.id, .0.epoch)]
    AlreadyHere(VmKey),
    #[error("VM {id} is still on this node at epoch {epoch} ({state}); destroy that first")]
    Rival {
        id: VmId,
        epoch: Epoch,
        state: &'static str,
    },
    #[error("VM {0} does not run on this node, so no other VMM here can take it over")]
    NoSourceHere(VmId),
    #[error("VM {} at epoch {} is not on this node", .0.id, .0.epoch)]
    NotHere(VmKey),
    #[error("{0}; nothing of it is left on this node")]
    NotStarted(String),
    /// In the VMM's own words, or why the VMM could not be asked.
    #[error("{}", .0.message())]
    Vmm(Box<Status>),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Vmm(Box::new(status))
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let words = refusal.to_string();
        match refusal {
            Refusal::Missing(_) | Refusal::Id(_) => Self::invalid_argument(words),
            Refusal::Epoch(EpochError::Stale { .. }) => Self::aborted(words),
            Refusal::Epoch(EpochError::File { .. }) => Self::internal(words),
            Refusal::Blob(BlobError::BadDigest { .. }) => Self::invalid_argument(words),
            Refusal::Blob(_) | Refusal::Kernel(_) | Refusal::Spawn(_) => Self::failed_precondition(words),
            Refusal::AlreadyHere(_) => Self::already_exists(words),
            Refusal::Rival { .. } | Refusal::NoSourceHere(_) | Refusal::NotStarted(_) => {
                Self::failed_precondition(words)
            }
            Refusal::NotHere(_) => Self::not_found(words),
            Refusal::Vmm(status) => *status,
        }
    }
}

/// For calls of which nothing else can be wrong.
fn parse_ref(vm: VmRef) -> Result<VmKey, Refusal> {
    key_of(Some(vm))
}

fn key_of(vm: Option<VmRef>) -> Result<VmKey, Refusal> {
    let vm = vm.ok_or(Refusal::Missing("vm"))?;
    Ok(VmKey::parse(&vm.vm_id, vm.epoch)?)
}

fn find(node: &Node, key: VmKey) -> Result<Arc<Vm>, Refusal> {
    node.vm(key).ok_or(Refusal::NotHere(key))
}

/// Refuses to start a VM beside itself.
fn refuse_company(node: &Node, key: VmKey) -> Result<(), Refusal> {
    if node.vm(key).is_some() {
        return Err(Refusal::AlreadyHere(key));
    }
    match node.rivals(key).first() {
        Some(&rival) => Err(rival_refusal(key, rival)),
        None => Ok(()),
    }
}

fn rival_refusal(key: VmKey, (epoch, state): (Epoch, vm::VmState)) -> Refusal {
    Refusal::Rival {
        id: key.id,
        epoch,
        state: state.as_str_name(),
    }
}

/// The incarnation here that another one, newer, is to take over from: the only one, and it runs or is paused.
fn predecessor(node: &Node, key: VmKey) -> Result<Epoch, Refusal> {
    if node.vm(key).is_some() {
        return Err(Refusal::AlreadyHere(key));
    }
    match node.rivals(key).as_slice() {
        [(epoch, vm::VmState::Running | vm::VmState::Paused)] if *epoch < key.epoch => Ok(*epoch),
        [rival, ..] => Err(rival_refusal(key, *rival)),
        [] => Err(Refusal::NoSourceHere(key.id)),
    }
}

/// Refuses what is asked at an old epoch. One that was only prepared to take over here, and has not run, makes none old.
async fn check_current(node: &Node, key: VmKey) -> Result<(), Refusal> {
    let Some(newest) = node.epochs.check_current(key).await? else {
        return Ok(());
    };
    let successor = VmKey { epoch: newest, ..key };
    if node.vm(successor).is_some_and(|vm| vm.dir.has_run()) {
        let asked = key.epoch;
        return Err(EpochError::Stale { asked, newest }.into());
    }
    Ok(())
}

/// Ends a VMM whose VM could not be started, and says why. Codes that mean "it is not known what happened" would be
/// wrong once nothing is left.
async fn discard(node: &Arc<Node>, vm: Arc<Vm>, cause: Status) -> Refusal {
    tracing::warn!(vm = %vm.key.id, epoch = %vm.key.epoch, %cause, "could not be started");
    node.kvm_doubted.notify_one();
    if let Err(error) = retire(node, &vm, Console::Drop).await {
        tracing::error!(vm = %vm.key.id, %error, "the VMM is still here");
        node.keep(vm); // so that it is reported, and can be destroyed
        return cause.into();
    }
    match cause.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown | Code::Internal => {
            Refusal::NotStarted(cause.message().to_owned())
        }
        _ => cause.into(),
    }
}
