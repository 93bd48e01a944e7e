//! A score in the manner of vSphere DRS 7: each VM has a score of how well its node serves it, looked at once a minute; a move
//! is made when it raises the cluster's score, the mean over VMs, by more than it costs. VMware's own formula is not published;
//! this one is the product of the parts of CPU and memory that the node can give, with its headroom for bursts: full up to
//! four fifths of a node, then falling.

use shoal_plan::{LaunchRequest, NodeName};

use super::digest::{Digest, Node};
use super::{Balancer, Observation, Orders};

/// A node filled up to here serves its VMs fully.
const HEADROOM: f64 = 0.8;
/// How much of its score a VM loses between there and full.
const SQUEEZE: f64 = 0.2;
/// Sum of scores that a move must gain, at the default aggressiveness (3 of 5): a fifth of one VM's score.
const LEAST_GAIN: f64 = 0.2;
/// What a GiB to copy costs, in scores.
const COST_PER_GIB: f64 = 0.02;
const MOST_STEPS: usize = 16;

#[derive(Debug)]
pub(super) struct Drs;

/// What a node gives of what is wanted, 0 to 1.
fn served(part: f64) -> f64 {
    if part <= HEADROOM {
        1.0
    } else if part <= 1.0 {
        1.0 - SQUEEZE * (part - HEADROOM) / (1.0 - HEADROOM)
    } else {
        (1.0 - SQUEEZE) / part
    }
}

/// Sum of the scores of a node's VMs.
fn score(node: &Node<'_>, cpu: f64, used: f64, vms: f64) -> f64 {
    vms * served((node.cpu + cpu) / node.cpus) * served((node.used + used) / node.memory)
}

fn best_step(digest: &Digest<'_>) -> Option<(usize, usize)> {
    let mut best: Option<(f64, usize, usize)> = None;
    let now: Vec<f64> = digest
        .nodes
        .iter()
        .map(|node| score(node, 0.0, 0.0, node.vms.len() as f64))
        .collect();
    for (number, vm) in digest.vms.iter().enumerate().filter(|(_, vm)| vm.movable) {
        let from = &digest.nodes[vm.node];
        let count = from.vms.len() as f64;
        if now[vm.node] >= count - 1e-9 {
            continue; // all are served fully
        }
        let left = score(from, -vm.cpu, -vm.resident, count - 1.0) - now[vm.node];
        for (to, node) in digest.nodes.iter().enumerate() {
            if !digest.fits(number, to) {
                continue;
            }
            let there = score(node, vm.cpu, vm.resident, node.vms.len() as f64 + 1.0) - now[to];
            let gain = left + there - COST_PER_GIB * vm.resident / (1_u64 << 30) as f64;
            if gain >= LEAST_GAIN && best.is_none_or(|best| gain > best.0) {
                best = Some((gain, number, to));
            }
        }
    }
    best.map(|(_, vm, to)| (vm, to))
}

impl Balancer for Drs {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let digest = Digest::new(seen);
        let (cpu, memory) = (
            f64::from(request.cpus),
            request.memory.0 as f64 / seen.policy.overcommit,
        );
        digest.cheapest(request, |node| {
            let node = &digest.nodes[node];
            let before = score(node, 0.0, 0.0, node.vms.len() as f64);
            let after = score(node, cpu, memory, node.vms.len() as f64 + 1.0);
            // Of nodes that serve it equally well, the emptiest.
            let fill = ((node.cpu + cpu) / node.cpus).max((node.used + memory) / node.memory);
            (before - after) * 1e3 + fill
        })
    }

    fn round(&mut self, seen: &Observation<'_>) -> Orders {
        let mut digest = Digest::new(seen);
        let mut moves = Vec::new();
        while moves.len() < MOST_STEPS
            && let Some((vm, to)) = best_step(&digest)
        {
            moves.push(digest.apply(vm, to));
        }
        moves.into()
    }

    fn interval(&self) -> f64 {
        60.0
    }
}
