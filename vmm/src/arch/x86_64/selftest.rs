//! What this host's KVM can do, tried in a throw-away VM: whether it runs a guest's ring 0 in hardware or emulates it, and
//! whether it has all that a Linux kernel relies on whose own code runs in ring 3. The guest is `selftest/guest.s`.

use std::ffi::CStr;
use std::sync::OnceLock;
use std::time::Duration;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout};

use super::{layout, tables};
use crate::memory::{GuestMemory, MemoryError};
use crate::vcpu::{self, VcpuError};

core::arch::global_asm!(include_str!("selftest/guest.s"), options(att_syntax, raw));

// As in guest.s.
const KERNEL_BASE: u64 = 0xffff_ffff_8000_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const TASK: u64 = 0x6000;
const LOAD: u64 = 0x1_0000;
const KERNEL_CODE: u16 = 0x10;
const PORT_END: u16 = 0xf4;
const PORT_ECHO: u16 = 0xf5;
const END_OK: u8 = 0;
const END_EXCEPTION: u8 = 2;
const BRAND_LEAF: u32 = 0x8000_0002;
const BRAND: [u8; 16] = *b"shoal self-test ";
const VECTORS: u64 = 0x31;
/// Vectors that ring 3 may ask for by INT.
const OPEN_VECTORS: [u64; 2] = [3, 4];
const STUB_SIZE: u64 = 64;

const TASK_BASE: u64 = KERNEL_BASE + TASK;

/// Indexed by selector / 8; the task's descriptor takes the last two.
const SEGMENTS: [u64; 10] = [
    0,
    0,
    0x00af_9b00_0000_ffff, // ring 0 code, 64-bit
    0x00cf_9300_0000_ffff, // ring 0 data
    0,
    0x00cf_f300_0000_ffff, // ring 3 data
    0x00af_fb00_0000_ffff, // ring 3 code, 64-bit
    0,
    TASK_LIMIT | (TASK_BASE & 0xff_ffff) << 16 | 0x89 << 40 | ((TASK_BASE >> 24) & 0xff) << 56,
    TASK_BASE >> 32,
];
/// Interrupt gate, present: for ring 0, and for ring 3 as well.
const GATE: u64 = 0x8e00;
const OPEN_GATE: u64 = 0xee00;
/// Offsets in the task segment: the stack of ring 0, where the bitmap of ports begins, the bitmap.
const TASK_STACK: u64 = 4;
const TASK_BITMAP_AT: u64 = 102;
const TASK_BITMAP: u16 = 104;
const TASK_LIMIT: u64 = TASK_BITMAP as u64 + 8192;

const PRESENT_WRITABLE_USER: u64 = 7;
const UNCACHED: u64 = 0x10;
const LARGE: u64 = 0x80;

/// A guest that takes longer hangs. It needs a thousandth of this; a busy host may stop it for a while.
const TIME_LIMIT: Duration = Duration::from_secs(2);

/// What runs a guest's ring 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmKind {
    /// VT-x, AMD-V, or another hypervisor's offer of it.
    Hardware,
    /// KVM's instruction emulator; ring 3 runs natively.
    Software,
}

/// Whether a kernel whose own code runs in ring 3 can be used; if not, what failed, in words.
pub type Ring3Support = Result<(), String>;

/// What was found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelfTest {
    /// What runs ring 0.
    pub kind: KvmKind,
    /// Tried on either kind.
    pub ring3_kernel: Ring3Support,
    /// The ring in which SYSCALL arrives, if it came that far.
    pub syscall_ring: Option<u8>,
}

