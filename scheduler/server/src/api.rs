//! The cluster API: one call a file. Calls validate, ask the parts that do the work, and turn what comes back into wire
//! messages; they make no decisions.

mod backup;
mod cancel_migration;
mod declare_node_lost;
mod drain_node;
mod errors;
mod explain_vm;
mod get_cpu_baseline;
mod get_migration;
mod get_migration_defaults;
mod get_vm;
mod import_image;
mod labels;
mod list_images;
mod list_migrations;
mod list_nodes;
mod list_queue;
mod list_schedulers;
mod list_vms;
mod migrate_vm;
mod move_vms;
mod rebalance;
mod record_cluster;
mod remove_node;
mod remove_vm;
mod resolve_vm;
mod run_vm;
mod set_cpu_baseline;
mod set_migration;
mod set_migration_defaults;
mod set_policy;
mod stop_vm;
mod stream_events;
mod stream_logs;
mod suspend_vm;
#[cfg(test)]
mod tests;
mod uncordon_node;
mod update_node;
mod update_vm;
mod wait_vm;
mod write_console;

pub use errors::chain;
pub use import_image::MOST as MOST_IMPORTS;

use std::pin::Pin;
use std::sync::Arc;

use shoal_proto::NodeName;
use shoal_proto::cluster::cluster_server::Cluster;
use shoal_proto::cluster::{
    BackupChunk, BackupRequest, CancelMigrationRequest, ClusterRecord, CpuBaseline, DeclareNodeLostRequest,
    DeclareNodeLostResponse, DrainNodeRequest, DrainNodeResponse, Event, ExplainVmRequest, Explanation,
    GetCpuBaselineRequest, GetMigrationDefaultsRequest, GetMigrationRequest, GetPolicyRequest, GetVmRequest,
    Image, ImportImageRequest, ListImagesRequest, ListImagesResponse, ListMigrationsRequest,
    ListMigrationsResponse, ListNodesRequest, ListNodesResponse, ListQueueRequest, ListQueueResponse,
    ListSchedulersRequest, ListSchedulersResponse, ListVmsRequest, ListVmsResponse, LogChunk,
    MigrateVmRequest, MigrateVmResponse, Migration, MigrationDefaults, MoveVmsRequest, MoveVmsResponse, Node,
    RebalanceRequest, RebalanceResponse, RecordClusterRequest, RemoveNodeRequest, RemoveNodeResponse,
    RemoveVmRequest, RemoveVmResponse, ResolveVmRequest, ResumeVmRequest, RunVmRequest, SchedulingPolicy,
    SetCpuBaselineRequest, SetMigrationRequest, SetPolicyRequest, StopVmRequest, StreamEventsRequest,
    StreamLogsRequest, SuspendVmRequest, UncordonNodeRequest, UpdateNodeRequest, UpdateVmRequest, Vm,
    WriteConsoleRequest, WriteConsoleResponse,
};
use shoal_proto::vm::MigrationPolicy;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::follower::Follower;
use crate::images::ImageStore;
use crate::migrations::OpenMigration;
use crate::nodes::NodeEntry;
use crate::queue::Waiting;
use crate::record::VmRecord;
use crate::scheduler::{Scheduler, Shared};
use crate::streams::Streams;
use crate::vms::VmEntry;

type Answer<T> = Result<Response<T>, Status>;
type AnswerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Calls that stream or wait, on one connection and in all.
const MOST_STREAMS_OF_ONE: usize = 64;
const MOST_STREAMS: usize = 1024;
/// Messages that a stream may be ahead of its reader.
const STREAM_DEPTH: usize = 16;

/// What a scheduler is at the moment.
#[derive(Debug, Clone)]
pub enum Role {
    /// The one that leads.
    Leader(Shared),
    /// One of the others.
    Follower(Arc<Follower>),
}

