//! Guest physical address map and I/O ports.
//!
//! Below 1 MiB, from low to high: GDT, boot_params or hvm_start_info, page tables, command line, ACPI tables. RAM ends at
//! 3 GiB and goes on at 4 GiB; the hole holds the I/O APIC, the local APIC and the pages KVM wants for itself.

use vm_memory::GuestAddress;

/// Boot GDT.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `struct hvm_start_info` (PVH).
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// Module list of PVH.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6040);
/// Memory map of PVH.
pub const PVH_MEMMAP: GuestAddress = GuestAddress(0x6100);
/// `struct boot_params` ("zero page", Linux).
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Boot stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Identity page tables: PML4, PDPT, then four page directories.
pub const PML4: GuestAddress = GuestAddress(0x9000);
/// Page directory pointer table.
pub const PDPT: GuestAddress = GuestAddress(0xa000);
/// First page directory.
pub const PAGE_DIRECTORIES: GuestAddress = GuestAddress(0xb000);
/// Kernel command line.
pub const CMDLINE: GuestAddress = GuestAddress(0x20000);
/// End of conventional memory as told to the guest.
pub const LOW_MEMORY_END: u64 = 0x9fc00;
/// ACPI tables, from the RSDP on, in the legacy BIOS area that guests scan.
pub const ACPI_RSDP: GuestAddress = GuestAddress(0xe0000);
/// Where kernels may be loaded, and "high memory" in the boot protocols begins.
pub const HIGH_MEMORY_START: GuestAddress = GuestAddress(0x10_0000);

/// RAM below the 32-bit hole, at most.
pub const LOW_RAM_LIMIT: u64 = 3 << 30;
/// Where the RAM that did not fit below goes on.
pub const HIGH_RAM_START: u64 = 4 << 30;
/// I/O APIC registers (KVM's in-kernel irqchip).
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Page for KVM's identity map (Intel without unrestricted guest).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's TSS (same).
pub const KVM_TSS: usize = 0xfffb_d000;

/// First serial port (16550A), eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Interrupt line of the serial port.
pub const SERIAL_IRQ: u32 = 4;
/// Keyboard controller command port; 0xfe written here resets the machine.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// ACPI sleep control register: `SLP_TYP << 2 | SLP_EN`.
pub const ACPI_SLEEP_PORT: u16 = 0x600;
/// ACPI reset register.
pub const ACPI_RESET_PORT: u16 = 0x601;
/// One byte written here is the workload's exit status; the VM goes on.
pub const EXIT_STATUS_PORT: u16 = 0x6f0;
/// Four bytes written here are microseconds in which the guest saw no time pass.
pub const GUEST_GAP_PORT: u16 = 0x6f4;
/// ASCII bytes written here say why the guest fails; a newline ends the VM.
pub const LAST_WORDS_PORT: u16 = 0x6f8;
