//! Guest pages on the wire: runs of pages, sent straight from guest memory and read straight into it.
//!
//! The guest goes on writing while its pages are sent, so what arrives may differ from what was looked at. Every page has
//! a checksum: one that does not match was written meanwhile (the dirty log has it too) or damaged on the way. Either way
//! the destination names it and it is sent again. While the guest is paused a page that does not match ends the migration.

pub mod frame;
mod receive;
mod send;
pub mod v1;

use std::sync::atomic::{AtomicU64, Ordering};

pub use receive::PageReceiver;
pub use send::{NextFrame, PageSender, Resent};

use twox_hash::XxHash3_64;

use crate::memory::GuestMemory;
use crate::spec::PAGE_SIZE;

pub(super) const PAGE: usize = 4096;

/// Pages handled so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Sent with their bytes.
    pub raw: u64,
    /// Found to be zero.
    pub zero: u64,
}

impl PageCounts {
    /// All of them.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.raw + self.zero
    }
}

impl std::ops::AddAssign for PageCounts {
    fn add_assign(&mut self, other: Self) {
        self.raw += other.raw;
        self.zero += other.zero;
    }
}

/// The lower half of a page's XXH3-64: as good as CRC-32C at finding damage, at several times its speed (decision 009).
///
/// # Safety
/// `page` is the start of a mapped page. The guest may write to it meanwhile: then the value is of neither content, which
/// the other side notices.
#[must_use]
pub(super) unsafe fn checksum(page: *const u8) -> u32 {
    // SAFETY: mapped, as the caller says. What the guest writes meanwhile is to this program like a device's DMA: the
    // bytes read may change between two reads, and nothing below depends on them but the value that is returned.
    let bytes = unsafe { std::slice::from_raw_parts(page, PAGE) };
    checksum_of(bytes)
}

/// The same of a page that nobody writes.
#[must_use]
pub(super) fn checksum_of(page: &[u8]) -> u32 {
    let hash = XxHash3_64::oneshot(page);
    u32::try_from(hash & u64::from(u32::MAX)).expect("masked")
}

/// Whether bytes that nobody writes are all zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(256)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Whether a page holds only zeros. Most pages that do not say so in their first words.
///
/// # Safety
/// `page` is the start of a mapped page; the guest may write to it meanwhile.
#[must_use]
pub(super) unsafe fn is_zero_at(page: *const u8) -> bool {
    const BLOCK: usize = 32;
    let words = page.cast::<AtomicU64>();
    (0..PAGE / 8 / BLOCK).all(|block| {
        let all = (0..BLOCK).fold(0, |all, word| {
            // SAFETY: within the page, which is aligned to more than eight bytes; atomic, so that the guest may write.
            all | unsafe { &*words.add(block * BLOCK + word) }.load(Ordering::Relaxed)
        });
        all == 0
    })
}

/// The pages that have been written, shared by all that write them.
#[derive(Debug)]
pub struct WrittenPages {
    regions: Vec<(u64, Vec<AtomicU64>)>,
}

impl WrittenPages {
    /// None yet.
    #[must_use]
    pub fn none(memory: &GuestMemory) -> Self {
        let words = |pages: u64| (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let regions = memory.regions();
        Self {
            regions: regions
                .iter()
                .map(|region| (region.start.0, words(region.pages())))
                .collect(),
        }
    }

    fn word(&self, gpa: u64) -> Option<(&AtomicU64, u64)> {
        let (start, words) = self.regions.iter().rev().find(|(start, _)| *start <= gpa)?;
        let page = (gpa - start) / PAGE_SIZE;
        let word = words.get(usize::try_from(page / 64).ok()?)?;
        Some((word, 1 << (page % 64)))
    }

    /// Whether the page at `gpa` has been written.
    #[must_use]
    pub fn contains(&self, gpa: u64) -> bool {
        self.word(gpa)
            .is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn insert_run(&self, gpa: u64, pages: u64) {
        for page in 0..pages {
            if let Some((word, bit)) = self.word(gpa + page * PAGE_SIZE) {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests;
