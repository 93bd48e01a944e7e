//! What is left when a node runs out of memory and nothing fits anywhere, in this order. What the VMM does not offer yet is
//! named with what it would free, so that an operator can act.

use std::fmt;

use crate::cluster::{Cluster, bytes};
use crate::model::CannotMove;
use crate::policy::Policy;

/// A step that frees memory without moving a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastResort {
    /// Take back from guests what they do not use.
    SqueezeBalloons,
    /// Write a VM to disk and end it, to go on later.
    Checkpoint,
    /// Pause a VM, so that it grows no more.
    Suspend,
}

impl LastResort {
    /// The mildest first.
    pub const IN_ORDER: [Self; 3] = [Self::SqueezeBalloons, Self::Checkpoint, Self::Suspend];
}

impl fmt::Display for LastResort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::SqueezeBalloons => "squeeze balloons",
            Self::Checkpoint => "checkpoint",
            Self::Suspend => "suspend",
        })
    }
}

impl Policy {
    /// Whether someone can have a step taken. The VMM has no balloon and writes no checkpoints; a VM is suspended on request
    /// only.
    #[must_use]
    pub fn offers(&self, step: LastResort) -> bool {
        step == LastResort::Suspend
    }
}

/// The steps for a node, what each would free, and which are not offered. The VM of the lowest priority gives way first, of
/// several the one that grows most, then the largest.
pub(crate) fn describe(cluster: &Cluster<'_>, node: usize) -> String {
    let grows = |&vm: &usize| cluster.vms[vm].view.cannot_move != Some(CannotMove::Suspended);
    let victim = cluster.staying(node).filter(grows).min_by(|&a, &b| {
        let (a, b) = (&cluster.vms[a], &cluster.vms[b]);
        a.view
            .priority
            .cmp(&b.view.priority)
            .then(b.growth.total_cmp(&a.growth))
            .then(b.resident.total_cmp(&a.resident))
    });
    let steps = LastResort::IN_ORDER.map(|step| {
        let offered = if cluster.policy.offers(step) {
            ""
        } else {
            ": not offered by the VMM"
        };
        match (step, victim.map(|vm| &cluster.vms[vm])) {
            (LastResort::SqueezeBalloons, _) | (_, None) => format!("{step}{offered}"),
            (LastResort::Checkpoint, Some(vm)) => format!(
                "{step} '{}' (priority {}), which would free {}{offered}",
                vm.view.name,
                vm.view.priority,
                bytes(vm.resident)
            ),
            (LastResort::Suspend, Some(vm)) => format!(
                "{step} '{0}', which would free nothing and stop growth of {1}/s{offered}: `shoal suspend {0}`",
                vm.view.name,
                bytes(vm.growth)
            ),
        }
    });
    format!("last resorts: {}", steps.join("; "))
}
