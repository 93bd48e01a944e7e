//! Guest memory, identity-mapped for ring 3.

use core::ptr::{addr_of, addr_of_mut};

use probe::page::Page;
use probe::ranges::{GuestAddress, Ranges};
use probe::worker::Memory;

const GIB: u64 = 1 << 30;
/// How much guest physical address space can be mapped: one page directory per GiB, set aside here.
const MAX_GIB: usize = 64;
/// The part that boot.s maps.
const BOOT_GIB: usize = 1;
const LARGE_PAGE_SIZE: usize = 2 << 20;
const PRESENT_WRITABLE_USER: u64 = 0x7;
const LARGE_PAGE: u64 = 0x80;

#[repr(C, align(4096))]
struct Directory([u64; 512]);

/// One page directory for each GiB above what boot.s maps.
static mut DIRECTORIES: [Directory; MAX_GIB - BOOT_GIB] = [const { Directory([0; 512]) }; MAX_GIB - BOOT_GIB];

unsafe extern "C" {
    static mut directory_pointers: [u64; 512];
    static image_end: u8;
}

/// The first address above the probe itself.
pub fn floor() -> GuestAddress {
    GuestAddress(addr_of!(image_end).addr() as u64)
}

/// The end of what can be mapped.
pub fn ceiling() -> GuestAddress {
    GuestAddress(MAX_GIB as u64 * GIB)
}

/// A pointer to what lies at `address`, if boot.s has mapped it.
pub fn mapped<T>(address: u64) -> Option<*const T> {
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
                let frames = (base..).step_by(LARGE_PAGE_SIZE);
                for (entry, frame) in (*directory).0.iter_mut().zip(frames) {
                    *entry = frame | LARGE_PAGE | PRESENT_WRITABLE_USER;
                }
                addr_of_mut!(directory_pointers[gib])
                    .write_volatile(directory.addr() as u64 | PRESENT_WRITABLE_USER);
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
        let address = self.ranges.address(number);
        let address = address.expect("main has compared the pages asked for with Ram::pages");
        let pointer = usize::try_from(address.0).expect("mapped addresses are below `ceiling`");
        let page = core::ptr::with_exposed_provenance_mut(pointer);
        // SAFETY: a page of RAM above the probe's own image, mapped by boot.s or `map`, of which nobody else knows; `&mut self`
        // keeps it the only reference.
        (address, unsafe { &mut *page })
    }
}
