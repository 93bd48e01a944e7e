//! Policies that place and never move.

use shoal_plan::{LaunchRequest, NodeName};

use super::digest::Digest;
use super::{Balancer, Observation, Orders};
use crate::random::Random;

/// The node with the fewest VMs.
#[derive(Debug)]
pub(super) struct Fewest;

impl Balancer for Fewest {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let digest = Digest::new(seen);
        digest.cheapest(request, |node| digest.nodes[node].vms.len() as f64)
    }

    fn round(&mut self, _: &Observation<'_>) -> Orders {
        Orders::default()
    }
}

/// One node after the other.
#[derive(Debug, Default)]
pub(super) struct RoundRobin {
    next: usize,
}

impl Balancer for RoundRobin {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let digest = Digest::new(seen);
        let count = digest.nodes.len();
        let node = (0..count)
            .map(|step| (self.next + step) % count)
            .find(|&node| digest.takes(node, request))?;
        self.next = (node + 1) % count;
        Some(digest.nodes[node].view.name.clone())
    }

    fn round(&mut self, _: &Observation<'_>) -> Orders {
        Orders::default()
    }
}

/// Any node that takes it.
#[derive(Debug)]
pub(super) struct Anywhere {
    random: Random,
}

impl Anywhere {
    pub fn new(seed: u64) -> Self {
        Self {
            random: Random::fork(seed, "random placement"),
        }
    }
}

impl Balancer for Anywhere {
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName> {
        let digest = Digest::new(seen);
        let nodes: Vec<usize> = (0..digest.nodes.len())
            .filter(|&node| digest.takes(node, request))
            .collect();
        let node = nodes.get(self.random.below(nodes.len()))?;
        Some(digest.nodes[*node].view.name.clone())
    }

    fn round(&mut self, _: &Observation<'_>) -> Orders {
        Orders::default()
    }
}
