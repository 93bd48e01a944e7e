//! The snapshot indexed for planning: nodes and VMs by dense numbers, sums kept per node, and moves applied to it as they
//! are planned. A planned move counts as one under way: on both nodes.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use crate::model::{Bytes, CannotMove, ClusterSnapshot, NodeName, NodeState, NodeView, VmView};
use crate::policy::Policy;
use crate::score::Use;

/// Pre-copy makes little headway when the guest dirties this part of what the link carries.
const CONVERGES_BELOW: f64 = 0.9;
const LONGEST_MOVE_SECONDS: f64 = 1e7;

/// A node with its sums. Memory is in bytes, as `f64` for the arithmetic (exact up to 8 PiB).
#[derive(Debug)]
pub(crate) struct Node<'a> {
    pub view: &'a NodeView,
    pub memory: f64,
    /// Declared memory of all VMs here or arriving.
    pub committed: f64,
    /// Memory held now, with all of what arrives reserved.
    pub occupied: f64,
    /// Memory held when the moves under way have ended.
    pub settled: f64,
    /// `settled`, with growth to the policy's horizon.
    pub projected: f64,
    /// Bytes per second by which the VMs grow that will be here.
    growth: f64,
    pub load_local: f64,
    pub load_exported: f64,
    /// CPUs times speed.
    pub cpu_capacity: f64,
    pub outgoing: usize,
    pub incoming: usize,
    /// Memory used by anything but VMs.
    other: f64,
    /// VMs that are here and those that arrive, as numbers.
    vms: Vec<usize>,
}

/// A VM with what the planner derives about it.
#[derive(Debug)]
pub(crate) struct Vm<'a> {
    pub view: &'a VmView,
    /// Where it is.
    pub node: usize,
    /// It moves, or a move is planned.
    pub leaving: bool,
    /// Where it goes, if that node is in the snapshot.
    pub to: Option<usize>,
    pub declared: f64,
    /// Resident memory; while not reported, what is expected.
    pub resident: f64,
    pub growth: f64,
    /// CPUs it would use if it got them; all of its own while not reported.
    pub demand: f64,
    /// How long moving it takes alone on a link.
    pub move_seconds: f64,
    /// Bytes per second by which pre-copy gets ahead.
    headway: f64,
    /// Pre-copy gets ahead of its dirty rate.
    pub converges: bool,
}

impl Vm<'_> {
    /// Memory it holds this many seconds from now. It never grows past what it was given.
    pub fn memory_at(&self, seconds: f64) -> f64 {
        (self.resident + self.growth * seconds).min(self.declared.max(self.resident))
    }

    /// What moves with it.
    pub fn usage(&self) -> Use {
        Use {
            cpu: self.demand,
            memory: self.resident,
        }
    }
}

/// Why a VM cannot be moved now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Immobile {
    /// As told in the snapshot.
    Told(CannotMove),
    /// It moves already.
    Migrating(NodeName),
    /// Its node does not answer.
    NodeUnreachable(NodeName),
    /// It moved, or tried to, not long ago.
    CoolDown {
        /// For how much longer.
        left: Duration,
    },
}

impl fmt::Display for Immobile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Told(reason) => reason.fmt(f),
            Self::Migrating(to) => write!(f, "it is migrating to {to}"),
            Self::NodeUnreachable(node) => write!(f, "its node {node} is unreachable"),
            Self::CoolDown { left } => {
                write!(
                    f,
                    "it has just moved, or failed to; not again for {:.0} s",
                    left.as_secs_f64().ceil()
                )
            }
        }
    }
}

/// The whole, with the moves planned so far.
#[derive(Debug)]
pub(crate) struct Cluster<'a> {
    pub policy: &'a Policy,
    /// By name.
    pub nodes: Vec<Node<'a>>,
    /// By id. VMs on nodes that the snapshot does not have are left out.
    pub vms: Vec<Vm<'a>>,
    /// Moves under way and planned.
    pub migrations: usize,
    node_numbers: HashMap<&'a str, usize>,
    largest_room: Option<f64>,
}

