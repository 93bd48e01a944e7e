//! The snapshot indexed for planning: nodes and VMs by dense numbers, sums kept per node, and moves applied to it as they
//! are planned. A planned move counts as one under way: on both nodes.

mod immobile;
mod node;

use std::collections::HashMap;
use std::time::Duration;

use shoal_estimate::Estimate;

use crate::failover::{Change, Failover, need};
use crate::kvm::KvmNeed;
use crate::labels::Rules;
use crate::margins::Margins;
use crate::model::{Bytes, BytesPerSecond, ClusterSnapshot, NodeName, NodeState, NodeView, VmId, VmView};
use crate::newcomer::Newcomer;
use crate::policy::{Mode, Policy};
use crate::preempt;
use crate::score::Use;
use crate::together::Together;

pub use immobile::Immobile;
pub(crate) use node::Node;

/// Pre-copy makes little headway when the guest dirties this part of what the link carries.
const CONVERGES_BELOW: f64 = 0.9;
const LONGEST_MOVE_SECONDS: f64 = 1e7;
/// However memory has jumped: no more than this part of a node's is kept free for it.
const MOST_BURST: f64 = 0.1;

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
    /// The same where it arrives: one that a plan has suspended is to run on there.
    growth_there: f64,
    /// CPUs it would use if it got them; all of its own while not measured, none while suspended.
    pub demand: f64,
    /// Standard error of that, if it was measured.
    pub demand_error: Option<f64>,
    /// Bytes that one which has just been started is expected to hold beyond what it holds already.
    pub awaited: f64,
    /// Bytes it dirties per second, growth included.
    pub dirty: f64,
    /// Bytes that it writes again and again; all it can hold where that is not known.
    pub working_set: f64,
    /// Bytes per second that a migration of it gets.
    pub link: f64,
    /// How long moving it takes alone on a link.
    pub move_seconds: f64,
    /// Bytes per second by which pre-copy gets ahead.
    headway: f64,
    /// Pre-copy gets ahead of its dirty rate, or what it writes is so little that this does not matter.
    pub converges: bool,
}

impl Vm<'_> {
    /// Memory it holds this many seconds from now. It never grows past what it was given.
    pub fn memory_at(&self, seconds: f64) -> f64 {
        (self.resident + self.growth * seconds).min(self.declared.max(self.resident))
    }

    /// Memory it would hold so many seconds after it arrived elsewhere, or ran on where it is.
    pub fn memory_there(&self, seconds: f64) -> f64 {
        (self.resident + self.growth_there * seconds).min(self.declared.max(self.resident))
    }

    /// What moves with it.
    pub fn usage(&self) -> Use {
        Use {
            cpu: self.demand,
            memory: self.resident,
        }
    }
}

/// The whole, with the moves planned so far.
#[derive(Debug)]
pub(crate) struct Cluster<'a> {
    pub policy: &'a Policy,
    /// What ushering allows for.
    pub margins: Margins,
    /// By name.
    pub nodes: Vec<Node<'a>>,
    /// By id. VMs on nodes that the snapshot does not have are left out.
    pub vms: Vec<Vm<'a>>,
    /// Who is on which node, as far as rules ask.
    pub together: Together<'a>,
    /// Logarithm of the policy's `cost_base`.
    pub cost_rate: f64,
    /// What becomes of the VMs of a node that dies, if the policy asks.
    pub failover: Option<Failover>,
    /// Moves under way and planned.
    pub migrations: usize,
    node_numbers: HashMap<&'a str, usize>,
    largest_room: Option<f64>,
    /// VMs that are to start and have a place.
    reserved: usize,
}

impl<'a> Cluster<'a> {
    pub fn new(snapshot: &'a ClusterSnapshot, policy: &'a Policy) -> Self {
        Self::with_rules(snapshot, policy, std::iter::empty())
    }

    /// With the rules of VMs that are to come.
    pub fn with_rules(
        snapshot: &'a ClusterSnapshot,
        policy: &'a Policy,
        to_come: impl Iterator<Item = &'a Rules>,
    ) -> Self {
        let mut cluster = Self::without_holds(snapshot, policy, to_come);
        for held in &snapshot.held {
            if let Some(room) = preempt::awaited(&cluster, held) {
                let newcomer = Newcomer::launch(&cluster, &held.request);
                cluster.hold(&newcomer, room.node, &room.ending);
            }
        }
        cluster
    }

