//! Guest RAM: one region below the 32-bit hole and one above it, of anonymous memory or of a memory file, with
//! transparent huge pages where the host gives them.

mod backed;
mod backing;
mod mapping;
mod write_log;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{
    Address as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionCollection,
};

pub use backing::Backing;
pub use mapping::RamRegion;
pub use write_log::WriteLog;

use crate::arch::layout::{HIGH_RAM_START, LOW_RAM_LIMIT};
use crate::spec::PAGE_SIZE;

/// Guest memory whose VMM-side writes are logged (vCPU writes are tracked by KVM's dirty log).
pub type Mmap = GuestRegionCollection<RamRegion>;

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
    #[error(
        "cannot map {bytes} bytes of guest memory: {source}; is there a limit on this process's address space?"
    )]
    Map {
        /// How much was asked for.
        bytes: u64,
        /// What the host said.
        source: io::Error,
    },
    /// No memory file.
    #[error("cannot make a memory file of {bytes} bytes: {source}")]
    Create {
        /// How large.
        bytes: u64,
        /// What the host said.
        source: io::Error,
    },
    /// A memory file from elsewhere that cannot be guest memory.
    #[error("guest memory received as a file: {why}")]
    Received {
        /// What is wrong with it.
        why: String,
    },
    /// KVM refused a memory slot.
    #[error("KVM_SET_USER_MEMORY_REGION for slot {slot}: {source}")]
    Slot {
        /// The slot.
        slot: u32,
        /// The ioctl's error.
        source: kvm_ioctls::Error,
    },
    /// The host does not say what it has backed.
    #[error("cannot tell which guest memory is in use: {0}")]
    Pagemap(io::Error),
}

/// The guest's RAM.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    mmap: Mmap,
    /// Regions follow one another in it.
    file: Option<Arc<MemoryFile>>,
}

#[derive(Debug)]
struct MemoryFile {
    file: File,
    known: backed::KnownData,
}

impl From<File> for MemoryFile {
    fn from(file: File) -> Self {
        let known = backed::KnownData::default();
        Self { file, known }
    }
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
    /// Maps `memory_bytes` of anonymous guest RAM. No page is touched.
    ///
    /// # Errors
    /// When the host cannot map it.
    pub fn new(memory_bytes: u64) -> Result<Self, MemoryError> {
        Self::with_backing(memory_bytes, Backing::Anonymous)
    }

    /// Maps `memory_bytes` of guest RAM. No page is touched.
    ///
    /// # Errors
    /// When the host cannot map it.
    pub fn with_backing(memory_bytes: u64, backing: Backing) -> Result<Self, MemoryError> {
        let file = match backing {
            Backing::Anonymous => None,
            Backing::Shared => Some(backing::create(memory_bytes)?),
        };
        Self::map(memory_bytes, file)
    }

    /// Maps the guest RAM of another VMM of this host, contents and all, from its memory file ([`GuestMemory::file`]).
    ///
    /// # Errors
    /// When the file is not one of that size that keeps it, or the host cannot map it.
    pub fn from_file(file: File, memory_bytes: u64) -> Result<Self, MemoryError> {
        backing::check(&file, memory_bytes)?;
        Self::map(memory_bytes, Some(file))
    }

