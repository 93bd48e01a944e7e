//! The snapshot by dense numbers, for the policies that are not the plan crate's.

use std::collections::HashMap;

use shoal_plan::{LaunchRequest, NodeName, NodeState, NodeView, VmView};

use super::{Move, Observation, RunQueue};

/// A node with its sums. What moves counts at its destination.
#[derive(Debug, Clone)]
pub(super) struct Node<'a> {
    pub view: &'a NodeView,
    pub queue: RunQueue,
    /// CPUs.
    pub cpus: f64,
    /// Work per second.
    pub capacity: f64,
    pub memory: f64,
    /// CPUs wanted.
    pub cpu: f64,
    /// Bytes.
    pub used: f64,
    pub declared: f64,
    pub virtual_cpus: f64,
    pub vms: Vec<usize>,
    /// Migrations from and to it.
    pub outgoing: usize,
    pub incoming: usize,
}

impl Node<'_> {
    pub fn cpu_part(&self) -> f64 {
        self.cpu / self.cpus
    }

    pub fn memory_part(&self) -> f64 {
        self.used / self.memory
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Vm<'a> {
    pub view: &'a VmView,
    /// Where it is, or goes.
    pub node: usize,
    /// CPUs it wants.
    pub cpu: f64,
    pub resident: f64,
    pub declared: f64,
    pub movable: bool,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Digest<'a> {
    pub nodes: Vec<Node<'a>>,
    pub vms: Vec<Vm<'a>>,
    overcommit: f64,
    threshold: f64,
}

impl<'a> Digest<'a> {
    pub fn new(seen: &Observation<'a>) -> Self {
        let snapshot = seen.snapshot;
        let numbers: HashMap<&NodeName, usize> = snapshot
            .nodes
            .iter()
            .enumerate()
            .map(|(number, node)| (&node.name, number))
            .collect();
        let mut digest = Self {
            nodes: snapshot.nodes.iter().zip(&seen.samples.nodes).map(node).collect(),
            vms: Vec::with_capacity(snapshot.vms.len()),
            overcommit: seen.policy.overcommit,
            threshold: seen.policy.usher_threshold,
        };
        let mut uses = vec![0.0; snapshot.nodes.len()];
        for (vm, used) in snapshot.vms.iter().zip(&seen.samples.vms) {
            uses[numbers[&vm.node]] += used;
        }
        for (view, used) in snapshot.vms.iter().zip(&seen.samples.vms) {
            let at = numbers[&view.node];
            let to = view.in_flight.as_ref().map(|flight| numbers[&flight.to]);
            if let Some(to) = to {
                digest.nodes[at].outgoing += 1;
                digest.nodes[to].incoming += 1;
            }
            let load = digest.nodes[at].queue.local;
            // With more load than CPUs, VMs get less than they want.
            let stretch = if load > f64::from(snapshot.nodes[at].cpus) && uses[at] > 0.0 {
                (load / uses[at]).max(1.0)
            } else {
                1.0
            };
            let declared = view.declared.0 as f64;
            let vm = Vm {
                view,
                node: to.unwrap_or(at),
                cpu: match view.resident {
                    Some(_) => (used * stretch).min(f64::from(view.cpus)).max(*used),
                    None => f64::from(view.cpus),
                },
                resident: view
                    .resident
                    .map_or(declared / seen.policy.overcommit, |resident| resident.0 as f64),
                declared,
                movable: to.is_none() && view.cannot_move.is_none(),
            };
            digest.add(vm);
        }
        digest
    }

    fn add(&mut self, vm: Vm<'a>) {
        let number = self.vms.len();
        self.vms.push(vm);
        self.count(number, vm.node, 1.0);
        self.nodes[vm.node].vms.push(number);
    }

    fn count(&mut self, vm: usize, node: usize, times: f64) {
        let (vm, node) = (&self.vms[vm], &mut self.nodes[node]);
        node.cpu += times * vm.cpu;
        node.used += times * vm.resident;
        node.declared += times * vm.declared;
        node.virtual_cpus += times * f64::from(vm.view.cpus);
    }

    /// Whether a node takes a new VM of this size: declared memory within overcommit, as for every policy.
    pub fn takes(&self, node: usize, request: &LaunchRequest) -> bool {
        let node = &self.nodes[node];
        node.view.state == NodeState::Ready
            && request.cpus <= node.view.cpus
            && node.declared + request.memory.0 as f64 <= node.memory * self.overcommit
    }

    /// Whether a VM can move to a node: what it was given fits, and what it holds does.
    pub fn fits(&self, vm: usize, to: usize) -> bool {
        let (vm, node) = (&self.vms[vm], &self.nodes[to]);
        vm.node != to
            && node.view.state == NodeState::Ready
            && vm.view.cpus <= node.view.cpus
            && node.declared + vm.declared <= node.memory * self.overcommit
            && node.used + vm.resident <= node.memory * self.threshold
    }

    /// Counts a move as done.
    pub fn apply(&mut self, vm: usize, to: usize) -> Move {
        let from = self.vms[vm].node;
        self.count(vm, from, -1.0);
        self.count(vm, to, 1.0);
        self.nodes[from].vms.retain(|other| *other != vm);
        self.nodes[to].vms.push(vm);
        self.vms[vm].node = to;
        self.vms[vm].movable = false;
        Move::new(self.vms[vm].view.id.clone(), self.nodes[to].view.name.clone())
    }

    /// The node that takes a new VM at the lowest value of `cost`; the first of equals.
    pub fn cheapest(&self, request: &LaunchRequest, cost: impl Fn(usize) -> f64) -> Option<NodeName> {
        (0..self.nodes.len())
            .filter(|&node| self.takes(node, request))
            .map(|node| (node, cost(node)))
            .min_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(node, _)| self.nodes[node].view.name.clone())
    }
}

fn node<'a>((view, queue): (&'a NodeView, &RunQueue)) -> Node<'a> {
    Node {
        view,
        queue: *queue,
        cpus: f64::from(view.cpus.max(1)),
        capacity: f64::from(view.cpus.max(1)) * view.speed,
        memory: view.memory.0.max(1) as f64,
        cpu: 0.0,
        used: 0.0,
        declared: 0.0,
        virtual_cpus: 0.0,
        vms: Vec::new(),
        outgoing: 0,
        incoming: 0,
    }
}