/// Why KVM could not be tried at all.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// A KVM call failed.
    #[error("self-test: {ioctl}: {source}")]
    Ioctl {
        /// The call.
        ioctl: &'static str,
        /// Its error.
        source: kvm_ioctls::Error,
    },
    /// Guest memory.
    #[error("self-test: {0}")]
    Memory(#[from] MemoryError),
    /// The guest does not fit its memory.
    #[error("self-test: {0}")]
    Layout(#[from] GuestMemoryError),
    /// The vCPU did not run.
    #[error("self-test: {0}")]
    Vcpu(#[from] VcpuError),
}

fn call<T>(ioctl: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, SelfTestError> {
    result.map_err(|source| SelfTestError::Ioctl { ioctl, source })
}

/// What the guest's image begins with, as guest.s lays it out. Addresses are offsets in the image.
#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    entry: u64,
    after_popcnt: u64,
    stubs: u64,
    ring0_stack_end: u64,
    brand: [u8; 16],
    check_name: u32,
    syscall_code: u32,
    event_vector: u64,
    event_error: u64,
    event_rip: u64,
    event_cr2: u64,
}

/// How the guest's run ended, if it ended.
enum End {
    Said(u8),
    InternalError,
    Shutdown,
    Unexpected(String),
}

/// Tries this host's KVM. Takes about 10 ms, most of them to make the VM.
///
/// # Errors
/// When there is no making a VM here. What KVM lacks is no error but the answer.
pub fn run(kvm: &Kvm) -> Result<SelfTest, SelfTestError> {
    run_changed(kvm, |_| Ok(()))
}

/// As [`run`], with a guest that tests may `change` first.
fn run_changed(
    kvm: &Kvm,
    change: impl FnOnce(&GuestMemory) -> Result<(), GuestMemoryError>,
) -> Result<SelfTest, SelfTestError> {
    let memory = GuestMemory::new(crate::spec::MIN_MEMORY)?;
    let header = write_guest(&memory)?;
    change(&memory)?;
    // After `memory`, so that they are dropped before it.
    let vm = call("KVM_CREATE_VM", kvm.create_vm())?;
    let mut vcpu = make_vcpu(kvm, &vm, &memory)?;
    let mut regs = kvm_regs {
        rip: linear(header.entry),
        rsp: linear(header.ring0_stack_end),
        rflags: 2,
        ..Default::default()
    };
    call("KVM_SET_REGS", vcpu.set_regs(&regs))?;

    let mut kind = KvmKind::Hardware;
    let mut end = run_guest(&mut vcpu)?;
    if matches!(end, Some(End::InternalError)) && call("KVM_GET_REGS", vcpu.get_regs())?.rip == regs.rip {
        kind = KvmKind::Software;
        regs.rip = linear(header.after_popcnt);
        call("KVM_SET_REGS", vcpu.set_regs(&regs))?;
        end = run_guest(&mut vcpu)?;
    }
    let header = read_header(&memory)?;
    // Null until SYSCALL has arrived; the lowest two bits of CS are the ring.
    let syscall_ring = (header.syscall_code != 0).then_some((header.syscall_code & 3) as u8);
    if syscall_ring == Some(3) {
        // No hardware does that, so the emulator has learned POPCNT.
        kind = KvmKind::Software;
    }
    let ring3_kernel = match end {
        Some(End::Said(END_OK)) => Ok(()),
        Some(End::Said(END_EXCEPTION)) => Err(exception(&header)),
        Some(End::Said(_)) => Err("another result than expected".to_owned()),
        Some(End::InternalError) => Err(vcpu::explain_internal_error(&mut vcpu)),
        Some(End::Shutdown) => Err("a triple fault".to_owned()),
        Some(End::Unexpected(exit)) => Err(format!("unexpected exit {exit}")),
        None => Err(format!("no end after {TIME_LIMIT:?}")),
    };
    Ok(SelfTest {
        kind,
        ring3_kernel: ring3_kernel.map_err(|how| format!("{}: {how}", check_name(&header))),
        syscall_ring,
    })
}

/// Whether KVM emulates kernel-mode instructions here. An error in the test itself counts as hardware: the ordinary case.
#[must_use]
pub fn is_software_kvm(kvm: &Kvm) -> bool {
    // Both ends of every migration ask, and making a VM takes long on a busy host.
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| match run(kvm) {
        Ok(found) => found.kind == KvmKind::Software,
        Err(error) => {
            tracing::warn!(%error, "the self-test of KVM failed; taking it for hardware KVM");
            false
        }
    })
}

/// Runs the guest to its end, which is none if it takes too long.
fn run_guest(vcpu: &mut VcpuFd) -> Result<Option<End>, VcpuError> {
    let mut echo = 0;
    vcpu::run_at_most(vcpu, TIME_LIMIT, |exit| {
        match exit {
            VcpuExit::IoOut(PORT_END, &[how]) => return Some(End::Said(how)),
            VcpuExit::IoOut(PORT_ECHO, &[byte]) => echo = byte,
            VcpuExit::IoIn(PORT_ECHO, data) => data.fill(!echo),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            VcpuExit::InternalError => return Some(End::InternalError),
            VcpuExit::Shutdown => return Some(End::Shutdown),
            other => return Some(End::Unexpected(format!("{other:?}"))),
        }
        None
    })
}

/// Where an offset in the guest's image is for the guest.
fn linear(offset: u64) -> u64 {
    KERNEL_BASE + LOAD + offset
}

/// The guest's image as it is linked into the VMM.
fn image() -> &'static [u8] {
    unsafe extern "C" {
        static shoal_self_test_start: u8;
        static shoal_self_test_end: u8;
    }
    // SAFETY: guest.s defines both, in this order in one read-only section, and everything between them is data.
    unsafe {
        let (start, end) = (&raw const shoal_self_test_start, &raw const shoal_self_test_end);
        std::slice::from_raw_parts(start, end.addr() - start.addr())
    }
}

