//! Stopping a vCPU where KVM tells all of its state.
//!
//! KVM_GET_VCPU_EVENTS is silent of an exception that an instruction asked for (INT3, INT 3, INT 4) and that is yet to be
//! delivered. It counts on RIP still being at that instruction, which is then met again. Where KVM has no hardware
//! virtualization RIP may be behind it, and a vCPU saved there would never see its exception.

use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes as _, GuestAddress};

use super::VcpuError;
use crate::memory::Mmap;

/// Vectors of such exceptions.
const BREAKPOINT: u8 = 3;
const OVERFLOW: u8 = 4;
const INT3: u8 = 0xcc;
const INT: u8 = 0xcd;
/// A guest is hardly ever at such a place twice in a row; twenty times it is only if it waits there for nothing, as programs can
/// in order not to be stopped. A try takes some 100 µs of the pause.
const TRIES: u32 = 20;

/// Lets a vCPU that has just been stopped go on until KVM tells all of its state. `run` runs it for a moment, and answers if
/// the guest ends; so does this.
///
/// # Errors
/// Those of `run`.
pub fn settle<T>(
    fd: &mut VcpuFd,
    memory: &Mmap,
    mut run: impl FnMut(&mut VcpuFd) -> Result<Option<T>, VcpuError>,
) -> Result<Option<T>, VcpuError> {
    for _ in 0..TRIES {
        if !may_be_silent(fd, memory) {
            return Ok(None);
        }
        if let Some(end) = run(fd)? {
            return Ok(Some(end));
        }
    }
    tracing::warn!(
        "the guest does not come past an INT instruction; if its exception is under way it is lost"
    );
    Ok(None)
}

/// Whether KVM may be silent of an exception. It is also taken for so right after one has been handled: the two look alike.
fn may_be_silent(fd: &VcpuFd, memory: &Mmap) -> bool {
    let Ok(events) = fd.get_vcpu_events() else {
        return false;
    };
    let last = events.exception;
    last.injected == 0 && last.pending == 0 && is_behind_int(fd, memory, last.nr).unwrap_or(false)
}

/// Whether RIP is behind an instruction that raises this vector. `None` if there is no reading it.
fn is_behind_int(fd: &VcpuFd, memory: &Mmap, vector: u8) -> Option<bool> {
    if vector != BREAKPOINT && vector != OVERFLOW {
        return None;
    }
    let rip = fd.get_regs().ok()?.rip;
    let base = fd.get_sregs().ok()?.cs.base;
    let before = |count: u64| -> Option<u8> {
        let address = base.wrapping_add(rip).wrapping_sub(count);
        let found = fd.translate_gva(address).ok()?;
        let address = GuestAddress(found.physical_address);
        (found.valid != 0)
            .then(|| memory.read_obj(address).ok())
            .flatten()
    };
    let last = before(1)?;
    Some(match vector {
        BREAKPOINT if last == INT3 => true,
        _ => last == vector && before(2)? == INT,
    })
}
