//! What a policy sees: the snapshot that Shoal's server would make of the agents' reports, and what common tools show besides.
//! Reports are noisy and come late; what the server has decided itself it knows at once.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use shoal_estimate::{Estimate, Meter, WINDOW};
use shoal_plan::{
    Bytes, BytesPerSecond, CannotMove, ClusterSnapshot, Growth, InFlight, NodeName, NodeView, Policy,
    SteadyGrowth, VmView,
};

use crate::foresight::Foresight;
use crate::migration::Migration;
use crate::model::Scenario;
use crate::noise::Chance;
use crate::smooth::{ExportedLoad, LocalLoad};
use crate::world::{Life, Node, Vm};

/// After so many samples of the same value a smoothed one has reached it.
const MOST_SAMPLES: u32 = 64;

/// The world at the moment of a report.
pub(crate) struct Looks<'w, 'a> {
    pub now: f64,
    /// Reports before this one.
    pub reports: u64,
    pub chance: Chance,
    pub scenario: &'a Scenario,
    pub nodes: &'w [Node<'a>],
    pub vms: &'w [Vm<'a>],
    pub migrations: &'w [Option<Migration>],
}

/// A node's report on its way.
#[derive(Debug)]
struct Report {
    taken: f64,
    due: f64,
    /// Threads that were runnable.
    runnable: f64,
    available: f64,
    pressure: f64,
    /// Held by what is no VM, and CPUs that it uses.
    other_memory: f64,
    other: Estimate,
    vms: Vec<VmReport>,
}

#[derive(Debug)]
struct VmReport {
    vm: usize,
    resident: f64,
    /// CPUs that it used.
    used: f64,
    /// CPUs that it would use if it got them, if that is known by now.
    demand: Option<Estimate>,
}

/// The reports so far.
#[derive(Debug)]
pub(crate) struct Observer {
    pub snapshot: ClusterSnapshot,
    samples: Samples,
    foresight: Foresight,
    nodes: Vec<SeenNode>,
    vms: Vec<SeenVm>,
    numbers: HashMap<String, usize>,
}

#[derive(Debug, Default)]
struct SeenNode {
    inbox: VecDeque<Report>,
    local: LocalLoad,
    exported: ExportedLoad,
    /// What is no VM: its memory, and its CPUs.
    memory: SteadyGrowth,
    other: Meter,
}

#[derive(Debug, Clone, Default)]
struct SeenVm {
    /// Place in the snapshot.
    at: Option<usize>,
    used: LocalLoad,
    /// Its agent's, and which node's that is.
    demand: Meter,
    metered_on: Option<usize>,
    growth: Growth,
    node: Option<usize>,
    dirty: Option<f64>,
}

/// What common tools show of CPUs: threads that are runnable at one instant, and CPUs used, smoothed as openMosix did. Who has
/// waited for a CPU, and for how long, they do not know.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Samples {
    /// By node of the snapshot.
    pub nodes: Vec<RunQueue>,
    /// CPUs used by each VM of the snapshot.
    pub vms: Vec<f64>,
}

/// Threads of a node that want to run.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RunQueue {
    /// As the node sees itself: rises slowly, falls at once.
    pub local: f64,
    /// As others see it: rises at once, falls slowly.
    pub exported: f64,
}

impl Observer {
    pub fn new(nodes: &[Node<'_>], vms: &[Vm<'_>]) -> Self {
        let views = nodes.iter().map(|node| {
            let mut view = NodeView::new(node.spec.name.as_str(), node.spec.cpus, Bytes(node.spec.memory));
            view.speed = node.spec.speed;
            view
        });
        let numbers = vms.iter().enumerate();
        Self {
            snapshot: ClusterSnapshot {
                nodes: views.collect(),
                vms: Vec::new(),
                ..ClusterSnapshot::default()
            },
            samples: Samples {
                nodes: vec![RunQueue::default(); nodes.len()],
                vms: Vec::new(),
            },
            foresight: Foresight::new(nodes.len()),
            nodes: nodes.iter().map(|_| SeenNode::default()).collect(),
            vms: vec![SeenVm::default(); vms.len()],
            numbers: numbers
                .map(|(number, vm)| (vm.spec.name.clone(), number))
                .collect(),
        }
    }

    /// The VM of this id.
    pub fn vm(&self, id: &str) -> Option<usize> {
        self.numbers.get(id).copied()
    }

