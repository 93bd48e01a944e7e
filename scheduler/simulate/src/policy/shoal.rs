//! Shoal's own policy: the plan crate, as the server calls it.

use shoal_plan::{LaunchRequest, NodeName, Turn, Waiting, place_launch, round, take_turns};

use super::{Balancer, Move, Observation, Orders};

/// Asks the plan crate.
#[derive(Debug)]
pub(super) struct Shoal;

impl Balancer for Shoal {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let placement = place_launch(seen.snapshot, seen.policy, request).ok()?;
        Some(placement.node)
    }

    fn round(&mut self, seen: &Observation<'_>) -> Orders {
        let plan = round(seen.snapshot, seen.policy);
        let moves = plan.actions.into_iter().map(|action| Move {
            kind: Some(action.kind),
            ..Move::new(action.vm, action.to)
        });
        Orders {
            moves: moves.collect(),
            suspend: plan.suspend,
            resume: plan.resume,
        }
    }

    fn turns(&mut self, seen: &Observation<'_>, waiting: &[Waiting]) -> Option<Vec<(usize, Turn)>> {
        Some(take_turns(seen.snapshot, seen.policy, waiting))
    }
}
