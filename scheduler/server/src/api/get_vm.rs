//! GetVm: with the VM's migrations.

use shoal_proto::cluster::{GetVmRequest, Vm};
use tonic::Status;

use crate::scheduler::Scheduler;
use crate::view;

pub fn call(scheduler: &Scheduler, request: &GetVmRequest) -> Result<Vm, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    Ok(view::vm_with_history(scheduler, &entry))
}
