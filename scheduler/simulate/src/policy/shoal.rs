//! Shoal's own policy: the plan crate, as the server calls it.

use shoal_plan::{LaunchRequest, NodeName, place_launch, round};

use super::{Balancer, Move, Observation};

/// Asks the plan crate.
#[derive(Debug)]
pub(super) struct Shoal;

impl Balancer for Shoal {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let placement = place_launch(seen.snapshot, seen.policy, request).ok()?;
        Some(placement.node)
    }

    fn round(&mut self, seen: &Observation<'_>) -> Vec<Move> {
        let plan = round(seen.snapshot, seen.policy);
        plan.actions
            .into_iter()
            .map(|action| Move {
                vm: action.vm,
                to: action.to,
            })
            .collect()
    }
}
