//! Consolidation: as few nodes as the VMs' needs allow, so that the others can be switched off. Pure functions from a snapshot
//! and forecasts to moves, in the manner of the plan crate.
//!
//! - What a VM needs is forecast from its last hour: a mean and a variance. What a **node** needs is the sum of the means and
//!   [`MARGIN`] standard deviations of the sum: peaks of many VMs do not fall together, so fewer reserves do for many.
//! - A node that wants more than it has *and* is expected to go on so sheds the VM that moves soonest of those that are
//!   enough. A short peak moves nothing: moving costs more than waiting.
//! - A node is emptied only if **all** of its VMs fit on others that are on, each filled up to [`FILL`] at most; the gap to 1
//!   is what keeps VMs from moving back and forth. The cheapest to empty per watt comes first.
//! - The fullest node that fits takes a VM; of equally full ones the one with more work per watt.

use std::collections::{HashMap, VecDeque};

use shoal_plan::{LaunchRequest, NodeName, NodeState, Policy, VmId};

use crate::observe::Observation;

/// Samples of a forecast.
const SAMPLES: usize = 12;
/// Standard deviations of a node's need that are kept free.
pub const MARGIN: f64 = 2.0;
/// A node is filled up to this part of its CPUs, by forecast.
pub const FILL: f64 = 0.85;
/// A VM rests so many seconds after a move before it is moved to save power.
const REST_SECONDS: f64 = 1800.0;
/// What a VM is taken to need of its CPUs, mean and deviation, before anything is known.
const UNKNOWN: (f64, f64) = (0.3, 0.2);
/// Samples that say enough.
const ENOUGH: f64 = 3.0;

/// What a VM is expected to use, in work per second.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Forecast {
    samples: VecDeque<f64>,
}

impl Forecast {
    /// Takes a sample.
    pub fn update(&mut self, sample: f64) {
        if sample.is_finite() {
            self.samples.push_back(sample.max(0.0));
        }
        if self.samples.len() > SAMPLES {
            self.samples.pop_front();
        }
    }

    /// Mean and variance. The less has been seen, the more what is taken for unknown VMs counts in the variance.
    #[must_use]
    pub fn expected(&self, unknown: (f64, f64)) -> (f64, f64) {
        if self.samples.is_empty() {
            return unknown;
        }
        let count = self.samples.len() as f64;
        let mean = self.samples.iter().sum::<f64>() / count;
        let squares = self
            .samples
            .iter()
            .map(|sample| (sample - mean).powi(2))
            .sum::<f64>();
        let missing = (ENOUGH - count).max(0.0);
        (mean, (squares + missing * unknown.1) / (count - 1.0 + missing))
    }
}

#[derive(Debug, Clone)]
struct Node {
    capacity: f64,
    cpus: u32,
    speed: f64,
    memory: f64,
    watts: f64,
    ready: bool,
    mean: f64,
    variance: f64,
    /// Wanted now.
    now: f64,
    used: f64,
    declared: f64,
    vms: Vec<usize>,
    moving: bool,
}

impl Node {
    fn need(&self) -> f64 {
        self.mean + MARGIN * self.variance.max(0.0).sqrt()
    }

    fn is_on(&self) -> bool {
        !self.vms.is_empty()
    }
}

#[derive(Debug, Clone, Copy)]
struct Vm {
    node: usize,
    cpus: u32,
    mean: f64,
    variance: f64,
    now: f64,
    resident: f64,
    declared: f64,
    movable: bool,
    rested: bool,
}

struct Cluster<'a> {
    policy: &'a Policy,
    nodes: Vec<Node>,
    vms: Vec<Vm>,
}

/// Where a VM starts: the fullest node that is on and takes it, or else the node with the most work per watt.
#[must_use]
#[allow(clippy::implicit_hasher)]
pub fn place(
    seen: &Observation<'_>,
    forecasts: &HashMap<VmId, Forecast>,
    watts: &[f64],
    request: &LaunchRequest,
) -> Option<NodeName> {
    let cluster = Cluster::new(seen, forecasts, watts);
    let declared = request.memory.0 as f64;
    let vm = Vm {
        node: usize::MAX,
        cpus: request.cpus,
        mean: f64::NAN,
        variance: f64::NAN,
        now: 0.0,
        resident: declared / seen.policy.overcommit,
        declared,
        movable: true,
        rested: true,
    };
    let node = cluster.destination(&vm, |_| true)?;
    Some(seen.snapshot.nodes[node].name.clone())
}