    /// The same as if no room were kept for anyone.
    pub fn without_holds(
        snapshot: &'a ClusterSnapshot,
        policy: &'a Policy,
        to_come: impl Iterator<Item = &'a Rules>,
    ) -> Self {
        let mut views: Vec<&NodeView> = snapshot.nodes.iter().collect();
        views.sort_by(|a, b| a.name.cmp(&b.name));
        views.dedup_by(|a, b| a.name == b.name);
        let node_numbers = views
            .iter()
            .enumerate()
            .map(|(number, view)| (view.name.as_str(), number))
            .collect();
        let nodes = views.into_iter().map(Node::new).collect();
        let there = snapshot.vms.iter().filter_map(|vm| vm.rules.as_deref());
        let held = snapshot
            .held
            .iter()
            .filter_map(|held| held.request.rules.as_deref());
        let mut cluster = Self {
            policy,
            margins: snapshot.margins.sane(),
            nodes,
            vms: Vec::with_capacity(snapshot.vms.len()),
            together: Together::new(there.chain(held).chain(to_come)),
            cost_rate: policy.cost_base.ln(),
            failover: None,
            migrations: 0,
            node_numbers,
            largest_room: None,
            reserved: 0,
        };
        cluster.add_vms(snapshot);
        cluster.add_sums();
        if policy.n_plus_one {
            cluster.failover = Some(Failover::new(&cluster));
        }
        cluster
    }

    fn add_vms(&mut self, snapshot: &'a ClusterSnapshot) {
        let mut views: Vec<&VmView> = snapshot.vms.iter().collect();
        views.sort_by(|a, b| a.id.cmp(&b.id));
        views.dedup_by(|a, b| a.id == b.id);
        for view in views {
            let Some(&node) = self.node_numbers.get(view.node.as_str()) else {
                continue;
            };
            let vm = self.vm(view, node);
            if !self.together.is_empty() {
                let marks = self.together.marks_of(&view.labels, view.rules.as_deref());
                self.together.add_vm(self.vms.len(), marks);
            }
            self.vms.push(vm);
        }
    }

    fn vm(&self, view: &'a VmView, node: usize) -> Vm<'a> {
        let declared = view.declared.0 as f64;
        let resident = match view.resident {
            Some(resident) => resident.0 as f64,
            None => expected_resident(view.declared, self.policy),
        };
        let rate = |rate: Option<BytesPerSecond>| rate.map_or(0.0, |rate| rate.0 as f64);
        let growth = rate(Some(view.growth).filter(|_| !view.suspended));
        let dirty = rate(view.dirty_rate.filter(|_| !view.suspended)) + growth;
        let measured = self.nodes[node].view.link_rate;
        let link = measured.map_or(self.policy.link_rate, |rate| rate.min(self.policy.link_rate));
        let link = (link.0 as f64).max(1.0);
        // It grows meanwhile, and what is new is written too.
        let set = view
            .working_set
            .map_or(f64::INFINITY, |set| set.0 as f64 + growth);
        let headway = (link - dirty).max(link * (1.0 - CONVERGES_BELOW)).max(1.0);
        let cpu = if view.suspended {
            Some(Estimate::default())
        } else {
            view.cpu
                .filter(|_| view.resident.is_some())
                .map(|cpu| cpu.sane(f64::from(view.cpus.max(1))))
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
            growth_there: if view.suspended {
                rate(view.suspended_growth)
            } else {
                growth
            },
            demand: cpu.map_or(f64::from(view.cpus), |cpu| cpu.mean),
            demand_error: cpu.map(|cpu| cpu.error),
            awaited: match cpu {
                Some(_) => 0.0,
                None => (expected_resident(view.declared, self.policy) - resident).max(0.0),
            },
            dirty,
            working_set: set,
            link,
            move_seconds: move_seconds(self.policy, resident, headway),
            headway,
            converges: dirty < link * CONVERGES_BELOW || set <= self.policy.max_downtime.as_secs_f64() * link,
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
            }
            let horizon = self.policy.usher_horizon.as_secs_f64();
            let (grown, growth) = (self.vms[number].memory_at(horizon), self.vms[number].growth);
            self.add_here(number, from, grown, growth);
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
            node.other = (used - reported).max(node.view.reserved_memory.0 as f64).max(0.0);
            node.occupied += node.other;
            node.settled += node.other;
            node.projected += node.other + node.view.other_growth.0 as f64 * horizon;
        }
    }

