//! SetCpuBaseline.

use shoal_proto::cluster::{CpuBaseline, SetCpuBaselineRequest};
use tonic::Status;

use crate::cpus::{self, BaselineError};
use crate::scheduler::Scheduler;

pub async fn call(scheduler: &Scheduler, request: &SetCpuBaselineRequest) -> Result<CpuBaseline, Status> {
    let changed = if request.clear {
        cpus::clear_baseline(scheduler).await
    } else {
        cpus::apply_baseline(scheduler).await
    };
    changed.map_err(|error| match error {
        BaselineError::Store(error) => super::errors::store(&error),
        _ => Status::failed_precondition(error.to_string()),
    })?;
    Ok(cpus::view(scheduler))
}