    fn map(memory_bytes: u64, file: Option<File>) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::Map {
            bytes: memory_bytes,
            source,
        };
        let mut mmap = Mmap::new();
        let mut offset = 0;
        for (start, len) in ram_ranges(memory_bytes) {
            let bytes = usize::try_from(len).map_err(|error| failed(io::Error::other(error)))?;
            let part = file.as_ref().map(|file| (file, offset));
            let region = RamRegion::map(start, bytes, part).map_err(failed)?;
            mmap = mmap
                .insert_region(Arc::new(region))
                .map_err(|error| failed(io::Error::other(error)))?;
            offset += len;
        }
        let file = file.map(|file| Arc::new(file.into()));
        Ok(Self { mmap, file })
    }

    /// What it is made of.
    #[must_use]
    pub fn backing(&self) -> Backing {
        match self.file {
            None => Backing::Anonymous,
            Some(_) => Backing::Shared,
        }
    }

    /// The memory file, for a VMM of this host that takes the guest over; `None` for anonymous memory.
    #[must_use]
    pub fn file(&self) -> Option<&File> {
        self.file.as_deref().map(|memory| &memory.file)
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
            unsafe { region.host().add(offset) }
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
                userspace_addr: region.host().addr() as u64,
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
        let Some(region) = self.region(slot) else {
            return vec![];
        };
        let mut words = vec![0; region.log().words()];
        region.log().take_into(&mut words);
        words
    }

    /// Adds the VMM's own writes to region `slot` since the last call to `words`, one bit a page. Costs next to nothing
    /// where there are few, however large the region.
    pub fn merge_vmm_dirty(&self, slot: u32, words: &mut [u64]) {
        if let Some(region) = self.region(slot) {
            region.log().take_into(words);
        }
    }

    /// Which of the pages `first..first + pages` of region `slot` the host has backed (present or swapped, by whichever
    /// process), one bit a page. All others have never been written, and read as zeros.
    ///
    /// # Errors
    /// When the host does not say.
    pub fn backed_pages(
        &self,
        pagemap: &File,
        slot: u32,
        first: u64,
        pages: u64,
    ) -> Result<Vec<u64>, MemoryError> {
        let Some(region) = self.region(slot) else {
            return Ok(vec![]);
        };
        let pages = pages.min((region.len() / PAGE_SIZE).saturating_sub(first));
        let offset = first * PAGE_SIZE;
        let backed = match self.file.as_deref() {
            None => backed::anonymous(pagemap, region.host().addr() as u64 + offset, pages),
            Some(MemoryFile { file, known }) => {
                backed::shared(file, known, self.file_offset(slot) + offset, pages)
            }
        };
        Ok(backed.map_err(MemoryError::Pagemap)?.into_words())
    }

    /// This process's page map, for [`GuestMemory::backed_pages`].
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn open_pagemap() -> Result<File, MemoryError> {
        File::open("/proc/self/pagemap").map_err(MemoryError::Pagemap)
    }

    /// Gives pages back to the host. Afterwards they are not backed: they read as zeros, or, under userfaultfd, are
    /// missing.
    ///
    /// # Errors
    /// When the range is not in the region, or the host keeps some of it: for a memory file, a huge page that is pinned
    /// cannot be split (EBUSY; its pages read as zeros, but are not missing).
    pub fn discard(&self, slot: u32, first_page: u64, pages: u64) -> io::Result<()> {
        let (region, offset, len) = self.part(slot, first_page, pages)?;
        if len == 0 {
            return Ok(());
        }
        let Some(MemoryFile { file, known }) = self.file.as_deref() else {
            return region.advise(offset, len, libc::MADV_DONTNEED);
        };
        let start = self.file_offset(slot) + offset as u64;
        let at = |value: u64| i64::try_from(value).map_err(io::Error::other);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: no memory of this process's own is involved; the file's pages are guest memory, which may change under
        // any reader.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, at(start)?, at(len as u64)?) } < 0 {
            return Err(io::Error::last_os_error());
        }
        known.forget();
        match backed::seek(file, start, libc::SEEK_DATA)? {
            Some(data) if data < start + len as u64 => Err(io::Error::from_raw_os_error(libc::EBUSY)),
            _ => Ok(()),
        }
    }

    fn region(&self, slot: u32) -> Option<&RamRegion> {
        self.mmap
            .iter()
            .nth(usize::try_from(slot).expect("u32 fits usize"))
    }

    /// Where region `slot` begins in the memory file.
    fn file_offset(&self, slot: u32) -> u64 {
        let before = usize::try_from(slot).expect("u32 fits usize");
        self.mmap.iter().take(before).map(|region| region.len()).sum()
    }

    fn part(&self, slot: u32, first_page: u64, pages: u64) -> io::Result<(&RamRegion, usize, usize)> {
        let outside = || {
            let message =
                format!("pages {first_page} and {pages} more are not in slot {slot} of guest memory");
            io::Error::new(io::ErrorKind::InvalidInput, message)
        };
        let region = self.region(slot).ok_or_else(outside)?;
        let end = first_page.checked_add(pages).ok_or_else(outside)?;
        if end > region.len() / PAGE_SIZE {
            return Err(outside());
        }
        let bytes = |pages: u64| usize::try_from(pages * PAGE_SIZE).map_err(|_| outside());
        Ok((region, bytes(first_page)?, bytes(pages)?))
    }
}

#[cfg(test)]
mod tests {
    use super::mapping::HUGE_PAGE;
    use super::*;
    use crate::dirty::Bitmap;
    use vm_memory::Bytes as _;

    #[test]
    fn ram_leaves_the_hole_below_4_gib_free() {
        assert_eq!(ram_ranges(1 << 30), [(GuestAddress(0), 1 << 30)]);
        assert_eq!(
            ram_ranges(5 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]
        );
    }

    const BACKINGS: [Backing; 2] = [Backing::Anonymous, Backing::Shared];

    fn backed(memory: &GuestMemory, slot: u32) -> Bitmap {
        let pagemap = GuestMemory::open_pagemap().expect("/proc");
        let words = memory.backed_pages(&pagemap, slot, 0, u64::MAX / PAGE_SIZE);
        Bitmap::from_words(words.expect("pagemap"))
    }

