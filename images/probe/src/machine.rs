//! The bare machine: ports, time, memory, and what the VMM said about it. Identity-mapped, ring 3, one CPU, no interrupts.

use core::arch::asm;
use core::arch::x86_64::_rdtsc;
use core::fmt::{self, Write};
use core::ptr::{addr_of, addr_of_mut};

use probe::PAGE_SIZE;
use probe::pace::{Frequency, Ticks};
use probe::page::Page;
use probe::ranges::{GuestAddress, Ranges};
use probe::text::Lines;
use probe::worker::Memory;

core::arch::global_asm!(include_str!("boot.s"), options(att_syntax));

const SERIAL_DATA: u16 = 0x3f8;
const SERIAL_FIFO_CONTROL: u16 = 0x3fa;
const SERIAL_LINE_STATUS: u16 = 0x3fd;
const SERIAL_TRANSMITTER_EMPTY: u8 = 0x20;
const SERIAL_FIFO_SIZE: u8 = 16;

const EXIT_STATUS: u16 = 0x6f0;
const ACPI_SLEEP_CONTROL: u16 = 0x600;
/// Sleep type 5, sleep enable.
const ACPI_SOFT_OFF: u8 = 0x34;
const KEYBOARD_CONTROLLER: u16 = 0x64;
const KEYBOARD_CONTROLLER_RESET: u8 = 0xfe;

const GIB: u64 = 1 << 30;
/// How much guest physical address space can be mapped: one page directory per GiB, set aside here.
const MAX_GIB: usize = 64;
/// The part that boot.s maps.
const BOOT_GIB: usize = 1;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const PRESENT_WRITABLE_USER: u64 = 0x7;
const LARGE_PAGE: u64 = 0x80;

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

/// KVM's `pvclock_vcpu_time_info` (Documentation/virt/kvm/x86/msr.rst).
#[repr(C)]
struct PvClock {
    version: u32,
    pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
}

#[repr(C, align(4096))]
struct Directory([u64; 512]);

/// One page directory for each GiB above what boot.s maps.
static mut DIRECTORIES: [Directory; MAX_GIB - BOOT_GIB] = [const { Directory([0; 512]) }; MAX_GIB - BOOT_GIB];

unsafe extern "C" {
    static mut directory_pointers: [u64; 512];
    static mut idt: [[u64; 2]; EXCEPTIONS];
    static exception_stubs: u8;
    static boot_facts: BootFacts;
    static pvclock: PvClock;
    static image_end: u8;
}

/// The TSC.
#[inline(always)]
pub fn now() -> Ticks {
    // SAFETY: RDTSC only reads a counter; CR4.TSD is clear, so ring 3 may.
    Ticks(unsafe { _rdtsc() })
}