impl Role {
    /// For what changes anything, or needs to know what agents report. A follower says who leads.
    pub async fn leader(&self) -> Result<&Shared, Status> {
        match self {
            Self::Leader(scheduler) => Ok(scheduler),
            Self::Follower(follower) => Err(follower.refusal().await),
        }
    }

    /// For what can be answered from what is stored.
    pub async fn read(&self) -> Result<Shared, Status> {
        match self {
            Self::Leader(scheduler) => Ok(Arc::clone(scheduler)),
            Self::Follower(follower) => follower.read().await.map_err(|error| {
                Status::unavailable(format!("this scheduler does not lead, and {}", chain(&error)))
            }),
        }
    }

    /// The file of a blob; None if the text is no SHA-256.
    pub fn blob(&self, sha256: &str) -> Option<std::path::PathBuf> {
        match self {
            Self::Leader(scheduler) => scheduler.images.blob(sha256),
            Self::Follower(follower) => ImageStore::view(follower.blob_directory(), Vec::new()).blob(sha256),
        }
    }
}

/// The service.
#[derive(Debug, Clone)]
pub struct ClusterApi {
    role: Role,
    streams: Arc<Streams>,
}

impl ClusterApi {
    /// For a scheduler that leads, or one that answers what is stored.
    pub fn new(role: Role) -> Self {
        Self {
            role,
            streams: Streams::new(MOST_STREAMS_OF_ONE, MOST_STREAMS),
        }
    }
}

#[tonic::async_trait]
impl Cluster for ClusterApi {
    type StreamLogsStream = AnswerStream<LogChunk>;
    type MigrateVmStream = AnswerStream<MigrateVmResponse>;
    type DrainNodeStream = AnswerStream<DrainNodeResponse>;
    type StreamEventsStream = AnswerStream<Event>;
    type MoveVmsStream = AnswerStream<MoveVmsResponse>;
    type BackupStream = AnswerStream<BackupChunk>;
    type RecordClusterStream = AnswerStream<ClusterRecord>;