    /// All that a policy is shown.
    pub fn seen<'a>(&'a self, now: f64, scenario: &'a Scenario) -> Observation<'a> {
        Observation {
            now,
            snapshot: &self.snapshot,
            samples: &self.samples,
            policy: &scenario.policy,
        }
    }

    /// A VM has just been started and is not in any report yet.
    pub fn started(&mut self, number: usize, vm: &Vm<'_>, node: &NodeName) {
        let spec = vm.spec;
        let mut view = VmView::new(&spec.name, node.as_str(), spec.cpus, bytes(spec.declared));
        (view.cannot_move, view.cpu) = (Some(CannotMove::Starting), None);
        (view.priority, view.preemptible) = (spec.priority, spec.preemptible);
        self.vms[number] = SeenVm {
            at: Some(self.snapshot.vms.len()),
            ..SeenVm::default()
        };
        self.snapshot.vms.push(view);
        self.samples.vms.push(0.0);
    }

    /// A VM has ended.
    pub fn ended(&mut self, number: usize) {
        if let Some(at) = self.vms[number].at.take() {
            self.snapshot.vms.swap_remove(at);
            self.samples.vms.swap_remove(at);
            if let Some(moved) = self.snapshot.vms.get(at)
                && let Some(&number) = self.numbers.get(moved.id.as_str())
            {
                self.vms[number].at = Some(at);
            }
        }
    }

    /// A migration has moved so much in so long: the dirty rate is known from now on.
    pub fn measured(&mut self, vm: usize, dirty_rate: f64) {
        self.vms[vm].dirty = Some(dirty_rate);
    }

    /// A move has ended that was expected to take so long.
    pub fn moved(&mut self, expected: Duration, took: f64) {
        self.foresight.moved(expected, took);
    }

    /// Every agent reports; what is due arrives.
    pub fn report(&mut self, looks: &Looks<'_, '_>) {
        for node in 0..looks.nodes.len() {
            let report = self.take(looks, node);
            self.nodes[node].inbox.push_back(report);
            while let Some(report) = self.nodes[node].inbox.front()
                && report.due <= looks.now
                && let Some(report) = self.nodes[node].inbox.pop_front()
            {
                self.arrives(looks, node, &report);
            }
            let age = self.foresight.report_age(node, looks.now);
            self.snapshot.nodes[node].report_age = Duration::from_secs_f64(age);
            self.tell_link(looks, node);
        }
        self.snapshot.margins = self.foresight.margins();
        for number in 0..looks.vms.len() {
            self.know(looks, number);
        }
    }

    fn arrives(&mut self, looks: &Looks<'_, '_>, node: usize, report: &Report) {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates; not negative
        let samples = (looks.scenario.interval.round() as u32).clamp(1, MOST_SAMPLES);
        let interval = Duration::from_secs_f64(looks.scenario.interval);
        let (seen, queue) = (&mut self.nodes[node], &mut self.samples.nodes[node]);
        for _ in 0..samples {
            queue.local = seen.local.update(report.runnable);
            queue.exported = seen.exported.update(report.runnable);
        }
        let view = &mut self.snapshot.nodes[node];
        view.memory_available = bytes(report.available);
        view.other_growth = seen.memory.update(bytes(report.other_memory), interval);
        view.other = report.other;
        view.pressure_memory = report.pressure;
        let (mut held, mut rate) = (0.0, 0.0);
        for told in &report.vms {
            let vm = &looks.vms[told.vm];
            let Some(at) = self.vms[told.vm].at else { continue };
            // It was started or has come here since, or has left.
            if vm.life != Life::On(node) || vm.arrived_at > report.taken {
                continue;
            }
            let (view, seen) = (&mut self.snapshot.vms[at], &mut self.vms[told.vm]);
            if seen.node != Some(node) {
                (seen.growth, seen.node) = (Growth::default(), Some(node));
            }
            let resident = bytes(told.resident);
            view.resident = Some(resident);
            view.growth = seen.growth.update(resident, interval);
            (held, rate) = (held + told.resident, rate + view.growth.0 as f64);
            // It is the same guest as before a move: what was known of it holds until more is.
            view.cpu = told.demand.or(view.cpu);
            for _ in 0..samples {
                self.samples.vms[at] = seen.used.update(told.used);
            }
            if view.cannot_move == Some(CannotMove::Starting) {
                view.cannot_move = None;
            }
        }
        let vms: Vec<usize> = report.vms.iter().map(|told| told.vm).collect();
        let seconds = looks.scenario.interval;
        self.foresight
            .reported(node, looks.now, seconds, &vms, (held, rate));
    }

