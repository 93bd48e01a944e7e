//! Balancing by a threshold, as two widely used systems do it.
//!
//! [`Gap`] is Incus (`cluster.rebalance.*`): when the busiest server's score is 20 points or more above the least busy one's,
//! one instance moves between those two, unless the other would then be above the middle of both; an instance rests 6 h. Its
//! interval is counted in minutes; here it is one. A server's score is the mean of its memory and CPU use.
//!
//! [`Imbalance`] is the dynamic scheduler of Proxmox VE 9.2: every 10 s, when the imbalance has been above 30 % for 3 rounds,
//! the one move that lowers it most is made, if it lowers it by a tenth of itself at least. The imbalance is the coefficient of
//! variation of the nodes' loads, divided by the largest that there can be (all load on one node); so many small VMs on one
//! node stay where they are: none of them alone is a tenth of it. A node's load is taken as the mean of its CPU and memory use.

use shoal_plan::{LaunchRequest, NodeName};

use super::digest::Digest;
use super::{Balancer, Move, Observation, Orders};

const GAP: f64 = 0.20;
const COOL_DOWN_SECONDS: f64 = 6.0 * 3600.0;
const IMBALANCE: f64 = 0.30;
const ROUNDS: u32 = 3;
const GAIN: f64 = 0.10;

/// Mean of memory and CPU use.
fn score(digest: &Digest<'_>, node: usize) -> f64 {
    let node = &digest.nodes[node];
    f64::midpoint(node.cpu_part(), node.memory_part())
}

/// The gap between the extremes.
#[derive(Debug, Default)]
pub(super) struct Gap {}

impl Balancer for Gap {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let digest = Digest::new(seen);
        digest.cheapest(request, |node| digest.nodes[node].vms.len() as f64)
    }

    fn round(&mut self, seen: &Observation<'_>) -> Orders {
        let mut digest = Digest::new(seen);
        let by_score = |a: &usize, b: &usize| score(&digest, *a).total_cmp(&score(&digest, *b));
        let nodes = 0..digest.nodes.len();
        let (Some(from), Some(to)) = (nodes.clone().max_by(by_score), nodes.min_by(by_score)) else {
            return Orders::default();
        };
        let middle = f64::midpoint(score(&digest, from), score(&digest, to));
        if score(&digest, from) - score(&digest, to) < GAP {
            return Orders::default();
        }
        let found = digest.nodes[from].vms.iter().copied().find(|&number| {
            let (vm, node) = (&digest.vms[number], &digest.nodes[to]);
            let expected = f64::midpoint(
                (node.cpu + vm.cpu) / node.cpus,
                (node.used + vm.resident) / node.memory,
            );
            let rests = vm
                .view
                .since_last_move
                .is_some_and(|since| since.as_secs_f64() < COOL_DOWN_SECONDS);
            vm.movable && !rests && expected < middle && digest.fits(number, to)
        });
        let moves: Vec<Move> = found.map(|vm| digest.apply(vm, to)).into_iter().collect();
        moves.into()
    }

    fn interval(&self) -> f64 {
        60.0
    }
}

/// The spread of all.
#[derive(Debug, Default)]
pub(super) struct Imbalance {
    rounds: u32,
}

/// Coefficient of variation divided by its upper bound, from a count, a sum and a sum of squares.
fn imbalance(count: f64, sum: f64, squares: f64) -> f64 {
    let mean = sum / count;
    if mean <= 1e-9 || count < 2.0 {
        return 0.0;
    }
    (squares / count - mean * mean).max(0.0).sqrt() / mean / (count - 1.0).sqrt()
}

impl Balancer for Imbalance {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let digest = Digest::new(seen);
        digest.cheapest(request, |node| digest.nodes[node].vms.len() as f64)
    }

    fn round(&mut self, seen: &Observation<'_>) -> Orders {
        let mut digest = Digest::new(seen);
        let scores: Vec<f64> = (0..digest.nodes.len()).map(|node| score(&digest, node)).collect();
        let count = scores.len() as f64;
        let (sum, squares) = (
            scores.iter().sum::<f64>(),
            scores.iter().map(|s| s * s).sum::<f64>(),
        );
        let now = imbalance(count, sum, squares);
        if now <= IMBALANCE {
            self.rounds = 0;
            return Orders::default();
        }
        self.rounds += 1;
        if self.rounds < ROUNDS {
            return Orders::default();
        }
        let mut best: Option<(f64, usize, usize)> = None;
        for (number, vm) in digest.vms.iter().enumerate().filter(|(_, vm)| vm.movable) {
            for (to, node) in digest.nodes.iter().enumerate() {
                if !digest.fits(number, to) {
                    continue;
                }
                let from = &digest.nodes[vm.node];
                let a = f64::midpoint(
                    (from.cpu - vm.cpu) / from.cpus,
                    (from.used - vm.resident) / from.memory,
                );
                let b = f64::midpoint(
                    (node.cpu + vm.cpu) / node.cpus,
                    (node.used + vm.resident) / node.memory,
                );
                let (old_a, old_b) = (scores[vm.node], scores[to]);
                let after = imbalance(
                    count,
                    sum - old_a - old_b + a + b,
                    squares - old_a * old_a - old_b * old_b + a * a + b * b,
                );
                if best.is_none_or(|best| after < best.0) {
                    best = Some((after, number, to));
                }
            }
        }
        match best {
            Some((after, vm, to)) if after <= now * (1.0 - GAIN) => {
                self.rounds = 0;
                vec![digest.apply(vm, to)].into()
            }
            _ => Orders::default(),
        }
    }

    fn interval(&self) -> f64 {
        10.0
    }
}
