//! SuspendVm and ResumeVm.

use std::sync::Arc;

use shoal_proto::cluster::{ResumeVmRequest, SuspendVmRequest, Vm};
use tonic::Status;

use super::errors;
use crate::execute::suspend;
use crate::limits;
use crate::scheduler::Shared;
use crate::view;

pub async fn suspend(scheduler: &Shared, request: SuspendVmRequest) -> Result<Vm, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    limits::suspend_reason(&request.reason).map_err(|error| errors::field(&error))?;
    let reason = match request.reason.as_str() {
        "" => "asked for by a user".to_owned(),
        reason => format!("asked for by a user: {reason}"),
    };
    let (shared, vm) = (Arc::clone(scheduler), Arc::clone(&entry));
    // On its own task: it goes on if the caller goes away.
    let suspended = tokio::spawn(async move { suspend::suspend(&shared, &vm, reason).await });
    suspended.await.map_err(super::ended)?.map_err(errors::suspend)?;
    Ok(view::vm(scheduler, &entry))
}

pub async fn resume(scheduler: &Shared, request: &ResumeVmRequest) -> Result<Vm, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    let (shared, vm) = (Arc::clone(scheduler), Arc::clone(&entry));
    // As above.
    let resumed = tokio::spawn(async move { suspend::resume(&shared, &vm).await });
    resumed.await.map_err(super::ended)?.map_err(errors::suspend)?;
    Ok(view::vm(scheduler, &entry))
}
