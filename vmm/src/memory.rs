//! Guest RAM: anonymous memory with transparent huge pages, one region below the 32-bit hole and one above it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
    GuestRegionMmap,
};

use crate::arch::layout::{HIGH_RAM_START, LOW_RAM_LIMIT};
use crate::spec::PAGE_SIZE;

/// Guest memory whose VMM-side writes are tracked in a bitmap (vCPU writes are tracked by KVM's dirty log).
pub type Mmap = GuestMemoryMmap<AtomicBitmap>;

/// One contiguous piece of guest RAM, and the KVM slot of the same index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// KVM memory slot.
    pub slot: u32,
    /// First guest physical address.
    pub start: GuestAddress,
    /// Length in bytes, whole pages.
    pub len: u64,
}

impl Region {
    /// Pages in the region.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.len / PAGE_SIZE
    }
}

/// Why guest memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host would not map that much.
    #[error("cannot map {bytes} bytes of guest memory: {source}")]
    Map {
        /// How much was asked for.
        bytes: u64,
        /// What the host said.
        source: vm_memory::mmap::FromRangesError,
    },
    /// KVM refused a memory slot.
    #[error("KVM_SET_USER_MEMORY_REGION for slot {slot}: {source}")]
    Slot {
        /// The slot.
        slot: u32,
        /// The ioctl's error.
        source: kvm_ioctls::Error,
    },
    /// /proc/self/pagemap could not be read.
    #[error("cannot read /proc/self/pagemap: {0}")]
    Pagemap(std::io::Error),
}

/// The guest's RAM.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    mmap: Mmap,
}

/// Where RAM of `memory_bytes` lies in guest physical address space.
#[must_use]
pub fn ram_ranges(memory_bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = memory_bytes.min(LOW_RAM_LIMIT);
    let mut ranges = vec![(GuestAddress(0), low)];
    if memory_bytes > low {
        ranges.push((GuestAddress(HIGH_RAM_START), memory_bytes - low));
    }
    ranges
}

impl GuestMemory {
    /// Maps `memory_bytes` of guest RAM. No page is touched.
    ///
    /// # Errors
    /// When the host cannot map it.
    pub fn new(memory_bytes: u64) -> Result<Self, MemoryError> {
        let ranges: Vec<_> = ram_ranges(memory_bytes)
            .into_iter()
            .map(|(start, len)| {
                (
                    start,
                    usize::try_from(len).expect("guest memory fits a 64-bit address space"),
                )
            })
            .collect();
        let mmap = Mmap::from_ranges(&ranges).map_err(|source| MemoryError::Map {
            bytes: memory_bytes,
            source,
        })?;
        for region in mmap.iter() {
            // SAFETY: the range is exactly one mapping that this process just made and owns; MADV_HUGEPAGE only
            // advises how it is backed and never changes its contents. A refusal (no THP in the kernel) is harmless.
            unsafe { libc::madvise(region.as_ptr().cast(), region_len(region), libc::MADV_HUGEPAGE) };
        }
        Ok(Self { mmap })
    }

    /// The vm-memory view, for device emulation and loaders.
    #[must_use]
    pub fn mmap(&self) -> &Mmap {
        &self.mmap
    }

    /// The regions in order of address; a region's index is its KVM slot.
    #[must_use]
    pub fn regions(&self) -> Vec<Region> {
        (0..)
            .zip(self.mmap.iter())
            .map(|(slot, region)| Region {
                slot,
                start: region.start_addr(),
                len: region.len(),
            })
            .collect()
    }

