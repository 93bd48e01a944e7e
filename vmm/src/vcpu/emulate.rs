//! Completes instructions that KVM could not emulate.
//!
//! Where KVM has hardware virtualization this is never reached. Where it runs guests in software, ring 0 goes through
//! KVM's instruction emulator, which stops (KVM_EXIT_INTERNAL_ERROR, suberror 1) at instructions it does not know, with
//! RIP on the instruction and consistent state. This module decodes the instruction, does what the manual says, and
//! advances RIP. Source for the operations: Intel SDM volumes 1 (chapter 13) and 2.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use kvm_bindings::{kvm_regs, kvm_sregs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes as _, GuestAddress};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::paging::{self, Denied};
use crate::memory::GuestMemory;

const PAGE: u64 = 4096;
const MAX_INSTRUCTION: usize = 15;
const BREAKPOINT_VECTOR: u8 = 3;
const PAGE_FAULT_VECTOR: u8 = 14;
const GENERAL_PROTECTION_VECTOR: u8 = 13;
const RFLAGS_ZF: u64 = 1 << 6;
const RFLAGS_AC: u64 = 1 << 18;
const RFLAGS_ARITHMETIC: u64 = 0x8d5;
const CR4_OSXSAVE: u64 = 1 << 18;

/// Layout of the standard-format XSAVE area (SDM vol. 1, 13.4), as this host's CPU lays it out and KVM passes it on.
mod area {
    use std::arch::x86_64::__cpuid_count;
    use std::ops::Range;
    use std::sync::OnceLock;

    const LEAF: u32 = 0xd;
    const COMPONENTS: u32 = 63;
    pub const FXSAVE_LEN: usize = 416;
    pub const MXCSR: Range<usize> = 24..32;
    pub const XSTATE_BV: Range<usize> = 512..520;
    pub const XCOMP_BV: Range<usize> = 520..528;
    pub const HEADER_END: usize = 576;
    pub const X87: u64 = 1;
    pub const SSE: u64 = 2;
    pub const AVX: u64 = 4;

    /// Extended user-state components that fit `struct kvm_xsave`: number, and bytes in the area.
    pub fn extended() -> &'static [(u32, Range<usize>)] {
        static LAYOUT: OnceLock<Vec<(u32, Range<usize>)>> = OnceLock::new();
        LAYOUT.get_or_init(|| {
            (2..COMPONENTS)
                .filter_map(|component| {
                    let leaf = __cpuid_count(LEAF, component);
                    let (size, start) = (usize::try_from(leaf.eax).ok()?, usize::try_from(leaf.ebx).ok()?);
                    let fits =
                        size > 0 && start >= HEADER_END && start + size <= size_of::<super::kvm_xsave>();
                    fits.then_some((component, start..start + size))
                })
                .collect()
        })
    }
}

/// Why an instruction could not be completed.
#[derive(Debug, thiserror::Error)]
pub enum EmulateError {
    /// Not an emulation failure at all.
    #[error("KVM internal error, suberror {0}: the VM cannot go on")]
    NotEmulation(u32),
    /// A register call failed.
    #[error("{ioctl}: {source}")]
    Ioctl {
        /// The call.
        ioctl: &'static str,
        /// Its error.
        source: kvm_ioctls::Error,
    },
    /// The bytes at RIP could not be read.
    #[error("KVM could not emulate the instruction at {rip:#x}, and it cannot be read")]
    Fetch {
        /// Where.
        rip: u64,
    },
    /// Nothing this module knows.
    #[error(
        "KVM cannot emulate the instruction at {rip:#x} ({bytes:02x?}), nor can this VMM; the guest kernel needs an option that avoids it"
    )]
    Unknown {
        /// Where.
        rip: u64,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// Paged, but not in 64-bit mode.
    #[error(
        "KVM cannot emulate the instruction at {rip:#x}, and this VMM completes instructions in 64-bit mode only"
    )]
    Mode {
        /// Where.
        rip: u64,
    },
    /// Guest memory access.
    #[error("guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What an instruction ends with if it does not complete: an exception for the guest, or an error of this VM.
enum Fault {
    Page { address: u64, code: u32 },
    GeneralProtection,
    Error(EmulateError),
}

impl From<EmulateError> for Fault {
    fn from(error: EmulateError) -> Self {
        Fault::Error(error)
    }
}

impl From<vm_memory::GuestMemoryError> for Fault {
    fn from(error: vm_memory::GuestMemoryError) -> Self {
        Fault::Error(error.into())
    }
}

