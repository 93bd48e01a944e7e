//! UpdateVm: what the owner wishes for a VM.

use std::sync::Arc;

use shoal_proto::cluster::{UpdateVmRequest, Vm};
use tonic::Status;

use super::errors;
use crate::events::{Kind, NewEvent};
use crate::limits;
use crate::record::{Runs, VmRecord, VmWishes};
use crate::scheduler::Shared;
use crate::view;
use crate::vms::VmEntry;

pub async fn call(scheduler: &Shared, request: UpdateVmRequest) -> Result<Vm, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    if let Some(priority) = request.priority {
        limits::priority(priority).map_err(|error| errors::field(&error))?;
    }
    let shared = Arc::clone(scheduler);
    // On its own task: what is stored is also shown if the caller goes away.
    tokio::spawn(async move { update(&shared, &entry, &request).await })
        .await
        .map_err(super::ended)?
}

async fn update(scheduler: &Shared, entry: &VmEntry, request: &UpdateVmRequest) -> Result<Vm, Status> {
    let _guard = entry.lock().await;
    let _planning = scheduler.planning.lock().await;
    let record = entry.record();
    let wishes = VmWishes {
        locked: request.locked.unwrap_or(record.wishes.locked),
        priority: request.priority.unwrap_or(record.wishes.priority),
        ..record.wishes.clone()
    };
    // What is said now takes the place of the node that it was started for, unless it says the same.
    let said = request
        .locked
        .is_some_and(|locked| !(locked && record.wishes.locked));
    let runs = Runs {
        pinned: record.runs.pinned.clone().filter(|_| !said),
        ..record.runs.clone()
    };
    if record.phase.is_over() {
        let name = &record.name;
        return Err(Status::failed_precondition(format!("VM {name} has ended")));
    }
    if wishes != record.wishes || runs != record.runs {
        let may = if wishes.locked {
            "stays on"
        } else {
            "may be moved off"
        };
        let message = format!(
            "{} {may} {}, priority {}",
            record.name, record.node, wishes.priority
        );
        let record = VmRecord {
            wishes,
            runs,
            ..record.as_ref().clone()
        };
        let record = scheduler.save_vm(record, Vec::new()).await;
        let record = record.map_err(|error| errors::store(&error))?;
        scheduler
            .events
            .publish(NewEvent::new(Kind::VmUpdated, message).vm(&record));
    }
    Ok(view::vm(scheduler, entry))
}
