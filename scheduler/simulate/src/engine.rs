//! The run: events in the order of their time, the world advanced from one to the next, reports and rounds in between. Who decides
//! is a [`Driver`]: a policy, or the record of what one did.

mod judge;
mod live;
mod lives;
mod log;
mod moves;

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};

use self::live::Live;
use self::log::{Harm, Recent};
use crate::measure::{Outcome, mean, percentile};
use crate::migration::Migration;
use crate::model::{Mode, Scenario, VmSpec};
use crate::noise::Chance;
use crate::policy::{Balancer, PolicyKind};
use crate::world::{Life, Node, Vm};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Arrive(usize),
    Restart(usize),
    Depart(usize),
    /// A VM has booted.
    Booted(usize),
    /// What a VM wants changes.
    Segment(usize),
    /// What other tenants of a node use changes.
    Tenant(usize),
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

#[derive(Debug, Clone, Default)]
struct Counters {
    oom: f64,
    /// Migrations that were begun.
    begun: f64,
    migrations: f64,
    failed: f64,
    bytes: f64,
    downtime_max: f64,
    undone: f64,
    equals: f64,
    waiting: f64,
    suspended: f64,
    preempted: f64,
}

/// What a driver that keeps views of its own has to be told.
#[derive(Debug, Clone, Copy)]
enum News {
    /// A VM has been started on a node.
    Started(usize, usize),
    /// It is on no node any more.
    Ended(usize),
    /// A move of it has ended, and has taken so many seconds.
    Moved(usize, f64),
    /// A migration has measured how fast it dirties memory.
    Dirties(usize, f64),
}

/// Decides where VMs start and what is moved.
trait Driver {
    /// A VM has no place: for the first time, or once more.
    fn arrived(&mut self, engine: &mut Engine<'_>, vm: usize, first: bool);

    /// The agents have looked; the world is up to date.
    fn reported(&mut self, engine: &mut Engine<'_>);
}

#[derive(Debug, Clone)]
struct Engine<'a> {
    scenario: &'a Scenario,
    chance: Chance,
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
    news: Vec<News>,
    recent: Recent,
    /// Reports so far.
    reports: u64,
    /// Limits on migrations at once hold.
    limited: bool,
    counters: Counters,
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
    let mut engine = Engine::new(scenario, &specs, seed);
    let mut live = Live::new(&engine, balancer);
    engine.run(&mut live);
    let mut outcome = engine.outcome(name, &live);
    if scenario.mode == Mode::Spread && scenario.judged > 0 {
        let start = Engine::new(scenario, &specs, seed);
        judge::judge(start, &live.log, scenario.judged, seed, &mut outcome);
    }
    outcome
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
    fn new(scenario: &'a Scenario, specs: &'a [VmSpec], seed: u64) -> Self {
        let chance = Chance::new(seed);
        let noise = &scenario.noise;
        let vms = specs.iter().enumerate().map(|(number, spec)| {
            let boot = if spec.boots {
                noise.boot(chance, number)
            } else {
                0.0
            };
            Vm::new(spec, boot)
        });
        let mut engine = Self {
            scenario,
            chance,
            now: 0.0,
            queue: BinaryHeap::new(),
            sequence: 0,
            nodes: scenario.nodes.iter().map(Node::new).collect(),
            vms: vms.collect(),
            migrations: Vec::new(),
            under_way: Vec::new(),
            free: Vec::new(),
            generation: 0,
            waiting: Vec::new(),
            changed: Vec::new(),
            news: Vec::new(),
            recent: Recent::default(),
            reports: 0,
            limited: true,
            counters: Counters::default(),
            fastest: scenario.fastest(),
        };
        for (number, spec) in specs.iter().enumerate() {
            engine.at(spec.arrival, Event::Arrive(number));
        }
        if noise.tenants > 0.0 {
            for node in 0..engine.nodes.len() {
                engine.at(0.0, Event::Tenant(node));
            }
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

    fn run(&mut self, driver: &mut dyn Driver) {
        while let Some(Reverse(entry)) = self.queue.pop() {
            if entry.time > self.scenario.duration {
                break;
            }
            self.go_on(entry, driver);
        }
        self.now = self.scenario.duration;
        for node in 0..self.nodes.len() {
            self.touch(node);
        }
        for number in 0..self.vms.len() {
            self.account_idle(number);
        }
    }

    fn go_on(&mut self, entry: Entry, driver: &mut dyn Driver) {
        self.now = entry.time.max(self.now);
        self.handle(entry.event, driver);
        self.settle();
    }

    /// Goes on until so many reports have been made; false if the simulation is over before.
    fn run_to(&mut self, reports: u64, driver: &mut dyn Driver) -> bool {
        while self.reports < reports {
            match self.queue.pop() {
                Some(Reverse(entry)) if entry.time <= self.scenario.duration => self.go_on(entry, driver),
                _ => return false,
            }
        }
        true
    }

    /// What moves are to avoid, so far.
    fn harm(&self) -> Harm {
        Harm {
            lost: self.vms.iter().map(|vm| vm.wanted_total - vm.given_total).sum(),
            above: self.nodes.iter().map(|node| node.totals.above_threshold).sum(),
        }
    }

    fn handle(&mut self, event: Event, driver: &mut dyn Driver) {
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
                    driver.arrived(self, vm, first);
                }
            }
            Event::Depart(vm) => self.end(vm),
            Event::Booted(vm) => self.booted(vm),
            Event::Segment(vm) => {
                if let Life::On(node) = self.vms[vm].life
                    && !self.vms[vm].booting
                {
                    self.touch(node);
                    self.next_segment(vm);
                }
            }
            Event::Tenant(node) => {
                self.touch(node);
                let node_spec = self.nodes[node].spec;
                let (tenant, lasts) =
                    self.scenario
                        .noise
                        .tenant(self.chance, node, self.nodes[node].visits, node_spec);
                self.nodes[node].visits += 1;
                self.nodes[node].tenant = tenant;
                self.at(self.now + lasts, Event::Tenant(node));
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
            Event::Report => self.report(driver),
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

    fn report(&mut self, driver: &mut dyn Driver) {
        for node in 0..self.nodes.len() {
            self.touch(node);
        }
        for vm in self.waiting.clone() {
            self.account_idle(vm);
        }
        self.kill();
        self.settle();
        driver.reported(self);
        self.reports += 1;
        self.at(self.now + self.scenario.interval, Event::Report);
    }

    fn outcome(&self, name: &str, live: &Live) -> Outcome {
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
            begun: self.counters.begun,
            judged: 0.0,
            needless: 0.0,
            unpaid: 0.0,
            realised: 0.0,
            predicted: 0.0,
            realised_of_predicted: 0.0,
            by_reason: BTreeMap::new(),
            equals: self.counters.equals,
            suspended: self.counters.suspended,
            preempted: self.counters.preempted,
            waiting: self.counters.waiting,
            imbalance: live.imbalance(),
            active: active / self.scenario.duration,
            energy,
            slatah,
            pdm,
            esv: energy * slatah * pdm,
            ended: lives(|life| life == Life::Ended),
            left: lives(|life| matches!(life, Life::On(_) | Life::Waiting | Life::Restarting)),
            series: live.series.clone(),
        }
    }
}

#[cfg(test)]
mod tests;
