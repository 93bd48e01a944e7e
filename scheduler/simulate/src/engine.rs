//! The run: events in the order of their time, the world advanced from one to the next, reports and rounds in between.

mod lives;
mod moves;

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::measure::{MOST_SAMPLES, Outcome, Sample, deviation, mean, percentile};
use crate::migration::Migration;
use crate::model::{Scenario, VmSpec};
use crate::observe::Observer;
use crate::policy::{Balancer, Observation, PolicyKind};
use crate::world::{Life, Node, Vm};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Arrive(usize),
    Restart(usize),
    Depart(usize),
    /// What a VM wants changes.
    Segment(usize),
    /// A job on the node has done its work, if the node's rates are still those of this generation.
    Work(usize, u64),
    Step(usize, u64),
    Report,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    time: f64,
    sequence: u64,
    event: Event,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.time
            .total_cmp(&other.time)
            .then(self.sequence.cmp(&other.sequence))
    }
}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Entry {}

#[derive(Debug, Default)]
struct Counters {
    oom: f64,
    migrations: f64,
    failed: f64,
    bytes: f64,
    downtime_max: f64,
    undone: f64,
    waiting: f64,
}

struct Engine<'a> {
    scenario: &'a Scenario,
    balancer: Box<dyn Balancer>,
    now: f64,
    queue: BinaryHeap<Reverse<Entry>>,
    sequence: u64,
    nodes: Vec<Node<'a>>,
    vms: Vec<Vm<'a>>,
    migrations: Vec<Option<Migration>>,
    /// Numbers of those under way.
    under_way: Vec<usize>,
    free: Vec<usize>,
    generation: u64,
    waiting: Vec<usize>,
    changed: Vec<usize>,
    observer: Observer,
    next_round: f64,
    counters: Counters,
    series: Vec<Sample>,
    imbalance: (f64, f64),
    fastest: f64,
}

/// Runs one policy once. The same scenario, policy and seed give the same outcome.
#[must_use]
pub fn run(scenario: &Scenario, kind: PolicyKind, seed: u64) -> Outcome {
    run_with(scenario, kind.name(), kind.build(scenario, seed), seed)
}

/// Runs a policy of one's own.
#[must_use]
pub fn run_with(scenario: &Scenario, name: &str, balancer: Box<dyn Balancer>, seed: u64) -> Outcome {
    let specs = vm_specs(scenario, seed);
    let mut engine = Engine::new(scenario, balancer, &specs);
    engine.run();
    engine.outcome(name)
}

/// The VMs of a run.
#[must_use]
pub fn vm_specs(scenario: &Scenario, seed: u64) -> Vec<VmSpec> {
    let mut specs = Vec::new();
    for (number, workload) in scenario.workloads.iter().enumerate() {
        workload.generate(seed, number, scenario.duration, &scenario.nodes, &mut specs);
    }
    specs
}

impl<'a> Engine<'a> {
    fn new(scenario: &'a Scenario, balancer: Box<dyn Balancer>, specs: &'a [VmSpec]) -> Self {
        let nodes: Vec<Node<'a>> = scenario.nodes.iter().map(Node::new).collect();
        let vms: Vec<Vm<'a>> = specs.iter().map(Vm::new).collect();
        let mut engine = Self {
            observer: Observer::new(&nodes, &vms),
            scenario,
            balancer,
            now: 0.0,
            queue: BinaryHeap::new(),
            sequence: 0,
            nodes,
            vms,
            migrations: Vec::new(),
            under_way: Vec::new(),
            free: Vec::new(),
            generation: 0,
            waiting: Vec::new(),
            changed: Vec::new(),
            next_round: 0.0,
            counters: Counters::default(),
            series: Vec::new(),
            imbalance: (0.0, 0.0),
            fastest: scenario.fastest(),
        };
        for (number, spec) in specs.iter().enumerate() {
            engine.at(spec.arrival, Event::Arrive(number));
        }
        engine.at(scenario.interval, Event::Report);
        engine
    }

