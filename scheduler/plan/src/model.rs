//! What the planner is told: a snapshot of the cluster. It holds no clock; ages are durations.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use shoal_estimate::Estimate;

use crate::kvm::KvmKind;
use crate::labels::{Labels, Rules};
use crate::margins::Margins;
use crate::preempt::Held;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// From text, which the caller has checked.
            #[must_use]
            pub fn new(text: &str) -> Self {
                Self(Arc::from(text))
            }

            /// As text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

text_id!(
    /// A node's name. Cloning it is cheap.
    NodeName
);
text_id!(
    /// A VM's id. Cloning it is cheap.
    VmId
);

text_id!(
    /// Names a set of CPU features. Cloning it is cheap.
    CpuClass
);

/// An amount of memory. Displayed in the largest unit that keeps it readable ("320 MiB").
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl Bytes {
    /// So many MiB.
    #[must_use]
    pub const fn mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// So many GiB.
    #[must_use]
    pub const fn gib(gib: u64) -> Self {
        Self(gib.saturating_mul(1 << 30))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(&str, u64); 4] = [
            ("TiB", 1 << 40),
            ("GiB", 1 << 30),
            ("MiB", 1 << 20),
            ("KiB", 1 << 10),
        ];
        for (unit, size) in UNITS {
            // From ten of a unit on it is readable without decimals; a TiB is the largest there is.
            if self.0 >= 10 * size || (self.0 >= size && self.0.is_multiple_of(size)) {
                let tenths = u128::from(self.0) * 10 / u128::from(size);
                return match (tenths % 10, tenths >= 1000) {
                    (0, _) | (_, true) => write!(f, "{} {unit}", tenths / 10),
                    (tenth, false) => write!(f, "{}.{tenth} {unit}", tenths / 10),
                };
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

/// A rate of memory: growth, dirtying, or a link's. Never negative: memory that shrinks has growth 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct BytesPerSecond(pub u64);

impl fmt::Display for BytesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", Bytes(self.0))
    }
}

/// Whether a node takes VMs, and whether it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeState {
    /// Takes VMs.
    Ready,
    /// Keeps its VMs, takes no new ones.
    Cordoned,
    /// Its VMs are to leave; takes no new ones.
    Draining,
    /// Has not reported for a while. Nothing is moved to it or from it.
    Unreachable,
}

impl fmt::Display for NodeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ready => "ready",
            Self::Cordoned => "cordoned",
            Self::Draining => "draining",
            Self::Unreachable => "unreachable",
        })
    }
}

/// What a node's CPU lacks of each class of VMs that cannot run there, for people to read. Cloning it is cheap.
pub type CpuLacks = Arc<[(CpuClass, Arc<str>)]>;

/// What failed on the way to a node, in words, by the node that VMs came from; without one: whatever comes there. Cloning it is
/// cheap.
pub type Failing = Arc<[(Option<NodeName>, Arc<str>)]>;

/// One node, as last reported. Loads are in CPUs: 2.0 means two threads that want to run.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeView {
    /// Unique in the snapshot.
    pub name: NodeName,
    /// Whether it takes VMs.
    pub state: NodeState,
    /// CPUs it lends.
    pub cpus: u32,
    /// CPUs that its VMs get at most together, where a quota limits them.
    pub cpu_limit: Option<f64>,
    /// Speed of one CPU relative to the others; 1.0 where nothing is known.
    pub speed: f64,
    /// Memory it lends.
    pub memory: Bytes,
    /// Part of `memory` that is free, from the same report as the residents of its VMs. When a VM has left since that
    /// report, add its resident memory, or the node looks fuller than it is.
    pub memory_available: Bytes,
    /// Growth of what is **not** VMs. 0 where the agent counts VMs only.
    pub other_growth: BytesPerSecond,
    /// CPUs that anything but VMs uses there. What VMs use is counted with them.
    pub other: Estimate,
    /// PSI memory "some avg10", percent.
    pub pressure_memory: f64,
    /// PSI CPU "some avg10", percent. Shown, not yet decided on.
    pub pressure_cpu: f64,
    /// It has a certificate for migrations, and takes and sends VMs over TLS only; otherwise in plaintext only.
    pub migration_tls: bool,
    /// Of which classes of VMs its CPU lacks features, and which, for people to read. Others can run here.
    pub cpu_lacks: CpuLacks,
    /// How its KVM runs guests; none: not known.
    pub kvm: Option<KvmKind>,
    /// What is wrong with its KVM, in words: it cannot be used at all if its kind is not known, and cannot run kernels in ring
    /// 3 otherwise.
    pub kvm_trouble: Option<Arc<str>>,
    /// What has failed there lately, and is not tried again yet.
    pub failing: Failing,
    /// What selectors ask about.
    pub labels: Labels,
    /// VMs that do not tolerate each of these do not come here; those here stay.
    pub taints: Labels,
    /// Memory kept free of VMs; what is used by anything else comes out of it.
    pub reserved_memory: Bytes,
    /// CPUs that VMs are not counted on.
    pub reserved_cpus: f64,
    /// What migrations out of it have got of its link, where that was measured.
    pub link_rate: Option<BytesPerSecond>,
    /// How old its last report is.
    pub report_age: Duration,
}

