//! Why nodes cannot take a VM, in words and numbers.

use std::fmt;
use std::sync::Arc;

use crate::kvm::KvmKind;
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
    /// Its KVM cannot be used.
    NoKvm {
        /// What its agent found.
        why: Arc<str>,
    },
    /// The VM's image has no kernel for its kind of KVM.
    NoKernel {
        /// The kind.
        kvm: KvmKind,
        /// The image.
        image: Arc<str>,
    },
    /// The VM's kernel runs in ring 3, which its KVM does not take.
    NoRing3 {
        /// What its agent found.
        why: Arc<str>,
    },
    /// It has no hardware virtualization, and the kernel for that has fewer CPUs than the VM asks for.
    KernelCpus {
        /// The image.
        image: Arc<str>,
        /// CPUs of the VM.
        needed: u32,
        /// CPUs of that kernel.
        has: u32,
    },
    /// The VM runs on the other kind of KVM.
    OtherKvm {
        /// That one.
        started_on: KvmKind,
    },
    /// It takes no VMs.
    NotReady(NodeState),
    /// What was tried there lately has failed, and is not tried again yet.
    Failing {
        /// What, and until when.
        why: Arc<str>,
    },
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
    /// The VM is to have a node for itself, and others are there.
    NotAlone {
        /// How many.
        vms: usize,
    },
    /// A VM there has the node for itself.
    Exclusive {
        /// Its name, unless it is still to start.
        vm: Option<Arc<str>>,
    },
    /// Others have waited longer for it.
    Kept,
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
    /// The declared vCPUs of its VMs would pass its CPUs times the overcommit.
    Vcpus {
        /// Declared by the VMs there.
        declared: f64,
        /// Of this VM.
        needed: u32,
        /// The limit.
        limit: f64,
    },
    /// So many slots for VMs of the queue are not free there.
    Slots {
        /// vCPUs declared by the VMs there.
        declared: f64,
        /// CPUs in use, or wanted, there.
        load: f64,
        /// vCPUs of this VM.
        needed: u32,
        /// Slots there.
        limit: f64,
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
            Self::NoKvm { why } => write!(f, "its KVM cannot be used: {why}"),
            Self::NoKernel {
                kvm: KvmKind::Hardware,
                image,
            } => write!(
                f,
                "its KVM has hardware virtualization, and image {image} has no kernel for that (kernel in image.toml)"
            ),
            Self::NoKernel {
                kvm: KvmKind::Software,
                image,
            } => write!(
                f,
                "its KVM has no hardware virtualization, and image {image} has no kernel for that ([software_kvm] kernel in image.toml)"
            ),
            Self::NoRing3 { why } => write!(f, "its KVM cannot run a kernel in ring 3: {why}"),
            Self::KernelCpus { image, needed, has } => {
                write!(f, "{}, as there, and the VM asks for {needed}", runs_with(image, *has))
            }
            Self::OtherKvm {
                started_on: KvmKind::Hardware,
            } => f.write_str(
                "its KVM has no hardware virtualization, and the VM was started with it: only a new start can bring it there",
            ),
            Self::OtherKvm {
                started_on: KvmKind::Software,
            } => f.write_str(
                "its KVM has hardware virtualization, and the VM was started without: only a new start can bring it there",
            ),
            Self::NotReady(state) => write!(f, "it is {state}"),
            Self::Failing { why } => f.write_str(why),
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
            Self::NotAlone { vms } => {
                write!(f, "{vms} VMs are there, and the VM is to have a node for itself")
            }
            Self::Exclusive { vm: Some(vm) } => write!(f, "'{vm}' has it for itself"),
            Self::Exclusive { vm: None } => f.write_str("a VM that is to start there has it for itself"),
            Self::Kept => f.write_str("it is kept for those who have waited long"),
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
            Self::Vcpus {
                declared,
                needed,
                limit,
            } => {
                write!(
                    f,
                    "{declared} vCPUs declared there and {needed} more would pass its limit of {} vCPUs",
                    short(*limit)
                )
            }
            Self::Slots {
                declared,
                load,
                needed,
                limit,
            } => {
                write!(
                    f,
                    "{declared} vCPUs declared there, load {load:.2}, and {needed} vCPUs more would pass its {} slots for the queue",
                    short(*limit)
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

impl RejectReason {
    /// Only room is missing, which there would be if VMs left.
    pub(crate) fn is_of_room(&self) -> bool {
        matches!(
            self,
            Self::Committed { .. }
                | Self::Vcpus { .. }
                | Self::Slots { .. }
                | Self::Memory { .. }
                | Self::NotAlone { .. }
                | Self::Exclusive { .. }
        )
    }

    /// It is about the node's KVM and the VM's image, which stay as they are.
    pub(crate) fn is_of_kvm(&self) -> bool {
        matches!(
            self,
            Self::NoKernel { .. } | Self::NoRing3 { .. } | Self::KernelCpus { .. }
        )
    }
}

/// To two places, if it has any.
fn short(number: f64) -> f64 {
    (number * 100.0).round() / 100.0
}

fn runs_with(image: &str, cpus: u32) -> String {
    let word = if cpus == 1 { "CPU" } else { "CPUs" };
    format!("image {image} runs with {cpus} {word} where KVM has no hardware virtualization")
}

/// In one sentence, if it is for its number of CPUs that no node takes a VM.
fn all_short_of_kernel_cpus(rejections: &[&Rejection]) -> Option<String> {
    let short = |rejection: &&Rejection| match &rejection.reason {
        RejectReason::KernelCpus { image, has, .. } => Some(runs_with(image, *has)),
        _ => None,
    };
    let words = rejections.first().and_then(short)?;
    let names: Vec<&str> = rejections
        .iter()
        .map(|rejection| rejection.node.as_str())
        .collect();
    let such = match names.as_slice() {
        [one] => format!("{one} is such"),
        [before @ .., last] if names.len() <= FEW => format!("{} and {last} are such", before.join(", ")),
        all => format!("all {} nodes are such", all.len()),
    };
    rejections
        .iter()
        .all(|rejection| short(rejection).is_some())
        .then(|| format!("{words}; {such}"))
}

/// So many rejections are listed one by one.
const FEW: usize = 5;

/// Rejections in one line, but for the node where the VM is: each node's where there are few, otherwise how many for which
/// reason, with one example each.
#[must_use]
pub fn summarise(rejections: &[Rejection]) -> String {
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
    if let Some(text) = all_short_of_kernel_cpus(&elsewhere) {
        return text;
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
