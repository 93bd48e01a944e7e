//! What a node has told, as the planner is to see it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_plan::{Bytes, Estimate, Growth, Peak, SteadyGrowth};
use shoal_proto::{node, vm};

use crate::predictions::Grown;

/// More CPUs than any host has: what is told beyond that is cut.
pub(super) const MOST_CPUS: f64 = 1e6;

/// What a node last reported of one VM at one epoch.
#[derive(Debug, Clone)]
pub struct ObservedVm {
    /// As reported.
    pub facts: Arc<node::VmFacts>,
    /// How fast it dirties memory, in bytes per second, smoothed; none while it is not sampled.
    pub dirty_rate: Option<Peak>,
    /// What it writes again and again, in bytes, smoothed; none while it is not sampled.
    pub working_set: Option<Peak>,
    /// How fast its resident memory grows.
    pub growth: Growth,
    pub(super) sampled: Instant,
}

impl ObservedVm {
    /// The next view of a VM. What comes between heartbeats is no sample.
    pub(super) fn next(seen: Option<Self>, facts: Arc<node::VmFacts>, now: Instant, is_sample: bool) -> Self {
        let mut next = match seen {
            Some(seen) => Self { facts, ..seen },
            None => Self {
                facts,
                dirty_rate: None,
                working_set: None,
                growth: Growth::default(),
                sampled: now,
            },
        };
        if !is_sample {
            return next;
        }
        if next.state() == vm::VmState::Incoming {
            // It grows as fast as the link sends, which says nothing of the guest.
            next.growth = Growth::default();
        } else {
            next.growth
                .update(Bytes(next.facts.resident_bytes), now - next.sampled);
        }
        let smooth = |known: Option<Peak>, sample: Option<u64>| {
            sample.map(|sample| known.unwrap_or_default().next(sample))
        };
        next.dirty_rate = smooth(next.dirty_rate, next.facts.dirty_rate_bytes_per_second);
        next.working_set = smooth(next.working_set, next.facts.working_set_bytes);
        next.sampled = now;
        next
    }

    /// CPUs that it would use if it never had to wait; none until its node has seen enough of it.
    pub fn demand(&self) -> Option<Estimate> {
        let mean = self.facts.cpu_demand?;
        let error = self.facts.cpu_demand_error.unwrap_or(0.0);
        Some(Estimate { mean, error }.sane(MOST_CPUS))
    }

    /// State of its VMM.
    pub fn state(&self) -> vm::VmState {
        self.facts
            .status
            .as_ref()
            .map_or(vm::VmState::Unspecified, vm::VmStatus::state)
    }
}

/// What a node last reported of itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Observed {
    /// Free part of what it lends.
    pub memory_available: u64,
    /// Growth of what is not VMs.
    pub other_growth: SteadyGrowth,
    /// PSI.
    pub pressure: node::Pressure,
    pub(super) sampled: Option<Instant>,
}

/// What a report says of the one before.
#[derive(Debug, Clone, Copy)]
pub struct Heard {
    /// It came so long after it.
    pub after: Duration,
    /// What became of what was expected then.
    pub grown: Option<Grown>,
}

/// What an agent told of the CPUs of its host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostCpu {
    /// Which host; none if that is not known.
    pub host: Option<Arc<str>>,
    /// CPUs that it has; 0 if that is not known.
    pub host_cpus: u32,
    /// CPUs of it that this node lends.
    pub lends: u32,
    /// CPUs of it that anything but the VMMs of this node uses.
    pub other: Estimate,
    /// CPUs that these use.
    pub vmms: f64,
    /// PSI memory "some avg10" of it, percent.
    pub memory_pressure: f64,
}

impl HostCpu {
    /// From a report of a node that lends so many CPUs of a host; none if it does not tell.
    pub(super) fn told(
        figures: &node::Heartbeat,
        host: Option<Arc<str>>,
        host_cpus: u32,
        lends: u32,
    ) -> Option<Self> {
        let other = Estimate {
            mean: figures.other_cpu?,
            error: figures.other_cpu_error.unwrap_or(0.0),
        };
        let vmms = Estimate::exactly(figures.vmm_cpu.unwrap_or(0.0));
        Some(Self {
            host,
            host_cpus,
            lends,
            other: other.sane(MOST_CPUS),
            vmms: vmms.sane(MOST_CPUS).mean,
            memory_pressure: figures
                .pressure
                .and_then(|pressure| pressure.memory)
                .unwrap_or(0.0),
        })
    }
}
