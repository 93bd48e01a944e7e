//! What a round answers: moves, each with its reason, and notes about what could not be done. It changes nothing by itself.

use std::fmt;
use std::time::Duration;

use crate::cluster::{Cluster, duration};
use crate::model::{BytesPerSecond, NodeName, VmId};

/// Why a VM is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ActionKind {
    /// Its node runs out of memory.
    Usher,
    /// Its node is drained.
    Drain,
    /// Its rules do not hold on its node.
    Rules,
    /// The cluster is better balanced afterwards.
    Rebalance,
    /// So it is when this VM and that of the next action, or of the one before, have changed places.
    Swap,
    /// Its node is emptied, or is short of CPU, where VMs are packed.
    Pack,
    /// Someone asked that its node be rid of its VMs.
    Expel,
    /// Someone asked that it come back to where it was started.
    Bring,
}

impl fmt::Display for ActionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Usher => "usher",
            Self::Drain => "drain",
            Self::Rules => "rules",
            Self::Rebalance => "rebalance",
            Self::Swap => "swap",
            Self::Pack => "pack",
            Self::Expel => "expel",
            Self::Bring => "bring",
        })
    }
}

/// One migration to start.
#[derive(Debug, Clone, PartialEq)]
pub struct Action {
    /// Why, in a word.
    pub kind: ActionKind,
    /// What to move.
    pub vm: VmId,
    /// Where it is.
    pub from: NodeName,
    /// Where it goes.
    pub to: NodeName,
    /// How long the move is expected to take.
    pub expected: Duration,
    /// Why, in a line.
    pub reason: String,
    /// All the figures; empty if the reason has them.
    pub details: String,
}

impl Action {
    /// The move of a VM to a node, both as numbers.
    pub(crate) fn new(cluster: &Cluster<'_>, kind: ActionKind, vm: usize, to: usize, reason: String) -> Self {
        let vm = &cluster.vms[vm];
        Self {
            kind,
            vm: vm.view.id.clone(),
            from: cluster.nodes[vm.node].view.name.clone(),
            to: cluster.nodes[to].view.name.clone(),
            expected: duration(vm.move_seconds),
            reason,
            details: String::new(),
        }
    }

    pub(crate) fn with_details(self, details: String) -> Self {
        Self { details, ..self }
    }
}

/// What a note is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NoteKind {
    /// A node runs out of memory and nothing can be moved off it.
    UsherStuck,
    /// A VM of a draining node, or one that is asked to go, cannot.
    DrainStuck,
    /// Such a VM goes later: limits, or a move that has just ended.
    DrainWaiting,
    /// A VM is on a node against its rules and cannot go.
    RulesStuck,
}

impl fmt::Display for NoteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::UsherStuck => "usher-stuck",
            Self::DrainStuck => "drain-stuck",
            Self::DrainWaiting => "drain-waiting",
            Self::RulesStuck => "rules-stuck",
        })
    }
}

/// Something that could not be done, and why. The same situation gives the same note again each round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// What it is about.
    pub kind: NoteKind,
    /// The node it is about.
    pub node: NodeName,
    /// The VM it is about, if one.
    pub vm: Option<VmId>,
    /// In words and numbers.
    pub text: String,
}

/// A VM whose vCPUs are to be stopped where it is, or to run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// Which.
    pub vm: VmId,
    /// Where it is.
    pub node: NodeName,
    /// How fast it grows, or grew when it was suspended.
    pub growth: BytesPerSecond,
    /// Why, in words and numbers.
    pub reason: String,
}

/// The answer of one round.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// Migrations to start now, all of them at once, most urgent first.
    pub actions: Vec<Action>,
    /// VMs to suspend, at most one of a node: see [`crate::LastResort`].
    pub suspend: Vec<Hold>,
    /// VMs that were suspended so, and are to run on; at most one of a node.
    pub resume: Vec<Hold>,
    /// What could not be done.
    pub notes: Vec<Note>,
    /// Score of the cluster when the migrations under way have ended: see [`crate::score`].
    pub score_before: f64,
    /// The same with `actions` done.
    pub score_after: f64,
    /// How much longer the work of VMs takes then than if each had the CPUs that it wants, on average: 1 where all have.
    pub slowdown_before: f64,
    /// The same with `actions` done.
    pub slowdown_after: f64,
    /// Where VMs are packed: ready nodes that have none, or none any more when the migrations have ended.
    pub empty_nodes: Vec<NodeName>,
}
