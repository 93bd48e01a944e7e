//! ListNodes: by name.

use shoal_proto::cluster::ListNodesResponse;

use crate::scheduler::Scheduler;
use crate::view;

pub fn call(scheduler: &Scheduler) -> ListNodesResponse {
    ListNodesResponse {
        nodes: view::nodes(scheduler),
    }
}
