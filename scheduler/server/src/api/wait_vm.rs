//! WaitVm: answers when the VM has ended and its console is complete.

use shoal_proto::cluster::{GetVmRequest, Vm};
use tonic::Status;

use crate::record::Phase;
use crate::scheduler::Scheduler;
use crate::view;

pub async fn call(scheduler: &Scheduler, request: &GetVmRequest) -> Result<Vm, Status> {
    let entry = super::find_watched(scheduler, &request.vm, true)?;
    let mut record = entry.subscribe();
    // The entry in hand keeps the channel open: a VM that is removed had ended before, and says so.
    let _ = record
        .wait_for(|record| matches!(record.phase, Phase::Ended(_)))
        .await;
    Ok(view::vm_with_history(scheduler, &entry))
}
