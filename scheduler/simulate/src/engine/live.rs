//! A policy decides: it is shown what agents report, and asked as often as it wants to be.

use std::collections::HashMap;
use std::time::Duration;

use shoal_plan::{Held, LaunchRequest, Turn, Waiting};

use super::log::{Chosen, Decision, Done, Log};
use super::{Driver, Engine, News};
use crate::measure::{MOST_SAMPLES, Sample, deviation};
use crate::model::VmSpec;
use crate::observe::{Observer, bytes};
use crate::policy::{Balancer, Orders};
use crate::world::{Life, Node};

/// Room that has been made for a VM.
#[derive(Debug)]
struct Room {
    vm: usize,
    node: shoal_plan::NodeName,
    since: f64,
}

#[derive(Debug)]
pub(super) struct Live {
    balancer: Box<dyn Balancer>,
    observer: Observer,
    next_round: f64,
    rooms: Vec<Room>,
    /// How long moves under way were expected to take, by VM.
    expected: HashMap<usize, Duration>,
    pub log: Log,
    pub series: Vec<Sample>,
    imbalances: (f64, f64),
}

impl Live {
    pub fn new(engine: &Engine<'_>, balancer: Box<dyn Balancer>) -> Self {
        Self {
            balancer,
            observer: Observer::new(&engine.nodes, &engine.vms),
            next_round: 0.0,
            rooms: Vec::new(),
            expected: HashMap::new(),
            log: Log::default(),
            series: Vec::new(),
            imbalances: (0.0, 0.0),
        }
    }

    /// Mean over time.
    pub fn imbalance(&self) -> f64 {
        self.imbalances.0 / self.imbalances.1.max(1.0)
    }

    fn tell(&mut self, engine: &mut Engine<'_>) {
        for news in engine.news.drain(..) {
            match news {
                News::Started(vm, node) => {
                    self.observer
                        .started(vm, &engine.vms[vm], &engine.scenario.nodes[node].name);
                }
                News::Ended(vm) => self.observer.ended(vm),
                News::Moved(vm, took) => {
                    if let Some(expected) = self.expected.remove(&vm) {
                        self.observer.moved(expected, took);
                    }
                }
                News::Dirties(vm, rate) => {
                    let error = engine
                        .scenario
                        .noise
                        .dirty_error(engine.chance, vm, engine.reports);
                    self.observer.measured(vm, rate * error);
                }
            }
        }
    }

    /// Whether it took effect.
    fn carry_out(&mut self, engine: &mut Engine<'_>, what: Decision) -> bool {
        let (time, reports) = (engine.now, engine.reports);
        let Some(from) = engine.carry_out(&what) else {
            return false;
        };
        self.log.done.push(Done {
            time,
            reports,
            from,
            what,
        });
        self.tell(engine);
        true
    }

    fn place(&mut self, engine: &mut Engine<'_>, vm: usize, first: bool) {
        self.tell(engine);
        let spec = engine.vms[vm].spec;
        let node = match &spec.node {
            Some(node) if first => Some(node.clone()),
            _ => self
                .balancer
                .place(&self.observer.seen(engine.now, engine.scenario), &request(spec)),
        };
        let number = node.and_then(|name| engine.scenario.nodes.iter().position(|node| node.name == name));
        if let Some(node) = number {
            self.carry_out(engine, Decision::Start { vm, node });
        }
    }

    /// Those that wait get their turn: all at once if the policy keeps a queue, else one after the other.
    fn turns(&mut self, engine: &mut Engine<'_>) {
        if engine.waiting.is_empty() {
            self.rooms.clear();
            self.observer.snapshot.held.clear();
            return;
        }
        let waiting = engine.waiting.clone();
        self.rooms.retain(|room| waiting.contains(&room.vm));
        let now = engine.now;
        let held = self.rooms.iter().map(|room| Held {
            vm: shoal_plan::VmId::new(&engine.vms[room.vm].spec.name),
            node: room.node.clone(),
            request: request(engine.vms[room.vm].spec),
            quiet: Duration::from_secs_f64((now - room.since).max(0.0)),
        });
        self.observer.snapshot.held = held.collect();
        let asked: Vec<Waiting> = waiting.iter().map(|&vm| waits(engine, vm)).collect();
        let seen = self.observer.seen(now, engine.scenario);
        let Some(turns) = self.balancer.turns(&seen, &asked) else {
            for vm in waiting {
                self.place(engine, vm, false);
            }
            return;
        };
        let node_number =
            |name: &shoal_plan::NodeName| engine.scenario.nodes.iter().position(|node| node.name == *name);
        let mut decisions = Vec::new();
        for (number, turn) in turns {
            match turn {
                Turn::Start(placement) => {
                    let vm = waiting[number];
                    decisions.extend(node_number(&placement.node).map(|node| Decision::Start { vm, node }));
                }
                Turn::Preempt(preemption) => {
                    self.rooms.push(Room {
                        vm: waiting[number],
                        node: preemption.node,
                        since: now,
                    });
                    let victims = preemption
                        .victims
                        .iter()
                        .filter_map(|id| self.observer.vm(id.as_str()));
                    decisions.extend(victims.map(Decision::Preempt));
                }
                _ => {}
            }
        }
        for decision in decisions {
            self.carry_out(engine, decision);
        }
    }