/// What to move now, so that nodes are neither overloaded nor needlessly on.
#[must_use]
#[allow(clippy::implicit_hasher)]
pub fn round(
    seen: &Observation<'_>,
    forecasts: &HashMap<VmId, Forecast>,
    watts: &[f64],
) -> Vec<(VmId, NodeName)> {
    let mut cluster = Cluster::new(seen, forecasts, watts);
    let mut moves = Vec::new();
    cluster.relieve(&mut moves);
    cluster.empty(&mut moves);
    let named = moves.into_iter().map(|(vm, to)| {
        (
            seen.snapshot.vms[vm].id.clone(),
            seen.snapshot.nodes[to].name.clone(),
        )
    });
    named.collect()
}

impl<'a> Cluster<'a> {
    fn new(seen: &Observation<'a>, forecasts: &HashMap<VmId, Forecast>, watts: &[f64]) -> Self {
        let (snapshot, policy) = (seen.snapshot, seen.policy);
        let numbers: HashMap<&NodeName, usize> = snapshot
            .nodes
            .iter()
            .enumerate()
            .map(|(number, node)| (&node.name, number))
            .collect();
        let nodes = snapshot.nodes.iter().enumerate().map(|(number, view)| Node {
            capacity: f64::from(view.cpus.max(1)) * view.speed,
            cpus: view.cpus,
            speed: view.speed,
            memory: view.memory.0 as f64,
            watts: watts.get(number).copied().unwrap_or(1.0),
            ready: view.state == NodeState::Ready,
            mean: 0.0,
            variance: 0.0,
            now: seen.samples.nodes[number].local * view.speed,
            used: 0.0,
            declared: 0.0,
            vms: Vec::new(),
            moving: false,
        });
        let mut cluster = Self {
            policy,
            nodes: nodes.collect(),
            vms: Vec::with_capacity(snapshot.vms.len()),
        };
        for (view, used) in snapshot.vms.iter().zip(&seen.samples.vms) {
            let Some(&at) = numbers.get(&view.node) else {
                continue;
            };
            let to = view
                .in_flight
                .as_ref()
                .and_then(|flight| numbers.get(&flight.to).copied());
            if let Some(to) = to {
                cluster.nodes[at].moving = true;
                cluster.nodes[to].moving = true;
            }
            let speed = cluster.nodes[at].speed;
            let guess = unknown(view.cpus, speed);
            let (mean, variance) = forecasts
                .get(&view.id)
                .map_or(guess, |forecast| forecast.expected(guess));
            let declared = view.declared.0 as f64;
            let rested = view
                .since_last_move
                .is_none_or(|since| since.as_secs_f64() >= REST_SECONDS);
            cluster.vms.push(Vm {
                node: to.unwrap_or(at),
                cpus: view.cpus,
                mean,
                variance,
                now: used * speed,
                resident: view
                    .resident
                    .map_or(declared / policy.overcommit, |resident| resident.0 as f64),
                declared,
                movable: to.is_none() && view.cannot_move.is_none(),
                rested,
            });
            let number = cluster.vms.len() - 1;
            cluster.count(number, to.unwrap_or(at), 1.0);
            cluster.nodes[to.unwrap_or(at)].vms.push(number);
        }
        cluster
    }

    fn count(&mut self, vm: usize, node: usize, times: f64) {
        let (vm, node) = (&self.vms[vm], &mut self.nodes[node]);
        node.mean += times * vm.mean;
        node.variance += times * vm.variance;
        node.used += times * vm.resident;
        node.declared += times * vm.declared;
    }

    fn apply(&mut self, vm: usize, to: usize) {
        let from = self.vms[vm].node;
        self.count(vm, from, -1.0);
        self.count(vm, to, 1.0);
        let now = self.vms[vm].now;
        self.nodes[from].now -= now;
        self.nodes[to].now += now;
        self.nodes[from].vms.retain(|&other| other != vm);
        self.nodes[to].vms.push(vm);
        self.vms[vm].node = to;
    }

    /// The part of a node that would be needed with this VM, if it takes it.
    fn filled(&self, vm: &Vm, node: usize) -> Option<f64> {
        let (policy, target) = (self.policy, &self.nodes[node]);
        let (mean, variance) = if vm.mean.is_nan() {
            unknown(vm.cpus, target.speed)
        } else {
            (vm.mean, vm.variance)
        };
        let need = target.mean + mean + MARGIN * (target.variance + variance).max(0.0).sqrt();
        let now = target.now + vm.now;
        let fits = target.ready
            && vm.node != node
            && vm.cpus <= target.cpus
            && mean <= f64::from(vm.cpus) * target.speed
            && target.declared + vm.declared <= target.memory * policy.overcommit
            && target.used + vm.resident <= target.memory * policy.usher_threshold
            && need.max(now) <= target.capacity * FILL;
        fits.then_some(need / target.capacity)
    }

