//! Which pages of guest RAM the host has backed with memory. All others were never touched and read as zeros. The cost
//! is that of what is backed, not of the size of the guest.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::dirty::Bitmap;
use crate::spec::PAGE_SIZE;

/// `struct pm_scan_arg` of linux/fs.h; Documentation/admin-guide/mm/pagemap.rst.
#[repr(C)]
struct ScanRequest {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    found: u64,
    found_len: u64,
    max_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    returned: u64,
}

/// `struct page_region` of linux/fs.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct ScanRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// A page of zeros that the host shares between all who only read.
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const REGIONS_AT_ONCE: usize = 512;

/// Backed pages of `pages` pages of anonymous memory from `host`, one bit a page.
pub(super) fn anonymous(pagemap: &File, host: u64, pages: u64) -> io::Result<Bitmap> {
    match scan(pagemap, host, pages) {
        // Before Linux 6.7 there is no such ioctl.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            read_entries(pagemap, host, pages)
        }
        result => result,
    }
}

fn scan(pagemap: &File, host: u64, pages: u64) -> io::Result<Bitmap> {
    let mut bitmap = Bitmap::clean(pages);
    let end = host + pages * PAGE_SIZE;
    let nothing = ScanRegion {
        start: 0,
        end: 0,
        categories: 0,
    };
    let mut found = [nothing; REGIONS_AT_ONCE];
    let mut start = host;
    while start < end {
        let mut request = ScanRequest {
            size: size_of::<ScanRequest>() as u64,
            flags: 0,
            start,
            end,
            walk_end: 0,
            found: found.as_mut_ptr().addr() as u64,
            found_len: REGIONS_AT_ONCE as u64,
            max_pages: 0,
            inverted: PAGE_IS_PFNZERO,
            all_of: PAGE_IS_PFNZERO,
            any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            returned: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        };
        // SAFETY: the request says its size; the kernel writes at most `found_len` regions to `found`, which has that many
        // and lives across the call, and walk_end. Without flags it changes nothing else.
        let regions = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut request) };
        let Ok(regions) = usize::try_from(regions) else {
            return Err(io::Error::last_os_error());
        };
        for region in found.iter().take(regions) {
            let first = region.start.max(host) - host;
            let last = region.end.min(end).saturating_sub(host);
            bitmap.set_run(first / PAGE_SIZE, last.saturating_sub(first) / PAGE_SIZE);
        }
        if request.walk_end <= start {
            return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
        }
        start = request.walk_end;
    }
    Ok(bitmap)
}

/// The way of older kernels: one entry of 8 bytes for each page.
fn read_entries(pagemap: &File, host: u64, pages: u64) -> io::Result<Bitmap> {
    const ENTRY: u64 = 8;
    const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
    const CHUNK: u64 = 64 * 1024;
    let mut bitmap = Bitmap::clean(pages);
    let mut entries = vec![0u8; usize::try_from(CHUNK.min(pages) * ENTRY).expect("a chunk")];
    for first in (0..pages).step_by(usize::try_from(CHUNK).expect("a chunk")) {
        let count = usize::try_from(CHUNK.min(pages - first) * ENTRY).expect("a chunk");
        pagemap.read_exact_at(&mut entries[..count], (host / PAGE_SIZE + first) * ENTRY)?;
        for (page, entry) in (first..).zip(entries[..count].chunks_exact(8)) {
            if u64::from_le_bytes(entry.try_into().expect("8 bytes")) & PRESENT_OR_SWAPPED != 0 {
                bitmap.set_run(page, 1);
            }
        }
    }
    Ok(bitmap)
}

/// Extents of data that were found before. Looking for the end of one costs what the whole extent has, and callers ask
/// for one chunk after another, from several threads.
#[derive(Debug, Default)]
pub(super) struct KnownData {
    extents: Mutex<VecDeque<Range<u64>>>,
}

const EXTENTS_KEPT: usize = 16;

impl KnownData {
    fn extents(&self) -> MutexGuard<'_, VecDeque<Range<u64>>> {
        self.extents.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called when data was removed.
    pub(super) fn forget(&self) {
        self.extents().clear();
    }

    fn end_of(&self, data: u64) -> Option<u64> {
        self.extents()
            .iter()
            .find_map(|extent| extent.contains(&data).then_some(extent.end))
    }

    fn add(&self, extent: Range<u64>) {
        let mut extents = self.extents();
        if extents.len() == EXTENTS_KEPT {
            extents.pop_front();
        }
        extents.push_back(extent);
    }
}

/// Backed pages of `pages` pages of a memory file from `offset`, whichever process touched them.
pub(super) fn shared(file: &File, known: &KnownData, offset: u64, pages: u64) -> io::Result<Bitmap> {
    let mut bitmap = Bitmap::clean(pages);
    let end = offset + pages * PAGE_SIZE;
    let mut at = offset;
    while at < end {
        let (data, hole) = match known.end_of(at) {
            Some(hole) => (at, hole),
            None => {
                let Some(data) = seek(file, at, libc::SEEK_DATA)?.filter(|data| *data < end) else {
                    break;
                };
                let hole = seek(file, data, libc::SEEK_HOLE)?
                    .unwrap_or(end)
                    .max(data + PAGE_SIZE);
                known.add(data..hole);
                (data, hole)
            }
        };
        let last = hole.min(end);
        bitmap.set_run((data - offset) / PAGE_SIZE, (last - data).div_ceil(PAGE_SIZE));
        at = last;
    }
    Ok(bitmap)
}

