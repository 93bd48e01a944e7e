//! Model-specific registers: which of those that a KVM saves belong to a guest with a given CPU.
//!
//! A KVM lists what its host has, not what a guest was given. A guest needs an MSR where it goes if it has the feature that
//! brings it, or if it has it whatever its CPUID says. An MSR that is in no row here came with a feature that is newer than
//! this program: a host that offers all of the guest's features has it if the guest does, so it is not asked for. Should a
//! guest have changed one that it does not need ([`optional_msrs`]), the VMM sends it all the same, and a host that does not
//! know it refuses it then.

use std::collections::HashSet;
use std::fmt;

use crate::table::Table;

/// Longest list that is believed. KVM's are of 40 to 400.
pub const MAX_MSRS: usize = 4096;
/// General-purpose counters, Intel: EAX 15:8 of leaf 0xa; fixed ones: EDX 4:0.
const COUNTERS_AT: u32 = 8;
const COUNTERS: u32 = 0xff;
const FIXED_COUNTERS: u32 = 0x1f;
const AMD: [&str; 2] = ["AuthenticAMD", "HygonGenuine"];

/// An MSR by its number. Displayed with its name, if it has one here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Msr(pub u32);

impl fmt::Display for Msr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match row_of(self.0) {
            Some(row) => write!(f, "MSR {:#x} ({})", self.0, row.name),
            None => write!(f, "MSR {:#x}", self.0),
        }
    }
}

/// Who has an MSR.
#[derive(Debug, Clone, Copy)]
enum Owner {
    /// Every guest.
    Every,
    /// No guest here: what it belongs to is not offered, and some change by themselves.
    Nobody,
    /// Guests with any of these features.
    Any(&'static [&'static str]),
    /// Guests with so many general-purpose counters, by its place among its like.
    Counter,
    /// Guests with so many fixed counters, likewise.
    FixedCounter,
    /// Guests with a performance monitoring unit of Intel's.
    Perfmon,
    /// Guests of AMD's make.
    Amd,
}

#[derive(Debug)]
struct Row {
    first: u32,
    last: u32,
    name: &'static str,
    owner: Owner,
}

const fn row(first: u32, last: u32, name: &'static str, owner: Owner) -> Row {
    Row {
        first,
        last,
        name,
        owner,
    }
}

const KVM_CLOCK: Owner = Owner::Any(&["KVM_CLOCKSOURCE"]);
const KVM_CLOCK2: Owner = Owner::Any(&["KVM_CLOCKSOURCE2"]);
const ASYNC_PF: Owner = Owner::Any(&["KVM_ASYNC_PF"]);
const ASYNC_PF_INT: Owner = Owner::Any(&["KVM_ASYNC_PF_INT"]);
const SPEC_CTRL: Owner = Owner::Any(&[
    "IBRS",
    "STIBP",
    "SSBD",
    "AMD_IBRS",
    "AMD_STIBP",
    "AMD_SSBD",
    "AMD_PSFD",
    "PSFD",
    "IPRED_CTRL",
    "RRSBA_CTRL",
    "DDPD_U",
    "BHI_CTRL",
]);
const CET: Owner = Owner::Any(&["CET_SS", "CET_IBT"]);