    /// What moves through a node's link are expected to get.
    fn tell_link(&mut self, looks: &Looks<'_, '_>, node: usize) {
        let noise = &looks.scenario.noise;
        if noise.link > 0.0 {
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // minutes of a month
            let minute = (looks.now / 60.0) as u64;
            let rate = looks.scenario.migration.link * noise.link_error(looks.chance, node, minute);
            self.snapshot.nodes[node].link_rate = Some(BytesPerSecond(bytes(rate).0));
        }
    }

    /// What the server knows of a VM without being told.
    fn know(&mut self, looks: &Looks<'_, '_>, number: usize) {
        let vm = &looks.vms[number];
        let (Some(at), Life::On(node)) = (self.vms[number].at, vm.life) else {
            return;
        };
        let view = &mut self.snapshot.vms[at];
        let since = |at: f64| Duration::from_secs_f64((looks.now - at).max(0.0));
        if view.node != looks.nodes[node].spec.name {
            view.node = looks.nodes[node].spec.name.clone();
        }
        view.dirty_rate = self.vms[number].dirty.map(|rate| BytesPerSecond(bytes(rate).0));
        view.since_last_move = vm.last_move.map(|(_, at)| since(at));
        view.ran = Some(since(vm.started_at));
        view.longest_pause = vm.longest_pause.map(Duration::from_secs_f64);
        view.suspended = vm.suspended.is_some();
        view.suspended_growth = vm.suspended.map(|growth| BytesPerSecond(bytes(growth).0));
        if view.suspended {
            view.growth = BytesPerSecond(0);
        }
        view.in_flight = vm.migration.and_then(|migration| {
            let migration = looks.migrations[migration].as_ref()?;
            Some(InFlight {
                to: looks.nodes[migration.to].spec.name.clone(),
                received: bytes(migration.arrived(vm.resident)),
            })
        });
    }

    /// What a node's agent sees.
    fn take(&mut self, looks: &Looks<'_, '_>, number: usize) -> Report {
        let (node, noise) = (&looks.nodes[number], &looks.scenario.noise);
        let (chance, reports) = (looks.chance, looks.reports);
        let interval = Duration::from_secs_f64(looks.scenario.interval);
        let speed = node.spec.speed;
        let others = node.tenant.cpu / speed;
        let mut runnable = others;
        let mut vms = Vec::with_capacity(node.vms.len());
        for &vm in &node.vms {
            let state = &looks.vms[vm];
            let seen = &mut self.vms[vm];
            if seen.metered_on != Some(number) {
                (seen.demand, seen.metered_on) = (Meter::default(), Some(number));
            }
            let error = noise.cpu_error(chance, vm, reports);
            // A VM gets CPUs of its node; what it uses and wants is counted in those.
            let most = f64::from(state.spec.cpus);
            let stands = state.paused || state.suspended.is_some();
            let wanted = if stands {
                0.0
            } else {
                (state.wanted / speed).min(most)
            };
            if !stands {
                runnable += noise.runnable(chance, vm, reports, state.spec.cpus, wanted);
                seen.demand.update((wanted * error).min(most), interval);
            }
            vms.push(VmReport {
                vm,
                resident: state.resident,
                used: state.given / speed * error,
                demand: (seen.demand.age() >= WINDOW).then(|| seen.demand.value()),
            });
        }
        let seen = &mut self.nodes[number];
        // Nodes have numbers of their own, after those of the VMs.
        let error = noise.cpu_error(chance, looks.vms.len() + number, reports);
        seen.other.update(others * error, interval);
        Report {
            taken: looks.now,
            due: looks.now + noise.report_delay(chance, number, reports),
            runnable,
            available: node.spec.memory as f64 - node.used,
            pressure: (1.0 - node.memory_factor) * 100.0,
            other_memory: node.tenant.memory,
            other: seen.other.value(),
            vms,
        }
    }
}

/// Cluster and constants, as a policy is given them.
#[derive(Debug, Clone, Copy)]
pub struct Observation<'a> {
    /// Seconds since the start.
    pub now: f64,
    /// What the agents reported.
    pub snapshot: &'a ClusterSnapshot,
    /// What common tools show, for policies that decide by it.
    pub samples: &'a Samples,
    /// Shoal's constants; the limits hold for all.
    pub policy: &'a Policy,
}

pub(crate) fn bytes(amount: f64) -> Bytes {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    // float casts saturate, and it is not negative
    Bytes(amount.max(0.0) as u64)
}
