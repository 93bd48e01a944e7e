//! Before the first page: is this the VM, and can it run here?

use kvm_ioctls::{Cap, Kvm};
use shoal_cpuid::{Msr, Table, TableError, missing_msrs, needed_msrs};
use shoal_proto::{Epoch, MigrationId};
use zerocopy::IntoBytes as _;

use super::policy::MAX_CONNECTIONS;
use super::wire::{Attach, Hello, Role};
use crate::arch::{cpuid, selftest};
use crate::spec::VmSpec;
use crate::vm::{Platform, Vm};

/// Devices whose state is sent, in this build.
const DEVICES: [&str; 3] = ["serial", "console", "power"];
/// How far two TSC frequencies may lie apart and still be taken for the same, by KVM (its parameter `tsc_tolerance_ppm`) and
/// by Linux's own clock.
const TSC_TOLERANCE_PPM: u64 = 250;
/// KVM_GET_XSAVE and KVM_SET_XSAVE carry this much of an XSAVE area; AMX tiles would need more.
const XSAVE_BYTES: u32 = 4096;
/// What KVM must be able to do to take up a VM's state.
const CAPABILITIES: [(Cap, &str); 10] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Why the destination does not take the VM.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A stranger, or a mix-up.
    #[error("{field}: not the migration this destination was prepared for")]
    NotPrepared {
        /// What did not match.
        field: &'static str,
    },
    /// A connection that is for something else.
    #[error("preamble: a {found:?} connection, and a {expected:?} connection was due")]
    Role {
        /// What came.
        found: Role,
        /// What was due.
        expected: Role,
    },
    /// Not a number of connections.
    #[error("connections: {0} is not between 1 and {MAX_CONNECTIONS}")]
    Connections(u32),
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
    #[error("MSRs: this host's KVM lacks {}", .0.iter().map(Msr::to_string).collect::<Vec<_>>().join(", "))]
    Msrs(Vec<Msr>),
    /// From hardware virtualization to none.
    #[error("KVM: the VM was started with hardware virtualization, and this host's KVM has none")]
    SoftwareKvm,
    /// From no hardware virtualization to it.
    #[error("KVM: the VM was started without hardware virtualization, and this host's KVM has it")]
    HardwareKvm,
    /// A malformed CPUID table.
    #[error("cpuid: {0}")]
    CpuidTable(#[from] TableError),
    /// The guest's XSAVE area is larger than this host's.
    #[error("xsave: the guest's area has {guest} bytes, this host's at most {host}")]
    XsaveSize {
        /// There.
        guest: u32,
        /// Here.
        host: u32,
    },
    /// A component of the XSAVE area lies elsewhere here.
    #[error("xsave: component {component} of the guest has (bytes, offset) {guest:?}, of this host {host:?}")]
    XsaveLayout {
        /// Its bit in XCR0.
        component: u32,
        /// There.
        guest: (u32, u32),
        /// Here.
        host: (u32, u32),
    },
    /// This host's KVM is too old, or too bare.
    #[error("KVM: this host's lacks {}", .0.join(", "))]
    Capabilities(Vec<&'static str>),
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
        msr_indices: needed_msrs(&cpuid::to_table(&platform.cpuid), &platform.msr_indices),
        devices: DEVICES.map(str::to_owned).to_vec(),
        software_kvm: selftest::is_software_kvm(kvm),
        ..Hello::default()
    }
}

/// Whether a further connection belongs to the migration that this destination was prepared for.
///
/// # Errors
/// What does not match; never what was expected.
pub fn check_attach(attach: &Attach, prepared: &Prepared) -> Result<(), Refusal> {
    let refuse = |field| Err(Refusal::NotPrepared { field });
    if !equal_in_constant_time(attach.token.as_bytes(), prepared.token.as_bytes()) {
        return refuse("token");
    }
    if attach.migration_id != prepared.migration_id.as_bytes() {
        return refuse("migration_id");
    }
    Ok(())
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

    same_kind(hello.software_kvm, selftest::is_software_kvm(kvm))?;

    let host = Platform::of_host(kvm, spec.cpus)?;
    let guest = Table::from_bytes(&hello.cpuid)?;
    requirements(&guest, &cpuid::to_table(&host.cpuid), kvm)?;
    let tsc_khz = tsc_khz(hello.tsc_khz, host.tsc_khz, kvm.check_extension(Cap::TscControl))?;
    let missing = missing_msrs(&guest, &hello.msr_indices, &host.msr_indices);
    if !missing.is_empty() {
        return Err(Refusal::Msrs(missing));
    }
    Ok(Platform {
        cpuid: cpuid::from_table(&guest),
        tsc_khz,
        msr_indices: host.msr_indices,
    })
}

/// The frequency to ask KVM for: what the guest was told at its boot, wherever it has been since. KVM takes one that is
/// within its tolerance of the host's own without scaling; were the host's taken instead, one move after another could lead
/// away from what the guest reckons with.
fn tsc_khz(guest_khz: u32, host_khz: u32, scales: bool) -> Result<u32, Refusal> {
    match (guest_khz, host_khz) {
        (0, _) | (_, 0) if guest_khz != host_khz => Err(Refusal::Tsc { guest_khz, host_khz }),
        _ if scales || same_frequency(guest_khz, host_khz) => Ok(guest_khz),
        _ => Err(Refusal::Tsc { guest_khz, host_khz }),
    }
}

