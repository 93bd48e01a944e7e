//! CPUID for the guest: what KVM supports, with topology, local APIC ids and the hypervisor leaves made the VM's own.
//! Sources: Intel SDM vol. 2A CPUID; Linux Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use shoal_cpuid::{Entry, Table};

const LEAF_FEATURES: u32 = 1;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_CACHE: u32 = 4;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
const LEAF_HYPERVISOR_TIMING: u32 = 0x4000_0010;
const LEAF_AMD_CACHE: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;
const LEAF_AMD_CORES: u32 = 0x8000_0008;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
/// SVM and encrypted VMs, of which a guest here has neither.
const LEAF_AMD_SVM: u32 = 0x8000_000a;
const LEAF_AMD_SEV: u32 = 0x8000_001f;
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
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_HYPERVISOR_TIMING | LEAF_AMD_SVM | LEAF_AMD_SEV
        )
    });
    let tsc_deadline = kvm.check_extension(kvm_ioctls::Cap::TscDeadlineTimer);
    for entry in &mut entries {
        shape(entry, cpus, tsc_deadline);
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

/// Makes a leaf that KVM took from the host one of a VM of `cpus` CPUs, of one thread each.
fn shape(entry: &mut kvm_cpuid_entry2, cpus: u32, tsc_deadline: bool) {
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
        // EAX 25:14: CPUs that share this cache, less one. Intel has in 31:26 the cores of the package, less one; AMD
        // keeps them reserved.
        LEAF_CACHE => entry.eax = entry.eax & 0x3fff | (cpus - 1).min(63) << 26 | sharing(entry, cpus) << 14,
        LEAF_AMD_CACHE => entry.eax = entry.eax & 0x3fff | sharing(entry, cpus) << 14,
        LEAF_AMD_FEATURES => entry.ecx &= !SVM_BIT,
        LEAF_HYPERVISOR => entry.eax = LEAF_HYPERVISOR_TIMING,
        LEAF_AMD_CORES => entry.ecx = entry.ecx & !0xffff | (cpus - 1) | apic_id_bits(cpus) << 12,
        // One node; EAX and EBX are each vCPU's own.
        LEAF_AMD_TOPOLOGY => entry.ecx = 0,
        _ => {}
    }
}

/// CPUs that share the cache of this leaf, less one: all of them, from the third level (EAX 7:5) on.
fn sharing(cache: &kvm_cpuid_entry2, cpus: u32) -> u32 {
    if cache.eax >> 5 & 7 >= 3 { cpus - 1 } else { 0 }
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

/// As a table that can be compared.
#[must_use]
pub fn to_table(entries: &[kvm_cpuid_entry2]) -> Table {
    let entry = |entry: &kvm_cpuid_entry2| Entry {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    };
    entries.iter().map(entry).collect::<Vec<_>>().into()
}

/// As KVM has it.
#[must_use]
pub fn from_table(table: &Table) -> Vec<kvm_cpuid_entry2> {
    let entry = |entry: &Entry| kvm_cpuid_entry2 {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
        ..Default::default()
    };
    table.entries().iter().map(entry).collect()
}

/// `entries` with no features but those of `baseline`.
///
/// # Errors
/// Features of the baseline that `entries` lack: a VM made here would not have what the baseline promises.
pub fn restrict(
    entries: &[kvm_cpuid_entry2],
    baseline: &Table,
) -> Result<Vec<kvm_cpuid_entry2>, Vec<String>> {
    let host = to_table(entries);
    let missing = baseline.missing_on(&host);
    if missing.is_empty() {
        Ok(from_table(&host.restricted_to(baseline)))
    } else {
        Err(missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_baseline_takes_features_away_and_is_refused_where_it_adds_some() {
        let leaf7 = |ebx| {
            [kvm_cpuid_entry2 {
                function: 7,
                ebx,
                ..Default::default()
            }]
        };
        let avx2_and_avx512f = leaf7(1 << 5 | 1 << 16);
        let avx2 = leaf7(1 << 5);
        assert_eq!(
            restrict(&avx2_and_avx512f, &to_table(&avx2)).as_deref(),
            Ok(&avx2[..])
        );
        assert_eq!(
            restrict(&avx2, &to_table(&avx2_and_avx512f)),
            Err(vec!["AVX512F".to_owned()])
        );
    }

    #[test]
    fn no_nested_virtualization_is_shown() {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) if std::env::var_os("SHOAL_SKIP_KVM").is_some() => {
                eprintln!("skipped without KVM: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        for entry in supported(&kvm, 1, 1_000_000).expect("a table") {
            match entry.function {
                LEAF_FEATURES => assert_eq!(entry.ecx & VMX_BIT, 0),
                LEAF_AMD_FEATURES => assert_eq!(entry.ecx & SVM_BIT, 0),
                leaf => assert!(![LEAF_AMD_SVM, LEAF_AMD_SEV].contains(&leaf), "{leaf:#x}"),
            }
        }
    }

    #[test]
    fn caches_are_shared_by_the_cpus_of_the_vm_not_of_the_host() {
        // Level 1 data for 2 threads, level 3 unified for 32; 24 cores a package where Intel says so.
        let leaf = |function, eax| kvm_cpuid_entry2 {
            function,
            eax,
            ..Default::default()
        };
        let shaped = |function, eax, cpus| {
            let mut entry = leaf(function, eax);
            shape(&mut entry, cpus, true);
            entry.eax
        };
        let (first, third) = (1 << 14 | 0x121, 31 << 14 | 0x163);
        assert_eq!(shaped(LEAF_AMD_CACHE, first, 4), 0x121);
        assert_eq!(shaped(LEAF_AMD_CACHE, third, 4), 3 << 14 | 0x163);
        assert_eq!(shaped(LEAF_AMD_CACHE, third, 1), 0x163);
        assert_eq!(shaped(LEAF_CACHE, 23 << 26 | third, 4), 3 << 26 | 3 << 14 | 0x163);
        let mut node = kvm_cpuid_entry2 {
            ecx: 3 << 8 | 2,
            ..leaf(LEAF_AMD_TOPOLOGY, 0)
        };
        shape(&mut node, 4, true);
        assert_eq!(node.ecx, 0);
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
