//! CPUs as a limit of admission, beside declared memory: how many vCPUs a node takes.
//!
//! VMs of the queue take slots, as in a batch system: what a node really does counts there as well, so that a job does not start
//! beside other work that has the CPUs already. Others are let in up to the overcommit, which is about the worst case only.

use crate::cluster::Node;
use crate::newcomer::Beside;
use crate::policy::Policy;
use crate::reject::RejectReason;

/// Products of a policy's factor and CPUs are not exact.
const EXACT: f64 = 1e-9;

/// By which limit a VM comes to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CpuLimit {
    /// None: it must leave where it is, or someone asked for the move.
    Free,
    /// The policy's `cpu_overcommit`, of what is declared.
    Overcommit,
    /// The policy's `queue_slots`, of what is declared or in use, whichever is more.
    Slots,
}

impl CpuLimit {
    /// vCPUs that a node takes in all that lends so many CPUs.
    pub fn most(self, policy: &Policy, cpus: f64) -> f64 {
        let factor = match self {
            Self::Free => return f64::INFINITY,
            Self::Overcommit => policy.cpu_overcommit,
            Self::Slots => policy.queue_slots,
        };
        factor * cpus + EXACT
    }

    /// Whether a node takes so many more.
    pub fn check(
        self,
        policy: &Policy,
        node: &Node<'_>,
        cpus: u32,
        beside: &Beside,
    ) -> Result<(), RejectReason> {
        let limit = self.most(policy, node.lends_cpus);
        let declared = node.vcpus + beside.vcpus;
        // Whole CPUs: what daemons use now and then takes no slot.
        let busy = (node.busy + beside.cpu).round();
        let taken = match self {
            Self::Free | Self::Overcommit => declared,
            Self::Slots => declared.max(busy),
        };
        if taken + f64::from(cpus) <= limit {
            return Ok(());
        }
        Err(match self {
            Self::Slots => RejectReason::Slots {
                declared,
                load: node.busy + beside.cpu,
                needed: cpus,
                limit,
            },
            Self::Free | Self::Overcommit => RejectReason::Vcpus {
                declared,
                needed: cpus,
                limit,
            },
        })
    }
}
