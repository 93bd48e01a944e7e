//! N+1: the cluster still fits if any one node dies. Each VM of that node would be started again on a ready node, where it
//! needs what it holds now and at least what is expected of a new one. That this is possible is shown by doing it: the
//! largest VM first, each to the node with the most room left. Only memory is looked at, not rules and CPU features.

use std::cell::Cell;

use crate::cluster::Cluster;
use crate::model::NodeState;
use crate::policy::Policy;

/// What a VM would need on another node, if it were started there again.
pub(crate) fn need(policy: &Policy, declared: f64, resident: f64) -> f64 {
    (declared / policy.overcommit).max(resident)
}

/// A VM that is to come to a node, from another or from nowhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Change {
    pub to: usize,
    pub from: Option<usize>,
    pub need: f64,
}

/// What could be lost, and what would not fit then.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shortfall {
    /// If this node dies,
    pub node: usize,
    /// a VM that needs so much
    pub needed: f64,
    /// does not fit into the largest room left.
    pub room: f64,
}

/// Room on every ready node, and what the VMs of every node need.
#[derive(Debug, Clone)]
pub(crate) struct Failover {
    /// By node.
    rooms: Vec<f64>,
    /// Ready nodes, those with the most room first.
    order: Vec<usize>,
    /// By node: what each VM there needs, the largest first.
    needs: Vec<Vec<f64>>,
    /// Whether the cluster fits as it is.
    safe: bool,
    /// The node whose death did not fit last time: likely not to fit again.
    likely: Cell<usize>,
}

impl Failover {
    pub fn new(cluster: &Cluster<'_>) -> Self {
        let policy = cluster.policy;
        let mut needs = vec![Vec::new(); cluster.nodes.len()];
        for vm in &cluster.vms {
            needs[vm.to.unwrap_or(vm.node)].push(need(policy, vm.declared, vm.resident));
        }
        for needs in &mut needs {
            needs.sort_by(|a: &f64, b| b.total_cmp(a));
        }
        let rooms: Vec<f64> = cluster
            .nodes
            .iter()
            .zip(&needs)
            .map(|(node, needs)| {
                node.memory * policy.usher_threshold - node.other - needs.iter().sum::<f64>()
            })
            .collect();
        let ready = |node: &usize| cluster.nodes[*node].view.state == NodeState::Ready;
        let order = (0..rooms.len()).filter(ready).collect();
        let mut failover = Self {
            rooms,
            order,
            needs,
            safe: true,
            likely: Cell::new(0),
        };
        failover.settle();
        failover
    }

    fn settle(&mut self) {
        let rooms = &self.rooms;
        self.order
            .sort_by(|&a, &b| rooms[b].total_cmp(&rooms[a]).then(a.cmp(&b)));
        self.safe = self.shortfall(None).is_none();
    }

    /// The cluster fits as it is.
    pub fn is_safe(&self) -> bool {
        self.safe
    }

    /// Makes a change.
    pub fn apply(&mut self, change: Change) {
        if let Some(from) = change.from {
            self.leave(from, change.need);
        }
        self.rooms[change.to] -= change.need;
        let needs = &mut self.needs[change.to];
        needs.insert(needs.partition_point(|need| *need > change.need), change.need);
        self.settle();
    }

    /// What would not fit if some node died, after a change.
    pub fn shortfall(&self, change: Option<Change>) -> Option<Shortfall> {
        let likely = self.likely.get();
        let others = (0..self.needs.len()).filter(|&dead| dead != likely);
        let mut nodes = std::iter::once(likely)
            .filter(|&n| n < self.needs.len())
            .chain(others);
        let found = nodes.find_map(|dead| self.shortfall_of(dead, change));
        if let Some(found) = found {
            self.likely.set(found.node);
        }
        found
    }

    /// The same, with VMs of a node ended that need so much.
    pub fn shortfall_without(&self, node: usize, ended: &[f64], change: Change) -> Option<Shortfall> {
        let mut without = self.clone();
        for &need in ended {
            without.leave(node, need);
        }
        without.settle();
        without.shortfall(Some(change))
    }

    fn leave(&mut self, node: usize, need: f64) {
        self.rooms[node] += need;
        let needs = &mut self.needs[node];
        if let Some(index) = needs.iter().position(|other| *other == need) {
            needs.remove(index);
        }
    }

    fn shortfall_of(&self, dead: usize, change: Option<Change>) -> Option<Shortfall> {
        let comes = change
            .filter(|change| change.to == dead)
            .map(|change| change.need);
        let largest = self.needs[dead]
            .first()
            .copied()
            .unwrap_or(0.0)
            .max(comes.unwrap_or(0.0));
        // Each VM on a node of its own, where the dead one, and the one that a VM comes to, do not count.
        let last = self.order.get(self.needs[dead].len() + 2);
        if largest == 0.0 || last.is_some_and(|&node| self.rooms[node] >= largest) {
            return None;
        }
        let mut needs = self.needs[dead].clone();
        if let Some(need) = comes {
            needs.insert(needs.partition_point(|other| *other > need), need);
        }
        let left = change.filter(|change| change.from == Some(dead));
        if let Some(index) = left.and_then(|change| needs.iter().position(|need| *need == change.need)) {
            needs.remove(index);
        }
        // One node for each VM is enough, and one for the one with less room than its place in the order says.
        let others = self
            .order
            .iter()
            .filter(|&&node| node != dead)
            .take(needs.len() + 1);
        let mut rooms: Vec<f64> = others
            .map(|&node| match change {
                Some(change) if change.to == node => self.rooms[node] - change.need,
                Some(change) if change.from == Some(node) => self.rooms[node] + change.need,
                _ => self.rooms[node],
            })
            .collect();
        for needed in needs {
            match rooms.iter_mut().max_by(|a, b| a.total_cmp(b)) {
                Some(room) if *room >= needed => *room -= needed,
                most => {
                    return Some(Shortfall {
                        node: dead,
                        needed,
                        room: most.map_or(0.0, |room| room.max(0.0)),
                    });
                }
            }
        }
        None
    }
}
