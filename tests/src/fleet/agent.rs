//! The calls of the scheduler to all agents, answered at one address: a VM's id and epoch say which node is meant.

use std::pin::Pin;
use std::sync::Arc;

use shoal_proto::node::agent_server::Agent;
use shoal_proto::node::{
    AbortIncomingRequest, AbortIncomingResponse, CancelMigrationRequest, CancelMigrationResponse,
    DestroyVmResponse, LaunchVmRequest, PrepareIncomingRequest, PrepareIncomingResponse, SetMigrationRequest,
    StartMigrationRequest, StartMigrationResponse, VmFacts, VmRef, WatchMigrationRequest,
    WriteConsoleRequest, WriteConsoleResponse,
};
use shoal_proto::vm::{
    MigrationProgress, MigrationReport, MigrationResult, SetMigrationResponse, VmState, VmStatus,
};
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::Shared;

#[derive(Debug)]
pub(super) struct Agents(pub(super) Arc<Shared>);

fn missing() -> Status {
    Status::not_found("no such VM")
}

fn key(vm: Option<VmRef>) -> Result<(String, u64), Status> {
    let vm = vm.ok_or_else(|| Status::invalid_argument("vm: missing"))?;
    Ok((vm.vm_id, vm.epoch))
}

impl Agents {
    fn facts(&self, (id, epoch): &(String, u64)) -> Option<VmFacts> {
        let place = *self.0.lock_places().get(&(id.clone(), *epoch))?;
        self.0.node(place).facts(id, *epoch)
    }
}

#[tonic::async_trait]
impl Agent for Agents {
    type WatchMigrationStream = Pin<Box<dyn Stream<Item = Result<MigrationProgress, Status>> + Send>>;

    async fn launch_vm(&self, _: Request<LaunchVmRequest>) -> Result<Response<VmStatus>, Status> {
        Err(Status::unimplemented("VMs are there from the start"))
    }

    async fn prepare_incoming(
        &self,
        request: Request<PrepareIncomingRequest>,
    ) -> Result<Response<PrepareIncomingResponse>, Status> {
        let source = request.into_inner().source_node;
        let source = self.0.names.get(&source).ok_or_else(missing)?;
        self.0.acted_on(*source);
        let address = "127.0.0.1:1".to_owned();
        Ok(Response::new(PrepareIncomingResponse { address }))
    }

    async fn abort_incoming(
        &self,
        request: Request<AbortIncomingRequest>,
    ) -> Result<Response<AbortIncomingResponse>, Status> {
        let key = key(request.into_inner().vm)?;
        let committed = self.facts(&key).is_some();
        Ok(Response::new(AbortIncomingResponse { committed }))
    }

    async fn start_migration(
        &self,
        request: Request<StartMigrationRequest>,
    ) -> Result<Response<StartMigrationResponse>, Status> {
        let request = request.into_inner();
        let (id, epoch) = key(request.vm)?;
        let migration = request.migration.ok_or_else(missing)?;
        let to = *self.0.names.get(&request.destination_node).ok_or_else(missing)?;
        let from = *self
            .0
            .lock_places()
            .get(&(id.clone(), epoch))
            .ok_or_else(missing)?;
        // First gone, then there: no report tells of two that run.
        self.0
            .node(from)
            .set_migrated(&id, epoch, &migration.migration_id);
        let there = migration.destination_epoch;
        self.0.node(to).insert(&id, there, VmState::Running);
        self.0.lock_places().insert((id, there), to);
        Ok(Response::new(StartMigrationResponse {}))
    }

    async fn watch_migration(
        &self,
        request: Request<WatchMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        let migration_id = request.into_inner().migration_id;
        let report = MigrationReport {
            migration_id: migration_id.clone(),
            result: MigrationResult::Completed.into(),
            passes: 2,
            total_us: 1000,
            downtime_us: 100,
            ..MigrationReport::default()
        };
        let last = MigrationProgress {
            migration_id,
            report: Some(report),
            ..MigrationProgress::default()
        };
        Ok(Response::new(Box::pin(tokio_stream::once(Ok(last)))))
    }

    async fn cancel_migration(
        &self,
        _: Request<CancelMigrationRequest>,
    ) -> Result<Response<CancelMigrationResponse>, Status> {
        Err(Status::failed_precondition("it has ended"))
    }

    async fn set_migration(
        &self,
        _: Request<SetMigrationRequest>,
    ) -> Result<Response<SetMigrationResponse>, Status> {
        Err(Status::not_found("it has ended"))
    }

    async fn describe_vm(&self, request: Request<VmRef>) -> Result<Response<VmFacts>, Status> {
        let key = key(Some(request.into_inner()))?;
        self.facts(&key).map(Response::new).ok_or_else(missing)
    }

    async fn pause_vm(&self, _: Request<VmRef>) -> Result<Response<VmStatus>, Status> {
        Err(Status::unimplemented("nobody suspends VMs here"))
    }

    async fn resume_vm(&self, _: Request<VmRef>) -> Result<Response<VmStatus>, Status> {
        Err(Status::failed_precondition("nothing is paused here"))
    }

    async fn stop_vm(&self, _: Request<VmRef>) -> Result<Response<VmStatus>, Status> {
        Err(Status::unimplemented("nobody stops VMs here"))
    }

    async fn destroy_vm(&self, request: Request<VmRef>) -> Result<Response<DestroyVmResponse>, Status> {
        let (id, epoch) = key(Some(request.into_inner()))?;
        let place = self.0.lock_places().remove(&(id.clone(), epoch));
        if let Some(place) = place {
            self.0.node(place).remove(&id, epoch);
        }
        Ok(Response::new(DestroyVmResponse {}))
    }

    async fn write_console(
        &self,
        _: Request<WriteConsoleRequest>,
    ) -> Result<Response<WriteConsoleResponse>, Status> {
        Ok(Response::new(WriteConsoleResponse {}))
    }
}
