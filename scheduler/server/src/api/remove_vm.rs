//! RemoveVm.

use std::sync::Arc;

use shoal_proto::cluster::{RemoveVmRequest, RemoveVmResponse};
use tonic::Status;

use super::errors;
use crate::execute::stop;
use crate::scheduler::Shared;

pub async fn call(scheduler: &Shared, request: &RemoveVmRequest) -> Result<RemoveVmResponse, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    let (shared, force) = (Arc::clone(scheduler), request.force);
    let removed = tokio::spawn(async move { stop::remove(&shared, &entry, force).await });
    removed.await.map_err(super::ended)?.map_err(errors::stop)?;
    Ok(RemoveVmResponse {})
}