/// A kernel is chosen for one kind of KVM when the VM starts: it does not go on with the other.
fn same_kind(source_is_software: bool, this_is_software: bool) -> Result<(), Refusal> {
    match (source_is_software, this_is_software) {
        (false, true) => Err(Refusal::SoftwareKvm),
        (true, false) => Err(Refusal::HardwareKvm),
        (true, true) | (false, false) => Ok(()),
    }
}

/// What a VM with the CPU `guest` needs of this host's CPU and KVM.
///
/// # Errors
/// The first kind of thing that is not there, with all that lack.
pub fn requirements(guest: &Table, host: &Table, kvm: &Kvm) -> Result<(), Refusal> {
    let lacking = CAPABILITIES.iter().filter(|(cap, _)| !kvm.check_extension(*cap));
    let lacking: Vec<_> = lacking.map(|(_, name)| *name).collect();
    if !lacking.is_empty() {
        return Err(Refusal::Capabilities(lacking));
    }
    cpu_requirements(guest, host)
}

fn cpu_requirements(guest: &Table, host: &Table) -> Result<(), Refusal> {
    let missing = guest.missing_on(host);
    if !missing.is_empty() {
        return Err(Refusal::CpuFeatures(missing));
    }
    let (guest_bytes, host_bytes) = (guest.xsave_bytes(), host.xsave_bytes().min(XSAVE_BYTES));
    if guest_bytes > host_bytes {
        return Err(Refusal::XsaveSize {
            guest: guest_bytes,
            host: host_bytes,
        });
    }
    for (component, bytes, offset) in guest.xsave_components() {
        let here = host.xsave_components().find(|(other, ..)| *other == component);
        let host = here.map_or((0, 0), |(_, bytes, offset)| (bytes, offset));
        if (bytes, offset) != host {
            return Err(Refusal::XsaveLayout {
                component,
                guest: (bytes, offset),
                host,
            });
        }
    }
    Ok(())
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
    fn a_guest_keeps_the_frequency_of_its_boot_from_host_to_host() {
        let within = [2_000_300, 1_999_700, 2_000_500].map(|host| tsc_khz(2_000_000, host, false).ok());
        assert_eq!(within, [Some(2_000_000); 3]);
        // Though it is within the tolerance of the host before.
        let refused = tsc_khz(2_000_000, 2_000_900, false)
            .expect_err("450 ppm")
            .to_string();
        assert_eq!(
            refused,
            "TSC: the guest's runs at 2000000 kHz, this host's at 2000900 kHz and cannot be scaled"
        );
        assert_eq!(tsc_khz(2_000_000, 3_000_000, true).ok(), Some(2_000_000));
        assert_eq!(tsc_khz(0, 0, false).ok(), Some(0));
        assert!(tsc_khz(0, 2_000_000, true).is_err() && tsc_khz(2_000_000, 0, true).is_err());
    }

    #[test]
    fn an_xsave_area_that_is_larger_or_laid_out_otherwise_is_refused() {
        let table = |bytes, components: u32, offset| -> Table {
            let leaf = |index, eax, ebx, ecx| shoal_cpuid::Entry {
                function: 0xd,
                index,
                eax,
                ebx,
                ecx,
                ..Default::default()
            };
            vec![
                leaf(0, components, bytes, bytes),
                leaf(2, 256, 576, 0),
                leaf(9, 8, offset, 0),
            ]
            .into()
        };
        let wide = table(2696, 7 | 1 << 9, 2688);
        assert!(cpu_requirements(&wide, &wide).is_ok());
        assert!(cpu_requirements(&table(832, 7, 0), &wide).is_ok());
        let refused = cpu_requirements(&table(2704, 7, 2688), &wide);
        assert!(matches!(
            refused,
            Err(Refusal::XsaveSize {
                guest: 2704,
                host: 2696
            })
        ));
        let moved = cpu_requirements(&table(2440, 7 | 1 << 9, 2432), &wide);
        assert!(matches!(
            moved,
            Err(Refusal::XsaveLayout {
                component: 9,
                guest: (8, 2432),
                host: (8, 2688)
            })
        ));
        let lacking = cpu_requirements(&wide, &table(832, 7, 0)).unwrap_err();
        assert_eq!(lacking.to_string(), "CPU: this host lacks XSAVE_PKRU");
    }

    #[test]
    fn a_vm_goes_on_with_the_kind_of_kvm_that_it_was_started_with() {
        assert!(same_kind(false, false).is_ok() && same_kind(true, true).is_ok());
        let refused = |source, here| same_kind(source, here).expect_err("another kind").to_string();
        assert_eq!(
            refused(false, true),
            "KVM: the VM was started with hardware virtualization, and this host's KVM has none"
        );
        assert_eq!(
            refused(true, false),
            "KVM: the VM was started without hardware virtualization, and this host's KVM has it"
        );
    }

    #[test]
    fn secrets_are_compared_whole() {
        assert!(equal_in_constant_time(b"secret", b"secret"));
        assert!(!equal_in_constant_time(b"secret", b"secreT"));
        assert!(!equal_in_constant_time(b"secret", b"secre"));
    }
}