    /// The fullest node that is on; else the best of those that are off.
    fn destination(&self, vm: &Vm, allowed: impl Fn(usize) -> bool) -> Option<usize> {
        let candidates = (0..self.nodes.len()).filter(|&node| allowed(node));
        candidates
            .filter_map(|node| Some((node, self.filled(vm, node)?)))
            .max_by(|a, b| {
                let key = |(node, filled): &(usize, f64)| {
                    let on = self.nodes[*node].is_on();
                    (on, if on { *filled } else { -self.nodes[*node].watts })
                };
                let (x, y) = (key(a), key(b));
                x.0.cmp(&y.0).then(x.1.total_cmp(&y.1)).then(b.0.cmp(&a.0))
            })
            .map(|(node, _)| node)
    }

    /// Nodes that want more than they have, now and by forecast, shed.
    fn relieve(&mut self, moves: &mut Vec<(usize, usize)>) {
        for node in 0..self.nodes.len() {
            while self.nodes[node].now > self.nodes[node].capacity
                && self.nodes[node].need() > self.nodes[node].capacity
            {
                let excess = self.nodes[node].need().min(self.nodes[node].now) - self.nodes[node].capacity;
                let mut vms: Vec<usize> = self.nodes[node]
                    .vms
                    .iter()
                    .copied()
                    .filter(|&vm| self.vms[vm].movable)
                    .collect();
                // What is enough, the smallest memory first and then the least work; else what is most.
                vms.sort_by(|&a, &b| {
                    let key = |vm: usize| {
                        let vm = &self.vms[vm];
                        if vm.mean >= excess - 1e-9 {
                            (0, vm.resident, vm.mean)
                        } else {
                            (1, -vm.mean, vm.resident)
                        }
                    };
                    let (a, b) = (key(a), key(b));
                    a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)).then(a.2.total_cmp(&b.2))
                });
                let Some((vm, to)) = vms
                    .into_iter()
                    .find_map(|vm| Some((vm, self.destination(&self.vms[vm], |_| true)?)))
                else {
                    break;
                };
                self.apply(vm, to);
                self.vms[vm].movable = false;
                self.nodes[to].moving = true;
                self.nodes[node].moving = true;
                moves.push((vm, to));
            }
        }
    }

    /// Nodes are emptied, the least memory to move per watt first.
    fn empty(&mut self, moves: &mut Vec<(usize, usize)>) {
        let mut order: Vec<usize> = (0..self.nodes.len())
            .filter(|&node| self.nodes[node].is_on())
            .collect();
        order.sort_by(|&a, &b| {
            let key = |node: usize| self.nodes[node].used / self.nodes[node].watts;
            key(a).total_cmp(&key(b)).then(a.cmp(&b))
        });
        for node in order {
            let vms = self.nodes[node].vms.clone();
            let can_leave = |&vm: &usize| self.vms[vm].movable && self.vms[vm].rested;
            if self.nodes[node].moving || !vms.iter().all(can_leave) {
                continue;
            }
            if let Some(planned) = self.empty_one(node, vms) {
                self.nodes[node].moving = true;
                for &(_, to) in &planned {
                    self.nodes[to].moving = true;
                }
                moves.extend(planned);
            }
        }
    }

    /// All or nothing.
    fn empty_one(&mut self, node: usize, mut vms: Vec<usize>) -> Option<Vec<(usize, usize)>> {
        vms.sort_by(|&a, &b| {
            self.vms[b]
                .resident
                .total_cmp(&self.vms[a].resident)
                .then(a.cmp(&b))
        });
        let mut planned: Vec<(usize, usize)> = Vec::new();
        for vm in vms {
            let on = |other: usize| other != node && self.nodes[other].is_on();
            let Some(to) = self.destination(&self.vms[vm], on) else {
                for &(vm, _) in planned.iter().rev() {
                    self.apply(vm, node);
                }
                return None;
            };
            self.apply(vm, to);
            planned.push((vm, to));
        }
        Some(planned)
    }
}

fn unknown(cpus: u32, speed: f64) -> (f64, f64) {
    let all = f64::from(cpus) * speed;
    (UNKNOWN.0 * all, (UNKNOWN.1 * all).powi(2))
}

#[cfg(test)]
mod tests;
