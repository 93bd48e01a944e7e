//! The policies that are compared. All see the same [`Observation`] and answer the same two questions: where a new VM goes,
//! and what is moved now. Each file says where its rule comes from.

mod digest;
mod drs;
mod hbal;
mod lr_mmt;
mod openmosix;
mod pack;
mod shoal;
mod simple;
mod threshold;

use std::time::Duration;

use shoal_plan::{ActionKind, Hold, LaunchRequest, NodeName, Turn, VmId, Waiting};

use crate::model::{Mode, Scenario};
pub use crate::observe::{Observation, RunQueue, Samples};

/// A migration to start.
#[derive(Debug, Clone, PartialEq)]
pub struct Move {
    /// What.
    pub vm: VmId,
    /// Where to.
    pub to: NodeName,
    /// What for, if the policy says.
    pub kind: Option<ActionKind>,
    /// What the policy expects it to gain in ten minutes, in CPU seconds of the fastest node, if it says.
    pub predicted: Option<f64>,
    /// How long the policy expects it to take, if it says.
    pub expected: Option<Duration>,
}

impl Move {
    /// A move of which nothing more is said.
    #[must_use]
    pub fn new(vm: VmId, to: NodeName) -> Self {
        Self {
            vm,
            to,
            kind: None,
            predicted: None,
            expected: None,
        }
    }
}

/// What a policy wants done now.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Orders {
    /// Migrations to start.
    pub moves: Vec<Move>,
    /// VMs to suspend.
    pub suspend: Vec<Hold>,
    /// Suspended VMs that are to run on.
    pub resume: Vec<Hold>,
}

impl From<Vec<Move>> for Orders {
    fn from(moves: Vec<Move>) -> Self {
        Self {
            moves,
            ..Self::default()
        }
    }
}

/// A placement and migration policy. It may keep what it has seen; it knows nothing but what it is shown.
pub trait Balancer: std::fmt::Debug {
    /// Where a new VM starts; none: it waits, and is asked for again with the next report.
    fn place(&mut self, seen: &Observation<'_>, request: &LaunchRequest) -> Option<NodeName>;

    /// What to do now. Moves that the limits do not let start are dropped.
    fn round(&mut self, seen: &Observation<'_>) -> Orders;

    /// What becomes of VMs that wait, in the order of their arrival; none: they are placed one after the other.
    fn turns(&mut self, _seen: &Observation<'_>, _waiting: &[Waiting]) -> Option<Vec<(usize, Turn)>> {
        None
    }

    /// Seconds between two rounds, if more than a report's.
    fn interval(&self) -> f64 {
        0.0
    }
}

/// A policy by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PolicyKind {
    /// The node with the fewest VMs; nothing is moved.
    None,
    /// One node after the other; nothing is moved.
    RoundRobin,
    /// Any node with room; nothing is moved.
    Random,
    /// Incus: a gap of 20 %.
    Threshold20,
    /// Proxmox: an imbalance of 30 %.
    Threshold30,
    /// The published formula of openMosix.
    OpenMosix,
    /// Ganeti's metric and steps.
    Hbal,
    /// A score per VM in the manner of vSphere DRS 7.
    Drs,
    /// Beloglazov and Buyya: local regression and minimum migration time.
    LrMmt,
    /// The plan crate.
    Shoal,
}

impl PolicyKind {
    /// Every policy, in the order of the tables.
    pub const ALL: [Self; 10] = [
        Self::None,
        Self::RoundRobin,
        Self::Random,
        Self::Threshold20,
        Self::Threshold30,
        Self::OpenMosix,
        Self::Hbal,
        Self::Drs,
        Self::LrMmt,
        Self::Shoal,
    ];

    /// As written in scenarios and tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::RoundRobin => "round-robin",
            Self::Random => "random",
            Self::Threshold20 => "threshold-20",
            Self::Threshold30 => "threshold-30",
            Self::OpenMosix => "openmosix",
            Self::Hbal => "hbal",
            Self::Drs => "drs-like",
            Self::LrMmt => "lr-mmt",
            Self::Shoal => "shoal",
        }
    }

    /// By its name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == text)
    }

    /// Those compared unless a scenario says which.
    #[must_use]
    pub fn default_for(mode: Mode) -> Vec<Self> {
        match mode {
            Mode::Spread => Self::ALL
                .into_iter()
                .filter(|kind| *kind != Self::LrMmt)
                .collect(),
            Mode::Pack => vec![Self::None, Self::LrMmt, Self::Shoal],
        }
    }

    /// The policy, ready for a run with this seed.
    #[must_use]
    pub fn build(self, scenario: &Scenario, seed: u64) -> Box<dyn Balancer> {
        match self {
            Self::None => Box::new(simple::Fewest),
            Self::RoundRobin => Box::new(simple::RoundRobin::default()),
            Self::Random => Box::new(simple::Anywhere::new(seed)),
            Self::Threshold20 => Box::new(threshold::Gap::default()),
            Self::Threshold30 => Box::new(threshold::Imbalance::default()),
            Self::OpenMosix => Box::new(openmosix::OpenMosix::new(seed)),
            Self::Hbal => Box::new(hbal::Hbal),
            Self::Drs => Box::new(drs::Drs),
            Self::LrMmt => Box::new(lr_mmt::LrMmt::new(scenario)),
            Self::Shoal if scenario.mode == Mode::Pack => Box::new(pack::Pack::new(scenario)),
            Self::Shoal => Box::new(shoal::Shoal),
        }
    }
}

#[cfg(test)]
mod tests;