impl<'a> Cluster<'a> {
    pub fn new(snapshot: &'a ClusterSnapshot, policy: &'a Policy) -> Self {
        let mut views: Vec<&NodeView> = snapshot.nodes.iter().collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views.dedup_by(|a, b| a.name == b.name);
        let node_numbers = views
            .iter()
            .enumerate()
            .map(|(number, view)| (view.name.as_str(), number))
            .collect();
        let nodes = views.into_iter().map(Node::new).collect();
        let mut cluster = Self {
            policy,
            nodes,
            vms: Vec::new(),
            migrations: 0,
            node_numbers,
            largest_room: None,
        };
        cluster.add_vms(snapshot);
        cluster.add_sums();
        cluster
    }

    fn add_vms(&mut self, snapshot: &'a ClusterSnapshot) {
        let mut views: Vec<&VmView> = snapshot.vms.iter().collect();
        views.sort_by(|a, b| a.id.cmp(&b.id));
        views.dedup_by(|a, b| a.id == b.id);
        let mut cpu_use = vec![0.0; self.nodes.len()];
        for view in &views {
            if let Some(&node) = self.node_numbers.get(view.node.as_str()) {
                cpu_use[node] += load(view.cpu_use);
            }
        }
        for view in views {
            let Some(&node) = self.node_numbers.get(view.node.as_str()) else {
                continue;
            };
            let stretch = self.nodes[node].stretch(cpu_use[node]);
            let vm = self.vm(view, node, stretch);
            self.vms.push(vm);
        }
    }

