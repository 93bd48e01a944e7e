//! Kinds of KVM. A VM starts where its image has a kernel for the node's kind, and keeps to that kind until it begins anew.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::model::NodeView;
use crate::reject::RejectReason;

/// How a host's KVM runs guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KvmKind {
    /// By the CPU's virtualization: VT-x or AMD-V.
    Hardware,
    /// Without: a guest's ring 0 is emulated.
    Software,
}

impl fmt::Display for KvmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Hardware => "hardware",
            Self::Software => "software",
        })
    }
}

/// Neither `hardware` nor `software`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a kind of KVM: it is hardware or software")]
pub struct UnknownKvmKind;

impl FromStr for KvmKind {
    type Err = UnknownKvmKind;

    fn from_str(text: &str) -> Result<Self, UnknownKvmKind> {
        match text {
            "hardware" => Ok(Self::Hardware),
            "software" => Ok(Self::Software),
            _ => Err(UnknownKvmKind),
        }
    }
}

/// The kernel of an image for hosts without hardware virtualization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SoftwareKernel {
    /// The same as with hardware virtualization.
    Plain,
    /// One of its own, which runs in ring 3.
    Ring3,
}

/// The kernels that an image has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernels {
    /// The image's name, for people to read.
    pub image: Arc<str>,
    /// It has one for hosts with hardware virtualization.
    pub hardware: bool,
    /// The one for hosts without.
    pub software: Option<SoftwareKernel>,
    /// The most vCPUs of that one, if it has a limit of its own.
    pub software_cpus: Option<u32>,
}

/// What a VM asks of a node's KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum KvmNeed {
    /// It runs on KVM of this kind, with a kernel in ring 3 or another.
    Same { kvm: KvmKind, ring3: bool },
    /// Nothing is known of it.
    Unknown,
}

impl KvmNeed {
    /// Whether a VM that runs can be moved to the node.
    pub fn check(self, node: &NodeView) -> Result<(), RejectReason> {
        let kind = usable(node)?;
        let (Self::Same { kvm, ring3 }, Some(kind)) = (self, kind) else {
            return Ok(());
        };
        if kind != kvm {
            return Err(RejectReason::OtherKvm { started_on: kvm });
        }
        if ring3 { takes_ring3(node) } else { Ok(()) }
    }
}

impl Kernels {
    /// Whether a VM with so many vCPUs can start on the node.
    pub(crate) fn check(&self, cpus: u32, node: &NodeView) -> Result<(), RejectReason> {
        let image = || Arc::clone(&self.image);
        match (usable(node)?, self.hardware, self.software) {
            (Some(kvm @ KvmKind::Hardware), false, _) | (Some(kvm @ KvmKind::Software), _, None) => {
                Err(RejectReason::NoKernel { kvm, image: image() })
            }
            (Some(KvmKind::Software), _, Some(kernel)) => {
                if kernel == SoftwareKernel::Ring3 {
                    takes_ring3(node)?;
                }
                match self.software_cpus {
                    Some(has) if cpus > has => Err(RejectReason::KernelCpus {
                        image: image(),
                        needed: cpus,
                        has,
                    }),
                    _ => Ok(()),
                }
            }
            (Some(KvmKind::Hardware), true, _) | (None, ..) => Ok(()),
        }
    }
}

/// The node's kind, where known; refused if its KVM cannot be used at all.
pub(crate) fn usable(node: &NodeView) -> Result<Option<KvmKind>, RejectReason> {
    match (node.kvm, &node.kvm_trouble) {
        (None, Some(why)) => Err(RejectReason::NoKvm { why: Arc::clone(why) }),
        (kind, _) => Ok(kind),
    }
}

fn takes_ring3(node: &NodeView) -> Result<(), RejectReason> {
    match &node.kvm_trouble {
        Some(why) => Err(RejectReason::NoRing3 { why: Arc::clone(why) }),
        None => Ok(()),
    }
}
