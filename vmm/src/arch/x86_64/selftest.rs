//! Does this host's KVM run guests in hardware, or does it emulate ring 0? One POPCNT in a throw-away VM tells: hardware
//! runs it, software KVM does not know it.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::layout;
use super::tables::{BootMode, boot_registers};
use crate::memory::GuestMemory;

/// `popcnt eax, ebx; out 0xf4, al; hlt`
const CODE: [u8; 7] = [0xf3, 0x0f, 0xb8, 0xc3, 0xe6, 0xf4, 0xf4];
const CODE_AT: GuestAddress = GuestAddress(0x10_0000);

/// Whether KVM emulates kernel-mode instructions here. An error in the test itself counts as hardware: the ordinary case.
#[must_use]
pub fn is_software_kvm(kvm: &Kvm) -> bool {
    match emulates_ring_zero(kvm) {
        Ok(answer) => answer,
        Err(error) => {
            tracing::warn!(%error, "the self-test of KVM failed; taking it for hardware KVM");
            false
        }
    }
}

fn emulates_ring_zero(kvm: &Kvm) -> Result<bool, Box<dyn std::error::Error>> {
    let memory = GuestMemory::new(crate::spec::MIN_MEMORY)?;
    memory.mmap().write_slice(&CODE, CODE_AT)?;
    let vm = kvm.create_vm()?;
    vm.set_tss_address(layout::KVM_TSS)?;
    let host = memory.mmap().get_host_address(GuestAddress(0))?;
    // SAFETY: `memory` outlives `vm` and `vcpu` in this function (declared before, dropped after them).
    unsafe {
        vm.set_user_memory_region(kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: memory.len(),
            userspace_addr: host.addr() as u64,
        })?;
    }
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?)?;
    let (regs, sregs) = boot_registers(&memory, BootMode::Linux64, CODE_AT, vcpu.get_sregs()?)?;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&regs)?;
    debug_assert_eq!(regs.rip, CODE_AT.raw_value());
    Ok(matches!(vcpu.run()?, VcpuExit::InternalError))
}
