//! UncordonNode.

use shoal_proto::cluster::{Node, UncordonNodeRequest};
use tonic::Status;

use crate::events::{Kind, NewEvent};
use crate::record::Cordon;
use crate::scheduler::Scheduler;
use crate::{drain, view};

pub async fn call(scheduler: &Scheduler, request: &UncordonNodeRequest) -> Result<Node, Status> {
    let entry = super::find_node(scheduler, &request.node)?;
    let record = entry.record();
    let name = record.name;
    if record.cordon != Cordon::Open {
        let words = if entry.is_reachable() {
            format!("{name} takes VMs again")
        } else {
            format!("{name} is not to be kept empty any more; it does not answer, and takes VMs when it does")
        };
        let event = NewEvent::new(Kind::NodeUncordoned, words).node(&name);
        drain::set_cordon(scheduler, &entry, Cordon::Open, event)
            .await
            .map_err(|error| super::errors::store(&error))?;
    }
    Ok(view::node(scheduler, &entry))
}
