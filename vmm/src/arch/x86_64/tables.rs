//! The CPU state a boot protocol asks for: GDT, identity page tables, segment and control registers.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryError};

use super::layout;
use crate::memory::GuestMemory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;
const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const PAGE_DIRECTORY_COUNT: u64 = 4;

/// Selectors of the boot GDT; Linux's 64-bit protocol fixes 0x10 and 0x18.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TSS: u16 = 0x20;

const GDT_CODE_64: u64 = 0x00af_9b00_0000_ffff;
const GDT_CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const GDT_DATA: u64 = 0x00cf_9300_0000_ffff;
const GDT_TSS: u64 = 0x0000_8b00_0000_0067;

/// How the boot CPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BootMode {
    /// 64-bit Linux boot protocol: long mode, identity map of the first 4 GiB, `rsi` = boot_params.
    Linux64,
    /// PVH: 32-bit protected mode without paging, `ebx` = hvm_start_info.
    Pvh,
}

/// Registers of the boot CPU at `entry`, with `sregs` as KVM gave them to start from. Writes GDT and page tables.
///
/// # Errors
/// When guest memory is too small for the tables.
pub fn boot_registers(
    memory: &GuestMemory,
    mode: BootMode,
    entry: GuestAddress,
    mut sregs: kvm_sregs,
) -> Result<(kvm_regs, kvm_sregs), GuestMemoryError> {
    let code_descriptor = match mode {
        BootMode::Linux64 => GDT_CODE_64,
        BootMode::Pvh => GDT_CODE_32,
    };
    let gdt = [0, 0, code_descriptor, GDT_DATA, GDT_TSS];
    for (index, descriptor) in (0u64..).zip(gdt) {
        memory
            .mmap()
            .write_obj(descriptor, layout::GDT.unchecked_add(index * 8))?;
    }
    sregs.gdt.base = layout::GDT.raw_value();
    sregs.gdt.limit = u16::try_from(gdt.len() * 8 - 1).expect("five descriptors");
    sregs.idt.base = 0;
    sregs.idt.limit = 0;

    let mut regs = kvm_regs {
        rflags: RFLAGS_RESERVED,
        rip: entry.raw_value(),
        ..Default::default()
    };
    match mode {
        BootMode::Linux64 => {
            write_identity_map(memory)?;
            enter_long_mode(&mut sregs, layout::PML4);
            regs.rsp = layout::BOOT_STACK;
            regs.rbp = layout::BOOT_STACK;
            regs.rsi = layout::ZERO_PAGE.raw_value();
        }
        BootMode::Pvh => {
            set_flat_segments(&mut sregs, 0);
            sregs.cr4 = 0;
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.efer = 0;
            regs.rbx = layout::PVH_START_INFO.raw_value();
        }
    }
    Ok((regs, sregs))
}

/// Ring 0 in long mode with the page tables at `pml4`; its flat segments have the selectors 0x10 and 0x18.
pub fn enter_long_mode(sregs: &mut kvm_sregs, pml4: GuestAddress) {
    set_flat_segments(sregs, 1);
    sregs.cr3 = pml4.raw_value();
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
}

fn set_flat_segments(sregs: &mut kvm_sregs, long: u8) {
    let data = segment(DATA, 3, 0, 1);
    sregs.cs = segment(CODE, 11, long, 1 - long);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: TSS,
        type_: 11,
        present: 1,
        ..Default::default()
    };
}

fn segment(selector: u16, kind: u8, long: u8, default_big: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        l: long,
        db: default_big,
        g: 1,
        ..Default::default()
    }
}

/// Maps the first 4 GiB onto themselves in 2 MiB pages.
fn write_identity_map(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory
        .mmap()
        .write_obj(layout::PDPT.raw_value() | PRESENT_WRITABLE, layout::PML4)?;
    for directory in 0..PAGE_DIRECTORY_COUNT {
        let table = layout::PAGE_DIRECTORIES.unchecked_add(directory * 4096);
        memory.mmap().write_obj(
            table.raw_value() | PRESENT_WRITABLE,
            layout::PDPT.unchecked_add(directory * 8),
        )?;
        let entries: Vec<u8> = (0..512u64)
            .flat_map(|entry| ((directory << 30 | entry << 21) | PRESENT_WRITABLE | LARGE_PAGE).to_le_bytes())
            .collect();
        memory.mmap().write_slice(&entries, table)?;
    }
    Ok(())
}
