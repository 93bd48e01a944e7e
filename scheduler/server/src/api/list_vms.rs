//! ListVms: oldest first, those that wait for room among them.

use shoal_proto::cluster::ListVmsResponse;

use crate::scheduler::Scheduler;
use crate::view;

pub fn call(scheduler: &Scheduler) -> ListVmsResponse {
    let mut vms: Vec<_> = scheduler
        .vms
        .list()
        .iter()
        .map(|entry| view::vm(scheduler, entry))
        .chain(scheduler.queue.list().iter().map(view::queued))
        .collect();
    vms.sort_by(|a, b| (a.created_unix_ms, &a.name).cmp(&(b.created_unix_ms, &b.name)));
    ListVmsResponse { vms }
}
