//! Guest linear addresses to guest physical ones, with the permissions that the guest's own page tables give.
//!
//! KVM_TRANSLATE answers where an address lies but not whether it may be written, and a VMM that completes a store for the
//! guest must fault where the CPU would: a read-only page may be a file's, or shared by copy-on-write. Source: Intel SDM
//! vol. 3A, 4.5 (4-level and 5-level paging) and 4.6 (access rights).

use std::sync::atomic::{AtomicU64, Ordering};

use kvm_bindings::kvm_sregs;
use vm_memory::bitmap::Bitmap as _;
use vm_memory::{GuestAddress, GuestMemoryBackend as _};

use crate::memory::GuestMemory;

const CR0_PG: u64 = 1 << 31;
const CR0_WP: u64 = 1 << 16;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_AC: u64 = 1 << 18;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const ENTRY_LEN: u64 = 8;

/// Page-fault error code bits (SDM vol. 3A, 4.7).
const ERROR_PRESENT: u32 = 1;
const ERROR_WRITE: u32 = 1 << 1;
const ERROR_USER: u32 = 1 << 2;

/// Why an address cannot be accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// The guest gets a page fault with this error code.
    PageFault(u32),
    /// A paging mode that no 64-bit guest uses in ring 0 after boot.
    Mode,
}

/// The guest physical address of `linear` for a data access of the present privilege level. Sets accessed and dirty bits
/// as the CPU does.
///
/// # Errors
/// What the guest's tables say against it.
pub fn translate(
    memory: &GuestMemory,
    sregs: &kvm_sregs,
    rflags: u64,
    linear: u64,
    write: bool,
) -> Result<GuestAddress, Denied> {
    if sregs.cr0 & CR0_PG == 0 {
        return Ok(GuestAddress(linear));
    }
    if sregs.efer & EFER_LMA == 0 {
        return Err(Denied::Mode);
    }
    let user = sregs.ss.dpl == 3;
    let mut code = if write { ERROR_WRITE } else { 0 } | if user { ERROR_USER } else { 0 };
    let mut table = sregs.cr3 & ADDRESS;
    let mut rights = WRITABLE | USER;
    let mut path: Vec<(GuestAddress, u64)> = Vec::with_capacity(5);
    let levels = if sregs.cr4 & CR4_LA57 == 0 { 4u32 } else { 5 };
    let mut level = levels;
    let physical = loop {
        let shift = 12 + 9 * (level - 1);
        let at = GuestAddress(table + (linear >> shift & 0x1ff) * ENTRY_LEN);
        let entry = entry(memory, at).map_or(0, |(entry, _)| entry.load(Ordering::SeqCst));
        if entry & PRESENT == 0 {
            return Err(Denied::PageFault(code));
        }
        rights &= entry;
        path.push((at, entry));
        if level == 1 || (level <= 3 && entry & LARGE != 0) {
            let offset = (1u64 << shift) - 1;
            break (entry & ADDRESS & !offset) | linear & offset;
        }
        table = entry & ADDRESS;
        level -= 1;
    };
    code |= ERROR_PRESENT;
    let readable = if user {
        rights & USER != 0
    } else {
        rights & USER == 0 || sregs.cr4 & CR4_SMAP == 0 || rflags & RFLAGS_AC != 0
    };
    let writable = rights & WRITABLE != 0 || (!user && sregs.cr0 & CR0_WP == 0);
    if !readable || (write && !writable) {
        return Err(Denied::PageFault(code));
    }
    let leaf = path.len() - 1;
    for (index, (at, seen)) in path.into_iter().enumerate() {
        let wanted = ACCESSED | if write && index == leaf { DIRTY } else { 0 };
        if seen & wanted != wanted
            && let Some((entry, mark)) = entry(memory, at)
        {
            entry.fetch_or(wanted, Ordering::SeqCst);
            mark();
        }
    }
    Ok(GuestAddress(physical))
}

