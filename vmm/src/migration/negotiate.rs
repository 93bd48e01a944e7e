//! Before the first page: is this the VM, and can it run here?

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{Cap, Kvm};
use shoal_proto::{Epoch, MigrationId};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::wire::Hello;
use crate::arch::{cpuid, selftest};
use crate::spec::VmSpec;
use crate::vm::{Platform, Vm};

/// Devices whose state is sent, in this build.
const DEVICES: [&str; 3] = ["serial", "console", "power"];
/// How far two TSC frequencies may lie apart and still be taken for the same (what Linux's own clock tolerates).
const TSC_TOLERANCE_PPM: u64 = 250;
const MAX_CPUID_ENTRIES: usize = 256;

/// Why the destination does not take the VM.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A stranger, or a mix-up.
    #[error("{field}: not the migration this destination was prepared for")]
    NotPrepared {
        /// What did not match.
        field: &'static str,
    },
    /// The two sides disagree on the VM's shape.
    #[error("{field}: the source has {source_has}, the destination was prepared for {prepared}")]
    Differs {
        /// What.
        field: &'static str,
        /// There.
        source_has: String,
        /// Here.
        prepared: String,
    },
    /// This host's CPU or KVM lacks what the VM uses.
    #[error("CPU: this host lacks {}", .0.join(", "))]
    CpuFeatures(Vec<String>),
    /// Another TSC frequency, and no scaling.
    #[error("TSC: the guest's runs at {guest_khz} kHz, this host's at {host_khz} kHz and cannot be scaled")]
    Tsc {
        /// The guest's.
        guest_khz: u32,
        /// The host's.
        host_khz: u32,
    },
    /// MSRs KVM does not have here.
    #[error("MSRs: this host's KVM does not know {0:x?}")]
    Msrs(Vec<u32>),
    /// From hardware to software virtualization.
    #[error("KVM: the VM was started with hardware virtualization, and this host's KVM emulates ring 0")]
    SoftwareKvm,
    /// A malformed CPUID table.
    #[error("cpuid: {0} bytes are not a table of at most {MAX_CPUID_ENTRIES} entries")]
    CpuidTable(usize),
    /// KVM did not answer.
    #[error(transparent)]
    Kvm(#[from] crate::vm::VmError),
}

/// What the destination was prepared for.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The VM; its epoch is the new one.
    pub spec: VmSpec,
    /// The migration.
    pub migration_id: MigrationId,
    /// Its secret.
    pub token: String,
}

/// The source's first message.
pub fn hello(
    vm: &Vm,
    spec: &VmSpec,
    kvm: &Kvm,
    migration_id: MigrationId,
    token: &str,
    epoch: Epoch,
) -> Hello {
    let platform = vm.platform();
    Hello {
        migration_id: migration_id.as_bytes().to_vec(),
        token: token.to_owned(),
        vm_id: spec.vm_id.as_bytes().to_vec(),
        epoch: epoch.0,
        memory_bytes: vm.memory().len(),
        cpus: vm.cpus(),
        tsc_khz: platform.tsc_khz,
        cpuid: platform.cpuid.as_bytes().to_vec(),
        msr_indices: platform.msr_indices.clone(),
        devices: DEVICES.map(str::to_owned).to_vec(),
        software_kvm: selftest::is_software_kvm(kvm),
    }
}

/// Whether the peer is the source this destination waits for.
///
/// # Errors
/// What does not match; never what was expected.
pub fn check_identity(hello: &Hello, prepared: &Prepared) -> Result<(), Refusal> {
    let same = |field, equal: bool| {
        if equal {
            Ok(())
        } else {
            Err(Refusal::NotPrepared { field })
        }
    };
    same(
        "token",
        equal_in_constant_time(hello.token.as_bytes(), prepared.token.as_bytes()),
    )?;
    same(
        "migration_id",
        hello.migration_id == prepared.migration_id.as_bytes(),
    )?;
    same("vm_id", hello.vm_id == prepared.spec.vm_id.as_bytes())?;
    same("epoch", hello.epoch == prepared.spec.epoch.0)
}

/// Checks everything that can be checked before a page is copied, and gives the platform to build the VM with.
///
/// # Errors
/// The first thing that does not fit.
pub fn check(hello: &Hello, prepared: &Prepared, kvm: &Kvm) -> Result<Platform, Refusal> {
    let spec = &prepared.spec;
    let agree = |field, source_has: String, prepared: String| {
        if source_has == prepared {
            Ok(())
        } else {
            Err(Refusal::Differs {
                field,
                source_has,
                prepared,
            })
        }
    };
    agree(
        "memory_bytes",
        hello.memory_bytes.to_string(),
        spec.memory_bytes.to_string(),
    )?;
    agree("cpus", hello.cpus.to_string(), spec.cpus.to_string())?;
    agree("devices", hello.devices.join(" "), DEVICES.join(" "))?;

    let host = Platform::of_host(kvm, spec.cpus)?;
    let entry_len = size_of::<kvm_cpuid_entry2>();
    let malformed = || Refusal::CpuidTable(hello.cpuid.len());
    if !hello.cpuid.len().is_multiple_of(entry_len) || hello.cpuid.len() / entry_len > MAX_CPUID_ENTRIES {
        return Err(malformed());
    }
    let cpuid: Vec<kvm_cpuid_entry2> = hello
        .cpuid
        .chunks_exact(entry_len)
        .map(|bytes| kvm_cpuid_entry2::read_from_bytes(bytes).map_err(|_| malformed()))
        .collect::<Result<_, _>>()?;
    let missing = cpuid::missing_features(&cpuid, &host.cpuid);
    if !missing.is_empty() {
        return Err(Refusal::CpuFeatures(missing));
    }
    if !same_frequency(hello.tsc_khz, host.tsc_khz) && !kvm.check_extension(Cap::TscControl) {
        return Err(Refusal::Tsc {
            guest_khz: hello.tsc_khz,
            host_khz: host.tsc_khz,
        });
    }
    let unknown: Vec<u32> = hello
        .msr_indices
        .iter()
        .copied()
        .filter(|index| !host.msr_indices.contains(index))
        .collect();
    if !unknown.is_empty() {
        return Err(Refusal::Msrs(unknown));
    }
    if !hello.software_kvm && selftest::is_software_kvm(kvm) {
        return Err(Refusal::SoftwareKvm);
    }
    // Within the tolerance the host's own frequency is taken: asking KVM for another would need scaling.
    let tsc_khz = if same_frequency(hello.tsc_khz, host.tsc_khz) {
        host.tsc_khz
    } else {
        hello.tsc_khz
    };
    Ok(Platform {
        cpuid,
        tsc_khz,
        msr_indices: hello.msr_indices.clone(),
    })
}

fn same_frequency(guest_khz: u32, host_khz: u32) -> bool {
    u64::from(guest_khz.abs_diff(host_khz)) * 1_000_000 <= u64::from(host_khz) * TSC_TOLERANCE_PPM
}

/// Comparison whose time does not tell where two secrets differ.
fn equal_in_constant_time(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (x, y)| all | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_within_the_tolerance_are_the_same() {
        assert!(same_frequency(2_000_000, 2_000_400));
        assert!(!same_frequency(2_000_000, 2_001_000));
        assert!(same_frequency(0, 0));
    }

    #[test]
    fn secrets_are_compared_whole() {
        assert!(equal_in_constant_time(b"secret", b"secret"));
        assert!(!equal_in_constant_time(b"secret", b"secreT"));
        assert!(!equal_in_constant_time(b"secret", b"secre"));
    }
}