/// What Linux's KVM lists (arch/x86/kvm/x86.c), and MTRRs and machine check banks, which it does not; Intel SDM volume 4,
/// AMD APM volume 2, appendix A, Linux Documentation/virt/kvm/x86/msr.rst. In the order of the numbers.
static ROWS: [Row; 69] = [
    row(0x10, 0x10, "TSC", Owner::Every),
    row(0x11, 0x11, "KVM_WALL_CLOCK", KVM_CLOCK),
    row(0x12, 0x12, "KVM_SYSTEM_TIME", KVM_CLOCK),
    row(0x34, 0x34, "SMI_COUNT", Owner::Every),
    row(0x3a, 0x3a, "FEAT_CTL", Owner::Every),
    row(0x3b, 0x3b, "TSC_ADJUST", Owner::Any(&["TSC_ADJUST"])),
    row(0x48, 0x48, "SPEC_CTRL", SPEC_CTRL),
    row(0x8b, 0x8b, "UCODE_REV", Owner::Every),
    // Of System Management Mode, which no firmware here uses.
    row(0x9e, 0x9e, "SMBASE", Owner::Any(&[])),
    row(0xc1, 0xc8, "PERFCTR", Owner::Counter),
    row(0xce, 0xce, "PLATFORM_INFO", Owner::Every),
    row(0xe1, 0xe1, "UMWAIT_CONTROL", Owner::Any(&["WAITPKG"])),
    row(
        0x10a,
        0x10a,
        "ARCH_CAPABILITIES",
        Owner::Any(&["ARCH_CAPABILITIES"]),
    ),
    row(0x122, 0x122, "TSX_CTRL", Owner::Any(&["ARCH_CAPABILITIES"])),
    row(0x140, 0x140, "MISC_FEATURES_ENABLES", Owner::Every),
    row(0x174, 0x176, "SYSENTER", Owner::Every),
    row(0x17a, 0x17b, "MCG", Owner::Any(&["MCE", "MCA"])),
    row(0x186, 0x18d, "PERFEVTSEL", Owner::Counter),
    row(0x1a0, 0x1a0, "MISC_ENABLE", Owner::Every),
    row(0x1c4, 0x1c5, "XFD", Owner::Any(&["XFD"])),
    row(0x1cc, 0x1d4, "FRED", Owner::Any(&["FRED"])),
    row(0x1d9, 0x1d9, "DEBUGCTL", Owner::Every),
    row(0x1db, 0x1de, "LAST_BRANCH", Owner::Every),
    row(0x1fc, 0x1fc, "POWER_CTL", Owner::Every),
    row(0x200, 0x20f, "MTRR_PHYS", Owner::Any(&["MTRR"])),
    row(0x250, 0x250, "MTRR_FIX64K", Owner::Any(&["MTRR"])),
    row(0x258, 0x259, "MTRR_FIX16K", Owner::Any(&["MTRR"])),
    row(0x268, 0x26f, "MTRR_FIX4K", Owner::Any(&["MTRR"])),
    row(0x277, 0x277, "PAT", Owner::Every),
    row(0x2ff, 0x2ff, "MTRR_DEF_TYPE", Owner::Any(&["MTRR"])),
    row(0x309, 0x310, "FIXED_CTR", Owner::FixedCounter),
    row(0x345, 0x345, "PERF_CAPABILITIES", Owner::Any(&["PDCM"])),
    row(0x38d, 0x390, "PERF_GLOBAL", Owner::Perfmon),
    row(0x3f1, 0x3f2, "PEBS", Owner::Any(&["DS"])),
    row(0x400, 0x47f, "MC_BANK", Owner::Any(&["MCE", "MCA"])),
    row(0x480, 0x493, "VMX", Owner::Any(&["VMX"])),
    // Of local machine checks, which no guest is given.
    row(0x4d0, 0x4d0, "MCG_EXT_CTL", Owner::Any(&[])),
    row(0x560, 0x561, "RTIT_OUTPUT", Owner::Any(&["INTEL_PT"])),
    row(0x570, 0x572, "RTIT", Owner::Any(&["INTEL_PT"])),
    row(0x580, 0x587, "RTIT_ADDR", Owner::Any(&["INTEL_PT"])),
    row(0x600, 0x600, "DS_AREA", Owner::Any(&["DS"])),
    row(0x6a0, 0x6a0, "U_CET", CET),
    row(0x6a2, 0x6a2, "S_CET", CET),
    row(0x6a4, 0x6a8, "SSP", Owner::Any(&["CET_SS"])),
    row(0x6e0, 0x6e0, "TSC_DEADLINE", Owner::Every),
    row(0xd90, 0xd90, "BNDCFGS", Owner::Any(&["MPX"])),
    row(0xda0, 0xda0, "XSS", Owner::Any(&["XSAVES"])),
    // Guests are shown KVM's own hypervisor leaves.
    row(0x4000_0000, 0x4000_01ff, "HYPERV", Owner::Nobody),
    row(0x4b56_4d00, 0x4b56_4d00, "KVM_WALL_CLOCK_NEW", KVM_CLOCK2),
    row(0x4b56_4d01, 0x4b56_4d01, "KVM_SYSTEM_TIME_NEW", KVM_CLOCK2),
    row(0x4b56_4d02, 0x4b56_4d02, "KVM_ASYNC_PF_EN", ASYNC_PF),
    row(
        0x4b56_4d03,
        0x4b56_4d03,
        "KVM_STEAL_TIME",
        Owner::Any(&["KVM_STEAL_TIME"]),
    ),
    row(
        0x4b56_4d04,
        0x4b56_4d04,
        "KVM_PV_EOI_EN",
        Owner::Any(&["KVM_PV_EOI"]),
    ),
    row(
        0x4b56_4d05,
        0x4b56_4d05,
        "KVM_POLL_CONTROL",
        Owner::Any(&["KVM_POLL_CONTROL"]),
    ),
    row(0x4b56_4d06, 0x4b56_4d06, "KVM_ASYNC_PF_INT", ASYNC_PF_INT),
    row(0x4b56_4d07, 0x4b56_4d07, "KVM_ASYNC_PF_ACK", ASYNC_PF_INT),
    row(0xc000_0081, 0xc000_0084, "SYSCALL", Owner::Every),
    row(0xc000_0102, 0xc000_0102, "KERNEL_GS_BASE", Owner::Every),
    row(
        0xc000_0103,
        0xc000_0103,
        "TSC_AUX",
        Owner::Any(&["RDTSCP", "RDPID"]),
    ),
    row(0xc000_0104, 0xc000_0104, "TSC_RATIO", Owner::Any(&["SVM"])),
    row(
        0xc000_0300,
        0xc000_0303,
        "PERF_GLOBAL_AMD",
        Owner::Any(&["PERFMON_V2"]),
    ),
    row(0xc001_0000, 0xc001_0003, "PERFEVTSEL_AMD", Owner::Amd),
    row(0xc001_0004, 0xc001_0007, "PERFCTR_AMD", Owner::Amd),
    row(0xc001_0015, 0xc001_0015, "HWCR", Owner::Every),
    row(0xc001_0114, 0xc001_0114, "VM_CR", Owner::Any(&["SVM"])),
    row(0xc001_0117, 0xc001_0117, "VM_HSAVE_PA", Owner::Any(&["SVM"])),
    row(
        0xc001_011f,
        0xc001_011f,
        "VIRT_SPEC_CTRL",
        Owner::Any(&["VIRT_SSBD"]),
    ),
    row(
        0xc001_0200,
        0xc001_020b,
        "PERF_CORE",
        Owner::Any(&["PERFCTR_CORE"]),
    ),
    row(0xc001_1029, 0xc001_1029, "DE_CFG", Owner::Amd),
];

