//! What a policy sees: the snapshot that Shoal's server would make of the agents' reports, smoothed as the server does it.

use std::collections::HashMap;
use std::time::Duration;

use shoal_estimate::{Meter, WINDOW};
use shoal_plan::{
    Bytes, BytesPerSecond, CannotMove, ClusterSnapshot, Growth, InFlight, NodeName, NodeView, Policy, VmView,
};

use crate::migration::Migration;
use crate::sampled::SampledLoad;
use crate::world::{Life, Node, Vm};

/// After so many samples of the same value a smoothed one has reached it.
const MOST_SAMPLES: u32 = 64;

/// The reports so far.
#[derive(Debug)]
pub(crate) struct Observer {
    pub snapshot: ClusterSnapshot,
    /// For policies that go by run queues.
    pub loads: Vec<SampledLoad>,
    vms: Vec<Seen>,
    numbers: HashMap<String, usize>,
}

#[derive(Debug, Clone, Default)]
struct Seen {
    /// Place in the snapshot.
    at: Option<usize>,
    cpu: Meter,
    growth: Growth,
    node: Option<usize>,
    dirty: Option<f64>,
}

impl Observer {
    pub fn new(nodes: &[Node<'_>], vms: &[Vm<'_>]) -> Self {
        let views = nodes.iter().map(|node| {
            let mut view = NodeView::new(node.spec.name.as_str(), node.spec.cpus, Bytes(node.spec.memory));
            view.speed = node.spec.speed;
            view
        });
        Self {
            snapshot: ClusterSnapshot {
                nodes: views.collect(),
                vms: Vec::new(),
                ..ClusterSnapshot::default()
            },
            loads: vec![SampledLoad::default(); nodes.len()],
            vms: vec![Seen::default(); vms.len()],
            numbers: vms
                .iter()
                .enumerate()
                .map(|(number, vm)| (vm.spec.name.clone(), number))
                .collect(),
        }
    }

    /// The VM of this id.
    pub fn vm(&self, id: &str) -> Option<usize> {
        self.numbers.get(id).copied()
    }

    /// A VM has just been started and is not in any report yet.
    pub fn started(&mut self, number: usize, vm: &Vm<'_>, node: &NodeName) {
        let mut view = VmView::new(
            &vm.spec.name,
            node.as_str(),
            vm.spec.cpus,
            bytes(vm.spec.declared),
        );
        view.cannot_move = Some(CannotMove::Starting);
        self.vms[number] = Seen {
            at: Some(self.snapshot.vms.len()),
            ..Seen::default()
        };
        self.snapshot.vms.push(view);
    }

    /// A VM has ended.
    pub fn ended(&mut self, number: usize) {
        if let Some(at) = self.vms[number].at.take() {
            self.snapshot.vms.swap_remove(at);
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

    /// One report from every agent, `interval` after the last one.
    pub fn report(
        &mut self,
        now: f64,
        interval: f64,
        nodes: &[Node<'_>],
        vms: &[Vm<'_>],
        migrations: &[Option<Migration>],
    ) {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates; not negative
        let samples = (interval.round() as u32).clamp(1, MOST_SAMPLES);
        for ((node, view), load) in nodes.iter().zip(&mut self.snapshot.nodes).zip(&mut self.loads) {
            for _ in 0..samples {
                load.update(node.load);
            }
            view.memory_available = bytes(node.spec.memory as f64 - node.used);
            view.pressure_memory = (1.0 - node.memory_factor) * 100.0;
        }
        for (number, vm) in vms.iter().enumerate() {
            let (Some(at), Life::On(node)) = (self.vms[number].at, vm.life) else {
                continue;
            };
            let (view, seen) = (&mut self.snapshot.vms[at], &mut self.vms[number]);
            if seen.node != Some(node) {
                seen.growth = Growth::default();
                seen.node = Some(node);
                view.node = nodes[node].spec.name.clone();
            }
            let resident = bytes(vm.resident);
            view.growth = seen.growth.update(resident, Duration::from_secs_f64(interval));
            view.resident = Some(resident);
            // A VM gets CPUs of its node; the plan counts what it wants in those.
            let wanted = (vm.wanted / nodes[node].spec.speed).min(f64::from(vm.spec.cpus));
            seen.cpu.update(wanted, Duration::from_secs_f64(interval));
            view.cpu = (seen.cpu.age() >= WINDOW).then(|| seen.cpu.value());
            view.ran = Some(seen.cpu.age());
            view.dirty_rate = seen.dirty.map(|rate| BytesPerSecond(bytes(rate).0));
            view.cannot_move = None;
            view.since_last_move = vm
                .last_move
                .map(|(_, at)| Duration::from_secs_f64((now - at).max(0.0)));
            view.in_flight = vm.migration.and_then(|migration| {
                let migration = migrations[migration].as_ref()?;
                Some(InFlight {
                    to: nodes[migration.to].spec.name.clone(),
                    received: bytes(migration.arrived(vm.resident)),
                })
            });
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
    /// Shoal's constants; the limits hold for all.
    pub policy: &'a Policy,
    /// Run queues as sampled, of the snapshot's nodes.
    pub loads: &'a [SampledLoad],
}

pub(crate) fn bytes(amount: f64) -> Bytes {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    // float casts saturate, and it is not negative
    Bytes(amount.max(0.0) as u64)
}
