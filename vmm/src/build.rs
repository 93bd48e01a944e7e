//! A VM from a spec, in one readable order; and the empty VM that an incoming migration is loaded into.

use kvm_ioctls::Kvm;
use shoal_cpuid::Msr;

use crate::arch::{acpi, boot, cpuid, msr, tables};
use crate::fault;
use crate::memory::{Backing, GuestMemory};
use crate::spec::VmSpec;
use crate::vm::{Platform, Vm, VmError, VmHooks};

/// Why a VM could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The image cannot be booted.
    #[error(transparent)]
    Image(#[from] boot::BootError),
    /// KVM or the host refused something.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The guest was to have features that this host lacks.
    #[error("cpu_baseline: this host lacks {}", .0.join(", "))]
    CpuBaseline(Vec<String>),
    /// A KVM call on a vCPU failed.
    #[error("{ioctl}: {source}")]
    BootCpu {
        /// The call.
        ioctl: &'static str,
        /// Its error.
        source: kvm_ioctls::Error,
    },
    /// Boot structures do not fit guest memory.
    #[error("boot structures: {0}")]
    Structures(#[from] vm_memory::GuestMemoryError),
    /// Injected by a test.
    #[error(transparent)]
    Fault(#[from] fault::Fault),
}

impl BuildError {
    /// Whether the spec or the image is at fault, rather than this host.
    #[must_use]
    pub fn is_callers_fault(&self) -> bool {
        matches!(self, BuildError::Image(_) | BuildError::CpuBaseline(_))
    }
}

/// Opens /dev/kvm.
///
/// # Errors
/// Says what to check.
pub fn open_kvm() -> Result<Kvm, VmError> {
    Kvm::new().map_err(VmError::NoKvm)
}

fn guest_memory(spec: &VmSpec) -> Result<GuestMemory, VmError> {
    let backing = Backing::choose(spec.memory_backing);
    Ok(GuestMemory::with_backing(spec.memory_bytes, backing)?)
}

/// Builds the VM that `spec` describes, ready to run its first instruction.
///
/// # Errors
/// What is wrong with the image, or what the host refused.
pub fn boot_vm(kvm: &Kvm, spec: &VmSpec, hooks: VmHooks) -> Result<Vm, BuildError> {
    let platform = baseline_platform(kvm, spec)?;
    let memory = guest_memory(spec)?;
    let rsdp = acpi::write_tables(&memory, spec.cpus)?;
    let kernel = boot::load(&memory, &spec.kernel, spec.initrd.as_deref(), &spec.cmdline, rsdp)?;
    let vm = Vm::new(kvm, memory, spec.cpus, platform, hooks)?;
    set_boot_state(&vm, kernel)?;
    Ok(vm)
}

/// What the spec leaves of this host's CPU features; nothing if it leaves all.
fn baseline_platform(kvm: &Kvm, spec: &VmSpec) -> Result<Option<Platform>, BuildError> {
    if spec.cpu_baseline.is_empty() {
        return Ok(None);
    }
    let host = Platform::of_host(kvm, spec.cpus)?;
    let cpuid = cpuid::restrict(&host.cpuid, &spec.cpu_baseline).map_err(BuildError::CpuBaseline)?;
    Ok(Some(Platform { cpuid, ..host }))
}

/// Builds an empty VM with the platform that the source of a migration has, and with its memory if it was handed over.
///
/// # Errors
/// What the host refused.
pub fn incoming_vm(
    kvm: &Kvm,
    spec: &VmSpec,
    handed_over: Option<GuestMemory>,
    platform: Platform,
    hooks: VmHooks,
) -> Result<Vm, BuildError> {
    fault::point("destination.memory")?;
    let memory = handed_over.map_or_else(|| guest_memory(spec), Ok)?;
    Ok(Vm::new(kvm, memory, spec.cpus, Some(platform), hooks)?)
}

fn set_boot_state(vm: &Vm, kernel: boot::LoadedKernel) -> Result<(), BuildError> {
    let failed = |ioctl| move |source| BuildError::BootCpu { ioctl, source };
    let fd = vm.boot_vcpu().fd();
    let reset = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let (regs, sregs) = tables::boot_registers(vm.memory(), kernel.mode, kernel.entry, reset)?;
    fd.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    fd.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    drop(fd);
    set_boot_msrs(vm)
}

fn set_boot_msrs(vm: &Vm) -> Result<(), BuildError> {
    for vcpu in vm.vcpus() {
        let refused = msr::write(&vcpu.fd(), msr::boot_entries()).map_err(|source| BuildError::BootCpu {
            ioctl: "KVM_SET_MSRS",
            source,
        })?;
        if let Some(msr) = refused {
            tracing::warn!(
                vcpu = vcpu.id(),
                "this host's KVM does not take boot {}; guests rarely need it",
                Msr(msr.index)
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::tests::{kvm, new_vm};

    #[test]
    fn what_firmware_would_set_is_set_on_every_cpu() {
        let Some(kvm) = kvm() else { return };
        let vm = new_vm(&kvm, 3, None);
        set_boot_msrs(&vm).expect("set");
        for vcpu in vm.vcpus() {
            let indices = msr::boot_entries().map(|(index, _)| index);
            let read = msr::read(&vcpu.fd(), &indices).expect("read");
            let read: Vec<(u32, u64)> = read.iter().map(|entry| (entry.index, entry.data)).collect();
            assert_eq!(read, msr::boot_entries(), "vCPU {}", vcpu.id());
        }
    }
}