fn row_of(msr: u32) -> Option<&'static Row> {
    let after = ROWS.partition_point(|row| row.first <= msr);
    ROWS[..after].last().filter(|row| msr <= row.last)
}

/// What a guest has to do with an MSR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Needed,
    Optional,
    Nothing,
}

fn select(cpu: &Table, saved: &[u32], wanted: Need) -> Vec<u32> {
    let features: HashSet<&str> = cpu.features().filter_map(|feature| feature.name()).collect();
    let perfmon = cpu.perfmon();
    let amd = AMD.contains(&cpu.vendor().as_str());
    let need = |msr: u32| {
        let Some(row) = row_of(msr) else {
            return Need::Optional;
        };
        let place = msr - row.first;
        let has = match row.owner {
            Owner::Every => true,
            Owner::Nobody => return Need::Nothing,
            Owner::Any(of) => of.iter().any(|feature| features.contains(feature)),
            Owner::Counter => place < perfmon.eax >> COUNTERS_AT & COUNTERS,
            Owner::FixedCounter => place < perfmon.edx & FIXED_COUNTERS,
            Owner::Perfmon => perfmon.eax != 0,
            Owner::Amd => amd,
        };
        if has { Need::Needed } else { Need::Optional }
    };
    saved.iter().copied().filter(|msr| need(*msr) == wanted).collect()
}

/// Of the MSRs that a KVM saves, those that a guest with this CPU has, in their order.
#[must_use]
pub fn needed_msrs(cpu: &Table, saved: &[u32]) -> Vec<u32> {
    select(cpu, saved, Need::Needed)
}

/// Of the MSRs that a KVM saves, those that a guest with this CPU does not have by its CPUID, and could have changed all the
/// same, in their order.
#[must_use]
pub fn optional_msrs(cpu: &Table, saved: &[u32]) -> Vec<u32> {
    select(cpu, saved, Need::Optional)
}

