//! VMs of a run: placed, started, changed by their workload, ended or killed.

use shoal_plan::{LaunchRequest, NodeName};

use super::{Engine, Event};
use crate::model::VmSpec;
use crate::observe::{Observation, bytes};
use crate::world::Life;

impl Engine<'_> {
    pub(super) fn place_waiting_one(&mut self, vm: usize, first: bool) {
        let spec = self.vms[vm].spec;
        let node = match &spec.node {
            Some(node) if first => Some(node.clone()),
            _ => self.ask_place(spec),
        };
        let number = node.and_then(|name| self.scenario.nodes.iter().position(|node| node.name == name));
        if let Some(node) = number {
            self.start(vm, node);
        }
    }

    pub(super) fn ask_place(&mut self, spec: &VmSpec) -> Option<NodeName> {
        let request = LaunchRequest {
            cpus: spec.cpus,
            memory: bytes(spec.declared),
            ..LaunchRequest::default()
        };
        let seen = Observation {
            now: self.now,
            snapshot: &self.observer.snapshot,
            loads: &self.observer.loads,
            policy: &self.scenario.policy,
        };
        self.balancer.place(&seen, &request)
    }

    pub(super) fn start(&mut self, number: usize, node: usize) {
        self.account_idle(number);
        self.waiting.retain(|&other| other != number);
        self.touch(node);
        let vm = &mut self.vms[number];
        vm.life = Life::On(node);
        vm.resident = vm.spec.initial;
        vm.work_left = vm.spec.work.unwrap_or(f64::INFINITY);
        vm.segment = 0;
        self.nodes[node].vms.push(number);
        self.observer
            .started(number, &self.vms[number], &self.nodes[node].spec.name);
        self.next_segment(number);
    }

    /// What a VM that does not run wanted meanwhile.
    pub(super) fn account_idle(&mut self, number: usize) {
        let vm = &mut self.vms[number];
        if matches!(vm.life, Life::Waiting | Life::Restarting) {
            let seconds = self.now - vm.idle_since;
            vm.idle_since = self.now;
            let wants = match (vm.spec.work, vm.spec.segments.first()) {
                (Some(_), _) => f64::from(vm.spec.cpus) * self.fastest,
                (None, Some(first)) if vm.wanted == 0.0 => first.cpu,
                _ => vm.wanted,
            };
            vm.wanted_total += wants * seconds;
            self.counters.waiting += seconds;
        }
    }

    /// Applies all that is due of a VM's segments, and waits for the next.
    pub(super) fn next_segment(&mut self, number: usize) {
        let vm = &mut self.vms[number];
        while let Some(segment) = vm.spec.segments.get(vm.segment)
            && segment.at <= self.now
        {
            vm.segment += 1;
            vm.wanted = match vm.spec.work {
                Some(_) => f64::from(vm.spec.cpus) * self.fastest,
                None => segment.cpu,
            };
            vm.growth = segment.growth;
            if let Some(resident) = segment.resident {
                vm.resident = resident.min(vm.spec.declared);
            }
        }
        if let Some(segment) = vm.spec.segments.get(vm.segment) {
            let at = segment.at;
            self.at(at, Event::Segment(number));
        }
    }

    /// A VM leaves the cluster.
    pub(super) fn end(&mut self, number: usize) {
        self.take_off(number);
        self.account_idle(number);
        self.waiting.retain(|&other| other != number);
        self.vms[number].life = Life::Ended;
    }

    /// A VM is nowhere any more; its migration, if any, is over.
    pub(super) fn take_off(&mut self, number: usize) {
        if let Life::On(node) = self.vms[number].life {
            self.touch(node);
            if let Some(migration) = self.vms[number].migration {
                self.abort(migration);
            }
            self.nodes[node].vms.retain(|&other| other != number);
            self.observer.ended(number);
        }
    }

    /// Kills the largest VMs of nodes that can swap no more.
    pub(super) fn kill(&mut self) {
        for node in 0..self.nodes.len() {
            let limit = self.nodes[node].spec.memory as f64 * (1.0 + self.scenario.memory.swap);
            loop {
                let held: f64 = self.nodes[node].vms.iter().map(|&vm| self.vms[vm].resident).sum();
                if held + self.arrived(node) <= limit {
                    break;
                }
                let by_size = |a: &&usize, b: &&usize| {
                    let (a, b) = (**a, **b);
                    self.vms[a]
                        .resident
                        .total_cmp(&self.vms[b].resident)
                        .then(b.cmp(&a))
                };
                let Some(&largest) = self.nodes[node].vms.iter().max_by(by_size) else {
                    // Nothing runs here: what arrives is too much.
                    let Some(&migration) = self.nodes[node].incoming.first() else {
                        break;
                    };
                    self.abort(migration);
                    continue;
                };
                self.counters.oom += 1.0;
                self.take_off(largest);
                self.vms[largest].life = Life::Restarting;
                self.vms[largest].idle_since = self.now;
                self.at(self.now + self.scenario.memory.restart, Event::Restart(largest));
            }
        }
    }
}
