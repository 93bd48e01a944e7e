//! The score: what the cluster's use of CPU and memory costs. Lower is better, 0 is an idle cluster.
//!
//! The cost of a resource of a node is `base ^ utilisation - 1`, the marginal opportunity cost of Amir, Awerbuch, Barak,
//! Borgstrom and Keren ("An opportunity cost approach for job assignment in a scalable computing cluster", IEEE TPDS
//! 11(7), 2000), so that one unit makes CPU and memory comparable, and the last free tenth costs far more than the first.
//! They take the number of machines as the base; here it is a constant of the policy, so that gains mean the same in
//! every cluster. The cost of a node is the sum over its CPU and memory, the score is the sum over the reachable nodes.

use crate::cluster::{Cluster, Node};
use crate::model::{ClusterSnapshot, NodeState};
use crate::policy::Policy;

/// Beyond this utilisation the cost goes on as its tangent: still convex and rising, never out of range.
const LINEAR_FROM: f64 = 4.0;

/// Score of a snapshot, as it will be when the migrations under way have ended.
#[must_use]
pub fn score(snapshot: &ClusterSnapshot, policy: &Policy) -> f64 {
    Cluster::new(snapshot, policy).score()
}

/// `base ^ utilisation - 1`, for any utilisation from 0; `rate` is the logarithm of the base.
pub(crate) fn cost(rate: f64, utilisation: f64) -> f64 {
    if utilisation <= LINEAR_FROM {
        (rate * utilisation.max(0.0)).exp() - 1.0
    } else {
        let edge = (rate * LINEAR_FROM).exp();
        edge * (1.0 + rate * (utilisation - LINEAR_FROM)) - 1.0
    }
}

/// What a VM adds to a node, or takes away from it: CPUs and bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Use {
    pub cpu: f64,
    pub memory: f64,
}

impl Node<'_> {
    /// What it costs the node to take `more`, by the load that it has at most.
    pub fn charge(&self, rate: f64, more: Use) -> f64 {
        let load = self.most_load();
        let cpu = self.cpu_cost(rate, load + more.cpu) - self.cpu_cost(rate, load);
        let held = self.settled + self.awaited;
        let memory = self.memory_cost(rate, held + more.memory) - self.memory_cost(rate, held);
        cpu + memory
    }

    /// What it saves the node to lose `less`, by the load that it has at least.
    pub fn saving(&self, rate: f64, less: Use) -> f64 {
        let load = self.least_load();
        let cpu = self.cpu_cost(rate, load) - self.cpu_cost(rate, load - less.cpu);
        let memory =
            self.memory_cost(rate, self.settled) - self.memory_cost(rate, self.settled - less.memory);
        cpu + memory
    }

    /// What it costs, by the load that it has at least.
    pub fn least_cost(&self, rate: f64) -> f64 {
        self.cpu_cost(rate, self.least_load()) + self.memory_cost(rate, self.settled)
    }

    /// What a change costs the node, negative if it saves: by the view of its load that says more.
    pub fn worse(&self, rate: f64, change: Use) -> f64 {
        let by = |load: f64| self.cpu_cost(rate, load + change.cpu) - self.cpu_cost(rate, load);
        let memory =
            self.memory_cost(rate, self.settled + change.memory) - self.memory_cost(rate, self.settled);
        by(self.least_load()).max(by(self.most_load())) + memory
    }

    fn cpu_cost(&self, rate: f64, load: f64) -> f64 {
        cost(rate, load / self.cpu_capacity)
    }

    fn memory_cost(&self, rate: f64, memory: f64) -> f64 {
        cost(rate, memory / self.memory.max(1.0))
    }
}

impl Cluster<'_> {
    /// The score with all moves done that have been planned or are under way.
    pub fn score(&self) -> f64 {
        let rate = self.cost_rate;
        self.nodes
            .iter()
            .filter(|node| node.view.state != NodeState::Unreachable)
            .map(|node| node.cpu_cost(rate, node.load) + node.memory_cost(rate, node.settled))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_rises_and_is_convex_everywhere() {
        for rate in [1.1, 16.0, 1e6].map(f64::ln) {
            let mut last = (cost(rate, 0.0), 0.0);
            assert_eq!(last.0, 0.0);
            for step in 1..1000 {
                let now = cost(rate, f64::from(step) / 100.0);
                let slope = now - last.0;
                assert!(
                    now.is_finite() && slope >= last.1 * 0.999_999,
                    "rate {rate} step {step}"
                );
                last = (now, slope);
            }
            assert!(cost(rate, 1e12).is_finite());
        }
    }
}