fn call<T>(ioctl: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, EmulateError> {
    result.map_err(|source| EmulateError::Ioctl { ioctl, source })
}

/// Completes the instruction at RIP after an internal-error exit.
///
/// # Errors
/// When it is not an emulation failure, or the instruction is not known here.
pub fn complete(fd: &mut VcpuFd, memory: &GuestMemory) -> Result<(), EmulateError> {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR (the caller's match arm), for which KVM fills this member.
    let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    if suberror != kvm_bindings::KVM_INTERNAL_ERROR_EMULATION {
        return Err(EmulateError::NotEmulation(suberror));
    }
    let regs = call("KVM_GET_REGS", fd.get_regs())?;
    let sregs = call("KVM_GET_SREGS", fd.get_sregs())?;
    let mut cpu = Cpu {
        fd,
        memory,
        regs,
        sregs,
    };
    let instruction = cpu.fetch()?;
    match cpu.execute(&instruction) {
        Ok(()) => call("KVM_SET_REGS", cpu.fd.set_regs(&cpu.regs)),
        Err(Fault::Page { address, code }) => cpu.raise_page_fault(address, code),
        Err(Fault::GeneralProtection) => cpu.raise(GENERAL_PROTECTION_VECTOR, Some(0)),
        Err(Fault::Error(error)) => Err(error),
    }
}

struct Cpu<'a> {
    fd: &'a mut VcpuFd,
    memory: &'a GuestMemory,
    regs: kvm_regs,
    sregs: kvm_sregs,
}

impl Cpu<'_> {
    fn fetch(&mut self) -> Result<Instruction, EmulateError> {
        let rip = self.regs.rip;
        let linear = rip.wrapping_add(if self.sregs.cs.l == 0 {
            self.sregs.cs.base
        } else {
            0
        });
        let mut bytes = [0u8; MAX_INSTRUCTION];
        let first_page = usize::try_from(PAGE - linear % PAGE)
            .unwrap_or(MAX_INSTRUCTION)
            .min(MAX_INSTRUCTION);
        let mut length = first_page;
        self.read(linear, &mut bytes[..first_page])
            .map_err(|_| EmulateError::Fetch { rip })?;
        if first_page < MAX_INSTRUCTION
            && self
                .read(linear.wrapping_add(first_page as u64), &mut bytes[first_page..])
                .is_ok()
        {
            length = MAX_INSTRUCTION;
        }
        let bitness = match (self.sregs.cs.l, self.sregs.cs.db) {
            (1, _) => 64,
            (_, 1) => 32,
            _ => 16,
        };
        let instruction = Decoder::with_ip(bitness, &bytes[..length], rip, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            return Err(EmulateError::Unknown {
                rip,
                bytes: bytes[..length].to_vec(),
            });
        }
        Ok(instruction)
    }

    fn execute(&mut self, instruction: &Instruction) -> Result<(), Fault> {
        use Mnemonic as M;
        match instruction.mnemonic() {
            M::Int3 => return self.breakpoint(instruction),
            M::Wait | M::Clflush | M::Clflushopt | M::Clwb | M::Endbr64 => {}
            M::Fninit => self.change_xsave(|image| clear_bv(image, area::X87))?,
            M::Fnclex => self.change_xsave(|image| {
                image[2] &= 0x00;
                image[3] &= 0x7f;
            })?,
            M::Clac => self.regs.rflags &= !RFLAGS_AC,
            M::Stac => self.regs.rflags |= RFLAGS_AC,
            M::Popcnt => self.popcnt(instruction)?,
            M::Cmpxchg16b => self.cmpxchg16b(instruction)?,
            M::Xsave | M::Xsave64 => self.xsave(instruction)?,
            M::Xrstor | M::Xrstor64 => self.xrstor(instruction)?,
            M::Fxsave | M::Fxsave64 => {
                let image = self.get_xsave()?;
                self.write(self.address(instruction)?, &image.as_bytes()[..area::FXSAVE_LEN])?;
            }
            M::Fxrstor | M::Fxrstor64 => {
                let mut legacy = [0u8; area::FXSAVE_LEN];
                let address = self.address(instruction)?;
                self.read(address, &mut legacy)?;
                if !address.is_multiple_of(16) {
                    return Err(Fault::GeneralProtection);
                }
                self.check_mxcsr(&legacy)?;
                self.change_xsave(|image| {
                    image[..area::FXSAVE_LEN].copy_from_slice(&legacy);
                    set_bv(image, area::X87 | area::SSE);
                })?;
            }
            M::Ldmxcsr => {
                let mut legacy = [0u8; 28];
                self.read(self.address(instruction)?, &mut legacy[24..])?;
                self.check_mxcsr(&legacy)?;
                self.change_xsave(|image| {
                    image[24..28].copy_from_slice(&legacy[24..]);
                    set_bv(image, area::SSE);
                })?;
            }
            M::Stmxcsr => {
                let image = self.get_xsave()?;
                self.write(self.address(instruction)?, &image.as_bytes()[24..28])?;
            }
            _ => return Err(self.unknown(instruction).into()),
        }
        self.advance(instruction);
        Ok(())
    }

    fn unknown(&mut self, instruction: &Instruction) -> EmulateError {
        let mut bytes = vec![0u8; instruction.len()];
        let rip = self.regs.rip;
        // Shown for diagnosis only; an unreadable page shows as zeros.
        let _ = self.read(rip, &mut bytes);
        EmulateError::Unknown { rip, bytes }
    }

    fn advance(&mut self, instruction: &Instruction) {
        self.regs.rip = instruction.next_ip();
    }

    fn breakpoint(&mut self, instruction: &Instruction) -> Result<(), Fault> {
        self.advance(instruction);
        Ok(self.raise(BREAKPOINT_VECTOR, None)?)
    }

    fn raise_page_fault(&mut self, address: u64, code: u32) -> Result<(), EmulateError> {
        self.sregs.cr2 = address;
        call("KVM_SET_SREGS", self.fd.set_sregs(&self.sregs))?;
        self.raise(PAGE_FAULT_VECTOR, Some(code))
    }

    /// Has the guest take an exception at the present RIP.
    fn raise(&mut self, vector: u8, error_code: Option<u32>) -> Result<(), EmulateError> {
        let mut events = call("KVM_GET_VCPU_EVENTS", self.fd.get_vcpu_events())?;
        events.exception.injected = 1;
        events.exception.nr = vector;
        events.exception.has_error_code = u8::from(error_code.is_some());
        events.exception.error_code = error_code.unwrap_or(0);
        call("KVM_SET_VCPU_EVENTS", self.fd.set_vcpu_events(&events))
    }

    fn popcnt(&mut self, instruction: &Instruction) -> Result<(), Fault> {
        let size = instruction.op0_register().size();
        let value = if instruction.op1_kind() == OpKind::Register {
            self.register(instruction.op1_register())
        } else {
            let mut bytes = [0u8; 8];
            self.read(self.address(instruction)?, &mut bytes[..size])?;
            u64::from_le_bytes(bytes)
        };
        let bits = u64::from((value & mask(size)).count_ones());
        let target = instruction.op0_register();
        let old = self.register(target.full_register());
        // A 32-bit result clears the upper half, a 16-bit one keeps the rest.
        let merged = if size == 2 { old & !0xffff | bits } else { bits };
        self.set_register(target, merged);
        self.regs.rflags &= !RFLAGS_ARITHMETIC;
        if bits == 0 {
            self.regs.rflags |= RFLAGS_ZF;
        }
        Ok(())
    }

    fn cmpxchg16b(&mut self, instruction: &Instruction) -> Result<(), Fault> {
        let address = self.address(instruction)?;
        let mut bytes = [0u8; 16];
        self.read_to_write(address, 16, &mut bytes)?;
        let low = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let high = u64::from_le_bytes(bytes[8..].try_into().expect("8 bytes"));
        if (low, high) == (self.regs.rax, self.regs.rdx) {
            bytes[..8].copy_from_slice(&self.regs.rbx.to_le_bytes());
            bytes[8..].copy_from_slice(&self.regs.rcx.to_le_bytes());
            self.regs.rflags |= RFLAGS_ZF;
            self.write(address, &bytes)
        } else {
            (self.regs.rax, self.regs.rdx) = (low, high);
            self.regs.rflags &= !RFLAGS_ZF;
            Ok(())
        }
    }

    /// Requested-feature bitmap: EDX:EAX, limited to what XCR0 enables (SDM vol. 1, 13.3).
    fn requested_features(&self) -> Result<u64, EmulateError> {
        let asked = (self.regs.rdx & 0xffff_ffff) << 32 | self.regs.rax & 0xffff_ffff;
        Ok(asked & self.enabled_features()?)
    }

    /// What XCR0 enables.
    fn enabled_features(&self) -> Result<u64, EmulateError> {
        if self.sregs.cr4 & CR4_OSXSAVE == 0 {
            return Ok(area::X87 | area::SSE);
        }
        Ok(call("KVM_GET_XCRS", self.fd.get_xcrs())?.xcrs[0].value)
    }

    fn xsave(&mut self, instruction: &Instruction) -> Result<(), Fault> {
        let address = self.address(instruction)?;
        let requested = self.requested_features()?;
        let image = self.get_xsave()?;
        let image = image.as_bytes();
        let length = area_length(requested);
        let mut target = vec![0u8; length];
        self.read_to_write(address, 64, &mut target)?;
        if requested & area::X87 != 0 {
            target[..24].copy_from_slice(&image[..24]);
            target[32..160].copy_from_slice(&image[32..160]);
        }
        if requested & area::SSE != 0 {
            target[160..area::FXSAVE_LEN].copy_from_slice(&image[160..area::FXSAVE_LEN]);
        }
        if requested & (area::SSE | area::AVX) != 0 {
            target[area::MXCSR].copy_from_slice(&image[area::MXCSR]);
        }
        for (_, range) in area::extended()
            .iter()
            .filter(|(bit, _)| requested >> bit & 1 != 0)
        {
            target[range.clone()].copy_from_slice(&image[range.clone()]);
        }
        let in_use = read_bv(&target) & !requested | read_bv(image) & requested;
        target[area::XSTATE_BV].copy_from_slice(&in_use.to_le_bytes());
        self.write(address, &target)
    }

    fn xrstor(&mut self, instruction: &Instruction) -> Result<(), Fault> {
        let address = self.address(instruction)?;
        let requested = self.requested_features()?;
        let mut source = vec![0u8; area_length(requested)];
        self.read(address, &mut source)?;
        let present = read_bv(&source);
        let enabled = self.enabled_features()?;
        // SDM vol. 1, 13.8: the compacted format is for guests that were told of XSAVEC, which these are not.
        let header_is_clean = source[area::XCOMP_BV.start..area::HEADER_END]
            .iter()
            .all(|&byte| byte == 0);
        if !address.is_multiple_of(64) || !header_is_clean || present & !enabled != 0 {
            return Err(Fault::GeneralProtection);
        }
        if requested & (area::SSE | area::AVX) != 0 {
            self.check_mxcsr(&source)?;
        }
        self.change_xsave(|image| {
            let load = requested & present;
            if load & area::X87 != 0 {
                image[..24].copy_from_slice(&source[..24]);
                image[32..160].copy_from_slice(&source[32..160]);
            }
            if load & area::SSE != 0 {
                image[160..area::FXSAVE_LEN].copy_from_slice(&source[160..area::FXSAVE_LEN]);
            }
            if requested & (area::SSE | area::AVX) != 0 {
                image[24..28].copy_from_slice(&source[24..28]);
            }
            for (_, range) in area::extended().iter().filter(|(bit, _)| load >> bit & 1 != 0) {
                image[range.clone()].copy_from_slice(&source[range.clone()]);
            }
            clear_bv(image, requested & !present);
            set_bv(image, load);
        })
    }

    fn get_xsave(&self) -> Result<kvm_xsave, EmulateError> {
        call("KVM_GET_XSAVE", self.fd.get_xsave())
    }

    fn change_xsave(&mut self, change: impl FnOnce(&mut [u8])) -> Result<(), Fault> {
        let mut bytes = self.get_xsave()?.as_bytes().to_vec();
        change(&mut bytes);
        let image = kvm_xsave::read_from_bytes(&bytes).expect("the bytes of a kvm_xsave");
        // SAFETY: KVM reads the 4096 bytes of `struct kvm_xsave`; more only after arch_prctl, which is never called.
        match unsafe { self.fd.set_xsave(&image) } {
            // The guest asked for a state that no CPU can be in.
            Err(error) if error.errno() == libc::EINVAL => Err(Fault::GeneralProtection),
            result => Ok(call("KVM_SET_XSAVE", result)?),
        }
    }

    /// Reserved bits of MXCSR cannot be set (SDM vol. 1, 11.6.6).
    fn check_mxcsr(&self, legacy: &[u8]) -> Result<(), Fault> {
        const DEFAULT_MASK: u32 = 0xffbf;
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
        let image = self.get_xsave()?;
        let mask = match word(&image.as_bytes()[28..32]) {
            0 => DEFAULT_MASK,
            mask => mask,
        };
        if word(&legacy[24..28]) & !mask == 0 {
            Ok(())
        } else {
            Err(Fault::GeneralProtection)
        }
    }

    fn address(&self, instruction: &Instruction) -> Result<u64, EmulateError> {
        let operand = (0..instruction.op_count()).find(|&op| instruction.op_kind(op) == OpKind::Memory);
        operand
            .and_then(|op| instruction.virtual_address(op, 0, |register, _, _| Some(self.register(register))))
            .ok_or(EmulateError::Fetch { rip: self.regs.rip })
    }

    /// Calls `access` for each page piece of a guest linear range, as (guest physical, offset in the range, length).
    fn pieces(
        &self,
        address: u64,
        length: usize,
        write: bool,
        mut access: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), vm_memory::GuestMemoryError>,
    ) -> Result<(), Fault> {
        let mut done = 0;
        while done < length {
            let linear = address.wrapping_add(done as u64);
            let piece = usize::try_from(PAGE - linear % PAGE)
                .unwrap_or(length)
                .min(length - done);
            let physical = paging::translate(self.memory, &self.sregs, self.regs.rflags, linear, write);
            let physical = physical.map_err(|denied| match denied {
                Denied::PageFault(code) => Fault::Page {
                    address: linear,
                    code,
                },
                Denied::Mode => EmulateError::Mode { rip: self.regs.rip }.into(),
            })?;
            access(physical, done..done + piece)?;
            done += piece;
        }
        Ok(())
    }

    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Fault> {
        self.pieces(address, data.len(), false, |at, range| {
            self.memory.mmap().read_slice(&mut data[range], at)
        })
    }

    /// Reads what is about to be written back: faults as the write would, before anything has changed.
    fn read_to_write(&self, address: u64, alignment: u64, data: &mut [u8]) -> Result<(), Fault> {
        if !address.is_multiple_of(alignment) {
            return Err(Fault::GeneralProtection);
        }
        self.pieces(address, data.len(), true, |at, range| {
            self.memory.mmap().read_slice(&mut data[range], at)
        })
    }

    fn write(&self, address: u64, data: &[u8]) -> Result<(), Fault> {
        self.pieces(address, data.len(), true, |at, range| {
            self.memory.mmap().write_slice(&data[range], at)
        })
    }

    fn register(&self, register: Register) -> u64 {
        let r = &self.regs;
        let full = match register.full_register() {
            Register::RAX => r.rax,
            Register::RCX => r.rcx,
            Register::RDX => r.rdx,
            Register::RBX => r.rbx,
            Register::RSP => r.rsp,
            Register::RBP => r.rbp,
            Register::RSI => r.rsi,
            Register::RDI => r.rdi,
            Register::R8 => r.r8,
            Register::R9 => r.r9,
            Register::R10 => r.r10,
            Register::R11 => r.r11,
            Register::R12 => r.r12,
            Register::R13 => r.r13,
            Register::R14 => r.r14,
            Register::R15 => r.r15,
            // As iced asks for them: the base that segmentation adds. Flat in long mode but for FS and GS.
            Register::FS => self.sregs.fs.base,
            Register::GS => self.sregs.gs.base,
            _ => 0,
        };
        full & if register.is_gpr() {
            mask(register.size())
        } else {
            u64::MAX
        }
    }

    fn set_register(&mut self, register: Register, value: u64) {
        let r = &mut self.regs;
        let slot = match register.full_register() {
            Register::RAX => &mut r.rax,
            Register::RCX => &mut r.rcx,
            Register::RDX => &mut r.rdx,
            Register::RBX => &mut r.rbx,
            Register::RSP => &mut r.rsp,
            Register::RBP => &mut r.rbp,
            Register::RSI => &mut r.rsi,
            Register::RDI => &mut r.rdi,
            Register::R8 => &mut r.r8,
            Register::R9 => &mut r.r9,
            Register::R10 => &mut r.r10,
            Register::R11 => &mut r.r11,
            Register::R12 => &mut r.r12,
            Register::R13 => &mut r.r13,
            Register::R14 => &mut r.r14,
            _ => &mut r.r15,
        };
        *slot = value;
    }
}

fn mask(bytes: usize) -> u64 {
    if bytes >= 8 {
        u64::MAX
    } else {
        (1 << (bytes * 8)) - 1
    }
}

/// How much of the area the requested features reach into.
fn area_length(requested: u64) -> usize {
    area::extended()
        .iter()
        .filter(|(bit, _)| requested >> bit & 1 != 0)
        .map(|(_, range)| range.end)
        .max()
        .unwrap_or(area::HEADER_END)
}

fn read_bv(image: &[u8]) -> u64 {
    u64::from_le_bytes(image[area::XSTATE_BV].try_into().expect("8 bytes"))
}

fn set_bv(image: &mut [u8], bits: u64) {
    let value = read_bv(image) | bits;
    image[area::XSTATE_BV].copy_from_slice(&value.to_le_bytes());
}

fn clear_bv(image: &mut [u8], bits: u64) {
    let value = read_bv(image) & !bits;
    image[area::XSTATE_BV].copy_from_slice(&value.to_le_bytes());
}
