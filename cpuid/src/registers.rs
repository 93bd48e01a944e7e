//! Which registers of which leaves hold feature bits.

use crate::table::Entry;

/// One of a leaf's four.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub(crate) fn of(self, entry: &Entry) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    pub(crate) fn of_mut(self, entry: &mut Entry) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// A register with feature bits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FeatureRegister {
    pub leaf: u32,
    pub index: u32,
    pub register: Register,
    /// Bits that say something else, or that the VMM sets for itself.
    pub not_features: u32,
}

const HYPERVISOR: u32 = 1 << 31;
/// Mirrors CR4.
const OSXSAVE: u32 = 1 << 27;
const TSC_DEADLINE: u32 = 1 << 24;
const HTT: u32 = 1 << 28;
/// Mirrors CR4.
const OSPKE: u32 = 1 << 4;
/// MAWAU, a number.
const MAWAU: u32 = 0x1f << 17;

const fn feature(leaf: u32, index: u32, register: Register, not_features: u32) -> FeatureRegister {
    FeatureRegister {
        leaf,
        index,
        register,
        not_features,
    }
}

/// Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.
pub(crate) const FEATURE_REGISTERS: [FeatureRegister; 31] = {
    use Register::{Eax, Ebx, Ecx, Edx};
    [
        feature(1, 0, Ecx, HYPERVISOR | OSXSAVE | TSC_DEADLINE),
        feature(1, 0, Edx, HTT),
        feature(7, 0, Ebx, 0),
        feature(7, 0, Ecx, OSPKE | MAWAU),
        feature(7, 0, Edx, 0),
        feature(7, 1, Eax, 0),
        feature(7, 1, Ebx, 0),
        feature(7, 1, Ecx, 0),
        feature(7, 1, Edx, 0),
        feature(7, 2, Eax, 0),
        feature(7, 2, Ecx, 0),
        feature(7, 2, Edx, 0),
        feature(0xd, 0, Eax, 0),
        feature(0xd, 0, Edx, 0),
        feature(0xd, 1, Eax, 0),
        feature(0xd, 1, Ecx, 0),
        feature(0xd, 1, Edx, 0),
        feature(0x14, 0, Ebx, 0),
        feature(0x14, 0, Ecx, 0),
        feature(0x19, 0, Eax, 0),
        feature(0x19, 0, Ebx, 0),
        feature(0x19, 0, Ecx, 0),
        feature(0x1e, 1, Eax, 0),
        feature(0x4000_0001, 0, Eax, 0),
        feature(0x8000_0001, 0, Ecx, 0),
        feature(0x8000_0001, 0, Edx, 0),
        feature(0x8000_0007, 0, Ebx, 0),
        feature(0x8000_0007, 0, Edx, 0),
        feature(0x8000_0008, 0, Ebx, 0),
        feature(0x8000_0021, 0, Eax, 0),
        feature(0x8000_0022, 0, Eax, 0),
    ]
};
