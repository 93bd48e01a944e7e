//! What to say of a guest that KVM cannot go on with: which instruction, where, in which ring.
//!
//! Where KVM has no hardware virtualization it emulates ring 0, and stops (KVM_EXIT_INTERNAL_ERROR, suberror 1) at an
//! instruction that its emulator does not know. With hardware this is hardly ever seen.

use std::fmt;

use iced_x86::{Decoder, DecoderOptions};
use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES};
use kvm_ioctls::VcpuFd;

/// An instruction that KVM could not emulate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unemulated {
    /// Where it is.
    pub rip: u64,
    /// CPL.
    pub ring: u8,
    /// 16, 32 or 64.
    pub bits: u32,
    /// The bytes from there on that KVM had fetched; none, if it does not tell.
    pub bytes: Vec<u8>,
}

impl fmt::Display for Unemulated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KVM could not emulate ")?;
        let instruction = Decoder::with_ip(self.bits, &self.bytes, self.rip, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            write!(f, "an instruction of the guest ({:02x?})", self.bytes)?;
        } else {
            let mnemonic = format!("{:?}", instruction.mnemonic()).to_lowercase();
            write!(f, "{mnemonic} ({:02x?})", &self.bytes[..instruction.len()])?;
        }
        write!(f, " at {:#x} in ring {}", self.rip, self.ring)?;
        if self.ring == 0 {
            f.write_str("; the guest needs a kernel made for KVM without hardware virtualization")?;
        }
        Ok(())
    }
}

/// Why KVM_RUN ended with an internal error, for a user. Call it only after such an exit.
pub fn explain(fd: &mut VcpuFd) -> String {
    match unemulated(fd) {
        Ok(Some(found)) => found.to_string(),
        Ok(None) => {
            // SAFETY: KVM_EXIT_INTERNAL_ERROR was the exit, for which KVM fills this member.
            let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
            format!("KVM internal error {suberror}")
        }
        Err(error) => format!("KVM could not emulate an instruction of the guest, nor say which: {error}"),
    }
}

/// Which instruction KVM could not emulate, if that is what its internal error was.
fn unemulated(fd: &mut VcpuFd) -> Result<Option<Unemulated>, kvm_ioctls::Error> {
    // SAFETY: as above. Both members begin with the suberror, and each field of both is an integer.
    let failure = unsafe { fd.get_kvm_run().__bindgen_anon_1.emulation_failure };
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
        return Ok(None);
    }
    // The flags are there if KVM says that it gave more than the suberror.
    let told = failure.ndata > 0
        && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
    // SAFETY: of the two members one is an empty struct, the other one integers.
    let fetched = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let length = if told { usize::from(fetched.insn_size) } else { 0 };
    let (regs, sregs) = (fd.get_regs()?, fd.get_sregs()?);
    Ok(Some(Unemulated {
        rip: regs.rip,
        ring: sregs.ss.dpl,
        bits: match (sregs.cs.l, sregs.cs.db) {
            (1, _) => 64,
            (_, 1) => 32,
            _ => 16,
        },
        bytes: fetched.insn_bytes.iter().copied().take(length).collect(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(bytes: &[u8], ring: u8) -> String {
        let bytes = bytes.to_vec();
        Unemulated {
            rip: 0x10_0000,
            ring,
            bits: 64,
            bytes,
        }
        .to_string()
    }

    #[test]
    fn the_instruction_is_named_with_its_bytes_place_and_ring() {
        assert_eq!(
            said(&[0xf3, 0x0f, 0xb8, 0xc3, 0xe6, 0xf4], 3),
            "KVM could not emulate popcnt ([f3, 0f, b8, c3]) at 0x100000 in ring 3"
        );
    }

    #[test]
    fn in_ring_0_it_is_said_what_the_guest_needs() {
        assert!(
            said(&[0x0f, 0x01, 0xca], 0)
                .contains("clac ([0f, 01, ca]) at 0x100000 in ring 0; the guest needs")
        );
    }

    #[test]
    fn what_cannot_be_decoded_is_shown_as_it_is() {
        assert!(said(&[], 0).starts_with("KVM could not emulate an instruction of the guest ([]) at"));
        assert!(said(&[0x06], 3).contains("([06])"));
    }
}