/// A page table entry in guest memory, and how to mark its page as written by the VMM.
fn entry(memory: &GuestMemory, at: GuestAddress) -> Option<(&AtomicU64, impl Fn())> {
    let length = usize::try_from(ENTRY_LEN).expect("eight");
    let host = memory.host_range(at, ENTRY_LEN)?;
    let slice = memory.mmap().get_slice(at, length).ok()?;
    // SAFETY: host_range says that the eight bytes lie within guest memory, which lives as long as `memory`; entries are
    // eight-byte aligned, and everybody accesses them atomically (the guest's CPU does).
    let entry = unsafe { AtomicU64::from_ptr(host.cast()) };
    Some((entry, move || slice.bitmap().mark_dirty(0, length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    const PML4: u64 = 0x1000;
    const PAGE: u64 = 0x40_0000;

    fn guest(leaf_rights: u64) -> (GuestMemory, kvm_sregs) {
        let memory = GuestMemory::new(8 << 20).expect("map");
        let set = |at: u64, value: u64| memory.mmap().write_obj(value, GuestAddress(at)).expect("inside");
        set(PML4, 0x2000 | PRESENT | WRITABLE | USER);
        set(0x2000, 0x3000 | PRESENT | WRITABLE | USER);
        set(0x3000 + 8 * (PAGE >> 21), 0x4000 | PRESENT | WRITABLE | USER);
        set(0x4000, 0x5000 | leaf_rights);
        let mut sregs = kvm_sregs {
            cr0: CR0_PG | CR0_WP,
            cr3: PML4,
            efer: EFER_LMA,
            ..Default::default()
        };
        sregs.ss.dpl = 0;
        (memory, sregs)
    }

    #[test]
    fn a_read_only_page_is_read_and_not_written() {
        let (memory, sregs) = guest(PRESENT | USER);
        assert_eq!(
            translate(&memory, &sregs, 0, PAGE + 5, false),
            Ok(GuestAddress(0x5005))
        );
        let denied = Err(Denied::PageFault(ERROR_PRESENT | ERROR_WRITE));
        assert_eq!(translate(&memory, &sregs, 0, PAGE + 5, true), denied);
        let without_wp = kvm_sregs { cr0: CR0_PG, ..sregs };
        assert!(translate(&memory, &without_wp, 0, PAGE, true).is_ok());
    }

    #[test]
    fn a_user_access_needs_a_user_page() {
        let (memory, mut sregs) = guest(PRESENT | WRITABLE);
        assert!(translate(&memory, &sregs, 0, PAGE, true).is_ok());
        sregs.ss.dpl = 3;
        let denied = Err(Denied::PageFault(ERROR_PRESENT | ERROR_USER));
        assert_eq!(translate(&memory, &sregs, 0, PAGE, false), denied);
    }

    #[test]
    fn smap_keeps_the_kernel_from_user_pages_unless_it_asks() {
        let (memory, mut sregs) = guest(PRESENT | WRITABLE | USER);
        sregs.cr4 |= CR4_SMAP;
        assert!(translate(&memory, &sregs, 0, PAGE, false).is_err());
        assert!(translate(&memory, &sregs, RFLAGS_AC, PAGE, false).is_ok());
    }

    #[test]
    fn what_is_not_mapped_faults_without_the_present_bit() {
        let (memory, sregs) = guest(0);
        assert_eq!(
            translate(&memory, &sregs, 0, PAGE, true),
            Err(Denied::PageFault(ERROR_WRITE))
        );
        let nowhere = kvm_sregs {
            cr3: 1 << 40,
            ..sregs
        };
        assert_eq!(
            translate(&memory, &nowhere, 0, PAGE, false),
            Err(Denied::PageFault(0))
        );
    }

    #[test]
    fn a_write_leaves_the_dirty_bit_and_is_tracked() {
        let (memory, sregs) = guest(PRESENT | WRITABLE);
        let _ = memory.take_vmm_dirty(0);
        translate(&memory, &sregs, 0, PAGE, true).expect("writable");
        let leaf: u64 = memory.mmap().read_obj(GuestAddress(0x4000)).expect("inside");
        assert_eq!(leaf & (ACCESSED | DIRTY), ACCESSED | DIRTY);
        assert_eq!(memory.take_vmm_dirty(0)[0] >> 4 & 1, 1);
    }
}
