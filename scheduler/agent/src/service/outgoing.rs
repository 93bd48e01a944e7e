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
use crate::node::Node;
use crate::vm::{ANSWER_LIMIT, Vm};

/// Progress messages that may wait for a slow watcher.
const QUEUE: usize = 16;

pub(super) async fn start(
    node: Arc<Node>,
    request: StartMigrationRequest,
) -> Result<StartMigrationResponse, Refusal> {
    let key = key_of(request.vm)?;
    let migration = vm::StartMigrationRequest {
        tls: node.migration_tls(&request.destination_node),
        ..request.migration.ok_or(Refusal::Missing("migration"))?
    };
    check_current(&node, key).await?;
    let vm = find(&node, key)?;
    tracing::info!(vm = %key.id, epoch = %key.epoch, migration = migration.migration_id, "migration starts");
    let mut client = vm.client();
    vm.call(ANSWER_LIMIT, client.start_migration(migration)).await?;
    Ok(StartMigrationResponse {})
}

/// Relays the VMM's stream; its breaking is explained by the VMM's end where that is the cause.
pub(super) async fn watch(
    node: Arc<Node>,
    request: WatchMigrationRequest,
) -> Result<impl Stream<Item = Result<MigrationProgress, Status>> + Send + use<>, Refusal> {
    let vm = find(&node, key_of(request.vm)?)?;
    let mut client = vm.client();
    let request = vm::WatchMigrationRequest {
        migration_id: request.migration_id,
    };
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

pub(super) async fn cancel(
    node: Arc<Node>,
    request: CancelMigrationRequest,
) -> Result<CancelMigrationResponse, Refusal> {
    let vm = find(&node, key_of(request.vm)?)?;
    let request = vm::CancelMigrationRequest {
        migration_id: request.migration_id,
    };
    let mut client = vm.client();
    vm.call(ANSWER_LIMIT, client.cancel_migration(request)).await?;
    Ok(CancelMigrationResponse {})
}

pub(super) async fn set(
    node: Arc<Node>,
    request: SetMigrationRequest,
) -> Result<vm::SetMigrationResponse, Refusal> {
    let vm = find(&node, key_of(request.vm)?)?;
    let mut client = vm.client();
    Ok(vm
        .call(
            ANSWER_LIMIT,
            client.set_migration(request.change.unwrap_or_default()),
        )
        .await?)
}