fn read_header(memory: &GuestMemory) -> Result<Header, GuestMemoryError> {
    let mut header = Header::new_zeroed();
    memory
        .mmap()
        .read_slice(header.as_mut_bytes(), GuestAddress(LOAD))?;
    Ok(header)
}

/// The name of the check that the guest began last.
fn check_name(header: &Header) -> String {
    let name = image().get(header.check_name as usize..).unwrap_or_default();
    let name = CStr::from_bytes_until_nul(name).unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Writes the guest, and the tables that the CPU reads.
fn write_guest(memory: &GuestMemory) -> Result<Header, GuestMemoryError> {
    memory.mmap().write_slice(image(), GuestAddress(LOAD))?;
    let mut header = read_header(memory)?;
    header.brand = BRAND;
    memory.mmap().write_slice(header.as_bytes(), GuestAddress(LOAD))?;

    let set = |at: u64, value: u64| memory.mmap().write_obj(value, GuestAddress(at));
    // -2 GiB is entry 511 of 512, then entry 510. The second MiB pair stays unmapped, for page faults.
    set(PML4 + 511 * 8, PDPT | PRESENT_WRITABLE_USER)?;
    set(PDPT + 510 * 8, PAGE_DIRECTORY | PRESENT_WRITABLE_USER)?;
    set(PAGE_DIRECTORY, LARGE | PRESENT_WRITABLE_USER)?;
    let apic = u64::from(layout::LOCAL_APIC);
    set(
        PAGE_DIRECTORY + 16,
        apic | LARGE | UNCACHED | PRESENT_WRITABLE_USER,
    )?;

    for (at, descriptor) in (GDT..).step_by(8).zip(SEGMENTS) {
        set(at, descriptor)?;
    }
    for vector in 0..VECTORS {
        let stub = linear(header.stubs + vector * STUB_SIZE);
        let rights = if OPEN_VECTORS.contains(&vector) {
            OPEN_GATE
        } else {
            GATE
        };
        let low = stub & 0xffff | u64::from(KERNEL_CODE) << 16 | rights << 32 | (stub >> 16 & 0xffff) << 48;
        set(IDT + vector * 16, low)?;
        set(IDT + vector * 16 + 8, stub >> 32)?;
    }
    set(TASK + TASK_STACK, linear(header.ring0_stack_end))?;
    memory
        .mmap()
        .write_obj(TASK_BITMAP, GuestAddress(TASK + TASK_BITMAP_AT))?;
    // The bitmap itself is zeros; a byte of ones ends it.
    memory.mmap().write_obj(0xffu8, GuestAddress(TASK + TASK_LIMIT))?;
    Ok(header)
}

/// A vCPU in ring 0 and long mode, with the tables of [`write_guest`], and a name of ours in its CPUID.
fn make_vcpu(kvm: &Kvm, vm: &VmFd, memory: &GuestMemory) -> Result<VcpuFd, SelfTestError> {
    call("KVM_SET_TSS_ADDR", vm.set_tss_address(layout::KVM_TSS))?;
    call("KVM_CREATE_IRQCHIP", vm.create_irq_chip())?;
    memory.register(vm, false)?;
    let vcpu = call("KVM_CREATE_VCPU", vm.create_vcpu(0))?;

    let mut cpuid = call(
        "KVM_GET_SUPPORTED_CPUID",
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES),
    )?;
    let word = |index: usize| u32::from_le_bytes(BRAND[index..index + 4].try_into().expect("4 bytes"));
    for entry in cpuid.as_mut_slice() {
        if entry.function == BRAND_LEAF {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (word(0), word(4), word(8), word(12));
        }
    }
    call("KVM_SET_CPUID2", vcpu.set_cpuid2(&cpuid))?;

    let mut sregs = call("KVM_GET_SREGS", vcpu.get_sregs())?;
    tables::enter_long_mode(&mut sregs, GuestAddress(PML4));
    sregs.gdt.base = KERNEL_BASE + GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&SEGMENTS) - 1).expect("ten descriptors");
    call("KVM_SET_SREGS", vcpu.set_sregs(&sregs))?;
    Ok(vcpu)
}

/// What the guest noted of an exception that it did not expect.
fn exception(header: &Header) -> String {
    format!(
        "exception {} at {:#x}, error {:#x}, CR2 {:#x}",
        header.event_vector, header.event_rip, header.event_error, header.event_cr2
    )
}

#[cfg(test)]
mod tests;
