//! Errors of the parts below as gRPC statuses.

use prost::Message as _;
use shoal_plan::{MigrateError, PlaceError, RejectReason, Rejection};
use shoal_proto::cluster::{NodeRejection, PlacementFailure};
use tonic::{Code, Status};

use crate::agent::AgentError;
use crate::execute::launch::LaunchError;
use crate::execute::lost::LostError;
use crate::execute::migrate::BeginError;
use crate::execute::stop::StopError;
use crate::execute::suspend::SuspendError;
use crate::images::ImportError;
use crate::limits::FieldError;
use crate::store::StoreError;

/// Placement failures are cut to this many bytes.
const MAX_DETAIL_BYTES: usize = 6 << 10;

/// An error and all that caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

pub fn field(error: &FieldError) -> Status {
    Status::invalid_argument(error.to_string())
}

pub fn store(error: &StoreError) -> Status {
    if matches!(error, StoreError::Deposed | StoreError::ReadOnly) {
        return Status::unavailable(error.to_string());
    }
    tracing::error!(error = chain(error), "store");
    Status::internal(chain(error))
}

pub fn io(what: &str, error: &std::io::Error) -> Status {
    tracing::error!(%error, "{what}");
    Status::internal(format!("{what}: {error}"))
}

pub fn import(error: &ImportError) -> Status {
    match error {
        ImportError::Io(_) => Status::internal(chain(error)),
        _ => Status::invalid_argument(chain(error)),
    }
}

pub fn agent(error: AgentError) -> Status {
    match error {
        AgentError::NoAnswer { .. } => Status::unavailable(error.to_string()),
        AgentError::Refused(status) => Status::new(status.code(), status.message()),
    }
}

pub fn launch(error: LaunchError) -> Status {
    match error {
        LaunchError::Name(_) => Status::already_exists(error.to_string()),
        LaunchError::Place(PlaceError::UnknownNode(_)) => Status::not_found(error.to_string()),
        LaunchError::Place(PlaceError::NothingFits { ref rejections, .. }) => {
            nothing_fits(&error.to_string(), rejections)
        }
        LaunchError::QueueFull | LaunchError::NotStarted { .. } => {
            Status::failed_precondition(error.to_string())
        }
        LaunchError::Failed {
            code: Code::Ok | Code::AlreadyExists,
            ..
        } => Status::internal(error.to_string()),
        LaunchError::Failed { code, .. } => Status::new(code, error.to_string()),
        LaunchError::Unclear { .. } => Status::unavailable(error.to_string()),
        LaunchError::Store(error) => store(&error),
    }
}

pub fn begin(error: BeginError) -> Status {
    let text = error.to_string();
    match error {
        BeginError::AlreadyMigrating { .. }
        | BeginError::NotRunning { .. }
        | BeginError::NodeSilent { .. }
        | BeginError::Busy(_) => Status::failed_precondition(text),
        BeginError::Refused(refusal) => match refusal {
            MigrateError::UnknownVm(_) | MigrateError::UnknownNode(_) => Status::not_found(text),
            MigrateError::SameNode { .. } => Status::invalid_argument(text),
            MigrateError::CannotMove { .. } | MigrateError::NotReady { .. } => {
                Status::failed_precondition(text)
            }
            MigrateError::NoRoom { node, reason, .. } => nothing_fits(&text, &[Rejection { node, reason }]),
            MigrateError::NothingFits { rejections } => nothing_fits(&text, &rejections),
        },
        BeginError::Store(error) => store(&error),
    }
}

pub fn stop(error: StopError) -> Status {
    let text = error.to_string();
    match error {
        StopError::InDoubt(_) | StopError::NotEnded(_) | StopError::NotKnown { .. } | StopError::Waits(_) => {
            Status::failed_precondition(text)
        }
        StopError::Busy(_)
        | StopError::Migrating { .. }
        | StopError::Later { .. }
        | StopError::NotConfirmed { .. } => Status::unavailable(text),
        StopError::Agent(error) => agent(error),
        StopError::Store(error) => store(&error),
        StopError::Log(error) => io("console log", &error),
    }
}

pub fn lost(error: LostError) -> Status {
    match error {
        LostError::Store(error) => store(&error),
        LostError::TooEarly { .. } => Status::unavailable(error.to_string()),
        LostError::Reports { .. } | LostError::Connected { .. } | LostError::HasVms { .. } => {
            Status::failed_precondition(error.to_string())
        }
    }
}

pub fn suspend(error: SuspendError) -> Status {
    let text = error.to_string();
    match error {
        SuspendError::Migrating { .. } | SuspendError::NotRunning { .. } => Status::failed_precondition(text),
        SuspendError::Busy(_) | SuspendError::Later { .. } => Status::unavailable(text),
        SuspendError::Refused(error) => agent(error),
        SuspendError::Store(error) => store(&error),
    }
}

/// RESOURCE_EXHAUSTED with a [`PlacementFailure`] as its details: as many nodes as HTTP/2 headers can be relied on to
/// carry, those that were asked for first.
fn nothing_fits(message: &str, rejections: &[Rejection]) -> Status {
    let (other, asked): (Vec<_>, Vec<_>) = rejections
        .iter()
        .partition(|rejection| matches!(rejection.reason, RejectReason::NotAskedFor { .. }));
    let mut failure = PlacementFailure::default();
    for (index, rejection) in asked.iter().chain(&other).enumerate() {
        let (node, reason) = (rejection.node.to_string(), rejection.reason.to_string());
        failure.rejections.push(NodeRejection { node, reason });
        if failure.encoded_len() > MAX_DETAIL_BYTES {
            failure.rejections.pop();
            let left = rejections.len() - index;
            let (node, reason) = (
                "…".to_owned(),
                format!("and {left} more nodes cannot take it either"),
            );
            failure.rejections.push(NodeRejection { node, reason });
            break;
        }
    }
    let message = crate::limits::shorten(message);
    Status::with_details(Code::ResourceExhausted, message, failure.encode_to_vec().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_in_a_large_cluster_still_fits_into_headers() {
        let rejections: Vec<Rejection> = (0..10_000)
            .map(|number| Rejection {
                node: shoal_plan::NodeName::new(&format!("node{number}")),
                reason: RejectReason::TooFewCpus { needed: 64, has: 2 },
            })
            .collect();
        let status = nothing_fits(&"long ".repeat(10_000), &rejections);
        assert!(status.details().len() <= MAX_DETAIL_BYTES + 200 && status.message().len() < 1000);
        let failure = PlacementFailure::decode(status.details()).expect("decodes");
        let last = failure.rejections.last().expect("one at least");
        assert!(
            failure.rejections.len() > 50 && last.reason.contains("more nodes"),
            "{last:?}"
        );
    }
}
