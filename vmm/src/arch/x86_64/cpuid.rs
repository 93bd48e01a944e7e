//! CPUID for the guest: what KVM supports, with topology, local APIC ids and the hypervisor leaves made the VM's own.
//! Sources: Intel SDM vol. 2A CPUID; Linux Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

const LEAF_FEATURES: u32 = 1;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_CACHE: u32 = 4;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_HYPERVISOR_FEATURES: u32 = 0x4000_0001;
const LEAF_HYPERVISOR_TIMING: u32 = 0x4000_0010;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const LEAF_AMD_CORES: u32 = 0x8000_0008;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
/// Nested virtualization is not offered: its state is not saved.
const VMX_BIT: u32 = 1 << 5;
const SVM_BIT: u32 = 1 << 2;
const HYPERVISOR_BIT: u32 = 1 << 31;
const HTT_BIT: u32 = 1 << 28;
const TSC_DEADLINE_BIT: u32 = 1 << 24;
const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;
const LOCAL_APIC_BUS_KHZ: u32 = 1_000_000;

/// The table for every vCPU; [`for_vcpu`] fills in what differs between them.
///
/// # Errors
/// When KVM does not say what it supports.
pub fn supported(kvm: &Kvm, cpus: u32, tsc_khz: u32) -> Result<Vec<kvm_cpuid_entry2>, kvm_ioctls::Error> {
    let mut entries = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?
        .as_slice()
        .to_vec();
    entries.retain(|entry| {
        !matches!(
            entry.function,
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_HYPERVISOR_TIMING
        )
    });
    let tsc_deadline = kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer);
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => {
                entry.ecx &= !VMX_BIT;
                entry.ecx |= HYPERVISOR_BIT | if tsc_deadline { TSC_DEADLINE_BIT } else { 0 };
                entry.edx = if cpus > 1 {
                    entry.edx | HTT_BIT
                } else {
                    entry.edx & !HTT_BIT
                };
                entry.ebx = entry.ebx & 0xff00_ffff | cpus << 16;
            }
            LEAF_CACHE => {
                // EAX 31:26 cores per package less one, 25:14 CPUs sharing this cache less one: one thread a core.
                let sharing = if entry.eax >> 5 & 7 >= 3 { cpus - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | (cpus - 1).min(63) << 26 | sharing << 14;
            }
            LEAF_AMD_FEATURES => entry.ecx &= !SVM_BIT,
            LEAF_HYPERVISOR => entry.eax = LEAF_HYPERVISOR_TIMING,
            LEAF_AMD_CORES => entry.ecx = entry.ecx & !0xffff | (cpus - 1) | apic_id_bits(cpus) << 12,
            _ => {}
        }
    }
    for (index, level, shift, count) in [
        (0, LEVEL_SMT, 0, 1),
        (1, LEVEL_CORE, apic_id_bits(cpus), cpus),
        (2, 0, 0, 0),
    ] {
        entries.push(kvm_cpuid_entry2 {
            function: LEAF_TOPOLOGY,
            index,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: index | level << 8,
            ..Default::default()
        });
    }
    entries.push(kvm_cpuid_entry2 {
        function: LEAF_HYPERVISOR_TIMING,
        eax: tsc_khz,
        ebx: LOCAL_APIC_BUS_KHZ,
        ..Default::default()
    });
    Ok(entries)
}

fn apic_id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

/// `entries` as vCPU `id` sees them.
#[must_use]
pub fn for_vcpu(entries: &[kvm_cpuid_entry2], id: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries = entries.to_vec();
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            LEAF_TOPOLOGY => entry.edx = id,
            LEAF_AMD_TOPOLOGY => {
                entry.eax = id;
                entry.ebx = id & 0xff;
            }
            _ => {}
        }
    }
    entries
}

/// As KVM takes it.
///
/// # Errors
/// When there are more entries than KVM takes.
pub fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Result<CpuId, vmm_sys_util::fam::Error> {
    CpuId::from_entries(entries)
}