    fn has(bitmap: &Bitmap, page: u64) -> bool {
        bitmap.words()[usize::try_from(page / 64).expect("small")] >> (page % 64) & 1 == 1
    }

    #[test]
    fn only_touched_pages_count_as_backed() {
        for backing in BACKINGS {
            let memory = GuestMemory::with_backing(64 << 20, backing).expect("map");
            assert_eq!(
                (memory.backing(), memory.file().is_some()),
                (backing, backing == Backing::Shared)
            );
            let address = GuestAddress(32 << 20);
            memory.mmap().write_obj(1u64, address).expect("inside");
            let found = backed(&memory, 0);
            assert_eq!(found.words().len(), (64 << 20) / 4096 / 64);
            assert!(has(&found, (32 << 20) / 4096));
            assert!(found.count() <= 512, "{backing:?}: more than a huge page");
        }
    }

    #[test]
    fn host_and_guest_addresses_agree_within_a_huge_page() {
        for backing in BACKINGS {
            for bytes in [2 << 20, (7 << 20) + 4096, (3 << 30) + (9 << 20)] {
                let memory = GuestMemory::with_backing(bytes, backing).expect("map");
                assert_eq!(memory.len(), bytes);
                for region in memory.regions() {
                    let host = memory.host_range(region.start, region.len).expect("inside");
                    assert_eq!(host.addr() % HUGE_PAGE, 0);
                    let last = region.start.unchecked_add(region.len - 1);
                    memory.mmap().write_obj(3u8, last).expect("inside");
                    assert!(memory.mmap().write_obj(3u16, last).is_err());
                }
            }
        }
    }

    #[test]
    fn memory_handed_over_is_the_same_memory() {
        const BYTES: u64 = (3 << 30) + (6 << 20);
        let source = GuestMemory::with_backing(BYTES, Backing::Shared).expect("map");
        let (low, high) = (
            GuestAddress(12345 << 12),
            GuestAddress(HIGH_RAM_START + (5 << 20)),
        );
        source.mmap().write_obj(0x1122_u64, low).expect("inside");
        source.mmap().write_obj(0x3344_u64, high).expect("inside");
        let file = source.file().expect("shared").try_clone().expect("a descriptor");
        assert!(GuestMemory::from_file(file.try_clone().expect("again"), BYTES + 4096).is_err());
        let destination = GuestMemory::from_file(file, BYTES).expect("map");
        assert_eq!(destination.backing(), Backing::Shared);
        // Nothing is mapped in the destination yet; it is known all the same.
        assert!(has(&backed(&destination, 0), 12345));
        assert!(has(&backed(&destination, 1), (5 << 20) / PAGE_SIZE));
        assert!(backed(&destination, 0).count() + backed(&destination, 1).count() <= 1024);
        drop(source);
        let read = |address| -> u64 { destination.mmap().read_obj(address).expect("inside") };
        assert_eq!((read(low), read(high)), (0x1122, 0x3344));
    }

    #[test]
    fn discarded_pages_are_zero_and_not_backed_and_their_neighbours_stay() {
        for backing in BACKINGS {
            let memory = GuestMemory::with_backing((3 << 30) + (8 << 20), backing).expect("map");
            for slot in [0, 1] {
                let start = memory.regions()[slot as usize].start;
                let at = |page: u64| start.unchecked_add(page * PAGE_SIZE);
                for page in 0..2048 {
                    memory.mmap().write_obj(page + 1, at(page)).expect("inside");
                }
                memory.discard(slot, 700, 900).expect("discard");
                memory.discard(slot, 1, 1).expect("discard");
                memory.discard(slot, 5, 0).expect("nothing to do");
                let found = backed(&memory, slot);
                for page in 0..2048 {
                    let gone = page == 1 || (700..1600).contains(&page);
                    assert_eq!(has(&found, page), !gone, "{backing:?} page {page}");
                    let value: u64 = memory.mmap().read_obj(at(page)).expect("inside");
                    assert_eq!(value, if gone { 0 } else { page + 1 });
                }
            }
        }
    }

    #[test]
    fn ranges_outside_a_region_are_refused() {
        let memory = GuestMemory::new(4 << 20).expect("map");
        for (slot, first, pages) in [
            (0, 1024, 1),
            (0, 0, 1025),
            (0, u64::MAX, 2),
            (0, 1, u64::MAX),
            (1, 0, 0),
        ] {
            assert!(memory.discard(slot, first, pages).is_err());
        }
    }

    #[test]
    fn more_than_there_are_addresses_is_refused_in_words() {
        for backing in BACKINGS {
            let error = GuestMemory::with_backing(1 << 60, backing)
                .expect_err("too much")
                .to_string();
            assert!(error.contains("1152921504606846976 bytes"), "{error}");
        }
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
