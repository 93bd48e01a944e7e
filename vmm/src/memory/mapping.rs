//! One region of guest RAM in this process: a mapping at a multiple of 2 MiB, so that guest and host addresses agree
//! within a huge page, and vm-memory's view of it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::ptr::null_mut;

use vm_memory::bitmap::{BS, Bitmap as _};
use vm_memory::guest_memory::Result as GuestResult;
use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, MemoryRegionAddress,
    VolatileSlice,
};

use super::write_log::WriteLog;
use crate::spec::PAGE_SIZE;

/// Size and alignment of a huge page.
pub(super) const HUGE_PAGE: usize = 2 << 20;

/// A piece of guest RAM: its mapping, and which of its pages the VMM wrote.
#[derive(Debug)]
pub struct RamRegion {
    start: GuestAddress,
    host: *mut u8,
    len: usize,
    log: WriteLog,
}

// SAFETY: the pointer is to a mapping that this value owns and that stays until it is dropped; it is read and written only
// through volatile slices and system calls, as memory that a guest writes at any time.
unsafe impl Send for RamRegion {}
// SAFETY: as above; there is no state behind a shared reference but the mapping and atomics.
unsafe impl Sync for RamRegion {}

impl RamRegion {
    /// Maps `len` bytes, whole pages, for guest memory at `start`: anonymous, or of `file` from `offset`.
    pub(super) fn map(start: GuestAddress, len: usize, file: Option<(&File, u64)>) -> io::Result<Self> {
        let (fd, offset, flags) = match file {
            Some((file, offset)) => {
                let offset = i64::try_from(offset).map_err(io::Error::other)?;
                (file.as_raw_fd(), offset, libc::MAP_SHARED)
            }
            None => (-1, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        };
        let room = len
            .checked_add(HUGE_PAGE)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a new mapping where the kernel likes it touches nothing that exists.
        let reserved = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(null_mut(), room, libc::PROT_NONE, flags, -1, 0)
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let reserved = reserved.cast::<u8>();
        let head = reserved.addr().next_multiple_of(HUGE_PAGE) - reserved.addr();
        // SAFETY: head < HUGE_PAGE, so head + len lies within the `room` bytes that were just reserved.
        let host = unsafe { reserved.add(head) };
        // SAFETY: MAP_FIXED replaces `len` bytes of the reservation, which nothing else uses, or fails and leaves it.
        let mapped = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = flags | libc::MAP_FIXED | libc::MAP_NORESERVE;
            libc::mmap(host.cast(), len, protection, flags, fd, offset)
        };
        if mapped == libc::MAP_FAILED {
            let error = io::Error::last_os_error();
            unmap(reserved, room);
            return Err(error);
        }
        unmap(reserved, head);
        // SAFETY: host + len is at most the end of the reservation, which is `room` = len + HUGE_PAGE bytes long.
        unmap(unsafe { host.add(len) }, HUGE_PAGE - head);
        let region = Self {
            start,
            host,
            len,
            log: WriteLog::new(len as u64 / PAGE_SIZE),
        };
        // Advice only. A kernel without huge pages says no, and core dumps are then as large as they are.
        let _ = region.advise(0, len, libc::MADV_HUGEPAGE);
        let _ = region.advise(0, len, libc::MADV_DONTDUMP);
        Ok(region)
    }

    /// First byte in this process.
    pub(super) fn host(&self) -> *mut u8 {
        self.host
    }

    pub(super) fn log(&self) -> &WriteLog {
        &self.log
    }

    /// madvise(2) with one of the advices that leave memory valid, on `len` bytes from `offset`, within the region.
    pub(super) fn advise(&self, offset: usize, len: usize, advice: i32) -> io::Result<()> {
        debug_assert!(offset.checked_add(len).is_some_and(|end| end <= self.len));
        // SAFETY: the range lies within this value's own mapping (all callers check), which holds guest memory: bytes
        // that may change at any time, so that advice which drops or adds pages breaks nobody's assumptions.
        match unsafe { libc::madvise(self.host.add(offset).cast(), len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Gives part of a mapping back.
fn unmap(start: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: callers give ranges of mappings that they made and that nothing refers to any more.
        unsafe { libc::munmap(start.cast(), len) };
    }
}

impl Drop for RamRegion {
    fn drop(&mut self) {
        unmap(self.host, self.len);
    }
}

impl GuestMemoryRegion for RamRegion {
    type B = WriteLog;

    fn len(&self) -> u64 {
        self.len as u64
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, WriteLog> {
        self.log.slice_at(0)
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> GuestResult<*mut u8> {
        let address = self
            .check_address(address)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self
            .host
            .wrapping_add(usize::try_from(address.0).expect("an offset within a mapping")))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> GuestResult<VolatileSlice<'_, BS<'_, WriteLog>>> {
        let start = usize::try_from(offset.0).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        if start.checked_add(count).is_none_or(|end| end > self.len) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        // SAFETY: start + count <= len, so the slice lies within the mapping, which lives as long as the borrow of self.
        Ok(
            unsafe {
                VolatileSlice::with_bitmap(self.host.add(start), count, self.log.slice_at(start), None)
            },
        )
    }
}

impl GuestMemoryRegionBytes for RamRegion {}
