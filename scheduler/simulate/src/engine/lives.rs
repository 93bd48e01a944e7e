//! VMs of a run: started, booted, changed by their workload, suspended, ended, killed or stopped for others.

use super::{Engine, Event, News};
use crate::world::Life;

/// Part of what a VM holds when it has booted that it holds when it begins to.
const HELD_BEFORE_BOOT: f64 = 0.2;

impl Engine<'_> {
    pub(super) fn start(&mut self, number: usize, node: usize) {
        self.account_idle(number);
        self.waiting.retain(|&other| other != number);
        self.touch(node);
        let (now, fastest) = (self.now, self.fastest);
        let vm = &mut self.vms[number];
        vm.life = Life::On(node);
        (vm.started_at, vm.arrived_at) = (now, now);
        vm.resident = vm.spec.initial;
        vm.segment = 0;
        vm.work_left = vm.job_work();
        vm.booting = vm.boot > 0.0;
        self.nodes[node].vms.push(number);
        self.news.push(News::Started(number, node));
        if vm.booting {
            vm.resident = vm.spec.initial * HELD_BEFORE_BOOT;
            vm.growth = (vm.spec.initial - vm.resident) / vm.boot;
            vm.wanted = fastest;
            let at = now + vm.boot;
            self.at(at, Event::Booted(number));
        } else {
            self.next_segment(number);
        }
    }

    /// A VM does from now on what it was started for.
    pub(super) fn booted(&mut self, number: usize) {
        let vm = &self.vms[number];
        // Events of a run that was cut short come too early.
        if let Life::On(node) = vm.life
            && vm.booting
            && self.now >= vm.started_at + vm.boot
        {
            self.touch(node);
            let vm = &mut self.vms[number];
            (vm.booting, vm.wanted, vm.growth) = (false, 0.0, 0.0);
            self.next_segment(number);
        }
    }

    /// Stops a VM's vCPUs where it is.
    pub(super) fn suspend(&mut self, number: usize, growth: f64) -> Option<usize> {
        let Life::On(node) = self.vms[number].life else {
            return None;
        };
        if self.vms[number].suspended.is_some() || self.vms[number].migration.is_some() {
            return None;
        }
        self.touch(node);
        self.vms[number].suspended = Some(growth);
        self.counters.suspended += 1.0;
        Some(node)
    }

    /// Lets a suspended VM run on.
    pub(super) fn resume(&mut self, number: usize) -> Option<usize> {
        let Life::On(node) = self.vms[number].life else {
            return None;
        };
        self.vms[number].suspended?;
        self.touch(node);
        self.vms[number].suspended = None;
        Some(node)
    }

    /// Stops a VM for another; it waits to begin anew.
    pub(super) fn preempt(&mut self, number: usize) -> Option<usize> {
        let Life::On(node) = self.vms[number].life else {
            return None;
        };
        self.counters.preempted += 1.0;
        self.take_off(number);
        self.begins_anew(number, Life::Waiting);
        self.waiting.push(number);
        Some(node)
    }

    /// What a VM has done is lost, if it is a job.
    fn begins_anew(&mut self, number: usize, life: Life) {
        let now = self.now;
        let vm = &mut self.vms[number];
        if vm.spec.work.is_some() {
            vm.given_total -= vm.job_work() - vm.work_left;
        }
        (vm.life, vm.idle_since, vm.waits_since) = (life, now, now);
        (vm.suspended, vm.booting) = (None, false);
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
            self.news.push(News::Ended(number));
        }
    }

    /// Kills the largest VMs of nodes that can swap no more.
    pub(super) fn kill(&mut self) {
        for node in 0..self.nodes.len() {
            let limit = self.nodes[node].spec.memory as f64 * (1.0 + self.scenario.memory.swap);
            loop {
                let vms = self.nodes[node].vms.iter().map(|&vm| self.vms[vm].resident);
                let held = self.nodes[node].tenant.memory + vms.sum::<f64>();
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
                self.begins_anew(largest, Life::Restarting);
                self.at(self.now + self.scenario.memory.restart, Event::Restart(largest));
            }
        }
    }
}
