//! Saving and restoring one parked vCPU.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use shoal_cpuid::Msr;

use crate::arch::msr::{self, GuestMsrs};
use crate::state::{Kind, MsrEntry, StateError, VcpuState, from_bytes, to_bytes};

/// A TSC that was read within this is known well enough.
const QUICK: Duration = Duration::from_micros(20);
const TRIES: usize = 5;

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
    /// The state holds an MSR that is not restored here, or one twice.
    #[error("{}: this host's KVM does not know it, or it is there twice", Msr(*.0))]
    UnknownMsr(u32),
    /// Malformed state.
    #[error(transparent)]
    State(#[from] StateError),
}

fn call<T>(ioctl: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, VcpuStateError> {
    result.map_err(|source| VcpuStateError::Ioctl { ioctl, source })
}

/// The state of a parked vCPU, with its MSRs, of which the TSC is `tsc`.
///
/// # Errors
/// The KVM call that failed.
pub fn save(fd: &VcpuFd, msrs: &GuestMsrs, tsc: u64) -> Result<VcpuState, VcpuStateError> {
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
        msrs: save_msrs(fd, msrs, tsc)?,
        // Last: reading the other state may turn a pending exception into an injected one.
        events: to_bytes(&call("KVM_GET_VCPU_EVENTS", fd.get_vcpu_events())?),
    })
}

fn save_msrs(fd: &VcpuFd, msrs: &GuestMsrs, tsc: u64) -> Result<Vec<MsrEntry>, VcpuStateError> {
    let msrs = call("KVM_GET_MSRS", msrs.read(fd))?;
    let saved = msrs.iter().map(|entry| MsrEntry {
        index: entry.index,
        data: if entry.index == msr::TSC { tsc } else { entry.data },
    });
    Ok(saved.collect())
}

/// The TSC, and when it showed that.
///
/// # Errors
/// The KVM call that failed.
pub fn read_tsc(fd: &VcpuFd) -> Result<(u64, Instant), VcpuStateError> {
    let mut best: Option<(Duration, u64, Instant)> = None;
    for _ in 0..TRIES {
        let before = Instant::now();
        let read = call("KVM_GET_MSRS", msr::read(fd, &[msr::TSC]))?;
        let took = before.elapsed();
        let tsc = read.first().map_or(0, |entry| entry.data);
        if best.is_none_or(|(least, ..)| took < least) {
            best = Some((took, tsc, before + took / 2));
        }
        if took < QUICK {
            break;
        }
    }
    let (_, tsc, at) = best.expect("TRIES is not 0");
    Ok((tsc, at))
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
    call("KVM_SET_MSRS", msr::write(fd, [(msr::TSC, FAR_FROM_ANY)])).map(drop)
}

/// Loads saved state into a parked vCPU, with no MSRs but those of `known`. `tsc_advance` tells, when the TSC is set, what is
/// to be added to it: the time since it was saved.
///
/// # Errors
/// The section that is malformed, or the KVM call that failed.
pub fn restore(
    fd: &VcpuFd,
    state: &VcpuState,
    known: &[u32],
    tsc_advance: impl FnOnce() -> u64,
) -> Result<(), VcpuStateError> {
    let msrs = checked_msrs(&state.msrs, known)?;
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
    restore_msrs(fd, msrs, tsc_advance)?;
    call(
        "KVM_SET_VCPU_EVENTS",
        fd.set_vcpu_events(&from_bytes(kind, "events", &state.events)?),
    )
}

/// MSRs in the order in which they are restored.
fn checked_msrs(msrs: &[MsrEntry], known: &[u32]) -> Result<Vec<(u32, u64)>, VcpuStateError> {
    let mut known: HashSet<u32> = known.iter().copied().collect();
    if let Some(unknown) = msrs.iter().find(|msr| !known.remove(&msr.index)) {
        return Err(VcpuStateError::UnknownMsr(unknown.index));
    }
    let mut msrs: Vec<_> = msrs.iter().map(|msr| (msr.index, msr.data)).collect();
    msrs.sort_by_key(|&(index, _)| msr::in_order(index));
    Ok(msrs)
}

fn restore_msrs(
    fd: &VcpuFd,
    mut msrs: Vec<(u32, u64)>,
    tsc_advance: impl FnOnce() -> u64,
) -> Result<(), VcpuStateError> {
    if let Some((msr::TSC, tsc)) = msrs.first_mut() {
        *tsc = tsc.wrapping_add(tsc_advance());
    }
    match call("KVM_SET_MSRS", msr::write(fd, msrs))? {
        None => Ok(()),
        Some(refused) => Err(VcpuStateError::Msr {
            index: refused.index,
            data: refused.data,
        }),
    }
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
    fn only_known_msrs_are_restored_each_once_and_the_tsc_before_its_deadline() {
        let msrs = |indices: &[u32]| -> Vec<MsrEntry> {
            let msr = |&index| MsrEntry { index, data: 7 };
            indices.iter().map(msr).collect()
        };
        let known = [0x10, 0x1a0, 0x174, 0x6e0];
        let restored = |indices: &[u32]| {
            let msrs = checked_msrs(&msrs(indices), &known).expect("known");
            msrs.into_iter().map(|(index, _)| index).collect::<Vec<_>>()
        };
        assert_eq!(
            restored(&[0x6e0, 0x174, 0x10, 0x1a0]),
            [0x10, 0x174, 0x1a0, 0x6e0]
        );
        assert_eq!(restored(&[0x174]), [0x174]);
        for (wrong, at) in [([0x10, 0x3a], 0x3a), ([0x174, 0x174], 0x174)] {
            let refused = checked_msrs(&msrs(&wrong), &known);
            assert!(matches!(refused, Err(VcpuStateError::UnknownMsr(index)) if index == at));
        }
    }
}