    /// Total bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.mmap.iter().map(|region| region.len()).sum()
    }

    /// Whether there is none (never, for a built VM).
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Host address of `len` bytes of guest RAM at `gpa`, if they lie within one region.
    #[must_use]
    pub fn host_range(&self, gpa: GuestAddress, len: u64) -> Option<*mut u8> {
        let region = self.mmap.find_region(gpa)?;
        let offset = gpa.unchecked_offset_from(region.start_addr());
        (len <= region.len() - offset).then(|| {
            let offset = usize::try_from(offset).expect("offset within a mapping");
            // SAFETY: find_region says that gpa lies in the region, so offset < its length: still inside the mapping.
            unsafe { region.as_ptr().add(offset) }
        })
    }

    /// Gives every region to KVM, with or without dirty logging.
    ///
    /// # Errors
    /// When KVM refuses a slot.
    pub fn register(&self, vm: &VmFd, log_dirty_pages: bool) -> Result<(), MemoryError> {
        for (region, slot) in self.mmap.iter().zip(0u32..) {
            let kvm_region = kvm_userspace_memory_region {
                slot,
                flags: if log_dirty_pages {
                    KVM_MEM_LOG_DIRTY_PAGES
                } else {
                    0
                },
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
            };
            // SAFETY: the mapping outlives the VM: `Vm` owns both and drops the VM descriptor first; regions do not
            // overlap in guest physical space (ram_ranges).
            unsafe { vm.set_user_memory_region(kvm_region) }
                .map_err(|source| MemoryError::Slot { slot, source })?;
        }
        Ok(())
    }

    /// Bitmap of the VMM's own writes to region `slot` since the last call, one bit a page.
    #[must_use]
    pub fn take_vmm_dirty(&self, slot: u32) -> Vec<u64> {
        let index = usize::try_from(slot).expect("u32 fits usize");
        self.mmap
            .iter()
            .nth(index)
            .map(|region| region.get_mmap().bitmap().get_and_reset())
            .unwrap_or_default()
    }

    /// Which of the pages `first..first + pages` of region `slot` the host has backed (present or swapped), one bit a
    /// page. All others have never been touched, and read as zeros. Source: Documentation/admin-guide/mm/pagemap.rst.
    ///
    /// # Errors
    /// When /proc/self/pagemap cannot be read.
    pub fn backed_pages(
        &self,
        pagemap: &File,
        slot: u32,
        first: u64,
        pages: u64,
    ) -> Result<Vec<u64>, MemoryError> {
        const ENTRY: u64 = 8;
        const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
        let index = usize::try_from(slot).expect("u32 fits usize");
        let Some(region) = self.mmap.iter().nth(index) else {
            return Ok(vec![]);
        };
        let pages = pages.min((region.len() / PAGE_SIZE).saturating_sub(first));
        let mut entries = vec![0u8; usize::try_from(pages * ENTRY).expect("a chunk of guest memory")];
        let at = (region.as_ptr().addr() as u64 / PAGE_SIZE + first) * ENTRY;
        pagemap
            .read_exact_at(&mut entries, at)
            .map_err(MemoryError::Pagemap)?;
        let backed =
            |entry: &[u8]| u64::from_le_bytes(entry.try_into().expect("8 bytes")) & PRESENT_OR_SWAPPED != 0;
        let word = |entries: &[u8]| {
            entries
                .chunks_exact(8)
                .enumerate()
                .fold(0u64, |word, (bit, entry)| word | u64::from(backed(entry)) << bit)
        };
        Ok(entries.chunks(64 * 8).map(word).collect())
    }

    /// This process's page map, for [`GuestMemory::backed_pages`].
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn open_pagemap() -> Result<File, MemoryError> {
        File::open("/proc/self/pagemap").map_err(MemoryError::Pagemap)
    }
}

fn region_len(region: &GuestRegionMmap<AtomicBitmap>) -> usize {
    usize::try_from(region.len()).expect("guest memory fits a 64-bit address space")
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        assert_eq!(ram_ranges(1 << 30), [(GuestAddress(0), 1 << 30)]);
        assert_eq!(
            ram_ranges(5 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]
        );
    }

    #[test]
    fn only_touched_pages_count_as_backed() {
        let memory = GuestMemory::new(64 << 20).expect("map");
        memory
            .mmap()
            .write_obj(1u64, GuestAddress(32 << 20))
            .expect("inside");
        let pagemap = GuestMemory::open_pagemap().expect("/proc");
        let words = memory.backed_pages(&pagemap, 0, 0, u64::MAX).expect("pagemap");
        let page = (32 << 20) / 4096;
        assert_eq!(words.len(), (64 << 20) / 4096 / 64);
        assert_eq!(words[page / 64] >> (page % 64) & 1, 1);
        assert!(words.iter().map(|word| word.count_ones()).sum::<u32>() <= 1024);
    }

    #[test]
    fn host_range_stays_within_a_region() {
        let memory = GuestMemory::new(4 << 20).expect("map");
        assert!(memory.host_range(GuestAddress((4 << 20) - 4096), 4096).is_some());
        assert!(memory.host_range(GuestAddress((4 << 20) - 4096), 4097).is_none());
        assert!(memory.host_range(GuestAddress(4 << 20), 1).is_none());
        assert!(memory.host_range(GuestAddress(u64::MAX), 1).is_none());
    }

    #[test]
    fn writes_by_the_vmm_are_tracked() {
        let memory = GuestMemory::new(4 << 20).expect("map");
        let _ = memory.take_vmm_dirty(0);
        memory
            .mmap()
            .write_obj(1u8, GuestAddress(5 * 4096))
            .expect("inside");
        assert_eq!(memory.take_vmm_dirty(0)[0], 1 << 5);
        assert_eq!(memory.take_vmm_dirty(0)[0], 0);
    }
}
