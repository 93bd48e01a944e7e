//! The state of the simulated cluster between two events: who runs where, how fast, and how much memory is held. Rates are
//! constant from one event to the next, so everything is integrated exactly; memory is looked at once per report.

use crate::model::{MemoryModel, MigrationModel, NodeSpec, VmSpec};

/// Stands for a claim that is not a VM's.
const NO_VM: usize = usize::MAX;
/// Slowest progress that a starved VM makes, so that a ratio stays finite.
const LEAST_CAPACITY: f64 = 0.01;

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    /// Has not arrived.
    Future,
    /// Has no place yet.
    Waiting,
    /// Was killed; starts again by itself.
    Restarting,
    /// Runs on this node.
    On(usize),
    /// Has done its work, or its time is over.
    Ended,
}

#[derive(Debug, Clone)]
pub(crate) struct Vm<'a> {
    pub spec: &'a VmSpec,
    pub life: Life,
    pub resident: f64,
    pub growth: f64,
    /// Work per second it wants.
    pub wanted: f64,
    /// Work per second it gets.
    pub given: f64,
    /// Stopped for the last pass of a migration.
    pub paused: bool,
    /// Number of the migration it is in.
    pub migration: Option<usize>,
    /// Work of a job that is left.
    pub work_left: f64,
    pub wanted_total: f64,
    pub given_total: f64,
    /// Work lost to migrations, by the paper's rule.
    pub degraded: f64,
    /// Where it came from with its last move, and when.
    pub last_move: Option<(usize, f64)>,
    /// Since when it waits, or is restarted.
    pub idle_since: f64,
    /// Since when it has had no place, this time.
    pub waits_since: f64,
    /// Next of its segments.
    pub segment: usize,
    /// Seconds that it takes to boot.
    pub boot: f64,
    pub booting: bool,
    /// Its vCPUs are stopped; it grew so fast before, as far as its policy knows.
    pub suspended: Option<f64>,
    /// The longest that a move stopped it, seconds.
    pub longest_pause: Option<f64>,
    /// When it began to run, and when it came to the node it is on.
    pub started_at: f64,
    pub arrived_at: f64,
}

/// Less than this part apart is the same.
const ALIKE: f64 = 0.05;

/// Two VMs that nobody could tell apart by what they need: a node that has one instead of the other holds the same.
pub(crate) fn alike(a: &Vm<'_>, b: &Vm<'_>) -> bool {
    let close = |a: f64, b: f64, whole: f64| (a - b).abs() <= ALIKE * whole;
    (a.spec.cpus, a.suspended.is_some()) == (b.spec.cpus, b.suspended.is_some())
        && close(a.spec.declared, b.spec.declared, a.spec.declared)
        && close(a.wanted, b.wanted, f64::from(a.spec.cpus))
        && close(a.resident, b.resident, a.spec.declared)
        // Over a minute.
        && close(a.grows() * 60.0, b.grows() * 60.0, a.spec.declared)
}

impl<'a> Vm<'a> {
    pub fn new(spec: &'a VmSpec, boot: f64) -> Self {
        Self {
            spec,
            life: Life::Future,
            resident: 0.0,
            growth: 0.0,
            wanted: 0.0,
            given: 0.0,
            paused: false,
            migration: None,
            work_left: f64::INFINITY,
            wanted_total: 0.0,
            given_total: 0.0,
            degraded: 0.0,
            last_move: None,
            idle_since: 0.0,
            waits_since: spec.arrival,
            segment: 0,
            boot,
            booting: false,
            suspended: None,
            longest_pause: None,
            started_at: 0.0,
            arrived_at: 0.0,
        }
    }

    /// All that a job has to do, its boot included; for ever if it is none.
    pub fn job_work(&self) -> f64 {
        self.spec.work.map_or(f64::INFINITY, |work| work + self.boot)
    }

    /// Bytes per second.
    pub fn grows(&self) -> f64 {
        if self.suspended.is_some() {
            0.0
        } else {
            self.growth
        }
    }

