//! WriteConsole.

use shoal_proto::cluster::{WriteConsoleRequest, WriteConsoleResponse};
use tonic::Status;

use super::errors;
use crate::scheduler::Scheduler;

/// What a serial console takes in one call.
const MAX_BYTES: usize = 64 << 10;

pub async fn call(
    scheduler: &Scheduler,
    request: WriteConsoleRequest,
) -> Result<WriteConsoleResponse, Status> {
    let entry = super::find_vm(scheduler, &request.vm)?;
    let length = request.data.len();
    if length > MAX_BYTES {
        return Err(Status::invalid_argument(format!(
            "data: {length} bytes; at most {MAX_BYTES} at a time"
        )));
    }
    let record = entry.record();
    if record.phase.is_over() {
        return Err(Status::failed_precondition(format!(
            "VM {} has ended",
            record.name
        )));
    }
    let agent = scheduler.agent(&record.node).map_err(errors::agent)?;
    agent
        .write_console(record.id, record.epoch, request.data)
        .await
        .map_err(errors::agent)?;
    Ok(WriteConsoleResponse {})
}
