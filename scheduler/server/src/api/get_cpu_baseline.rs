//! GetCpuBaseline.

use shoal_proto::cluster::CpuBaseline;

use crate::cpus;
use crate::scheduler::Scheduler;

pub fn call(scheduler: &Scheduler) -> CpuBaseline {
    cpus::view(scheduler)
}