    /// What has been asked of it for each unit it was given; 1 is all it wanted.
    pub fn slowdown(&self) -> Option<f64> {
        /// A VM that never ran counts with this.
        const WORST: f64 = 1000.0;
        (self.wanted_total > 1e-9).then(|| {
            let given = self.given_total.max(self.wanted_total / WORST);
            (self.wanted_total / given).max(1.0)
        })
    }

    /// Lets it run for `seconds`.
    pub fn run(&mut self, seconds: f64, degradation: f64) {
        self.wanted_total += self.wanted * seconds;
        self.given_total += self.given * seconds;
        self.work_left -= self.given * seconds;
        if self.migration.is_some() {
            self.degraded += self.wanted * seconds * degradation;
        }
        self.resident = (self.resident + self.grows() * seconds).clamp(0.0, self.spec.declared);
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Node<'a> {
    pub spec: &'a NodeSpec,
    /// VMs that run here.
    pub vms: Vec<usize>,
    /// Migrations to here, and from here.
    pub incoming: Vec<usize>,
    pub outgoing: Vec<usize>,
    /// Threads that want to run.
    pub load: f64,
    /// Bytes held, with what has arrived of VMs on their way.
    pub used: f64,
    /// Work per second wanted here, and done.
    pub wanted: f64,
    pub busy: f64,
    /// CPU work per second that migrations take.
    pub migration_cpu: f64,
    /// 1 with enough memory, less when it swaps.
    pub memory_factor: f64,
    /// Until when its VMs have been advanced.
    pub until: f64,
    /// Counts changes of rates, to know which events are stale.
    pub generation: u64,
    pub totals: NodeTotals,
    /// What runs here that is no VM, and how often that has changed.
    pub tenant: Tenant,
    pub visits: u64,
}

/// What other tenants of a host use.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Tenant {
    /// Work per second that they want.
    pub cpu: f64,
    /// Bytes.
    pub memory: f64,
}

/// Sums over time of one node.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct NodeTotals {
    pub active: f64,
    pub saturated: f64,
    pub above_threshold: f64,
    pub joules: f64,
}

impl<'a> Node<'a> {
    pub fn new(spec: &'a NodeSpec) -> Self {
        Self {
            spec,
            vms: Vec::new(),
            incoming: Vec::new(),
            outgoing: Vec::new(),
            load: 0.0,
            used: 0.0,
            wanted: 0.0,
            busy: 0.0,
            migration_cpu: 0.0,
            memory_factor: 1.0,
            until: 0.0,
            generation: 0,
            totals: NodeTotals::default(),
            tenant: Tenant::default(),
            visits: 0,
        }
    }

    /// Nothing runs here and nothing arrives: switched off, where that counts.
    pub fn is_idle(&self) -> bool {
        self.vms.is_empty() && self.incoming.is_empty()
    }

