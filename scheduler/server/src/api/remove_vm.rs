//! RemoveVm.

use std::sync::Arc;

use shoal_proto::cluster::{RemoveVmRequest, RemoveVmResponse};
use tonic::Status;

use super::errors;
use crate::events::{Kind, NewEvent};
use crate::execute::stop;
use crate::queue;
use crate::scheduler::Shared;

pub async fn call(scheduler: &Shared, request: &RemoveVmRequest) -> Result<RemoveVmResponse, Status> {
    if let Some(waiting) = scheduler.queue.find(&request.vm) {
        let name = waiting.record.vm.name.to_string();
        let (shared, sequence) = (Arc::clone(scheduler), waiting.record.sequence);
        let withdrawn = tokio::spawn(async move { queue::withdraw(&shared, sequence).await });
        if withdrawn
            .await
            .map_err(super::ended)?
            .map_err(|error| errors::store(&error))?
        {
            let event = NewEvent::new(Kind::VmWithdrawn, format!("{name} does not wait any more"));
            scheduler.events.publish(event);
            return Ok(RemoveVmResponse {});
        }
        // It has started meanwhile.
    }
    let entry = super::find_vm(scheduler, &request.vm)?;
    let (shared, force) = (Arc::clone(scheduler), request.force);
    let removed = tokio::spawn(async move { stop::remove(&shared, &entry, force).await });
    removed.await.map_err(super::ended)?.map_err(errors::stop)?;
    Ok(RemoveVmResponse {})
}
