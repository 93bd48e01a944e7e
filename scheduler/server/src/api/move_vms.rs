//! MoveVms: orders the moves, then tells how they go.

use shoal_proto::cluster::move_vms_request::Direction as Wire;
use shoal_proto::cluster::{MoveVmsRequest, MoveVmsResponse};
use tonic::Status;

use super::{AnswerStream, errors};
use crate::limits::FieldError;
use crate::moves::{self, Direction};
use crate::scheduler::Shared;

pub async fn call(
    scheduler: &Shared,
    request: &MoveVmsRequest,
) -> Result<AnswerStream<MoveVmsResponse>, Status> {
    let node = super::find_node(scheduler, &request.node)?.record().name;
    let direction = match request.direction() {
        Wire::Expel => Direction::Expel,
        Wire::Bring => Direction::Bring,
        Wire::Unspecified => {
            let value = request.direction.to_string();
            let error = FieldError::new("direction", &value, "expel or bring");
            return Err(errors::field(&error));
        }
    };
    let begun = moves::begin(scheduler, node, direction).await;
    let mut progress = begun.map_err(|error| errors::store(&error))?;
    Ok(super::stream(move |sender| async move {
        while progress.changed().await.is_ok() {
            let now = progress.borrow_and_update().clone();
            let count = |number| u32::try_from(number).unwrap_or(u32::MAX);
            let message = MoveVmsResponse {
                moved: count(now.moved),
                remaining: count(now.remaining),
                message: now.message,
                done: now.done,
            };
            if sender.send(Ok(message)).await.is_err() || now.done {
                return;
            }
        }
    }))
}