    /// With what it will hold at the horizon, and how fast it grows.
    fn add_here(&mut self, number: usize, on: usize, grown: f64, growth: f64) {
        let (vm, node) = (&self.vms[number], &mut self.nodes[on]);
        node.committed += vm.declared;
        node.vcpus += f64::from(vm.view.cpus);
        node.busy += vm.demand;
        node.exclusive += usize::from(is_exclusive(vm.view.rules.as_deref()));
        node.occupied += vm.resident;
        node.settled += vm.resident;
        node.projected += grown;
        node.growth += growth;
        node.add_load(vm);
        node.awaited += vm.awaited;
        node.vms.push(number);
        self.together.add(number, on);
    }

    fn arrive(&mut self, number: usize, on: usize) {
        let horizon = self.policy.usher_horizon.as_secs_f64();
        let (grown, growth) = (
            self.vms[number].memory_there(horizon),
            self.vms[number].growth_there,
        );
        self.add_here(number, on, grown, growth);
        self.nodes[on].incoming += 1;
    }

    fn leave(&mut self, number: usize, from: usize) {
        self.together.leave(number, from);
        let (vm, node) = (&self.vms[number], &mut self.nodes[from]);
        node.settled -= vm.resident;
        node.projected -= vm.memory_at(self.policy.usher_horizon.as_secs_f64());
        node.growth -= vm.growth;
        node.take_load(vm);
        node.awaited -= vm.awaited;
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
        if let Some(failover) = &mut self.failover {
            let vm = &self.vms[number];
            failover.apply(Change {
                to,
                from: Some(from),
                need: need(self.policy, vm.declared, vm.resident),
            });
        }
    }

    /// Counts a VM that is to start on a node, so that the next one finds less room.
    pub fn reserve(&mut self, newcomer: &Newcomer<'_>, on: usize) {
        let node = self.expect(newcomer, on);
        node.committed += newcomer.declared;
        node.vcpus += newcomer.vcpus();
        node.busy += newcomer.usage.cpu;
        node.occupied += newcomer.usage.memory;
        node.settled += newcomer.usage.memory;
        node.projected += newcomer.at_horizon();
        node.expect_load(newcomer.usage);
        if let Some(failover) = &mut self.failover {
            failover.apply(newcomer.change(self.policy, on));
        }
    }

