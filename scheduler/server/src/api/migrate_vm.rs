//! MigrateVm.

use shoal_proto::cluster::{MigrateVmRequest, MigrateVmResponse};
use tonic::Status;

use super::{AnswerStream, errors};
use crate::execute::migrate::{self, Limits};
use crate::scheduler::Shared;

const DAY_MS: u64 = 24 * 3600 * 1000;

pub async fn call(
    scheduler: &Shared,
    request: MigrateVmRequest,
) -> Result<AnswerStream<MigrateVmResponse>, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    let to = match request.to_node.as_str() {
        "" => None,
        name => Some(super::find_node(scheduler, name)?.record().name),
    };
    for (field, value) in [
        ("max_downtime_ms", request.max_downtime_ms),
        ("timeout_ms", request.timeout_ms),
    ] {
        if value > DAY_MS {
            return Err(Status::invalid_argument(format!(
                "{field}: {value} ms is not at most a day"
            )));
        }
    }
    let limits = Limits {
        max_downtime_ms: request.max_downtime_ms,
        timeout_ms: request.timeout_ms,
    };
    let (shared, asked) = (scheduler.clone(), to);
    let begun =
        tokio::spawn(async move { migrate::begin_requested(&shared, &entry, asked.as_ref(), limits).await });
    let migration = begun.await.map_err(super::ended)?.map_err(errors::begin)?;
    let mut views = migration.watch();
    Ok(super::stream(move |sender| async move {
        let _migration = migration;
        loop {
            let view = views.borrow_and_update().clone();
            let done = view.outcome.is_some();
            if done || view.progress.is_some() {
                let message = MigrateVmResponse {
                    progress: view.progress,
                    outcome: view.outcome,
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
                () = sender.closed() => return,
            }
        }
    }))
}