    async fn import_image(&self, request: Request<Streaming<ImportImageRequest>>) -> Answer<Image> {
        let _seat = self.streams.enter(&request)?;
        import_image::call(self.role.leader().await?, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_images(&self, _: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        Ok(Response::new(list_images::call(self.role.read().await?.as_ref())))
    }

    async fn run_vm(&self, request: Request<RunVmRequest>) -> Answer<Vm> {
        run_vm::call(self.role.leader().await?, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_vms(&self, _: Request<ListVmsRequest>) -> Answer<ListVmsResponse> {
        Ok(Response::new(list_vms::call(self.role.read().await?.as_ref())))
    }

    async fn get_vm(&self, request: Request<GetVmRequest>) -> Answer<Vm> {
        get_vm::call(self.role.read().await?.as_ref(), &request.into_inner()).map(Response::new)
    }

    async fn wait_vm(&self, request: Request<GetVmRequest>) -> Answer<Vm> {
        let _seat = self.streams.enter(&request)?;
        wait_vm::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn stop_vm(&self, request: Request<StopVmRequest>) -> Answer<Vm> {
        stop_vm::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn suspend_vm(&self, request: Request<SuspendVmRequest>) -> Answer<Vm> {
        suspend_vm::suspend(self.role.leader().await?, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn resume_vm(&self, request: Request<ResumeVmRequest>) -> Answer<Vm> {
        suspend_vm::resume(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn remove_vm(&self, request: Request<RemoveVmRequest>) -> Answer<RemoveVmResponse> {
        remove_vm::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn stream_logs(&self, request: Request<StreamLogsRequest>) -> Answer<Self::StreamLogsStream> {
        let seat = self.streams.enter(&request)?;
        stream_logs::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(|stream| Response::new(seat.hold(stream)))
    }

    async fn write_console(&self, request: Request<WriteConsoleRequest>) -> Answer<WriteConsoleResponse> {
        write_console::call(self.role.leader().await?, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn migrate_vm(&self, request: Request<MigrateVmRequest>) -> Answer<Self::MigrateVmStream> {
        let seat = self.streams.enter(&request)?;
        migrate_vm::call(self.role.leader().await?, request.into_inner())
            .await
            .map(|stream| Response::new(seat.hold(stream)))
    }

    async fn list_migrations(
        &self,
        request: Request<ListMigrationsRequest>,
    ) -> Answer<ListMigrationsResponse> {
        list_migrations::call(self.role.read().await?.as_ref(), &request.into_inner()).map(Response::new)
    }

    async fn get_migration(&self, request: Request<GetMigrationRequest>) -> Answer<Migration> {
        get_migration::call(self.role.read().await?.as_ref(), &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn cancel_migration(&self, request: Request<CancelMigrationRequest>) -> Answer<Migration> {
        cancel_migration::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn set_migration(&self, request: Request<SetMigrationRequest>) -> Answer<MigrationPolicy> {
        set_migration::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_migration_defaults(
        &self,
        _: Request<GetMigrationDefaultsRequest>,
    ) -> Answer<MigrationDefaults> {
        Ok(Response::new(get_migration_defaults::call(
            self.role.read().await?.as_ref(),
        )))
    }

    async fn set_migration_defaults(&self, request: Request<MigrationDefaults>) -> Answer<MigrationDefaults> {
        set_migration_defaults::call(self.role.leader().await?, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_cpu_baseline(&self, _: Request<GetCpuBaselineRequest>) -> Answer<CpuBaseline> {
        Ok(Response::new(get_cpu_baseline::call(
            self.role.read().await?.as_ref(),
        )))
    }

    async fn set_cpu_baseline(&self, request: Request<SetCpuBaselineRequest>) -> Answer<CpuBaseline> {
        set_cpu_baseline::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn resolve_vm(&self, request: Request<ResolveVmRequest>) -> Answer<Vm> {
        resolve_vm::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Answer<ListNodesResponse> {
        Ok(Response::new(list_nodes::call(self.role.read().await?.as_ref())))
    }

    async fn drain_node(&self, request: Request<DrainNodeRequest>) -> Answer<Self::DrainNodeStream> {
        let seat = self.streams.enter(&request)?;
        drain_node::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(|stream| Response::new(seat.hold(stream)))
    }

    async fn uncordon_node(&self, request: Request<UncordonNodeRequest>) -> Answer<Node> {
        uncordon_node::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn declare_node_lost(
        &self,
        request: Request<DeclareNodeLostRequest>,
    ) -> Answer<DeclareNodeLostResponse> {
        declare_node_lost::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn remove_node(&self, request: Request<RemoveNodeRequest>) -> Answer<RemoveNodeResponse> {
        remove_node::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn rebalance(&self, request: Request<RebalanceRequest>) -> Answer<RebalanceResponse> {
        rebalance::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn stream_events(&self, request: Request<StreamEventsRequest>) -> Answer<Self::StreamEventsStream> {
        let seat = self.streams.enter(&request)?;
        let events = stream_events::call(&self.role, &request.into_inner());
        Ok(Response::new(seat.hold(events)))
    }

    async fn update_node(&self, request: Request<UpdateNodeRequest>) -> Answer<Node> {
        update_node::call(self.role.leader().await?, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn update_vm(&self, request: Request<UpdateVmRequest>) -> Answer<Vm> {
        update_vm::call(self.role.leader().await?, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_policy(&self, _: Request<GetPolicyRequest>) -> Answer<SchedulingPolicy> {
        Ok(Response::new(self.role.read().await?.policy.view()))
    }

    async fn explain_vm(&self, request: Request<ExplainVmRequest>) -> Answer<Explanation> {
        explain_vm::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_queue(&self, _: Request<ListQueueRequest>) -> Answer<ListQueueResponse> {
        Ok(Response::new(list_queue::call(self.role.read().await?.as_ref())))
    }

    async fn move_vms(&self, request: Request<MoveVmsRequest>) -> Answer<Self::MoveVmsStream> {
        let seat = self.streams.enter(&request)?;
        move_vms::call(self.role.leader().await?, &request.into_inner())
            .await
            .map(|stream| Response::new(seat.hold(stream)))
    }

    async fn set_policy(&self, request: Request<SetPolicyRequest>) -> Answer<SchedulingPolicy> {
        set_policy::call(self.role.leader().await?, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_schedulers(&self, _: Request<ListSchedulersRequest>) -> Answer<ListSchedulersResponse> {
        list_schedulers::call(&self.role).await.map(Response::new)
    }

    async fn backup(&self, request: Request<BackupRequest>) -> Answer<Self::BackupStream> {
        let seat = self.streams.enter(&request)?;
        Ok(Response::new(seat.hold(backup::call(self.role.read().await?))))
    }

    async fn record_cluster(
        &self,
        request: Request<RecordClusterRequest>,
    ) -> Answer<Self::RecordClusterStream> {
        let seat = self.streams.enter(&request)?;
        let records = record_cluster::call(self.role.leader().await?);
        Ok(Response::new(seat.hold(records)))
    }
}

/// A VM by id or name whose console and end can be waited for: also one that waits to begin anew and, if that is followed, one
/// that waits to begin.
fn find_watched(scheduler: &Scheduler, name: &str, follow: bool) -> Result<Arc<VmEntry>, Status> {
    let has_run = |waiting: &Waiting| follow || waiting.record.vm.runs.preempted > 0;
    match scheduler.queue.find(name).filter(has_run) {
        Some(waiting) => Ok(waiting.entry),
        None => find_vm(scheduler, name),
    }
}

/// A VM by id or name.
fn find_vm(scheduler: &Scheduler, name: &str) -> Result<Arc<VmEntry>, Status> {
    if name.is_empty() {
        return Err(Status::invalid_argument(
            "vm: is empty; give the name or the id of a VM",
        ));
    }
    scheduler.vms.find(name).ok_or_else(|| {
        if let Some(waiting) = scheduler.queue.find(name) {
            let name = &waiting.record.vm.name;
            return Status::failed_precondition(format!(
                "VM {name} waits for room: `shoal queue` shows it, `shoal rm {name}` takes it out"
            ));
        }
        let name = crate::limits::shorten(name);
        Status::not_found(format!("vm: there is no VM '{name}'; `shoal ps` lists them"))
    })
}

/// The migration that a VM is in.
fn find_open_migration(scheduler: &Scheduler, vm: &VmRecord) -> Result<Arc<OpenMigration>, Status> {
    scheduler.migrations.get(vm.id).ok_or_else(|| {
        let name = &vm.name;
        Status::failed_precondition(format!(
            "VM {name} is not being migrated; `shoal migrations --vm {name}` lists its migrations"
        ))
    })
}

/// A node by name.
fn find_node(scheduler: &Scheduler, name: &str) -> Result<Arc<NodeEntry>, Status> {
    let unknown = || {
        let name = crate::limits::shorten(name);
        Status::not_found(format!(
            "node: there is no node '{name}'; `shoal nodes` lists them"
        ))
    };
    let name: NodeName = name.parse().map_err(|_| unknown())?;
    scheduler.nodes.get(&name).ok_or_else(unknown)
}

/// A stream fed by a task, which ends when the reader has gone.
fn stream<T, F, W>(feed: F) -> AnswerStream<T>
where
    T: Send + 'static,
    F: FnOnce(mpsc::Sender<Result<T, Status>>) -> W,
    W: Future<Output = ()> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(STREAM_DEPTH);
    tokio::spawn(feed(sender));
    Box::pin(ReceiverStream::new(receiver))
}

/// A call's own task did not come to its end, which happens only when the scheduler ends.
fn ended(error: impl std::error::Error) -> Status {
    Status::unavailable(format!("the scheduler is shutting down: {error}"))
}
