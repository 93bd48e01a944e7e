//! The bare machine: ports, time, exceptions and power. Ring 3, one CPU, no interrupts.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;
use core::ptr::{addr_of, addr_of_mut};

use probe::clock::{KvmClock, Reading};
use probe::pace::{Frequency, Ticks};

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));

const EXIT_STATUS: u16 = 0x6f0;
/// Takes the microseconds for which the guest was away.
pub const GUEST_GAP: u16 = 0x6f4;
/// Takes the reason of a failure, up to a newline, which ends the VM.
const LAST_WORDS: u16 = 0x6f8;
const ACPI_SLEEP_CONTROL: u16 = 0x600;
/// Sleep type 5, sleep enable.
const ACPI_SOFT_OFF: u8 = 0x34;
const KEYBOARD_CONTROLLER: u16 = 0x64;
const KEYBOARD_CONTROLLER_RESET: u8 = 0xfe;

const EXCEPTIONS: usize = 32;
/// boot.s puts one exception entry in so many bytes.
const EXCEPTION_STUB_SIZE: u64 = 16;
const RING0_CODE: u64 = 0x08;
/// Present, ring 0, 64-bit interrupt gate.
const INTERRUPT_GATE: u64 = 0x8e00;

/// What ring 0 found out (boot.s: `boot_facts`).
#[repr(C)]
struct BootFacts {
    tsc_khz: u32,
    kvm_clock: u32,
}

unsafe extern "C" {
    static mut idt: [[u64; 2]; EXCEPTIONS];
    static exception_stubs: u8;
    static boot_facts: BootFacts;
    static mut pvclock: KvmClock;
}

/// The TSC.
#[inline(always)]
pub fn now() -> Ticks {
    // SAFETY: RDTSC only reads a counter; CR4.TSD is clear, so ring 3 may.
    Ticks(unsafe { _rdtsc() })
}

/// What KVM's clock says, if it is there; whether the VM was stopped is told once.
pub fn kvm_clock() -> Option<Reading> {
    // SAFETY: boot.s wrote it before this function could run, and nothing writes it again.
    if unsafe { addr_of!(boot_facts.kvm_clock).read() } == 0 {
        return None;
    }
    loop {
        // SAFETY: KVM writes the structure, between guest instructions; each field is read by itself, and the whole again
        // if its version says that KVM did so in between.
        let (before, clock, ticks, after) = unsafe {
            let version = addr_of!(pvclock.version);
            let before = version.read_volatile();
            let clock = addr_of!(pvclock).read_volatile();
            (before, clock, _rdtsc(), version.read_volatile())
        };
        if before != after || before & 1 != 0 {
            continue;
        }
        let reading = clock.at(Ticks(ticks));
        if reading.was_stopped {
            // SAFETY: as above; the guest is to clear the flag (msr.rst, bit 1).
            unsafe { addr_of_mut!(pvclock.flags).write_volatile(clock.flags & !KvmClock::STOPPED) };
        }
        return Some(reading);
    }
}

/// OUT of four bytes.
pub fn write_port_u32(port: u16, value: u32) {
    // SAFETY: as in `write_port`.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// OUT of one byte.
pub fn write_port(port: u16, value: u8) {
    // SAFETY: port I/O is to the VMM's devices, none of which writes to our memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// IN of one byte.
pub fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: as in `write_port`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Tells the VMM why the probe fails, which ends the VM.
pub fn fail(text: &str) -> ! {
    // In one instruction, as a guest may.
    // SAFETY: as in `write_port`; reads `text.len()` bytes of `text`, upwards, as the ABI leaves the direction flag clear.
    unsafe {
        asm!("rep outsb", in("dx") LAST_WORDS, inout("rsi") text.as_ptr() => _, inout("rcx") text.len() => _,
            options(readonly, nostack, preserves_flags));
    }
    write_port(LAST_WORDS, b'\n');
    power_off(0)
}

/// Reports the status and ends the VM, one way or another.
pub fn power_off(status: u8) -> ! {
    write_port(EXIT_STATUS, status);
    write_port(ACPI_SLEEP_CONTROL, ACPI_SOFT_OFF);
    write_port(KEYBOARD_CONTROLLER, KEYBOARD_CONTROLLER_RESET);
    // Neither exists here: an exception without any gates is a triple fault, which is a reset.
    // SAFETY: the IDT is ours alone (one CPU), and nothing runs after this.
    unsafe { addr_of_mut!(idt).write([[0; 2]; EXCEPTIONS]) };
    loop {
        // SAFETY: raises an exception; we mean to go no further.
        unsafe { asm!("ud2", options(nostack)) };
    }
}

/// Fills the IDT that boot.s has loaded, so that exceptions are reported.
pub fn catch_exceptions() {
    let stubs = addr_of!(exception_stubs).addr() as u64;
    let gates = core::array::from_fn(|vector| {
        let stub = stubs + vector as u64 * EXCEPTION_STUB_SIZE;
        let low =
            (stub & 0xffff) | (RING0_CODE << 16) | (INTERRUPT_GATE << 32) | ((stub >> 16 & 0xffff) << 48);
        [low, stub >> 32]
    });
    // SAFETY: the IDT is ours alone, as there is one CPU.
    unsafe { addr_of_mut!(idt).write(gates) };
}

/// The TSC frequency that the hypervisor gives, if it does.
pub fn tsc_frequency() -> Option<Frequency> {
    // SAFETY: boot.s wrote these before this function could run, and nothing writes them again.
    let (tsc_khz, kvm_clock) = unsafe {
        (
            addr_of!(boot_facts.tsc_khz).read(),
            addr_of!(boot_facts.kvm_clock).read(),
        )
    };
    if tsc_khz > 0 || kvm_clock == 0 {
        return Frequency::from_khz(tsc_khz);
    }
    // SAFETY: KVM filled the structure when boot.s enabled it. Its scale only changes when the VM is moved to a host with
    // another TSC frequency; volatile, because KVM is the one who writes it.
    let (multiplier, shift) = unsafe {
        (
            addr_of!(pvclock.tsc_to_system_mul).read_volatile(),
            addr_of!(pvclock.tsc_shift).read_volatile(),
        )
    };
    Frequency::from_pvclock(multiplier, shift)
}
