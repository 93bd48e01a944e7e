//! StopVm.

use std::sync::Arc;

use shoal_proto::cluster::{StopVmRequest, Vm};
use tonic::Status;

use super::errors;
use crate::execute::stop;
use crate::scheduler::Shared;
use crate::view;

pub async fn call(scheduler: &Shared, request: &StopVmRequest) -> Result<Vm, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    let (shared, vm) = (Arc::clone(scheduler), Arc::clone(&entry));
    // On its own task: it goes on if the caller goes away.
    let stopped = tokio::spawn(async move { stop::stop(&shared, &vm).await });
    stopped.await.map_err(super::ended)?.map_err(errors::stop)?;
    Ok(view::vm(scheduler, &entry))
}