impl NodeView {
    /// A ready, idle, empty node of speed 1.
    #[must_use]
    pub fn new(name: &str, cpus: u32, memory: Bytes) -> Self {
        Self {
            name: NodeName::new(name),
            state: NodeState::Ready,
            cpus,
            cpu_limit: None,
            speed: 1.0,
            memory,
            memory_available: memory,
            other_growth: BytesPerSecond(0),
            other: Estimate::default(),
            pressure_memory: 0.0,
            pressure_cpu: 0.0,
            migration_tls: false,
            cpu_lacks: Arc::from([]),
            kvm: None,
            kvm_trouble: None,
            failing: Arc::from([]),
            labels: Labels::default(),
            taints: Labels::default(),
            reserved_memory: Bytes(0),
            reserved_cpus: 0.0,
            link_rate: None,
            report_age: Duration::ZERO,
        }
    }

    /// Why nothing is to come here now, from that node or at all.
    #[must_use]
    pub fn fails(&self, from: Option<&NodeName>) -> Option<&Arc<str>> {
        let counts = |of: &Option<NodeName>| of.is_none() || of.as_ref() == from;
        let found = self.failing.iter().find(|(of, _)| counts(of));
        found.map(|(_, why)| why)
    }

    /// CPUs that its VMs can use at most together: all, or what a quota leaves of them.
    #[must_use]
    pub fn usable_cpus(&self) -> f64 {
        let limit = self.cpu_limit.filter(|limit| *limit > 0.0);
        f64::from(self.cpus.max(1)).min(limit.unwrap_or(f64::INFINITY))
    }

    /// CPU features that a VM of this class has and the node lacks.
    #[must_use]
    pub fn lacks(&self, class: &CpuClass) -> Option<&Arc<str>> {
        let found = self.cpu_lacks.iter().find(|(other, _)| other == class);
        found.map(|(_, lacking)| lacking)
    }
}

/// Why a VM cannot be moved now, besides what the planner sees for itself (migrating, cool-down, node unreachable).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CannotMove {
    /// It has not started to run yet.
    Starting,
    /// It is being powered off.
    Stopping,
    /// It is not known which of two nodes runs it.
    InDoubt,
    /// Its node does not report it, or it has failed.
    NotRunning,
    /// Its owner keeps it where it is.
    Locked,
    /// The same: it was started for this node alone.
    Pinned,
    /// A migration of it that ends where it is now is not over: within its node, or its last memory is on the way.
    Settling,
}

impl fmt::Display for CannotMove {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Starting => "it is starting",
            Self::Stopping => "it is stopping",
            Self::InDoubt => "it is in doubt after a migration",
            Self::NotRunning => "it is not running",
            Self::Locked => "it is locked to its node",
            Self::Pinned => "it is locked to its node by --node: `shoal unlock` it first",
            Self::Settling => "its last migration is not over yet",
        })
    }
}

impl CannotMove {
    /// It runs, and is to stay where it is.
    #[must_use]
    pub fn is_wished(self) -> bool {
        matches!(self, Self::Locked | Self::Pinned)
    }
}

/// A migration under way. Its VM counts on both nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InFlight {
    /// Where it goes.
    pub to: NodeName,
    /// Resident memory of its VMM at the destination, as the destination reports it in its used memory; 0 if not known.
    pub received: Bytes,
}