fn leaf(entries: &[kvm_cpuid_entry2], function: u32) -> kvm_cpuid_entry2 {
    let found = entries.iter().find(|entry| entry.function == function);
    found.copied().unwrap_or_default()
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> String {
    let leaf = leaf(entries, 0);
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    bytes
        .iter()
        .filter(|byte| byte.is_ascii_graphic())
        .map(|&byte| char::from(byte))
        .collect()
}

fn address_bits(entries: &[kvm_cpuid_entry2]) -> u32 {
    leaf(entries, LEAF_AMD_CORES).eax & 0xff
}

/// Feature bits that `wanted` (a VM's table) has and `host` (what KVM supports here) lacks, in words; empty if the VM
/// can run here. Compares the architectural feature leaves only: topology and hypervisor leaves are the VM's own.
#[must_use]
pub fn missing_features(wanted: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = vec![];
    if vendor(wanted) != vendor(host) {
        missing.push(format!("vendor {} (it is {})", vendor(wanted), vendor(host)));
    }
    if address_bits(wanted) > address_bits(host) {
        missing.push(format!("{} physical address bits", address_bits(wanted)));
    }
    for entry in wanted {
        let find = || {
            host.iter()
                .find(|other| other.function == entry.function && other.index == entry.index)
        };
        let mut compare =
            |register: &str, wanted: u32, offered: fn(&kvm_cpuid_entry2) -> u32, ignore: u32| {
                let lacking = wanted & !find().map_or(0, offered) & !ignore;
                if lacking != 0 {
                    missing.push(format!(
                        "CPUID {:#x}.{:#x} {register} bits {lacking:#x}",
                        entry.function, entry.index
                    ));
                }
            };
        match (entry.function, entry.index) {
            (LEAF_FEATURES, _) => {
                compare("ecx", entry.ecx, |e| e.ecx, HYPERVISOR_BIT | TSC_DEADLINE_BIT);
                compare("edx", entry.edx, |e| e.edx, HTT_BIT);
            }
            (7, 0) => {
                compare("ebx", entry.ebx, |e| e.ebx, 0);
                compare("ecx", entry.ecx, |e| e.ecx, 0);
                compare("edx", entry.edx, |e| e.edx, 0);
            }
            (7, 1 | 2) => {
                compare("eax", entry.eax, |e| e.eax, 0);
                compare("ecx", entry.ecx, |e| e.ecx, 0);
                compare("edx", entry.edx, |e| e.edx, 0);
            }
            (0x8000_0007, _) => compare("edx", entry.edx, |e| e.edx, 0),
            (LEAF_AMD_CORES, _) => compare("ebx", entry.ebx, |e| e.ebx, 0),
            (0xd, 0 | 1) => compare("eax", entry.eax, |e| e.eax, 0),
            (LEAF_HYPERVISOR_FEATURES, _) => compare("eax", entry.eax, |e| e.eax, 0),
            (LEAF_AMD_FEATURES, _) => {
                compare("ecx", entry.ecx, |e| e.ecx, 0);
                compare("edx", entry.edx, |e| e.edx, 0);
            }
            _ => {}
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_the_host_lacks_is_named() {
        let vm = [kvm_cpuid_entry2 {
            function: 7,
            ebx: 0b110,
            ..Default::default()
        }];
        let host = [kvm_cpuid_entry2 {
            function: 7,
            ebx: 0b011,
            ..Default::default()
        }];
        assert_eq!(missing_features(&vm, &host), ["CPUID 0x7.0x0 ebx bits 0x4"]);
        assert!(missing_features(&vm, &vm).is_empty());
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let table = [kvm_cpuid_entry2 {
            function: 1,
            ..Default::default()
        }];
        assert_eq!(for_vcpu(&table, 3)[0].ebx >> 24, 3);
    }
}
