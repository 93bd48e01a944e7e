//! Why nodes cannot take a VM, in words and numbers.

use std::fmt;
use std::sync::Arc;

use crate::labels::{Label, Term};
use crate::model::{Bytes, NodeName, NodeState};

/// Why a node cannot take a VM.
#[derive(Debug, Clone, PartialEq)]
pub enum RejectReason {
    /// The request names another node.
    NotAskedFor {
        /// That one.
        asked: NodeName,
    },
    /// The VM is there already.
    SameNode,
    /// It takes no VMs.
    NotReady(NodeState),
    /// Its labels are not as the VM asks.
    Selector {
        /// What is asked.
        term: Term,
    },
    /// The VM does not tolerate one of its taints.
    Taint {
        /// Which.
        taint: Label,
    },
    /// The VM asks to be with others, and none of them is there.
    Affinity {
        /// With which.
        term: Term,
    },
    /// The VM refuses to be with others, and one of them is there.
    AntiAffinity {
        /// With which.
        term: Term,
    },
    /// A VM there refuses to be with this one.
    AntiAffinityThere {
        /// What it refuses.
        term: Term,
    },
    /// If some node died, its VMs would not fit on the others any more.
    NPlusOne {
        /// That node.
        node: NodeName,
        /// What a VM of it would need.
        needed: Bytes,
        /// The largest room that would be left.
        room: Bytes,
    },
    /// The VM has more CPUs than the node.
    TooFewCpus {
        /// CPUs of the VM.
        needed: u32,
        /// CPUs of the node.
        has: u32,
    },
    /// Its CPU lacks features that the VM has, or is to have.
    CpuFeatures {
        /// Which.
        lacking: Arc<str>,
    },
    /// One of the two nodes migrates over TLS only, and the other has no certificate for that.
    Tls {
        /// Where the VM is.
        from: NodeName,
        /// Whether that is the one that lacks a certificate.
        from_lacks: bool,
    },
    /// The declared memory of its VMs would pass its memory times the overcommit.
    Committed {
        /// Declared by the VMs there.
        declared: Bytes,
        /// Declared by this VM.
        needed: Bytes,
        /// The limit.
        limit: Bytes,
    },
    /// The memory in use would pass the threshold.
    Memory {
        /// Used and reserved now.
        used: Bytes,
        /// What this VM is expected to use.
        needed: Bytes,
        /// The limit.
        limit: Bytes,
    },
    /// With what is growing there and what this VM grows, the memory in use would pass the threshold.
    Growth {
        /// What would be used at the horizon.
        predicted: Bytes,
        /// The horizon.
        seconds: u64,
        /// The limit.
        limit: Bytes,
    },
    /// It is under memory pressure.
    Pressure {
        /// PSI some avg10, percent.
        percent: f64,
        /// The limit.
        limit: f64,
    },
    /// As many migrations as allowed are on their way to it.
    Busy {
        /// How many.
        incoming: usize,
    },
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAskedFor { asked } => write!(f, "{asked} was asked for"),
            Self::SameNode => f.write_str("the VM is there already"),
            Self::NotReady(state) => write!(f, "it is {state}"),
            Self::Selector { term } => write!(f, "its labels are not '{term}', which the VM asks for"),
            Self::Taint { taint } => write!(f, "it has the taint '{taint}', which the VM does not tolerate"),
            Self::Affinity { term } => {
                write!(f, "no VM there is '{term}', and the VM is to be with one")
            }
            Self::AntiAffinity { term } => {
                write!(f, "a VM there is '{term}', and the VM is not to be with one")
            }
            Self::AntiAffinityThere { term } => {
                write!(f, "a VM there is not to be with one that is '{term}'")
            }
            Self::NPlusOne { node, needed, room } => {
                write!(
                    f,
                    "the cluster would not fit any more if {node} died: a VM of it needs {needed}, the largest room \
                     left would be {room}"
                )
            }
            Self::TooFewCpus { needed, has } => write!(f, "it has {has} CPUs, the VM asks for {needed}"),
            Self::CpuFeatures { lacking } => write!(f, "its CPU lacks {lacking}, which the VM has"),
            Self::Tls { from, from_lacks } if *from_lacks => write!(
                f,
                "it takes VMs over TLS only, and {from} has no certificate for migrations: start the agent of {from} with --migration-tls (`shoal certs issue` makes the files)"
            ),
            Self::Tls { from, .. } => write!(
                f,
                "it has no certificate for migrations, and {from} sends VMs over TLS only: start its agent with --migration-tls (`shoal certs issue` makes the files)"
            ),
            Self::Committed {
                declared,
                needed,
                limit,
            } => {
                write!(
                    f,
                    "{declared} declared there and {needed} more would pass its limit of {limit} declared memory"
                )
            }
            Self::Memory { used, needed, limit } => {
                write!(
                    f,
                    "{used} used or reserved there and {needed} expected of the VM would pass its limit of {limit}"
                )
            }
            Self::Growth {
                predicted,
                seconds,
                limit,
            } => {
                write!(
                    f,
                    "it would hold {predicted} within {seconds} s, growth counted, past its limit of {limit}"
                )
            }
            Self::Pressure { percent, limit } => {
                write!(
                    f,
                    "its memory pressure is {percent:.0} %, the limit is {limit:.0} %"
                )
            }
            Self::Busy { incoming } => {
                write!(f, "{incoming} migrations to it are under way, which is the limit")
            }
        }
    }
}

/// A node and why it cannot take the VM.
#[derive(Debug, Clone, PartialEq)]
pub struct Rejection {
    /// The node.
    pub node: NodeName,
    /// Why not.
    pub reason: RejectReason,
}

/// Rejections in one line, but for the node where the VM is: each node's where there are few, otherwise how many for which
/// reason, with one example each.
#[must_use]
pub fn summarise(rejections: &[Rejection]) -> String {
    const FEW: usize = 5;
    if rejections.is_empty() {
        return "the cluster has no nodes".to_owned();
    }
    let elsewhere: Vec<&Rejection> = rejections
        .iter()
        .filter(|rejection| rejection.reason != RejectReason::SameNode)
        .collect();
    if elsewhere.is_empty() {
        return "there is no other node".to_owned();
    }
    if elsewhere.len() <= FEW {
        let each: Vec<String> = elsewhere
            .iter()
            .map(|r| format!("{}: {}", r.node, r.reason))
            .collect();
        return each.join("; ");
    }
    // In order of first appearance, so that the text is stable.
    let mut groups: Vec<(&Rejection, usize)> = Vec::new();
    for rejection in elsewhere {
        let kind = std::mem::discriminant(&rejection.reason);
        match groups
            .iter_mut()
            .find(|(first, _)| std::mem::discriminant(&first.reason) == kind)
        {
            Some((_, count)) => *count += 1,
            None => groups.push((rejection, 1)),
        }
    }
    let each: Vec<String> = groups
        .iter()
        .map(|(first, count)| format!("{count} like {}: {}", first.node, first.reason))
        .collect();
    each.join("; ")
}
