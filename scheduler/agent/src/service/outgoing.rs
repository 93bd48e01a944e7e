//! StartMigration, WatchMigration, CancelMigration: the source's side of a migration. The VMM does the work.

use std::sync::Arc;

use shoal_proto::node::{
    CancelMigrationRequest, CancelMigrationResponse, SetMigrationRequest, StartMigrationRequest,
    StartMigrationResponse, WatchMigrationRequest,
};
use shoal_proto::vm::{self, MigrationProgress};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Refusal, check_current, find, key_of};
use crate::key::VmKey;
use crate::node::Node;
use crate::vm::{ANSWER_LIMIT, Vm};

/// Progress messages that may wait for a slow watcher.
const QUEUE: usize = 16;

/// A VM that is to go to a node, and how.
type Start = (VmKey, String, vm::StartMigrationRequest);

pub(super) fn parse_start(request: StartMigrationRequest) -> Result<Start, Refusal> {
    let key = key_of(request.vm)?;
    let migration = request.migration.ok_or(Refusal::Missing("migration"))?;
    Ok((key, request.destination_node, migration))
}

pub(super) async fn start(
    node: Arc<Node>,
    (key, destination, migration): Start,
) -> Result<StartMigrationResponse, Refusal> {
    let migration = vm::StartMigrationRequest {
        tls: node.migration_tls(&destination),
        ..migration
    };
    check_current(&node, key).await?;
    let vm = find(&node, key)?;
    tracing::info!(vm = %key.id, epoch = %key.epoch, migration = migration.migration_id, "migration starts");
    let mut client = vm.client();
    vm.call(ANSWER_LIMIT, client.start_migration(migration)).await?;
    Ok(StartMigrationResponse {})
}

pub(super) fn parse_watch(request: WatchMigrationRequest) -> Result<(VmKey, String), Refusal> {
    Ok((key_of(request.vm)?, request.migration_id))
}

/// Relays the VMM's stream; its breaking is explained by the VMM's end where that is the cause.
pub(super) async fn watch(
    node: Arc<Node>,
    (key, migration_id): (VmKey, String),
) -> Result<impl Stream<Item = Result<MigrationProgress, Status>> + Send + use<>, Refusal> {
    let vm = find(&node, key)?;
    let mut client = vm.client();
    let request = vm::WatchMigrationRequest { migration_id };
    let progress = vm.call(ANSWER_LIMIT, client.watch_migration(request)).await?;
    let (relay, relayed) = mpsc::channel(QUEUE);
    tokio::spawn(async move { relay_progress(&vm, progress, relay).await });
    Ok(ReceiverStream::new(relayed))
}

async fn relay_progress(
    vm: &Vm,
    mut progress: Streaming<MigrationProgress>,
    relay: mpsc::Sender<Result<MigrationProgress, Status>>,
) {
    loop {
        let message = tokio::select! {
            message = progress.message() => message,
            () = relay.closed() => return,
        };
        let item = match message {
            Ok(Some(message)) => Ok(message),
            Ok(None) => return,
            Err(status) => Err(vm.explain(status).await),
        };
        let last = item.is_err();
        if relay.send(item).await.is_err() || last {
            return;
        }
    }
}

pub(super) fn parse_cancel(request: CancelMigrationRequest) -> Result<(VmKey, String), Refusal> {
    Ok((key_of(request.vm)?, request.migration_id))
}

pub(super) async fn cancel(
    node: Arc<Node>,
    (key, migration_id): (VmKey, String),
) -> Result<CancelMigrationResponse, Refusal> {
    let vm = find(&node, key)?;
    let request = vm::CancelMigrationRequest { migration_id };
    let mut client = vm.client();
    vm.call(ANSWER_LIMIT, client.cancel_migration(request)).await?;
    Ok(CancelMigrationResponse {})
}

pub(super) fn parse_set(request: SetMigrationRequest) -> Result<(VmKey, vm::SetMigrationRequest), Refusal> {
    Ok((key_of(request.vm)?, request.change.unwrap_or_default()))
}

pub(super) async fn set(
    node: Arc<Node>,
    (key, change): (VmKey, vm::SetMigrationRequest),
) -> Result<vm::SetMigrationResponse, Refusal> {
    let vm = find(&node, key)?;
    let mut client = vm.client();
    Ok(vm.call(ANSWER_LIMIT, client.set_migration(change)).await?)
}
