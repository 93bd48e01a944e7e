//! Ganeti's `hbal`: the cluster's score is a weighted sum of standard deviations over the nodes, and the best single move is
//! made, again and again, until it gains too little. Metrics and weights are those of its manual page that concern CPU and
//! memory; what there is no disk, network or tag for here is 0 for every node. Run once a minute.

use shoal_plan::{LaunchRequest, NodeName};

use super::digest::{Digest, Node, Vm};
use super::{Balancer, Observation, Orders};

/// Weights of free memory, virtual CPU ratio, CPU load and memory load.
const WEIGHTS: [f64; 4] = [0.5, 0.5, 1.0, 1.0];
/// Below this score a step must gain at least `LEAST_GAIN`.
const GAIN_LIMIT: f64 = 0.1;
const LEAST_GAIN: f64 = 0.01;
const BALANCED: f64 = 1e-9;
/// Of one run; a real one goes on until it is done, but waits for each step.
const MOST_STEPS: usize = 20;

#[derive(Debug)]
pub(super) struct Hbal;

type Metrics = [f64; 4];

fn metrics(node: &Node<'_>, vm: Option<(&Vm<'_>, f64)>) -> Metrics {
    let (cpu, resident, cpus) = vm.map_or((0.0, 0.0, 0.0), |(vm, times)| {
        (
            vm.cpu * times,
            vm.resident * times,
            f64::from(vm.view.cpus) * times,
        )
    });
    let memory = (node.used + resident) / node.memory;
    [
        1.0 - memory,
        (node.virtual_cpus + cpus) / node.cpus,
        // Speed counts, as `cpu_speed` does.
        (node.cpu + cpu) / (node.cpus * node.view.speed),
        memory,
    ]
}

/// Sums and sums of squares over the nodes.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    sum: Metrics,
    squares: Metrics,
}

impl Sums {
    fn add(&mut self, metrics: Metrics, times: f64) {
        for (at, value) in metrics.into_iter().enumerate() {
            self.sum[at] += times * value;
            self.squares[at] += times * value * value;
        }
    }

    fn score(&self, nodes: f64) -> f64 {
        (0..WEIGHTS.len())
            .map(|at| {
                let mean = self.sum[at] / nodes;
                WEIGHTS[at] * (self.squares[at] / nodes - mean * mean).max(0.0).sqrt()
            })
            .sum()
    }
}

fn best_step(digest: &Digest<'_>) -> Option<(usize, usize)> {
    let count = digest.nodes.len() as f64;
    let mut sums = Sums::default();
    for node in &digest.nodes {
        sums.add(metrics(node, None), 1.0);
    }
    let now = sums.score(count);
    if now < BALANCED {
        return None;
    }
    let mut best: Option<(f64, usize, usize)> = None;
    for (number, vm) in digest.vms.iter().enumerate().filter(|(_, vm)| vm.movable) {
        let from = &digest.nodes[vm.node];
        let mut without = sums;
        without.add(metrics(from, None), -1.0);
        without.add(metrics(from, Some((vm, -1.0))), 1.0);
        for (to, node) in digest.nodes.iter().enumerate() {
            if !digest.fits(number, to) {
                continue;
            }
            let mut with = without;
            with.add(metrics(node, None), -1.0);
            with.add(metrics(node, Some((vm, 1.0))), 1.0);
            let score = with.score(count);
            if best.is_none_or(|best| score < best.0) {
                best = Some((score, number, to));
            }
        }
    }
    let (score, vm, to) = best?;
    let gain = now - score;
    (gain > 1e-12 && (now >= GAIN_LIMIT || gain >= LEAST_GAIN)).then_some((vm, to))
}

impl Balancer for Hbal {
    /// As `hail`: where the score is lowest afterwards.
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let digest = Digest::new(seen);
        let count = digest.nodes.len() as f64;
        let mut sums = Sums::default();
        for node in &digest.nodes {
            sums.add(metrics(node, None), 1.0);
        }
        digest.cheapest(request, |number| {
            let node = &digest.nodes[number];
            let mut grown = node.clone();
            grown.cpu += f64::from(request.cpus);
            grown.virtual_cpus += f64::from(request.cpus);
            grown.used += request.memory.0 as f64 / seen.policy.overcommit;
            let mut with = sums;
            with.add(metrics(node, None), -1.0);
            with.add(metrics(&grown, None), 1.0);
            with.score(count)
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
