//! MigrateVm.

use shoal_proto::cluster::{MigrateVmRequest, MigrateVmResponse};
use tonic::Status;

use super::{AnswerStream, errors};
use crate::execute::migrate;
use crate::policy;
use crate::scheduler::Shared;

pub async fn call(
    scheduler: &Shared,
    request: MigrateVmRequest,
) -> Result<AnswerStream<MigrateVmResponse>, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    let to = match request.to_node.as_str() {
        "" => None,
        name => Some(super::find_node(scheduler, name)?.record().name),
    };
    let asked = request.policy.unwrap_or_default();
    policy::check(&asked).map_err(|error| errors::field(&error))?;
    let shared = scheduler.clone();
    let begun =
        tokio::spawn(async move { migrate::begin_requested(&shared, &entry, to.as_ref(), &asked).await });
    let migration = begun.await.map_err(super::ended)?.map_err(errors::begin)?;
    let (mut views, mut shares) = (migration.watch(), migration.share());
    Ok(super::stream(move |sender| async move {
        loop {
            let view = views.borrow_and_update().clone();
            shares.mark_unchanged();
            let waits = migration.waits().unwrap_or_default();
            let done = view.outcome.is_some();
            if done || view.progress.is_some() || !waits.is_empty() {
                let message = MigrateVmResponse {
                    progress: view.progress,
                    outcome: view.outcome,
                    waits,
                };
                if sender.send(Ok(message)).await.is_err() {
                    return;
                }
            }
            if done {
                return;
            }
            tokio::select! {
                changed = views.changed() => if changed.is_err() { return },
                changed = shares.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
        }
    }))
}