/// What a VM with this CPU, where a KVM saves the MSRs `here`, misses on a host whose KVM saves those `there`; none if it can
/// run there. The scheduler asks it before it plans a move, and a destination of a source that has told what its VM needs.
#[must_use]
pub fn missing_msrs(cpu: &Table, here: &[u32], there: &[u32]) -> Vec<Msr> {
    let there: HashSet<u32> = there.iter().copied().collect();
    let needed = needed_msrs(cpu, here).into_iter();
    needed.filter(|msr| !there.contains(msr)).map(Msr).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::names::every_name;
    use crate::table::Entry;

    const MPX: u32 = 1 << 14;

    fn cpu(vendor: [u32; 3], leaf7_ebx: u32, perfmon: [u32; 2]) -> Table {
        let leaf = |function, [eax, ebx, ecx, edx]: [u32; 4]| Entry {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Entry::default()
        };
        let [ebx, edx, ecx] = vendor;
        vec![
            leaf(0, [0x16, ebx, ecx, edx]),
            leaf(7, [0, leaf7_ebx, 0, 0]),
            leaf(0xa, [perfmon[0], 0, 0, perfmon[1]]),
        ]
        .into()
    }

    const INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];
    const AUTHENTIC_AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];

    #[test]
    fn rows_are_in_order_and_apart_and_their_features_have_that_name() {
        assert!(ROWS.iter().all(|row| row.first <= row.last));
        assert!(ROWS.windows(2).all(|pair| pair[0].last < pair[1].first));
        for row in &ROWS {
            if let Owner::Any(features) = row.owner {
                for feature in features {
                    assert!(every_name().any(|name| name == *feature), "{feature}");
                }
            }
        }
    }

    #[test]
    fn a_guest_needs_the_msrs_of_its_own_features_and_those_that_every_guest_has() {
        let saved = [0x10, 0xd90, 0xda0, 0xc000_0081, 0x4000_0000, 0x1234_5678];
        assert_eq!(needed_msrs(&cpu(INTEL, 0, [0, 0]), &saved), [0x10, 0xc000_0081]);
        let wide = cpu(INTEL, MPX, [0, 0]);
        assert_eq!(needed_msrs(&wide, &saved), [0x10, 0xd90, 0xc000_0081]);
        assert_eq!(optional_msrs(&wide, &saved), [0xda0, 0x1234_5678]);
    }

    #[test]
    fn counters_are_needed_as_many_as_the_guest_has() {
        let saved = [0xc1, 0xc2, 0xc3, 0x186, 0x188, 0x309, 0x30a, 0x38f, 0xc001_0000];
        let two_and_one = cpu(INTEL, 0, [2 << 8 | 2, 1]);
        assert_eq!(
            needed_msrs(&two_and_one, &saved),
            [0xc1, 0xc2, 0x186, 0x309, 0x38f]
        );
        assert!(needed_msrs(&cpu(INTEL, 0, [0, 0]), &saved).is_empty());
        assert_eq!(needed_msrs(&cpu(AUTHENTIC_AMD, 0, [0, 0]), &saved), [0xc001_0000]);
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let wide = cpu(INTEL, MPX, [0, 0]);
        let missing = missing_msrs(&wide, &[0x10, 0xd90, 0x277, 0xfff0], &[0x277]);
        let words: Vec<String> = missing.iter().map(Msr::to_string).collect();
        assert_eq!(words, ["MSR 0x10 (TSC)", "MSR 0xd90 (BNDCFGS)"]);
        assert_eq!(Msr(0xfff0).to_string(), "MSR 0xfff0");
        assert!(missing_msrs(&cpu(INTEL, 0, [0, 0]), &[0x10, 0xd90], &[0x10]).is_empty());
    }

    proptest! {
        /// The VMM knows the whole table of its VM, the scheduler only the features, and a destination only what its source
        /// told that the VM needs: all three come to the same.
        #[test]
        fn whoever_asks_gets_the_same_answer(
            leaf7 in any::<u32>(),
            perfmon in any::<[u32; 2]>(),
            amd in any::<bool>(),
            here in proptest::collection::vec(prop_oneof![0u32..0x700, 0xc000_0000u32..0xc000_0400, any::<u32>()], 0..200),
            there in proptest::collection::vec(0u32..0x700, 0..200),
        ) {
            let whole = cpu(if amd { AUTHENTIC_AMD } else { INTEL }, leaf7, perfmon);
            let needed = needed_msrs(&whole, &here);
            prop_assert_eq!(&needed_msrs(&whole.features_only(), &here), &needed);
            prop_assert_eq!(&needed_msrs(&whole, &needed), &needed);
            let missing = missing_msrs(&whole.features_only(), &here, &there);
            prop_assert_eq!(missing_msrs(&whole, &needed, &there), missing);
        }
    }
}