    fn round(&mut self, engine: &mut Engine<'_>) {
        self.next_round = engine.now + self.balancer.interval().max(engine.scenario.interval);
        let orders: Orders = self
            .balancer
            .round(&self.observer.seen(engine.now, engine.scenario));
        let mut decisions = Vec::new();
        for hold in &orders.suspend {
            let vm = self.observer.vm(hold.vm.as_str());
            let growth = hold.growth.0 as f64;
            decisions.extend(vm.map(|vm| Decision::Suspend { vm, growth }));
        }
        let resumed = orders
            .resume
            .iter()
            .filter_map(|hold| self.observer.vm(hold.vm.as_str()));
        decisions.extend(resumed.map(Decision::Resume));
        for decision in decisions {
            self.carry_out(engine, decision);
        }
        for chosen in &orders.moves {
            let mut nodes = engine.scenario.nodes.iter();
            let to = nodes.position(|node| node.name == chosen.to);
            let (Some(vm), Some(to)) = (self.observer.vm(chosen.vm.as_str()), to) else {
                continue;
            };
            let begun = self.carry_out(
                engine,
                Decision::Move(Chosen {
                    vm,
                    to,
                    kind: chosen.kind,
                    predicted: chosen.predicted,
                }),
            );
            if let Some(expected) = chosen.expected.filter(|_| begun) {
                self.expected.insert(vm, expected);
            }
        }
    }

    fn sample(&mut self, engine: &Engine<'_>) {
        let (nodes, scenario) = (&engine.nodes, engine.scenario);
        let spread = |part: fn(&Node<'_>) -> f64| deviation(nodes.iter().map(part));
        let imbalance = spread(|node| node.load / f64::from(node.spec.cpus))
            + spread(|node| node.used / node.spec.memory as f64);
        self.imbalances = (self.imbalances.0 + imbalance, self.imbalances.1 + 1.0);
        let step = scenario.duration / MOST_SAMPLES as f64;
        if engine.now >= self.series.len() as f64 * step && self.series.len() < MOST_SAMPLES {
            let threshold = scenario.policy.usher_threshold;
            let count =
                |which: &dyn Fn(&&Node<'_>) -> bool| nodes.iter().filter(|node| which(node)).count() as f64;
            self.series.push(Sample {
                time: engine.now,
                imbalance,
                active: count(&|node| !node.is_idle()),
                above: count(&|node| node.used > threshold * node.spec.memory as f64),
            });
        }
    }

    /// What it is shown.
    #[cfg(test)]
    pub fn seen(&self) -> &shoal_plan::ClusterSnapshot {
        &self.observer.snapshot
    }
}

impl Driver for Live {
    fn arrived(&mut self, engine: &mut Engine<'_>, vm: usize, first: bool) {
        self.place(engine, vm, first);
    }

    fn reported(&mut self, engine: &mut Engine<'_>) {
        self.tell(engine);
        self.log.harm.push(engine.harm());
        let looks = crate::observe::Looks {
            now: engine.now,
            reports: engine.reports,
            chance: engine.chance,
            scenario: engine.scenario,
            nodes: &engine.nodes,
            vms: &engine.vms,
            migrations: &engine.migrations,
        };
        self.observer.report(&looks);
        self.sample(engine);
        self.turns(engine);
        if engine.now + 1e-9 >= self.next_round {
            self.round(engine);
        }
    }
}

fn request(spec: &VmSpec) -> LaunchRequest {
    LaunchRequest {
        cpus: spec.cpus,
        memory: bytes(spec.declared),
        priority: spec.priority,
        ..LaunchRequest::default()
    }
}

fn waits(engine: &Engine<'_>, vm: usize) -> Waiting {
    let vm = &engine.vms[vm];
    debug_assert_eq!(vm.life, Life::Waiting);
    Waiting {
        id: shoal_plan::VmId::new(&vm.spec.name),
        name: vm.spec.name.clone(),
        request: request(vm.spec),
        since: Duration::from_secs_f64((engine.now - vm.waits_since).max(0.0)),
    }
}
