//! One node of the cluster with its sums.

use super::{Vm, load};
use crate::model::NodeView;
use crate::score::Use;

/// More CPUs than any machine has.
pub(super) const MOST_CPUS: f64 = 1e6;
/// A gain is judged with the load of the source so many standard errors lower than measured, and that of the destination as many
/// higher: of gains that are none, one in 44 passes for each of the two. See docs/planning.md.
const CONFIDENCE: f64 = 2.0;

/// A node with its sums. Memory is in bytes, as `f64` for the arithmetic (exact up to 8 PiB).
#[derive(Debug)]
pub(crate) struct Node<'a> {
    pub view: &'a NodeView,
    pub memory: f64,
    /// Part of `memory` that VMs may declare, times the overcommit: without what is reserved.
    pub lends: f64,
    /// CPUs that VMs may declare, times the overcommit: without what is reserved.
    pub lends_cpus: f64,
    /// Declared memory of all VMs here or arriving.
    pub committed: f64,
    /// Declared vCPUs of all VMs here or arriving.
    pub vcpus: f64,
    /// CPUs that these want, and what is not VMs uses.
    pub busy: f64,
    /// Memory held now, with all of what arrives reserved.
    pub occupied: f64,
    /// Memory held when the moves under way have ended.
    pub settled: f64,
    /// What VMs that have just been started are expected to take besides. It decides where others go, and rejects nothing.
    pub awaited: f64,
    /// `settled`, with growth to the policy's horizon.
    pub projected: f64,
    /// Bytes per second by which the VMs grow that will be here.
    pub growth: f64,
    /// CPUs wanted by its VMs and used by anything else, on average. VMs that have only just been started count with all
    /// that they asked for.
    pub load: f64,
    /// What of that was measured.
    measured: f64,
    /// Of the measured part: the square of its standard error.
    variance: f64,
    /// [`CONFIDENCE`] times that error: it is asked for far more often than it changes.
    margin: f64,
    /// CPUs times speed, without what is reserved.
    pub cpu_capacity: f64,

    pub outgoing: usize,
    pub incoming: usize,
    /// VMs that are to start here.
    pub reserved: usize,
    /// VMs here, arriving or to start that have the node for themselves.
    pub exclusive: usize,
    /// It is kept for VMs that have waited long.
    pub kept: bool,
    /// VMs are being stopped here for one that waits.
    pub makes_room: bool,
    /// Memory used by anything but VMs, or reserved for it.
    pub other: f64,
    /// VMs that are here and those that arrive, as numbers.
    pub vms: Vec<usize>,
}

impl<'a> Node<'a> {
    pub fn new(view: &'a NodeView) -> Self {
        let speed = if view.speed.is_finite() {
            view.speed.clamp(0.01, 100.0)
        } else {
            1.0
        };
        let other = view.other.sane(MOST_CPUS);
        let cpus = view.usable_cpus() - load(view.reserved_cpus);
        Self {
            view,
            memory: view.memory.0 as f64,
            lends: view.memory.0.saturating_sub(view.reserved_memory.0) as f64,
            lends_cpus: (f64::from(view.cpus) - load(view.reserved_cpus)).max(0.0),
            committed: 0.0,
            vcpus: 0.0,
            busy: other.mean,
            occupied: 0.0,
            settled: 0.0,
            awaited: 0.0,
            projected: 0.0,
            growth: 0.0,
            load: other.mean,
            measured: other.mean,
            variance: other.error * other.error,
            margin: CONFIDENCE * other.error,
            cpu_capacity: cpus.max(0.1) * speed,

            outgoing: 0,
            incoming: 0,
            reserved: 0,
            exclusive: 0,
            kept: false,
            makes_room: false,
            other: 0.0,
            vms: Vec::new(),
        }
    }

    /// The load that it has at least: that which was measured, less [`CONFIDENCE`] standard errors.
    pub fn least_load(&self) -> f64 {
        (self.measured - self.margin).max(0.0)
    }

    /// The load that it has at most: all, and as much again for what may be wrong with it.
    pub fn most_load(&self) -> f64 {
        self.load + self.margin
    }

    /// A VM is here, or arrives.
    pub fn add_load(&mut self, vm: &Vm<'_>) {
        self.load += vm.demand;
        if let Some(error) = vm.demand_error {
            self.measured += vm.demand;
            self.variance += error * error;
            self.margin = CONFIDENCE * self.variance.sqrt();
        }
    }

    /// A VM leaves.
    pub fn take_load(&mut self, vm: &Vm<'_>) {
        self.load = (self.load - vm.demand).max(0.0);
        if let Some(error) = vm.demand_error {
            self.measured = (self.measured - vm.demand).max(0.0);
            self.variance = (self.variance - error * error).max(0.0);
            self.margin = CONFIDENCE * self.variance.sqrt();
        }
    }

    /// A VM that has not been started yet comes.
    pub fn expect_load(&mut self, usage: Use) {
        self.load += usage.cpu;
    }

    /// No VM is here, arrives or has been given a place.
    pub fn is_empty(&self) -> bool {
        self.vms.is_empty() && self.reserved == 0
    }

    /// How much of it is used, of CPU and memory the mean, with so much more.
    pub fn use_part(&self, cpu: f64, memory: f64) -> f64 {
        let cpu = (self.load + cpu) / self.cpu_capacity;
        let memory = (self.settled + memory) / self.memory.max(1.0);
        f64::midpoint(cpu, memory)
    }

    /// Part of its memory that it would hold with one more VM, when all have grown for so long after the horizon. Its VMs do
    /// not hold more than they were given.
    pub fn part_later(&self, vm: &Vm<'_>, at_horizon: f64, seconds: f64) -> f64 {
        let at_first = self.projected + at_horizon;
        let grown = at_first + (self.growth + vm.growth_there).max(0.0) * seconds;
        let most = self.other + self.committed + vm.declared;
        let other_growth = self.view.other_growth.0 as f64 * seconds;
        (grown.min(most.max(at_first)) + other_growth) / self.memory.max(1.0)
    }

    /// Memory pressure, percent.
    pub fn pressure(&self) -> f64 {
        if self.view.pressure_memory.is_finite() {
            self.view.pressure_memory
        } else {
            0.0
        }
    }
}