    /// Integrates everything on this node up to `now`.
    pub fn advance(&mut self, now: f64, vms: &mut [Vm<'_>], threshold: f64, migration: &MigrationModel) {
        let seconds = now - self.until;
        self.until = now;
        if seconds <= 0.0 {
            return;
        }
        for &vm in &self.vms {
            vms[vm].run(seconds, migration.degradation);
        }
        if !self.is_idle() {
            let capacity = self.spec.capacity();
            self.totals.active += seconds;
            self.totals.joules += seconds * self.spec.power.watts(self.busy / capacity);
            if self.wanted >= capacity * (1.0 - 1e-9) {
                self.totals.saturated += seconds;
            }
        }
        if self.used > threshold * self.spec.memory as f64 {
            self.totals.above_threshold += seconds;
        }
    }

    /// Divides the CPUs anew: max-min fair by virtual CPU, after what migrations take, slowed by short memory.
    pub fn share(&mut self, vms: &mut [Vm<'_>], arrived: f64, memory: &MemoryModel, logging: f64) {
        self.generation += 1;
        let speed = self.spec.speed;
        self.used = arrived + self.tenant.memory + self.vms.iter().map(|&vm| vms[vm].resident).sum::<f64>();
        let size = self.spec.memory as f64;
        let swapped = (self.used / size - 1.0).max(0.0);
        self.memory_factor = 1.0 / (1.0 + memory.thrash * swapped);
        (self.load, self.wanted) = (0.0, 0.0);
        let mut claims: Vec<(f64, f64, usize)> = Vec::with_capacity(self.vms.len());
        for &number in &self.vms {
            let vm = &vms[number];
            let most = f64::from(vm.spec.cpus) * speed;
            self.wanted += vm.wanted.min(most);
            let running = if vm.paused || vm.suspended.is_some() {
                0.0
            } else {
                vm.wanted.min(most)
            };
            self.load += running / speed;
            claims.push((running, f64::from(vm.spec.cpus), number));
        }
        if self.tenant.cpu > 0.0 {
            let cpus = self.tenant.cpu / speed;
            self.wanted += self.tenant.cpu;
            self.load += cpus;
            claims.push((self.tenant.cpu, cpus.ceil(), NO_VM));
        }
        claims.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)).then(a.2.cmp(&b.2)));
        let mut left = (self.spec.capacity() - self.migration_cpu).max(LEAST_CAPACITY);
        let mut weights: f64 = claims.iter().map(|claim| claim.1).sum();
        self.busy = self.migration_cpu;
        for (claim, weight, number) in claims {
            let got = claim.min(left * weight / weights);
            left = (left - got).max(0.0);
            weights -= weight;
            self.busy += got;
            if number == NO_VM {
                continue;
            }
            let vm = &mut vms[number];
            let logged = if vm.migration.is_some() {
                1.0 - logging
            } else {
                1.0
            };
            vm.given = got * self.memory_factor * logged;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use shoal_plan::NodeName;

    use super::*;
    use crate::power::PowerModel;

    fn vm_spec(name: &str, cpus: u32) -> VmSpec {
        VmSpec {
            name: name.to_owned(),
            arrival: 0.0,
            node: None,
            cpus,
            peak: f64::from(cpus),
            declared: 1e9,
            initial: 5e8,
            work: None,
            lifetime: None,
            dirty: 0.0,
            working_set: 0.0,
            priority: 5,
            preemptible: false,
            boots: false,
            segments: Arc::from([]),
        }
    }

    #[test]
    fn cpus_are_shared_fairly_and_short_memory_slows() {
        let spec = NodeSpec {
            name: NodeName::new("n"),
            cpus: 2,
            speed: 1.0,
            memory: 1_000_000_000,
            power: PowerModel::G5,
        };
        let specs = [vm_spec("a", 1), vm_spec("b", 1), vm_spec("c", 2)];
        let mut vms: Vec<Vm<'_>> = specs.iter().map(|spec| Vm::new(spec, 0.0)).collect();
        for (vm, wanted) in vms.iter_mut().zip([0.2, 1.0, 2.0]) {
            vm.wanted = wanted;
            vm.resident = 3e8;
        }
        let mut node = Node::new(&spec);
        node.vms = vec![0, 1, 2];
        node.share(&mut vms, 0.0, &MemoryModel::default(), 0.0);
        let given: Vec<f64> = vms.iter().map(|vm| vm.given).collect();
        assert!(
            (given[0] - 0.2).abs() < 1e-9 && (given[1] - 0.6).abs() < 1e-9 && (given[2] - 1.2).abs() < 1e-9
        );
        assert!((node.load - 3.2).abs() < 1e-9 && (node.busy - 2.0).abs() < 1e-9);

        // 4 % too much: 1 / (1 + 50 × 0.04).
        node.share(&mut vms, 1.4e8, &MemoryModel::default(), 0.0);
        assert!((vms[0].given - 0.2 / 3.0).abs() < 1e-9);

        node.advance(10.0, &mut vms, 0.9, &MigrationModel::default());
        assert!((vms[0].wanted_total - 2.0).abs() < 1e-9);
        assert!((vms[0].slowdown().expect("wanted") - 3.0).abs() < 1e-9);
        assert_eq!((node.totals.saturated, node.totals.above_threshold), (10.0, 10.0));
    }
}
