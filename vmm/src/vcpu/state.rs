//! Saving and restoring one parked vCPU.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::arch::msr;
use crate::state::{Kind, MsrEntry, StateError, VcpuState, from_bytes, to_bytes};

/// KVM takes and gives at most this many MSRs a call (KVM_MAX_MSR_ENTRIES).
const MSRS_PER_CALL: usize = 256;

/// Why a vCPU's state could not be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// A KVM call failed.
    #[error("{ioctl}: {source}")]
    Ioctl {
        /// The call.
        ioctl: &'static str,
        /// Its error.
        source: kvm_ioctls::Error,
    },
    /// KVM refused one MSR.
    #[error("KVM_SET_MSRS: this host refuses MSR {index:#x} = {data:#x}")]
    Msr {
        /// Register number.
        index: u32,
        /// The refused value.
        data: u64,
    },
    /// The state holds an MSR that was not agreed on, or one twice.
    #[error("MSR {0:#x} is not one of those that were negotiated, or is there twice")]
    MsrNotNegotiated(u32),
    /// More MSRs than fit one call.
    #[error("MSR list: {0}")]
    MsrList(vmm_sys_util::fam::Error),
    /// Malformed state.
    #[error(transparent)]
    State(#[from] StateError),
}

fn call<T>(ioctl: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, VcpuStateError> {
    result.map_err(|source| VcpuStateError::Ioctl { ioctl, source })
}

/// The state of a parked vCPU, with the MSRs of `msr_indices` in that order.
///
/// # Errors
/// The KVM call that failed.
pub fn save(fd: &VcpuFd, msr_indices: &[u32]) -> Result<VcpuState, VcpuStateError> {
    // KVM_GET_MP_STATE first: it makes KVM act on pending INIT/SIPI, which changes the registers read after it.
    let mp_state = call("KVM_GET_MP_STATE", fd.get_mp_state())?;
    Ok(VcpuState {
        mp_state: to_bytes(&mp_state),
        regs: to_bytes(&call("KVM_GET_REGS", fd.get_regs())?),
        sregs: to_bytes(&call("KVM_GET_SREGS", fd.get_sregs())?),
        xsave: to_bytes(&call("KVM_GET_XSAVE", fd.get_xsave())?),
        xcrs: to_bytes(&call("KVM_GET_XCRS", fd.get_xcrs())?),
        debug_regs: to_bytes(&call("KVM_GET_DEBUGREGS", fd.get_debug_regs())?),
        lapic: to_bytes(&call("KVM_GET_LAPIC", fd.get_lapic())?),
        msrs: save_msrs(fd, msr_indices)?,
        // Last: reading the other state may turn a pending exception into an injected one.
        events: to_bytes(&call("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?),
    })
}

fn save_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<MsrEntry>, VcpuStateError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> = rest
            .iter()
            .take(MSRS_PER_CALL)
            .map(|&index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&wanted).map_err(VcpuStateError::MsrList)?;
        let count = call("KVM_GET_MSRS", fd.get_msrs(&mut msrs))?;
        saved.extend(msrs.as_slice()[..count].iter().map(|entry| MsrEntry {
            index: entry.index,
            data: entry.data,
        }));
        // KVM stops at the first it cannot read (listed, but not for this guest's CPUID): leave that one out.
        rest = &rest[(count + usize::from(count < wanted.len())).min(rest.len())..];
    }
    Ok(saved)
}

/// Has KVM forget what the TSCs of a VM are expected to show. Call it with the first vCPU, before any is restored.
///
/// KVM before Linux 6.7 takes a TSC within a second of what it expects for an attempt to synchronize vCPUs, and lets it show
/// what is expected. Of a VM that has just been made that is its own age, which a young guest's TSC may well be near.
///
/// # Errors
/// The KVM call that failed.
pub fn forget_tsc(fd: &VcpuFd) -> Result<(), VcpuStateError> {
    const FAR_FROM_ANY: u64 = 1 << 62;
    let tsc = kvm_msr_entry {
        index: msr::TSC,
        data: FAR_FROM_ANY,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[tsc]).map_err(VcpuStateError::MsrList)?;
    call("KVM_SET_MSRS", fd.set_msrs(&msrs)).map(drop)
}

/// Loads saved state into a parked vCPU, with no MSRs but those of `msr_indices`. `tsc_advance` is added to the guest's TSC: the time the move took.
///
/// # Errors
/// The section that is malformed, or the KVM call that failed.
pub fn restore(
    fd: &VcpuFd,
    state: &VcpuState,
    msr_indices: &[u32],
    tsc_advance: u64,
) -> Result<(), VcpuStateError> {
    check_msrs(&state.msrs, msr_indices)?;
    let kind = Kind::Vcpu;
    call(
        "KVM_SET_MP_STATE",
        fd.set_mp_state(from_bytes(kind, "mp_state", &state.mp_state)?),
    )?;
    call(
        "KVM_SET_REGS",
        fd.set_regs(&from_bytes(kind, "regs", &state.regs)?),
    )?;
    call(
        "KVM_SET_SREGS",
        fd.set_sregs(&from_bytes(kind, "sregs", &state.sregs)?),
    )?;
    let xsave = from_bytes(kind, "xsave", &state.xsave)?;
    // SAFETY: KVM reads the 4096 bytes of `struct kvm_xsave`. It would read more only if this process had asked for
    // dynamically enabled features (arch_prctl ARCH_REQ_XCOMP_GUEST_PERM), which it never does.
    call("KVM_SET_XSAVE", unsafe { fd.set_xsave(&xsave) })?;
    call(
        "KVM_SET_XCRS",
        fd.set_xcrs(&from_bytes(kind, "xcrs", &state.xcrs)?),
    )?;
    call(
        "KVM_SET_DEBUGREGS",
        fd.set_debug_regs(&from_bytes(kind, "debug_regs", &state.debug_regs)?),
    )?;
    call(
        "KVM_SET_LAPIC",
        fd.set_lapic(&from_bytes(kind, "lapic", &state.lapic)?),
    )?;
    restore_msrs(fd, &state.msrs, tsc_advance)?;
    call(
        "KVM_SET_VCPU_EVENTS",
        fd.set_vcpu_events(&from_bytes(kind, "events", &state.events)?),
    )
}

/// Both are in the same order, so one walk over them tells.
fn check_msrs(msrs: &[MsrEntry], negotiated: &[u32]) -> Result<(), VcpuStateError> {
    let mut negotiated = negotiated.iter();
    for msr in msrs {
        if !negotiated.any(|&index| index == msr.index) {
            return Err(VcpuStateError::MsrNotNegotiated(msr.index));
        }
    }
    Ok(())
}

fn restore_msrs(fd: &VcpuFd, msrs: &[MsrEntry], tsc_advance: u64) -> Result<(), VcpuStateError> {
    let entries: Vec<_> = msrs
        .iter()
        .map(|msr| {
            let data = if msr.index == msr::TSC {
                msr.data.wrapping_add(tsc_advance)
            } else {
                msr.data
            };
            kvm_msr_entry {
                index: msr.index,
                data,
                ..Default::default()
            }
        })
        .collect();
    for chunk in entries.chunks(MSRS_PER_CALL) {
        let msrs = Msrs::from_entries(chunk).map_err(VcpuStateError::MsrList)?;
        let count = call("KVM_SET_MSRS", fd.set_msrs(&msrs))?;
        if let Some(refused) = chunk.get(count) {
            return Err(VcpuStateError::Msr {
                index: refused.index,
                data: refused.data,
            });
        }
    }
    Ok(())
}

/// TSC frequency of the vCPU, kHz; 0 if KVM does not tell.
#[must_use]
pub fn read_tsc_khz(fd: &VcpuFd) -> u32 {
    fd.get_tsc_khz().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_negotiated_msrs_are_restored_each_once() {
        let msrs = |indices: &[u32]| -> Vec<MsrEntry> {
            let msr = |&index| MsrEntry { index, data: 0 };
            indices.iter().map(msr).collect()
        };
        let negotiated = [0x10, 0x1a0, 0x174, 0x6e0];
        assert!(check_msrs(&msrs(&negotiated), &negotiated).is_ok());
        assert!(
            check_msrs(&msrs(&[0x10, 0x174]), &negotiated).is_ok(),
            "unreadable ones are left out"
        );
        for (wrong, at) in [([0x10, 0x3a], 0x3a), ([0x174, 0x174], 0x174)] {
            let refused = check_msrs(&msrs(&wrong), &negotiated);
            assert!(matches!(refused, Err(VcpuStateError::MsrNotNegotiated(index)) if index == at));
        }
    }
}
