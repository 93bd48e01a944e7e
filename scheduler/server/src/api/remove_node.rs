//! RemoveNode.

use std::sync::Arc;

use shoal_proto::cluster::{RemoveNodeRequest, RemoveNodeResponse};
use tonic::Status;

use super::errors;
use crate::execute::lost;
use crate::scheduler::Shared;

pub async fn call(scheduler: &Shared, request: &RemoveNodeRequest) -> Result<RemoveNodeResponse, Status> {
    let entry = super::find_node(scheduler, &request.node)?;
    let shared = Arc::clone(scheduler);
    // On its own task: what is stored is also shown if the caller goes away.
    let removed = tokio::spawn(async move { lost::remove(&shared, &entry).await });
    removed.await.map_err(super::ended)?.map_err(errors::lost)?;
    Ok(RemoveNodeResponse {})
}