    /// Keeps room on a node for a VM that waits until others there have ended. What these hold and what it needs counts
    /// once: the larger of both. Only filters see it; nothing is balanced for it yet.
    pub fn hold(&mut self, newcomer: &Newcomer<'_>, on: usize, ending: &[usize]) {
        let horizon = self.policy.usher_horizon.as_secs_f64();
        let sum = |of: &dyn Fn(&Vm<'_>) -> f64| -> f64 { ending.iter().map(|&vm| of(&self.vms[vm])).sum() };
        let declared = newcomer.declared - sum(&|vm| vm.declared);
        let vcpus = newcomer.vcpus() - sum(&|vm| f64::from(vm.view.cpus));
        let busy = newcomer.usage.cpu - sum(&|vm| vm.demand);
        let memory = newcomer.usage.memory - sum(&|vm| vm.resident);
        let projected = newcomer.at_horizon() - sum(&|vm| vm.memory_at(horizon));
        let change = newcomer.change(self.policy, on);
        let missing = change.need - sum(&|vm| need(self.policy, vm.declared, vm.resident));
        let node = self.expect(newcomer, on);
        node.makes_room = true;
        node.committed += declared.max(0.0);
        node.vcpus += vcpus.max(0.0);
        node.busy += busy.max(0.0);
        node.occupied += memory.max(0.0);
        node.projected += projected.max(0.0);
        if let Some(failover) = self.failover.as_mut().filter(|_| missing > 0.0) {
            failover.apply(Change {
                need: missing,
                ..change
            });
        }
    }

    /// A VM that is not there yet will be on a node; what it takes of it is for the caller to add.
    fn expect(&mut self, newcomer: &Newcomer<'_>, on: usize) -> &mut Node<'a> {
        let number = usize::MAX - self.reserved;
        self.reserved += 1;
        self.together.add_vm(number, newcomer.marks.clone());
        self.together.add(number, on);
        self.largest_room = None;
        let node = &mut self.nodes[on];
        node.reserved += 1;
        node.exclusive += usize::from(newcomer.is_exclusive());
        node
    }

    /// Whether one that stays or arrives would miss a VM that leaves, by its affinity.
    pub fn is_needed(&self, number: usize) -> bool {
        let node = self.vms[number].node;
        let stays = |&other: &usize| {
            let other = &self.vms[other];
            other.to.map_or(!other.leaving, |to| to == node)
        };
        let others = self.nodes[node].vms.iter().copied().filter(stays);
        !self.together.is_empty() && self.together.is_needed(number, node, others)
    }

    /// A VM by its id.
    pub fn number(&self, vm: &VmId) -> Option<usize> {
        self.vms.binary_search_by(|other| other.view.id.cmp(vm)).ok()
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
        self.memory_grown(node, seconds, 1.0)
    }

    /// From the last report of a node until what is decided after the next has begun. `detect` counts with a report each second: what
    /// it is older than that comes on top, and so does what the next may be late.
    pub fn seconds_to_act(&self, node: usize) -> f64 {
        const USUAL_AGE: Duration = Duration::from_secs(1);
        let late = self.nodes[node].view.report_age.saturating_sub(USUAL_AGE);
        (self.policy.detect + late + self.margins.delay).as_secs_f64()
    }

    /// The same with as much growth as there may be.
    pub fn most_memory_at(&self, node: usize, seconds: f64) -> f64 {
        let burst = self.margins.burst.0 as f64;
        self.memory_grown(node, seconds, self.margins.growth)
            + burst.min(self.nodes[node].memory * MOST_BURST)
    }

    fn memory_grown(&self, node: usize, seconds: f64, margin: f64) -> f64 {
        let grows = seconds * margin;
        let left = self.leaving_seconds(node) <= seconds;
        let vms = self.nodes[node].vms.iter().map(|&number| &self.vms[number]);
        let counts = |vm: &&Vm<'_>| !vm.leaving || vm.to == Some(node) || !left;
        let of_vm = |vm: &Vm<'_>| {
            if vm.leaving && vm.to == Some(node) {
                vm.memory_there(grows)
            } else {
                vm.memory_at(grows)
            }
        };
        let of_vms: f64 = vms.filter(counts).map(of_vm).sum();
        self.nodes[node].other + self.nodes[node].view.other_growth.0 as f64 * grows + of_vms
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

    /// What a VM asks of the KVM of a node that it moves to.
    pub fn kvm_need(&self, number: usize) -> KvmNeed {
        let vm = &self.vms[number];
        let kvm = vm.view.kvm.or(self.nodes[vm.node].view.kvm);
        kvm.map_or(KvmNeed::Unknown, |kvm| KvmNeed::Same {
            kvm,
            ring3: vm.view.ring3,
        })
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

    /// Why a VM is not moved for balance now. What must be, such as ushering, does not ask.
    pub fn unsettled(&self, number: usize) -> Option<Immobile> {
        let (policy, vm) = (self.policy, &self.vms[number]);
        if let Some(why) = self.immobile(number, policy.cool_down.max(policy.retry_after)) {
            return Some(why);
        }
        let left = policy.settle.saturating_sub(vm.view.ran?);
        (!left.is_zero()).then_some(Immobile::JustStarted { left })
    }

    /// By what the best node was chosen.
    pub fn why_best(&self) -> &'static str {
        match self.policy.mode {
            Mode::Spread => "lowest cost of the nodes that fit",
            Mode::Pack => "most used of the nodes that fit, or lowest cost",
        }
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

/// Whether a VM has its node for itself.
pub(crate) fn is_exclusive(rules: Option<&Rules>) -> bool {
    rules.is_some_and(|rules| rules.exclusive)
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
