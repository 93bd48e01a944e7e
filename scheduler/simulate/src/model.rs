//! What is simulated: hosts, VMs with what they want over time, and how migrations and short memory behave.

use std::sync::Arc;

use shoal_plan::{NodeName, Policy};

use crate::noise::Noise;
use crate::policy::PolicyKind;
use crate::power::PowerModel;
use crate::workload::Workload;

/// A host.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSpec {
    /// Unique.
    pub name: NodeName,
    /// CPUs.
    pub cpus: u32,
    /// Work that one CPU does per second.
    pub speed: f64,
    /// Bytes.
    pub memory: u64,
    /// For energy.
    pub power: PowerModel,
}

impl NodeSpec {
    /// Work per second of all its CPUs.
    #[must_use]
    pub fn capacity(&self) -> f64 {
        f64::from(self.cpus) * self.speed
    }
}

/// From a time on, what a VM wants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment {
    /// Seconds since the start of the simulation.
    pub at: f64,
    /// Work per second that it wants; a batch job wants all of its CPUs instead.
    pub cpu: f64,
    /// Bytes per second by which its memory grows, or shrinks.
    pub growth: f64,
    /// Bytes it holds from now on, if it jumps.
    pub resident: Option<f64>,
}

/// A VM, and what it will do.
#[derive(Debug, Clone, PartialEq)]
pub struct VmSpec {
    /// Unique.
    pub name: String,
    /// Seconds.
    pub arrival: f64,
    /// Where it starts, whatever the policy says.
    pub node: Option<NodeName>,
    /// Virtual CPUs.
    pub cpus: u32,
    /// The most work per second that it ever wants: what it asks for.
    pub peak: f64,
    /// Bytes it is given.
    pub declared: f64,
    /// Bytes it holds when it starts.
    pub initial: f64,
    /// A batch job: it ends when so much work is done.
    pub work: Option<f64>,
    /// It ends so many seconds after its arrival.
    pub lifetime: Option<f64>,
    /// Bytes dirtied per unit of work.
    pub dirty: f64,
    /// Bytes that it dirties again and again: what one pass can find dirty at most.
    pub working_set: f64,
    /// 0 to 9: whom others are stopped for.
    pub priority: u32,
    /// It may be stopped for one of higher priority, to begin anew later.
    pub preemptible: bool,
    /// It starts from nothing, rather than go on as it was seen.
    pub boots: bool,
    /// By time. Before the first it wants nothing.
    pub segments: Arc<[Segment]>,
}

impl VmSpec {
    /// Work per second that it wants on average, up to a time.
    #[must_use]
    pub fn mean_cpu(&self, until: f64) -> f64 {
        let ends = self
            .segments
            .iter()
            .skip(1)
            .map(|segment| segment.at)
            .chain([until]);
        let work: f64 = self
            .segments
            .iter()
            .zip(ends)
            .map(|(segment, end)| segment.cpu * (end.min(until) - segment.at).max(0.0))
            .sum();
        work / until.max(1e-9)
    }
}

/// What a migration costs: see docs/simulation.md.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MigrationModel {
    /// Bytes per second of a host's link, each way.
    pub link: f64,
    /// Migrations share the links; otherwise each has `link` for itself.
    pub shared: bool,
    /// Seconds before the first pass.
    pub setup: f64,
    /// The last pass is sent with the VM stopped when it takes no longer.
    pub max_downtime: f64,
    /// Seconds of downtime beside the last pass.
    pub switch: f64,
    /// After so many passes the VM is stopped all the same.
    pub passes: u32,
    /// CPU work per byte, on each of both ends.
    pub cpu_per_byte: f64,
    /// Part of its CPU that a VM loses while its writes are logged.
    pub logging: f64,
    /// Every migration loses this part of the VM's work, for the PDM of the paper.
    pub degradation: f64,
}

impl Default for MigrationModel {
    fn default() -> Self {
        Self {
            link: 125e6,
            shared: true,
            setup: 0.5,
            max_downtime: 0.05,
            switch: 0.02,
            passes: 30,
            cpu_per_byte: 1e-9,
            logging: 0.05,
            degradation: 0.1,
        }
    }
}

/// What happens on a host whose memory is full.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryModel {
    /// Part of its memory that a host can swap out. Beyond it the largest VM is killed.
    pub swap: f64,
    /// With a part `x` of its memory swapped out, VMs run at 1 / (1 + `thrash` × x).
    pub thrash: f64,
    /// Seconds until a VM that was killed starts again, from nothing.
    pub restart: f64,
}

impl Default for MemoryModel {
    fn default() -> Self {
        Self {
            swap: 0.1,
            thrash: 50.0,
            restart: 30.0,
        }
    }
}

/// What the policies are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// The least slowdown.
    #[default]
    Spread,
    /// The fewest nodes: the others are switched off.
    Pack,
}

/// One simulation: everything that its result depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// For titles and file names.
    pub name: String,
    /// What the policies are for.
    pub mode: Mode,
    /// Seconds.
    pub duration: f64,
    /// Seconds between two reports of the agents. Policies are asked as often, or less if they say so.
    pub interval: f64,
    /// Of the first run; each further run has the next one.
    pub seed: u64,
    /// How often it is repeated, with other random numbers. The results are means.
    pub runs: u32,
    /// Compared in this order.
    pub policies: Vec<PolicyKind>,
    /// Shoal's constants. The limits on migrations at once hold for every policy.
    pub policy: Policy,
    /// Hosts, by name.
    pub nodes: Vec<NodeSpec>,
    /// What makes the VMs.
    pub workloads: Vec<Workload>,
    /// Cost of migrations.
    pub migration: MigrationModel,
    /// Short memory.
    pub memory: MemoryModel,
    /// What is not as it should be.
    pub noise: Noise,
    /// So many moves of a run are judged by repeating it without them, at most.
    pub judged: usize,
}

impl Scenario {
    /// The speed of the fastest host: where a batch job would end soonest.
    #[must_use]
    pub fn fastest(&self) -> f64 {
        self.nodes.iter().map(|node| node.speed).fold(0.0, f64::max)
    }
}
