//! ResolveVm: an operator ends a doubt.

use shoal_proto::cluster::{ResolveVmRequest, Vm};
use tonic::Status;

use crate::scheduler::Scheduler;
use crate::view;

pub async fn call(scheduler: &Scheduler, request: &ResolveVmRequest) -> Result<Vm, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    let record = entry.record();
    let open = scheduler
        .migrations
        .get(record.id)
        .filter(|open| open.view().in_doubt.is_some());
    let Some(open) = open else {
        return Err(Status::failed_precondition(format!(
            "VM {} is not in doubt; nothing to resolve",
            record.name
        )));
    };
    let keep = super::find_node(scheduler, &request.keep_node)?.record().name;
    let (from, to) = (&open.intent.from, &open.intent.to);
    if keep != *from && keep != *to {
        return Err(Status::invalid_argument(format!(
            "keep_node: '{keep}' is neither {from} nor {to}"
        )));
    }
    open.ask(|wish| wish.keep = Some(keep));
    let mut views = open.watch();
    // The sender lives in `open`; the wait can only end with an outcome.
    let _ = views.wait_for(|view| view.outcome.is_some()).await;
    Ok(view::vm_with_history(scheduler, &entry))
}