    fn vm(&self, view: &'a VmView, node: usize, stretch: f64) -> Vm<'a> {
        let declared = view.declared.0 as f64;
        let resident = match view.resident {
            Some(resident) => resident.0 as f64,
            None => expected_resident(view.declared, self.policy),
        };
        let growth = view.growth.0 as f64;
        let dirty = view.dirty_rate.map_or(0.0, |rate| rate.0 as f64) + growth;
        let link = self.policy.link_rate.0 as f64;
        let headway = (link - dirty).max(link * (1.0 - CONVERGES_BELOW)).max(1.0);
        let cpu_use = load(view.cpu_use);
        let demand = match view.resident {
            Some(_) => (cpu_use * stretch).min(f64::from(view.cpus)).max(cpu_use),
            None => f64::from(view.cpus),
        };
        Vm {
            view,
            node,
            leaving: view.in_flight.is_some(),
            to: view
                .in_flight
                .as_ref()
                .and_then(|flight| self.node_number(&flight.to)),
            declared,
            resident,
            growth,
            demand,
            move_seconds: move_seconds(self.policy, resident, headway),
            headway,
            converges: dirty < link * CONVERGES_BELOW,
        }
    }

    /// Fills in the sums of every node.
    fn add_sums(&mut self) {
        // What the nodes' own reports already hold of these VMs, so as to know what else uses memory.
        let mut reported = vec![0.0; self.nodes.len()];
        for number in 0..self.vms.len() {
            let (from, to, leaving) = (
                self.vms[number].node,
                self.vms[number].to,
                self.vms[number].leaving,
            );
            let received = self.vms[number]
                .view
                .in_flight
                .as_ref()
                .map_or(0, |flight| flight.received.0);
            if self.vms[number].view.resident.is_some() {
                reported[from] += self.vms[number].resident;
            } else {
                // Not in the node's report, so not in its load either.
                self.nodes[from].load_exported += self.vms[number].demand;
            }
            self.add_here(number, from);
            if leaving {
                self.leave(number, from);
                self.migrations += 1;
            }
            if let Some(to) = to {
                reported[to] += received as f64;
                self.arrive(number, to);
            }
        }
        let horizon = self.policy.usher_horizon.as_secs_f64();
        for (node, reported) in self.nodes.iter_mut().zip(reported) {
            let used = node.view.memory.0.saturating_sub(node.view.memory_available.0) as f64;
            node.other = (used - reported).max(0.0);
            node.occupied += node.other;
            node.settled += node.other;
            node.projected += node.other + node.view.other_growth.0 as f64 * horizon;
        }
    }

    fn add_here(&mut self, number: usize, on: usize) {
        let (vm, node) = (&self.vms[number], &mut self.nodes[on]);
        node.committed += vm.declared;
        node.occupied += vm.resident;
        node.settled += vm.resident;
        node.projected += vm.memory_at(self.policy.usher_horizon.as_secs_f64());
        node.growth += vm.growth;
        node.vms.push(number);
    }

    fn arrive(&mut self, number: usize, on: usize) {
        self.add_here(number, on);
        let (vm, node) = (&self.vms[number], &mut self.nodes[on]);
        node.load_local += vm.demand;
        node.load_exported += vm.demand;
        node.incoming += 1;
    }

    fn leave(&mut self, number: usize, from: usize) {
        let (vm, node) = (&self.vms[number], &mut self.nodes[from]);
        node.settled -= vm.resident;
        node.projected -= vm.memory_at(self.policy.usher_horizon.as_secs_f64());
        node.growth -= vm.growth;
        node.load_local = (node.load_local - vm.demand).max(0.0);
        node.load_exported = (node.load_exported - vm.demand).max(0.0);
        node.outgoing += 1;
    }

    /// Counts a planned move as one under way.
    pub fn apply(&mut self, number: usize, to: usize) {
        let from = self.vms[number].node;
        self.vms[number].leaving = true;
        self.vms[number].to = Some(to);
        self.leave(number, from);
        self.arrive(number, to);
        self.migrations += 1;
        self.largest_room = None;
    }

    pub fn node_number(&self, name: &NodeName) -> Option<usize> {
        self.node_numbers.get(name.as_str()).copied()
    }

    /// VMs that are on the node and stay there.
    pub fn staying(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        self.nodes[node]
            .vms
            .iter()
            .copied()
            .filter(move |&vm| self.vms[vm].node == node && !self.vms[vm].leaving)
    }

    /// Memory the node will hold in so many seconds. What leaves counts until all of that is expected to have left.
    pub fn memory_at(&self, node: usize, seconds: f64) -> f64 {
        let left = self.leaving_seconds(node) <= seconds;
        let vms = self.nodes[node].vms.iter().map(|&number| &self.vms[number]);
        let counts = |vm: &&Vm<'_>| !vm.leaving || vm.to == Some(node) || !left;
        let of_vms: f64 = vms.filter(counts).map(|vm| vm.memory_at(seconds)).sum();
        self.nodes[node].other + self.nodes[node].view.other_growth.0 as f64 * seconds + of_vms
    }

    /// The most memory the node will hold at the horizon or, where VMs leave, just before they have left.
    pub fn peak(&self, node: usize) -> f64 {
        let horizon = self.policy.usher_horizon.as_secs_f64();
        let at_horizon = self.memory_at(node, horizon);
        let leaving_seconds = self.leaving_seconds(node).min(horizon);
        if leaving_seconds > 0.0 {
            at_horizon.max(self.memory_at(node, leaving_seconds.next_down()))
        } else {
            at_horizon
        }
    }

    /// How long the moves out of this node still take, sharing its link.
    pub fn leaving_seconds(&self, node: usize) -> f64 {
        let leaving = self.nodes[node].vms.iter().map(|&number| &self.vms[number]);
        leaving
            .filter(|vm| vm.node == node && vm.leaving)
            .map(|vm| {
                let received = vm
                    .view
                    .in_flight
                    .as_ref()
                    .map_or(0.0, |flight| flight.received.0 as f64);
                let part = if vm.resident > 0.0 {
                    (1.0 - received / vm.resident).clamp(0.0, 1.0)
                } else {
                    1.0
                };
                vm.move_seconds * part
            })
            .sum()
    }

    /// How long moving a VM takes that is started in so many seconds, when it has grown.
    pub fn move_seconds_at(&self, number: usize, seconds: f64) -> f64 {
        let vm = &self.vms[number];
        move_seconds(self.policy, vm.memory_at(seconds), vm.headway)
    }

    /// Why a VM cannot be moved now; `rest` is how long it is to be left alone after its last move.
    pub fn immobile(&self, number: usize, rest: Duration) -> Option<Immobile> {
        let vm = &self.vms[number];
        let node = self.nodes[vm.node].view;
        if let Some(flight) = &vm.view.in_flight {
            return Some(Immobile::Migrating(flight.to.clone()));
        }
        if vm.leaving {
            let to = vm
                .to
                .map_or_else(|| node.name.clone(), |to| self.nodes[to].view.name.clone());
            return Some(Immobile::Migrating(to));
        }
        if let Some(reason) = vm.view.cannot_move {
            return Some(Immobile::Told(reason));
        }
        if node.state == NodeState::Unreachable {
            return Some(Immobile::NodeUnreachable(node.name.clone()));
        }
        let left = rest.saturating_sub(vm.view.since_last_move?);
        (!left.is_zero()).then_some(Immobile::CoolDown { left })
    }

    /// Whether the limits let one more move start out of this node.
    pub fn may_send(&self, node: usize) -> bool {
        self.migrations < self.policy.max_migrations
            && self.nodes[node].outgoing < self.policy.max_out_per_node
    }

    /// The most memory that any node has left below its threshold, growth counted.
    pub fn largest_room(&mut self) -> f64 {
        let threshold = self.policy.usher_threshold;
        let nodes = &self.nodes;
        *self.largest_room.get_or_insert_with(|| {
            let ready = nodes.iter().filter(|node| node.view.state == NodeState::Ready);
            ready
                .map(|node| node.memory * threshold - node.projected)
                .fold(0.0, f64::max)
        })
    }
}

impl<'a> Node<'a> {
    fn new(view: &'a NodeView) -> Self {
        let speed = if view.speed.is_finite() {
            view.speed.clamp(0.01, 100.0)
        } else {
            1.0
        };
        let load_local = load(view.load_local);
        Self {
            view,
            memory: view.memory.0 as f64,
            committed: 0.0,
            occupied: 0.0,
            settled: 0.0,
            projected: 0.0,
            growth: 0.0,
            load_local,
            // What is exported is never less: it rises sooner and falls later.
            load_exported: load(view.load_exported).max(load_local),
            cpu_capacity: f64::from(view.cpus.max(1)) * speed,
            outgoing: 0,
            incoming: 0,
            other: 0.0,
            vms: Vec::new(),
        }
    }

