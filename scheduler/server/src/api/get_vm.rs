//! GetVm: with the VM's migrations.

use shoal_proto::cluster::{GetVmRequest, Vm};
use tonic::Status;

use crate::scheduler::Scheduler;
use crate::view;

pub fn call(scheduler: &Scheduler, request: &GetVmRequest) -> Result<Vm, Status> {
    if let Some(waiting) = scheduler.queue.find(&request.vm) {
        return Ok(view::queued(&waiting));
    }
    let entry = super::find_vm(scheduler, &request.vm)?;
    Ok(view::vm_with_history(scheduler, &entry))
}
