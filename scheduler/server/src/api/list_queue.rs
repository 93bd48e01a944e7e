//! ListQueue.

use shoal_proto::cluster::ListQueueResponse;

use crate::queue;
use crate::scheduler::Scheduler;

pub fn call(scheduler: &Scheduler) -> ListQueueResponse {
    ListQueueResponse {
        vms: scheduler.queue.list().iter().map(queue::view).collect(),
    }
}