/// One VM that holds memory on a node: starting, running, migrating, in doubt or stopping. Ended ones are left out.
#[derive(Debug, Clone, PartialEq)]
pub struct VmView {
    /// Unique in the snapshot.
    pub id: VmId,
    /// Its name, for the reasons people read. Cloning it is cheap.
    pub name: Arc<str>,
    /// Where it is.
    pub node: NodeName,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory it was given.
    pub declared: Bytes,
    /// Memory its VMM holds now; none until its node has reported it.
    pub resident: Option<Bytes>,
    /// CPUs that it would use if it got them. None while that has been seen for less than [`shoal_estimate::WINDOW`]: it counts
    /// with all that it asked for where others want to come, and with nothing where others might leave because of it.
    pub cpu: Option<Estimate>,
    /// How fast it dirties memory, where known.
    pub dirty_rate: Option<BytesPerSecond>,
    /// Memory that it writes again and again, where known: pre-copy has no more than that to send again.
    pub working_set: Option<Bytes>,
    /// How fast `resident` grows, smoothed: see [`crate::Growth`].
    pub growth: BytesPerSecond,
    /// A reason why it cannot be moved.
    pub cannot_move: Option<CannotMove>,
    /// The migration it is in.
    pub in_flight: Option<InFlight>,
    /// Since its last attempt to move ended, well or not; none if it never moved.
    pub since_last_move: Option<Duration>,
    /// The CPU features it was given, where known.
    pub cpu_class: Option<CpuClass>,
    /// The kind of KVM that it was started on; none: that of its node.
    pub kvm: Option<KvmKind>,
    /// Its kernel runs in ring 3.
    pub ring3: bool,
    /// What affinity asks about.
    pub labels: Labels,
    /// What it asks of its node.
    pub rules: Option<Arc<Rules>>,
    /// Where it was started, where known.
    pub home: Option<NodeName>,
    /// 0 to 9: the lower, the sooner it is moved, or suspended, for others.
    pub priority: u32,
    /// Its vCPUs are stopped, here and wherever it is moved: it uses no CPU, writes nothing and does not grow.
    pub suspended: bool,
    /// A plan had it suspended, and it grew so fast then: it is to run on where there is room for that. None for one that a
    /// user has suspended.
    pub suspended_growth: Option<BytesPerSecond>,
    /// Its owner lets it be stopped for one of higher priority, to begin anew later.
    pub preemptible: bool,
    /// For how long it has run since it began, which is lost when it begins anew; none if that is not known.
    pub ran: Option<Duration>,
    /// The longest pause that a move of it has had.
    pub longest_pause: Option<Duration>,
    /// It is being stopped so that this VM, which waits, has room.
    pub gives_way_to: Option<VmId>,
}

/// Of a VM of which nobody has said.
pub const DEFAULT_PRIORITY: u32 = 5;

impl VmView {
    /// A VM that runs, is movable, uses no CPU, and whose memory has not been reported yet.
    #[must_use]
    pub fn new(id: &str, node: &str, cpus: u32, declared: Bytes) -> Self {
        Self {
            id: VmId::new(id),
            name: Arc::from(id),
            node: NodeName::new(node),
            cpus,
            declared,
            resident: None,
            cpu: Some(Estimate::default()),
            dirty_rate: None,
            working_set: None,
            growth: BytesPerSecond(0),
            cannot_move: None,
            in_flight: None,
            since_last_move: None,
            cpu_class: None,
            kvm: None,
            ring3: false,
            labels: Labels::default(),
            rules: None,
            home: None,
            priority: DEFAULT_PRIORITY,
            suspended: false,
            suspended_growth: None,
            preemptible: false,
            ran: None,
            longest_pause: None,
            gives_way_to: None,
        }
    }
}

/// Everything a decision depends on, besides the [`crate::Policy`]. Order does not matter.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ClusterSnapshot {
    /// Every node that has ever registered and was not removed.
    pub nodes: Vec<NodeView>,
    /// Every VM that holds memory.
    pub vms: Vec<VmView>,
    /// Room that is being made for VMs that wait.
    pub held: Vec<Held>,
    /// How far predictions have been off.
    pub margins: Margins,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_well() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (4096, "4 KiB"),
            (320 << 20, "320 MiB"),
            (1 << 30, "1 GiB"),
            ((1 << 30) + (1 << 20), "1025 MiB"),
            ((20 << 30) + (512 << 20), "20.5 GiB"),
            (u64::MAX, "16777215 TiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }

    #[test]
    fn a_quota_leaves_less_than_the_cpus_and_nonsense_leaves_all() {
        let mut node = NodeView::new("node1", 4, Bytes::gib(1));
        for (limit, usable) in [
            (None, 4.0),
            (Some(0.5), 0.5),
            (Some(9.0), 4.0),
            (Some(0.0), 4.0),
            (Some(f64::NAN), 4.0),
        ] {
            node.cpu_limit = limit;
            assert_eq!(node.usable_cpus(), usable, "{limit:?}");
        }
    }
}
