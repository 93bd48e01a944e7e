//! Shoal's own policy: the plan crate, as the server calls it.

use std::collections::HashMap;

use shoal_plan::{
    Action, ActionKind, LaunchRequest, NodeName, Turn, VmId, Waiting, place_launch, round, take_turns,
};

use super::{Balancer, Move, Observation, Orders};

/// A move is judged by ten minutes.
const SECONDS: f64 = 600.0;

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
        let expected = Expected::new(seen);
        let moves = plan.actions.into_iter().map(|action| Move {
            kind: Some(action.kind),
            expected: Some(action.expected),
            // Those for memory have a gain that nobody can foresee, and half an exchange has none.
            predicted: (action.kind == ActionKind::Rebalance).then(|| expected.gain(&action)),
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

/// What moves would gain if everything stayed as the planner was told: work that VMs want and do not get on a node that is short of
/// CPUs. It is what the plan's slowdowns say, in seconds of one CPU.
struct Expected<'a> {
    /// CPUs wanted of each node, those there are, and their speed, by its name.
    nodes: HashMap<&'a NodeName, (f64, f64, f64)>,
    demands: HashMap<&'a VmId, f64>,
}

impl<'a> Expected<'a> {
    fn new(seen: &Observation<'a>) -> Self {
        let nodes = seen.snapshot.nodes.iter();
        let mut expected = Self {
            nodes: nodes
                .map(|node| (&node.name, (node.other.mean, f64::from(node.cpus), node.speed)))
                .collect(),
            demands: HashMap::with_capacity(seen.snapshot.vms.len()),
        };
        for vm in &seen.snapshot.vms {
            let demand = vm.cpu.map_or(f64::from(vm.cpus), |cpu| cpu.mean);
            expected.demands.insert(&vm.id, demand);
            let on = vm.in_flight.as_ref().map_or(&vm.node, |flight| &flight.to);
            if let Some(node) = expected.nodes.get_mut(on) {
                node.0 += demand;
            }
        }
        expected
    }

    fn gain(&self, action: &Action) -> f64 {
        let demand = self.demands.get(&action.vm).copied().unwrap_or(0.0);
        let lost = |node: &NodeName, more: f64| {
            let node = self.nodes.get(node);
            node.map_or(0.0, |(load, cpus, speed)| (load + more - cpus).max(0.0) * speed)
        };
        let before = lost(&action.from, 0.0) + lost(&action.to, 0.0);
        (before - lost(&action.from, -demand) - lost(&action.to, demand)) * SECONDS
    }
}