fn write_port(port: u16, value: u8) {
    // SAFETY: port I/O is to the VMM's devices, none of which writes to our memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

fn read_port(port: u16) -> u8 {
    let value;
    // SAFETY: as in `write_port`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a line at once, waiting for every byte: before the main loop, and when all is lost.
pub fn say(line: fmt::Arguments<'_>) {
    struct Serial;
    impl Write for Serial {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            for byte in text.bytes() {
                while read_port(SERIAL_LINE_STATUS) & SERIAL_TRANSMITTER_EMPTY == 0 {}
                write_port(SERIAL_DATA, byte);
            }
            Ok(())
        }
    }
    // `Serial` never fails, and there is nowhere else to complain.
    let _ = Serial.write_fmt(line).and_then(|()| Serial.write_char('\n'));
}

/// The serial port as the main loop uses it: at most one access per iteration.
#[derive(Debug, Default)]
pub struct Console {
    fifo_enabled: bool,
    /// Bytes that the port takes before its status must be asked again.
    room: u8,
}

impl Console {
    /// Does one port access, if there is anything to send.
    pub fn pump(&mut self, lines: &mut Lines) {
        if lines.is_empty() {
            return;
        }
        if !self.fifo_enabled {
            write_port(SERIAL_FIFO_CONTROL, 1);
            self.fifo_enabled = true;
        } else if self.room == 0 {
            let empty = read_port(SERIAL_LINE_STATUS) & SERIAL_TRANSMITTER_EMPTY != 0;
            self.room = if empty { SERIAL_FIFO_SIZE } else { 0 };
        } else if let Some(byte) = lines.pop() {
            write_port(SERIAL_DATA, byte);
            self.room -= 1;
        }
    }
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
    let mut stub = addr_of!(exception_stubs).addr() as u64;
    for vector in 0..EXCEPTIONS {
        let low = (stub & 0xffff) | (RING0_CODE << 16) | (INTERRUPT_GATE << 32) | ((stub >> 16 & 0xffff) << 48);
        // SAFETY: in bounds, and only this CPU uses the table.
        unsafe { addr_of_mut!(idt[vector]).write([low, stub >> 32]) };
        stub += EXCEPTION_STUB_SIZE;
    }
}

/// The TSC frequency that the hypervisor gives, if it does.
pub fn tsc_frequency() -> Option<Frequency> {
    // SAFETY: boot.s wrote these before this function could run, and nothing writes them again.
    let (tsc_khz, kvm_clock) = unsafe { (addr_of!(boot_facts.tsc_khz).read(), addr_of!(boot_facts.kvm_clock).read()) };
    if tsc_khz > 0 || kvm_clock == 0 {
        return Frequency::from_khz(tsc_khz);
    }
    // SAFETY: KVM filled the structure when boot.s enabled it. Its scale only changes when the VM is moved to a host with
    // another TSC frequency; volatile, because KVM is the one who writes it.
    let (multiplier, shift) =
        unsafe { (addr_of!(pvclock.tsc_to_system_mul).read_volatile(), addr_of!(pvclock.tsc_shift).read_volatile()) };
    Frequency::from_pvclock(multiplier, shift)
}

/// Xen's `hvm_start_info`, version 1 (xen/include/public/arch-x86/hvm/start_info.h).
#[repr(C)]
struct HvmStartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

const START_INFO_MAGIC: u32 = 0x336e_c578;
const KIND_RAM: u32 = 1;
const MAX_MAP_ENTRIES: u32 = 128;
const COMMAND_LINE_SIZE: usize = 2048;

/// What the VMM said, copied out of memory that the probe is about to overwrite.
pub struct StartInfo {
    command_line: [u8; COMMAND_LINE_SIZE],
    ranges: Ranges,
}

impl StartInfo {
    /// Reads it all. What lies above the first GiB is not mapped yet and is passed over.
    ///
    /// # Safety
    /// `address` must be where the VMM put its start info; the memory it leads to must not have been overwritten.
    pub unsafe fn read(address: u64) -> Self {
        let mut info = Self { command_line: [0; COMMAND_LINE_SIZE], ranges: Ranges::default() };
        // SAFETY: the caller's promise; mapped because it is checked to lie in the first GiB.
        let Some(start) = mapped::<HvmStartInfo>(address).map(|start| unsafe { start.read_unaligned() }) else {
            return info;
        };
        if start.magic != START_INFO_MAGIC {
            return info;
        }
        for (byte, source) in info.command_line.iter_mut().zip(start.command_line..) {
            // SAFETY: as above.
            let value = mapped::<u8>(source).map_or(0, |source| unsafe { source.read() });
            if start.command_line == 0 || value == 0 {
                break;
            }
            *byte = value;
        }
        let map_entries = if start.version >= 1 { start.memory_map_entries.min(MAX_MAP_ENTRIES) } else { 0 };
        let floor = GuestAddress(addr_of!(image_end).addr() as u64);
        let ceiling = GuestAddress(MAX_GIB as u64 * GIB);
        for index in 0..u64::from(map_entries) {
            let source = start.memory_map.saturating_add(index * size_of::<MemoryMapEntry>() as u64);
            // SAFETY: as above.
            let Some(entry) = mapped::<MemoryMapEntry>(source).map(|entry| unsafe { entry.read_unaligned() }) else {
                break;
            };
            if entry.kind == KIND_RAM {
                info.ranges.add(GuestAddress(entry.address), entry.size, floor, ceiling);
            }
        }
        info
    }

    /// The command line; empty if it is not UTF-8.
    pub fn command_line(&self) -> &str {
        let length = self.command_line.iter().position(|&byte| byte == 0).unwrap_or(COMMAND_LINE_SIZE);
        str::from_utf8(&self.command_line[..length]).unwrap_or("")
    }

    /// RAM above the probe itself.
    pub fn ranges(&self) -> Ranges {
        self.ranges
    }
}

/// A pointer to what lies at `address`, if boot.s has mapped it.
fn mapped<T>(address: u64) -> Option<*const T> {
    let end = address.checked_add(size_of::<T>() as u64)?;
    let address = usize::try_from(address).ok()?;
    (address > 0 && end <= BOOT_GIB as u64 * GIB).then(|| core::ptr::with_exposed_provenance(address))
}

/// RAM above the probe itself, mapped.
#[derive(Debug)]
pub struct Ram {
    ranges: Ranges,
}

impl Ram {
    /// Maps what boot.s has not. Page tables are memory like any other, and nothing that is mapped changes, so ring 3 can do it.
    pub fn map(ranges: Ranges) -> Self {
        let end = ranges.end().0;
        for gib in BOOT_GIB..MAX_GIB {
            let base = gib as u64 * GIB;
            if base >= end {
                break;
            }
            // SAFETY: only this function uses the directories, once, on the only CPU; `gib` is in bounds. The entry that makes
            // the CPU see a directory is written after the directory.
            unsafe {
                let directory = addr_of_mut!(DIRECTORIES[gib - BOOT_GIB]);
                for (entry, frame) in (*directory).0.iter_mut().zip((base..).step_by(LARGE_PAGE_SIZE as usize)) {
                    *entry = frame | LARGE_PAGE | PRESENT_WRITABLE_USER;
                }
                addr_of_mut!(directory_pointers[gib]).write_volatile(directory.addr() as u64 | PRESENT_WRITABLE_USER);
            }
        }
        Self { ranges }
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.ranges.pages()
    }
}

impl Memory for Ram {
    fn page(&mut self, number: u64) -> (GuestAddress, &mut Page) {
        let address = self.ranges.address(number).expect("numbers stay below what main checked against Ram::pages");
        debug_assert_eq!(address.0 % PAGE_SIZE, 0);
        let page = core::ptr::with_exposed_provenance_mut(address.0 as usize);
        // SAFETY: a page of RAM above the probe's own image, mapped by boot.s or `map`, of which nobody else knows; `&mut self`
        // keeps it the only reference.
        (address, unsafe { &mut *page })
    }
}
