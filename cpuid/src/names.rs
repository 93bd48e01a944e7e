//! Names of feature bits, as the vendors' manuals have them.

use std::fmt;

use crate::registers::Register;

/// One feature bit. Displayed by its name, or as "leaf 7.0 ecx bit 12".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Feature {
    pub(crate) leaf: u32,
    pub(crate) index: u32,
    pub(crate) register: Register,
    pub(crate) bit: u32,
}

impl Feature {
    /// Its name, if it has one here.
    #[must_use]
    pub fn name(&self) -> Option<&'static str> {
        let names = names(self.leaf, self.index, self.register);
        let mut names = names.split_ascii_whitespace();
        let bit = usize::try_from(self.bit).ok()?;
        names.nth(bit).filter(|name| *name != "-")
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.pad(name),
            None => write!(
                f,
                "leaf {:x}.{:x} {} bit {}",
                self.leaf,
                self.index,
                self.register.name(),
                self.bit
            ),
        }
    }
}

/// Bits 0 and up, separated by spaces; "-" has no name.
fn names(leaf: u32, index: u32, register: Register) -> &'static str {
    use Register::{Eax, Ebx, Ecx, Edx};
    match (leaf, index, register) {
        (1, 0, Ecx) => {
            "SSE3 PCLMULQDQ DTES64 MONITOR DS_CPL VMX SMX EIST TM2 SSSE3 CNXT_ID SDBG FMA CX16 XTPR PDCM - PCID DCA \
             SSE4_1 SSE4_2 X2APIC MOVBE POPCNT TSC_DEADLINE AES XSAVE OSXSAVE AVX F16C RDRAND HYPERVISOR"
        }
        (1, 0, Edx) => {
            "FPU VME DE PSE TSC MSR PAE MCE CX8 APIC - SEP MTRR PGE MCA CMOV PAT PSE36 PSN CLFSH - DS ACPI MMX FXSR SSE \
             SSE2 SS HTT TM - PBE"
        }
        (7, 0, Ebx) => {
            "FSGSBASE TSC_ADJUST SGX BMI1 HLE AVX2 FDP_EXCPTN_ONLY SMEP BMI2 ERMS INVPCID RTM PQM ZERO_FCS_FDS MPX PQE \
             AVX512F AVX512DQ RDSEED ADX SMAP AVX512_IFMA - CLFLUSHOPT CLWB INTEL_PT AVX512PF AVX512ER AVX512CD SHA \
             AVX512BW AVX512VL"
        }
        (7, 0, Ecx) => {
            "PREFETCHWT1 AVX512_VBMI UMIP PKU OSPKE WAITPKG AVX512_VBMI2 CET_SS GFNI VAES VPCLMULQDQ AVX512_VNNI \
             AVX512_BITALG TME AVX512_VPOPCNTDQ - LA57 - - - - - RDPID KL BUS_LOCK_DETECT CLDEMOTE - MOVDIRI MOVDIR64B \
             ENQCMD SGX_LC PKS"
        }
        (7, 0, Edx) => {
            "- SGX_KEYS AVX512_4VNNIW AVX512_4FMAPS FSRM UINTR - - AVX512_VP2INTERSECT SRBDS_CTRL MD_CLEAR \
             RTM_ALWAYS_ABORT - RTM_FORCE_ABORT SERIALIZE HYBRID TSXLDTRK - PCONFIG ARCH_LBR CET_IBT - AMX_BF16 \
             AVX512_FP16 AMX_TILE AMX_INT8 IBRS STIBP L1D_FLUSH ARCH_CAPABILITIES CORE_CAPABILITIES SSBD"
        }
        (7, 1, Eax) => {
            "SHA512 SM3 SM4 RAO_INT AVX_VNNI AVX512_BF16 LASS CMPCCXADD ARCH_PERFMON_EXT - FZRM FSRS FSRC - - - - FRED \
             LKGS WRMSRNS NMI_SRC AMX_FP16 HRESET AVX_IFMA - - LAM MSRLIST - - - MOVRS"
        }
        (7, 1, Edx) => {
            "- - - - AVX_VNNI_INT8 AVX_NE_CONVERT - - AMX_COMPLEX - AVX_VNNI_INT16 - - UTMR PREFETCHI USER_MSR - \
             UIRET_UIF CET_SSS AVX10 - APX_F"
        }
        (7, 2, Edx) => "PSFD IPRED_CTRL RRSBA_CTRL DDPD_U BHI_CTRL MCDT_NO UC_LOCK_DISABLE MONITOR_MITG_NO",
        (0xd, 0, Eax) => {
            "XSAVE_X87 XSAVE_SSE XSAVE_AVX XSAVE_BNDREGS XSAVE_BNDCSR XSAVE_OPMASK XSAVE_ZMM_HI256 XSAVE_HI16_ZMM - \
             XSAVE_PKRU - - - - - - - XSAVE_TILECFG XSAVE_TILEDATA XSAVE_APX"
        }
        (0xd, 1, Eax) => "XSAVEOPT XSAVEC XGETBV1 XSAVES XFD",
        (0xd, 1, Ecx) => {
            "- - - - - - - - XSAVE_PT - XSAVE_PASID XSAVE_CET_U XSAVE_CET_S XSAVE_HDC XSAVE_UINTR XSAVE_LBR XSAVE_HWP"
        }
        (0x4000_0001, 0, Eax) => {
            "KVM_CLOCKSOURCE KVM_NOP_IO_DELAY KVM_MMU_OP KVM_CLOCKSOURCE2 KVM_ASYNC_PF KVM_STEAL_TIME KVM_PV_EOI \
             KVM_PV_UNHALT - KVM_PV_TLB_FLUSH KVM_ASYNC_PF_VMEXIT KVM_PV_SEND_IPI KVM_POLL_CONTROL KVM_PV_SCHED_YIELD \
             KVM_ASYNC_PF_INT KVM_MSI_EXT_DEST_ID KVM_HC_MAP_GPA_RANGE KVM_MIGRATION_CONTROL - - - - - - \
             KVM_CLOCKSOURCE_STABLE"
        }
        (0x8000_0001, 0, Ecx) => {
            "LAHF_LM CMP_LEGACY SVM EXTAPIC CR8_LEGACY ABM SSE4A MISALIGNSSE 3DNOWPREFETCH OSVW IBS XOP SKINIT WDT - LWP \
             FMA4 TCE - NODEID_MSR - TBM TOPOEXT PERFCTR_CORE PERFCTR_NB - DBEXT PERFTSC PERFCTR_LLC MWAITX"
        }
        // Bits 0 to 9, 12 to 17, 23 and 24 repeat leaf 1 on AMD.
        (0x8000_0001, 0, Edx) => {
            "FPU VME DE PSE TSC MSR PAE MCE CX8 APIC - SYSCALL MTRR PGE MCA CMOV PAT PSE36 - MP NX - MMXEXT MMX FXSR \
             FXSR_OPT PDPE1GB RDTSCP - LM 3DNOWEXT 3DNOW"
        }
        (0x8000_0007, 0, Ebx) => "OVERFLOW_RECOV SUCCOR HWA SCALABLE_MCA",
        (0x8000_0007, 0, Edx) => "TS FID VID TTP TM STC 100MHZSTEPS HWPSTATE INVARIANT_TSC CPB EFFFREQ_RO",
        (0x8000_0008, 0, Ebx) => {
            "CLZERO IRPERF XSAVEERPTR INVLPGB RDPRU - MBA - MCOMMIT WBNOINVD - - AMD_IBPB INT_WBINVD AMD_IBRS AMD_STIBP \
             IBRS_ALWAYS_ON STIBP_ALWAYS_ON IBRS_PREFERRED IBRS_SAME_MODE NO_LMSLE INVLPGB_NESTED - PPIN AMD_SSBD \
             VIRT_SSBD AMD_SSB_NO CPPC AMD_PSFD BTC_NO IBPB_RET"
        }
        (0x8000_0021, 0, Eax) => {
            "NO_NESTED_DATA_BP FSGS_NON_SERIALIZING LFENCE_ALWAYS_SERIALIZING SMM_PAGE_CFG_LOCK - - NULL_SEL_CLR_BASE \
             UPPER_ADDRESS_IGNORE AUTO_IBRS NO_SMM_CTL_MSR FSRS_AMD FSRC_AMD - PREFETCH_CTL_MSR - - - - - - \
             AMD_CPUID_USER_DIS EPSF - - - - - - SBPB IBPB_BRTYPE SRSO_NO"
        }
        (0x8000_0022, 0, Eax) => "PERFMON_V2 LBR_STACK LBR_AND_PMC_FREEZE",
        _ => "",
    }
}

