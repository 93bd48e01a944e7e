//! UncordonNode.

use shoal_proto::cluster::{Node, UncordonNodeRequest};
use tonic::Status;

use crate::events::{Kind, NewEvent};
use crate::record::Cordon;
use crate::scheduler::Scheduler;
use crate::{drain, view};

pub async fn call(scheduler: &Scheduler, request: &UncordonNodeRequest) -> Result<Node, Status> {
    let entry = super::find_node(scheduler, &request.node)?;
    let name = entry.record().name;
    let event = NewEvent::new(Kind::NodeUncordoned, format!("{name} takes VMs again")).node(&name);
    drain::set_cordon(scheduler, &entry, Cordon::Open, event)
        .await
        .map_err(|error| super::errors::store(&error))?;
    Ok(view::node(scheduler, &entry))
}