    fn at(&mut self, time: f64, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse(Entry {
            time,
            sequence: self.sequence,
            event,
        }));
    }

    fn run(&mut self) {
        while let Some(Reverse(entry)) = self.queue.pop() {
            if entry.time > self.scenario.duration {
                break;
            }
            self.now = entry.time.max(self.now);
            self.handle(entry.event);
            self.settle();
        }
        self.now = self.scenario.duration;
        for node in 0..self.nodes.len() {
            self.touch(node);
        }
        for number in 0..self.vms.len() {
            self.account_idle(number);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive(vm) | Event::Restart(vm) => {
                if matches!(self.vms[vm].life, Life::Future | Life::Restarting) {
                    let first = self.vms[vm].life == Life::Future;
                    if first {
                        self.vms[vm].idle_since = self.now;
                        if let Some(lifetime) = self.vms[vm].spec.lifetime {
                            self.at(self.now + lifetime, Event::Depart(vm));
                        }
                    }
                    self.vms[vm].life = Life::Waiting;
                    self.waiting.push(vm);
                    self.place_waiting_one(vm, first);
                }
            }
            Event::Depart(vm) => self.end(vm),
            Event::Segment(vm) => {
                if let Life::On(node) = self.vms[vm].life {
                    self.touch(node);
                    self.next_segment(vm);
                }
            }
            Event::Work(node, generation) => {
                if self.nodes[node].generation == generation {
                    self.touch(node);
                    let done = |vm: &&usize| self.vms[**vm].work_left <= 1e-9;
                    let ended: Vec<usize> = self.nodes[node].vms.iter().filter(done).copied().collect();
                    for vm in ended {
                        self.end(vm);
                    }
                }
            }
            Event::Step(migration, generation) => self.step_migration(migration, generation),
            Event::Report => self.report(),
        }
    }

    /// Brings a node up to now; its rates are divided anew when the event is over.
    fn touch(&mut self, node: usize) {
        let threshold = self.scenario.policy.usher_threshold;
        self.nodes[node].advance(self.now, &mut self.vms, threshold, &self.scenario.migration);
        self.changed.push(node);
    }

    /// Divides CPUs anew where something changed.
    fn settle(&mut self) {
        self.changed.sort_unstable();
        self.changed.dedup();
        for node in std::mem::take(&mut self.changed) {
            let arrived = self.arrived(node);
            let (memory, logging) = (&self.scenario.memory, self.scenario.migration.logging);
            self.nodes[node].share(&mut self.vms, arrived, memory, logging);
            let generation = self.nodes[node].generation;
            let ends = |vm: &Vm<'_>| self.now + (vm.work_left / vm.given).max(0.0);
            let jobs = self.nodes[node].vms.iter().map(|&vm| &self.vms[vm]);
            let soonest = jobs
                .filter(|vm| vm.work_left.is_finite() && vm.given > 0.0)
                .map(ends)
                .fold(f64::INFINITY, f64::min);
            if soonest.is_finite() {
                self.at(soonest, Event::Work(node, generation));
            }
        }
    }

    fn arrived(&self, node: usize) -> f64 {
        let incoming = self.nodes[node].incoming.iter();
        let migrations = incoming.filter_map(|&number| self.migrations[number].as_ref());
        migrations
            .map(|migration| migration.arrived(self.vms[migration.vm].resident))
            .sum()
    }

    fn report(&mut self) {
        for node in 0..self.nodes.len() {
            self.touch(node);
        }
        self.kill();
        self.settle();
        let interval = self.scenario.interval;
        self.observer
            .report(self.now, interval, &self.nodes, &self.vms, &self.migrations);
        self.sample();
        for vm in self.waiting.clone() {
            self.place_waiting_one(vm, false);
        }
        if self.now + 1e-9 >= self.next_round {
            self.next_round = self.now + self.balancer.interval().max(interval);
            let seen = Observation {
                now: self.now,
                snapshot: &self.observer.snapshot,
                loads: &self.observer.loads,
                policy: &self.scenario.policy,
            };
            for chosen in self.balancer.round(&seen) {
                self.begin(&chosen);
            }
        }
        self.at(self.now + interval, Event::Report);
    }

    fn sample(&mut self) {
        let spread = |part: fn(&Node<'_>) -> f64| deviation(self.nodes.iter().map(part));
        let imbalance = spread(|node| node.load / f64::from(node.spec.cpus))
            + spread(|node| node.used / node.spec.memory as f64);
        self.imbalance = (self.imbalance.0 + imbalance, self.imbalance.1 + 1.0);
        let step = self.scenario.duration / MOST_SAMPLES as f64;
        if self.now >= self.series.len() as f64 * step && self.series.len() < MOST_SAMPLES {
            let threshold = self.scenario.policy.usher_threshold;
            let count = |which: &dyn Fn(&&Node<'_>) -> bool| {
                self.nodes.iter().filter(|node| which(node)).count() as f64
            };
            self.series.push(Sample {
                time: self.now,
                imbalance,
                active: count(&|node| !node.is_idle()),
                above: count(&|node| node.used > threshold * node.spec.memory as f64),
            });
        }
    }

    fn outcome(&self, name: &str) -> Outcome {
        let mut slowdowns: Vec<f64> = self.vms.iter().filter_map(Vm::slowdown).collect();
        let active: f64 = self.nodes.iter().map(|node| node.totals.active).sum();
        let energy = self.nodes.iter().map(|node| node.totals.joules).sum::<f64>() / 3.6e6;
        let saturated: f64 = self.nodes.iter().map(|node| node.totals.saturated).sum();
        let slatah = saturated / active.max(1e-9);
        let wanting = self.vms.iter().filter(|vm| vm.wanted_total > 1e-9);
        let pdm = mean(wanting.map(|vm| vm.degraded / vm.wanted_total));
        let lives = |which: fn(Life) -> bool| self.vms.iter().filter(|vm| which(vm.life)).count() as f64;
        Outcome {
            policy: name.to_owned(),
            slowdown_mean: mean(slowdowns.iter().copied()),
            slowdown_p99: percentile(&mut slowdowns, 0.99),
            above_threshold: self.nodes.iter().map(|node| node.totals.above_threshold).sum(),
            oom: self.counters.oom,
            migrations: self.counters.migrations,
            failed: self.counters.failed,
            bytes: self.counters.bytes,
            downtime_max: self.counters.downtime_max,
            undone: self.counters.undone,
            waiting: self.counters.waiting,
            imbalance: self.imbalance.0 / self.imbalance.1.max(1.0),
            active: active / self.scenario.duration,
            energy,
            slatah,
            pdm,
            esv: energy * slatah * pdm,
            ended: lives(|life| life == Life::Ended),
            left: lives(|life| matches!(life, Life::On(_) | Life::Waiting | Life::Restarting)),
            series: self.series.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