    /// On a node with more load than CPUs its VMs get less than they want: how many times more they want.
    fn stretch(&self, cpu_use: f64) -> f64 {
        let saturated = self.load_local > f64::from(self.view.cpus) && cpu_use > 0.0;
        if saturated {
            (self.load_local / cpu_use).max(1.0)
        } else {
            1.0
        }
    }

    /// Part of its memory that it would hold with one more VM, when all have grown for so long after the horizon. Not more
    /// than what they were given.
    pub fn part_later(&self, vm: &Vm<'_>, at_horizon: f64, seconds: f64) -> f64 {
        let grown = self.projected + at_horizon + (self.growth + vm.growth).max(0.0) * seconds;
        let most = self.other + self.committed + vm.declared;
        grown.min(most.max(self.projected + at_horizon)) / self.memory.max(1.0)
    }

    /// Memory pressure, percent.
    pub fn pressure(&self) -> f64 {
        if self.view.pressure_memory.is_finite() {
            self.view.pressure_memory
        } else {
            0.0
        }
    }
}

/// What a VM that was not reported yet is expected to hold.
pub(crate) fn expected_resident(declared: Bytes, policy: &Policy) -> f64 {
    (declared.0 as f64 / policy.overcommit).floor()
}

fn move_seconds(policy: &Policy, resident: f64, headway: f64) -> f64 {
    (policy.migration_overhead.as_secs_f64() + resident / headway).min(LONGEST_MOVE_SECONDS)
}

/// For display: whole bytes of a sum.
pub(crate) fn bytes(amount: f64) -> Bytes {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    // float casts saturate, and it is not negative
    Bytes(amount.max(0.0) as u64)
}

/// Seconds as a duration; never panics.
pub(crate) fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn load(sample: f64) -> f64 {
    if sample.is_finite() && sample > 0.0 {
        sample.min(1e6)
    } else {
        0.0
    }
}
