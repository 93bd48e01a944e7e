//! DeclareNodeLost.

use std::sync::Arc;

use shoal_proto::cluster::{DeclareNodeLostRequest, DeclareNodeLostResponse};
use tonic::Status;

use super::errors;
use crate::execute::lost;
use crate::scheduler::Shared;
use crate::view;

pub async fn call(
    scheduler: &Shared,
    request: &DeclareNodeLostRequest,
) -> Result<DeclareNodeLostResponse, Status> {
    let entry = super::find_node(scheduler, &request.node)?;
    let (shared, node) = (Arc::clone(scheduler), Arc::clone(&entry));
    // On its own task: it goes on if the caller goes away.
    let declared = tokio::spawn(async move { lost::declare(&shared, &node).await });
    let given = declared.await.map_err(super::ended)?.map_err(errors::lost)?;
    Ok(DeclareNodeLostResponse {
        node: Some(view::node(scheduler, &entry)),
        failed_vms: given.up,
        busy_vms: given.later,
    })
}
