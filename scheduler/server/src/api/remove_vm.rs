//! RemoveVm.

use std::sync::Arc;

use shoal_proto::cluster::{RemoveVmRequest, RemoveVmResponse};
use tonic::Status;

use super::errors;
use crate::events::{Kind, NewEvent};
use crate::execute::stop::{self, StopError};
use crate::queue;
use crate::scheduler::Shared;

pub async fn call(scheduler: &Shared, request: &RemoveVmRequest) -> Result<RemoveVmResponse, Status> {
    loop {
        match remove(scheduler, request).await? {
            Err(StopError::Waits(_)) => {}
            removed => return removed.map_err(errors::stop),
        }
    }
}

/// Takes it out of the queue, or removes it where it is: it may be stopped for another, and come to the queue, meanwhile.
async fn remove(
    scheduler: &Shared,
    request: &RemoveVmRequest,
) -> Result<Result<RemoveVmResponse, StopError>, Status> {
    if let Some(waiting) = scheduler.queue.find(&request.vm) {
        let name = waiting.record.vm.name.to_string();
        let (shared, vm) = (Arc::clone(scheduler), waiting.record.vm.id);
        let withdrawn = tokio::spawn(async move { queue::withdraw(&shared, vm).await });
        if withdrawn
            .await
            .map_err(super::ended)?
            .map_err(|error| errors::store(&error))?
        {
            let event = NewEvent::new(Kind::VmWithdrawn, format!("{name} does not wait any more"));
            scheduler.events.publish(event);
            return Ok(Ok(RemoveVmResponse {}));
        }
        // It has started meanwhile.
    }
    let entry = super::find_vm(scheduler, &request.vm)?;
    let (shared, force) = (Arc::clone(scheduler), request.force);
    let removed = tokio::spawn(async move { stop::remove(&shared, &entry, force).await });
    let removed = removed.await.map_err(super::ended)?;
    Ok(removed.map(|()| RemoveVmResponse {}))
}