/// Where data, or a hole, begins at or after `from`; `None` if there is none.
pub(super) fn seek(file: &File, from: u64, whence: i32) -> io::Result<Option<u64>> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    // SAFETY: no memory is involved; nobody uses the file's position.
    let at = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
    match u64::try_from(at) {
        Ok(at) => Ok(Some(at)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Backing, GuestMemory};
    use vm_memory::{Bytes as _, GuestAddress};

    #[test]
    fn both_ways_to_ask_agree() {
        const BYTES: u64 = 64 << 20;
        let memory = GuestMemory::new(BYTES).expect("map");
        for at in [0, 5 << 20, 33 << 20, BYTES - 1] {
            memory.mmap().write_obj(7u8, GuestAddress(at)).expect("inside");
        }
        let pagemap = GuestMemory::open_pagemap().expect("/proc");
        let host = memory.host_range(GuestAddress(0), BYTES).expect("inside").addr() as u64;
        let entries = read_entries(&pagemap, host, BYTES / PAGE_SIZE).expect("pagemap");
        assert!(entries.count() >= 4);
        match scan(&pagemap, host, BYTES / PAGE_SIZE) {
            Ok(scanned) => assert_eq!(scanned, entries),
            Err(error) => assert!(matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL))),
        }
        assert_eq!(
            anonymous(&pagemap, host, BYTES / PAGE_SIZE).expect("pagemap"),
            entries
        );
    }

    #[test]
    fn more_regions_than_one_call_returns_are_all_found() {
        const PAGES: u64 = 8192;
        let memory = GuestMemory::new(PAGES * PAGE_SIZE).expect("map");
        let host = memory
            .host_range(GuestAddress(0), PAGES * PAGE_SIZE)
            .expect("inside");
        // SAFETY: the range is the mapping of `memory`; the advice changes only how it is backed.
        unsafe { libc::madvise(host.cast(), 8192 * 4096, libc::MADV_NOHUGEPAGE) };
        for page in (0..PAGES).step_by(2) {
            memory
                .mmap()
                .write_obj(1u8, GuestAddress(page * PAGE_SIZE))
                .expect("inside");
        }
        let pagemap = GuestMemory::open_pagemap().expect("/proc");
        let found = anonymous(&pagemap, host.addr() as u64, PAGES).expect("pagemap");
        assert!(found.words().iter().all(|word| *word == 0x5555_5555_5555_5555));
    }

    #[test]
    fn asking_in_chunks_finds_the_same_as_asking_once() {
        const PAGES: u64 = 16384;
        let memory = GuestMemory::with_backing(PAGES * PAGE_SIZE, Backing::Shared).expect("map");
        let pagemap = GuestMemory::open_pagemap().expect("/proc");
        let chunks = || -> Vec<u64> {
            let chunk = |at| memory.backed_pages(&pagemap, 0, at * 256, 256).expect("known");
            (0..PAGES / 256).flat_map(chunk).collect()
        };
        for page in (1000..9000).chain((9500..16000).step_by(7)) {
            memory
                .mmap()
                .write_obj(1u8, GuestAddress(page * PAGE_SIZE))
                .expect("inside");
        }
        let file = memory.file().expect("shared");
        let fresh = || {
            shared(file, &KnownData::default(), 0, PAGES)
                .expect("known")
                .into_words()
        };
        assert_eq!(chunks(), fresh());
        // What comes after is found, and what goes is forgotten.
        memory
            .mmap()
            .write_obj(1u8, GuestAddress(9000 * PAGE_SIZE))
            .expect("inside");
        memory.mmap().write_obj(1u8, GuestAddress(0)).expect("inside");
        assert_eq!(chunks(), fresh());
        memory.discard(0, 2000, 3000).expect("discard");
        assert_eq!(chunks(), fresh());
    }

    #[test]
    fn pages_that_were_only_read_are_not_backed() {
        let memory = GuestMemory::new(4 << 20).expect("map");
        let host = memory.host_range(GuestAddress(0), 4 << 20).expect("inside");
        // SAFETY: as above.
        unsafe { libc::madvise(host.cast(), 4 << 20, libc::MADV_NOHUGEPAGE) };
        let pagemap = GuestMemory::open_pagemap().expect("/proc");
        let read: u64 = memory.mmap().read_obj(GuestAddress(8192)).expect("inside");
        assert_eq!(read, 0);
        memory.mmap().write_obj(1u8, GuestAddress(12288)).expect("inside");
        if let Ok(found) = scan(&pagemap, host.addr() as u64, 1024) {
            assert_eq!(found.words()[0], 1 << 3);
            assert_eq!(found.count(), 1);
        }
    }
}
