//! Migrations of a run: started within the limits, sharing the links, ended or given up.

use super::log::Chosen;
use super::{Engine, Event, News};
use crate::migration::{Guest, Migration, Next};
use crate::world::Life;

/// A VM that is back where it came from sooner than this was moved in vain.
const UNDONE_SECONDS: f64 = 60.0;

impl Engine<'_> {
    /// Starts a move, if it can be and the limits let it; answers where from.
    pub(super) fn begin(&mut self, chosen: Chosen) -> Option<usize> {
        let (policy, vm, to) = (&self.scenario.policy, chosen.vm, chosen.to);
        let Life::On(from) = self.vms[vm].life else {
            return None;
        };
        let full = self.under_way.len() >= policy.max_migrations
            || self.nodes[from].outgoing.len() >= policy.max_out_per_node
            || self.nodes[to].incoming.len() >= policy.max_in_per_node;
        if from == to || self.vms[vm].migration.is_some() || (self.limited && full) {
            return None;
        }
        self.counters.begun += 1.0;
        if self.recent.begins(self.now, vm, from, to, &self.vms) {
            self.counters.equals += 2.0;
        }
        self.touch(from);
        self.touch(to);
        self.generation += 1;
        let mut migration = Migration::new(vm, from, to, self.now, &self.scenario.migration);
        migration.generation = self.generation;
        let ends = migration.ends();
        let number = self.free.pop().unwrap_or_else(|| {
            self.migrations.push(None);
            self.migrations.len() - 1
        });
        self.migrations[number] = Some(migration);
        self.under_way.push(number);
        self.nodes[from].outgoing.push(number);
        self.nodes[to].incoming.push(number);
        self.vms[vm].migration = Some(number);
        self.at(ends, Event::Step(number, self.generation));
        Some(from)
    }

    /// A step of a migration ends, if its rate is still the one it was expected to end by.
    pub(super) fn step_migration(&mut self, number: usize, generation: u64) {
        let Some(migration) = &mut self.migrations[number] else {
            return;
        };
        if migration.generation != generation {
            return;
        }
        let (vm, from, to) = (migration.vm, migration.from, migration.to);
        migration.advance(self.now);
        self.touch(from);
        self.touch(to);
        let spec = self.vms[vm].spec;
        let guest = Guest {
            resident: self.vms[vm].resident,
            dirty_rate: self.vms[vm].given * spec.dirty,
            working_set: spec.working_set,
            growth: self.vms[vm].grows(),
        };
        let Some(migration) = &mut self.migrations[number] else {
            return;
        };
        match migration.step(self.now, guest, &self.scenario.migration) {
            Next::Continue => {}
            Next::Stop => {
                self.vms[vm].paused = true;
                self.news.push(News::Dirties(vm, guest.dirty_rate));
            }
            Next::Done => {
                self.arrive(number, vm, from, to);
                return;
            }
        }
        self.share_links(number);
    }

    fn arrive(&mut self, number: usize, vm: usize, from: usize, to: usize) {
        let times = self.migrations[number].as_ref();
        let (started_at, stopped_at) = times.map_or((self.now, self.now), |migration| {
            (migration.started_at, migration.stopped_at)
        });
        self.news.push(News::Moved(vm, self.now - started_at));
        // One that is suspended misses nothing.
        let suspended = self.vms[vm].suspended.is_some();
        let downtime = if suspended { 0.0 } else { self.now - stopped_at };
        self.counters.downtime_max = self.counters.downtime_max.max(downtime);
        self.counters.migrations += 1.0;
        if let Some((came_from, at)) = self.vms[vm].last_move
            && came_from == to
            && self.now - at < UNDONE_SECONDS
        {
            self.counters.undone += 1.0;
        }
        self.forget(number);
        self.vms[vm].last_move = Some((from, self.now));
        self.vms[vm].arrived_at = self.now;
        let before = self.vms[vm].longest_pause.unwrap_or(0.0);
        self.vms[vm].longest_pause = Some(before.max(downtime));
        self.vms[vm].life = Life::On(to);
        self.nodes[from].vms.retain(|&other| other != vm);
        self.nodes[to].vms.push(vm);
    }

    /// Ends a migration without a move; the VM goes on where it is.
    pub(super) fn abort(&mut self, number: usize) {
        let ends = self.migrations[number]
            .as_ref()
            .map(|migration| (migration.from, migration.to));
        if let Some((from, to)) = ends {
            self.touch(from);
            self.touch(to);
            self.counters.failed += 1.0;
            self.forget(number);
        }
    }

    fn forget(&mut self, number: usize) {
        let now = self.now;
        let Some(mut migration) = self.migrations[number].take() else {
            return;
        };
        migration.advance(now);
        self.counters.bytes += migration.sent;
        let vm = &mut self.vms[migration.vm];
        (vm.migration, vm.paused) = (None, false);
        self.under_way.retain(|&other| other != number);
        self.nodes[migration.from]
            .outgoing
            .retain(|&other| other != number);
        self.nodes[migration.to].incoming.retain(|&other| other != number);
        self.free.push(number);
        self.charge_cpu(migration.from);
        self.charge_cpu(migration.to);
        self.share_links(usize::MAX);
    }

    /// Divides the links anew: a migration gets its part of the sender's or of the receiver's, the smaller. `stepped` has a
    /// new step to be waited for, whatever its rate.
    fn share_links(&mut self, stepped: usize) {
        let mut senders = vec![0.0_f64; self.nodes.len()];
        let mut receivers = senders.clone();
        for migration in self
            .under_way
            .iter()
            .filter_map(|&number| self.migrations[number].as_ref())
        {
            if migration.sends() {
                senders[migration.from] += 1.0;
                receivers[migration.to] += 1.0;
            }
        }
        let model = &self.scenario.migration;
        let mut ends = Vec::new();
        for &number in &self.under_way {
            let Some(migration) = &mut self.migrations[number] else {
                continue;
            };
            let rate = match (migration.sends(), model.shared) {
                (false, _) => 0.0,
                (true, false) => model.link,
                (true, true) => model.link / senders[migration.from].max(receivers[migration.to]),
            };
            #[allow(clippy::float_cmp)] // the very same division
            if rate == migration.rate && number != stepped {
                continue;
            }
            migration.advance(self.now);
            migration.rate = rate;
            self.generation += 1;
            migration.generation = self.generation;
            ends.push((
                migration.ends(),
                number,
                self.generation,
                migration.from,
                migration.to,
            ));
        }
        for (time, number, generation, from, to) in ends {
            self.at(time, Event::Step(number, generation));
            for node in [from, to] {
                self.charge_cpu(node);
            }
        }
    }

    /// What migrations through a node take of its CPUs from now on.
    fn charge_cpu(&mut self, node: usize) {
        self.touch(node);
        let through = self.nodes[node].incoming.iter().chain(&self.nodes[node].outgoing);
        let rate: f64 = through
            .filter_map(|&number| self.migrations[number].as_ref())
            .map(|migration| migration.rate)
            .sum();
        self.nodes[node].migration_cpu = rate * self.scenario.migration.cpu_per_byte;
    }
}