/// Every name there is.
#[cfg(test)]
pub(crate) fn every_name() -> impl Iterator<Item = &'static str> {
    let places = crate::registers::FEATURE_REGISTERS.iter();
    places.flat_map(|place| names(place.leaf, place.index, place.register).split_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registers::FEATURE_REGISTERS;

    #[test]
    fn no_register_has_more_names_than_bits() {
        for register in FEATURE_REGISTERS {
            let count = names(register.leaf, register.index, register.register)
                .split_ascii_whitespace()
                .count();
            assert!(count <= 32, "{register:?}: {count}");
        }
    }

    #[test]
    fn names_are_at_their_bits() {
        use Register::{Eax, Ebx, Ecx, Edx};
        for (leaf, index, register, bit, name) in [
            (1, 0, Ecx, 0, "SSE3"),
            (1, 0, Ecx, 13, "CX16"),
            (1, 0, Ecx, 23, "POPCNT"),
            (1, 0, Ecx, 28, "AVX"),
            (1, 0, Ecx, 31, "HYPERVISOR"),
            (1, 0, Edx, 26, "SSE2"),
            (1, 0, Edx, 31, "PBE"),
            (7, 0, Ebx, 5, "AVX2"),
            (7, 0, Ebx, 16, "AVX512F"),
            (7, 0, Ebx, 20, "SMAP"),
            (7, 0, Ebx, 31, "AVX512VL"),
            (7, 0, Ecx, 16, "LA57"),
            (7, 0, Ecx, 22, "RDPID"),
            (7, 0, Ecx, 31, "PKS"),
            (7, 0, Edx, 4, "FSRM"),
            (7, 0, Edx, 23, "AVX512_FP16"),
            (7, 0, Edx, 29, "ARCH_CAPABILITIES"),
            (7, 0, Edx, 31, "SSBD"),
            (7, 1, Eax, 5, "AVX512_BF16"),
            (7, 1, Eax, 17, "FRED"),
            (7, 1, Eax, 26, "LAM"),
            (7, 1, Edx, 19, "AVX10"),
            (0xd, 0, Eax, 9, "XSAVE_PKRU"),
            (0xd, 0, Eax, 18, "XSAVE_TILEDATA"),
            (0xd, 1, Ecx, 12, "XSAVE_CET_S"),
            (0x4000_0001, 0, Eax, 24, "KVM_CLOCKSOURCE_STABLE"),
            (0x8000_0001, 0, Ecx, 22, "TOPOEXT"),
            (0x8000_0001, 0, Edx, 20, "NX"),
            (0x8000_0001, 0, Edx, 29, "LM"),
            (0x8000_0007, 0, Edx, 8, "INVARIANT_TSC"),
            (0x8000_0008, 0, Ebx, 12, "AMD_IBPB"),
            (0x8000_0008, 0, Ebx, 24, "AMD_SSBD"),
            (0x8000_0021, 0, Eax, 8, "AUTO_IBRS"),
            (0x8000_0021, 0, Eax, 30, "SRSO_NO"),
        ] {
            let feature = Feature {
                leaf,
                index,
                register,
                bit,
            };
            assert_eq!(feature.name(), Some(name), "{leaf:x}.{index} {register:?} {bit}");
        }
    }

    #[test]
    fn a_bit_without_a_name_is_said_by_its_place() {
        let feature = Feature {
            leaf: 7,
            index: 1,
            register: Register::Ecx,
            bit: 12,
        };
        assert_eq!(feature.to_string(), "leaf 7.1 ecx bit 12");
    }
}
