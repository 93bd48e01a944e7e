//! Which pages the VMM itself has written: one bit a page, and above it one bit for each 64 of them, so that reading
//! the log of a large guest that the VMM hardly writes to visits almost nothing.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

use crate::spec::PAGE_SIZE;

/// Writes to one region since they were last taken.
#[derive(Debug)]
pub struct WriteLog {
    pages: u64,
    words: Vec<AtomicU64>,
    /// Bit n is set after a bit of word n is.
    summary: Vec<AtomicU64>,
}

fn zeroed(words: u64) -> Vec<AtomicU64> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

fn index(word: u64) -> usize {
    usize::try_from(word).expect("guest memory fits a 64-bit address space")
}

impl WriteLog {
    pub(super) fn new(pages: u64) -> Self {
        let words = pages.div_ceil(64);
        Self {
            pages,
            words: zeroed(words),
            summary: zeroed(words.div_ceil(64)),
        }
    }

    /// Adds the pages written since the last call to `bitmap`, one bit a page. A bitmap that is too short misses the rest.
    pub(super) fn take_into(&self, bitmap: &mut [u64]) {
        for (at, summary) in self.summary.iter().enumerate() {
            if summary.load(Ordering::Relaxed) == 0 {
                continue;
            }
            // Before the words: a write that comes in between sets it again and is found by the next call.
            let mut groups = summary.swap(0, Ordering::SeqCst);
            while groups != 0 {
                let word = at * 64 + groups.trailing_zeros() as usize;
                groups &= groups - 1;
                let taken = self.words[word].swap(0, Ordering::SeqCst);
                if let Some(target) = bitmap.get_mut(word) {
                    *target |= taken;
                }
            }
        }
    }

    pub(super) fn words(&self) -> usize {
        self.words.len()
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for WriteLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 || self.pages == 0 {
            return;
        }
        let first = offset as u64 / PAGE_SIZE;
        let last = (offset.saturating_add(len - 1) as u64 / PAGE_SIZE).min(self.pages - 1);
        for page in first..=last {
            let word = page / 64;
            self.words[index(word)].fetch_or(1 << (page % 64), Ordering::SeqCst);
            self.summary[index(word / 64)].fetch_or(1 << (word % 64), Ordering::SeqCst);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE_SIZE;
        page < self.pages && self.words[index(page / 64)].load(Ordering::SeqCst) >> (page % 64) & 1 == 1
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_byte_written_is_in_the_log_once(writes in proptest::collection::vec((0usize..40 << 20, 0usize..100_000), 0..20)) {
            let log = WriteLog::new((40 << 20) / PAGE_SIZE);
            let mut expected = vec![0u64; log.words()];
            for (offset, len) in &writes {
                log.mark_dirty(*offset, *len);
                for page in (offset / 4096..(offset + len).div_ceil(4096)).filter(|_| *len > 0) {
                    if let Some(word) = expected.get_mut(page / 64) {
                        *word |= 1 << (page % 64);
                    }
                    prop_assert!(page >= (40 << 20) / 4096 || log.dirty_at(page * 4096));
                }
            }
            let mut taken = vec![0u64; log.words()];
            log.take_into(&mut taken);
            prop_assert_eq!(&taken, &expected);
            let mut again = vec![0u64; log.words()];
            log.take_into(&mut again);
            prop_assert!(again.iter().all(|word| *word == 0));
        }
    }

    #[test]
    fn nothing_is_lost_between_a_writer_and_a_taker() {
        const PAGES: usize = 64 * 64 * 3;
        let log = WriteLog::new(PAGES as u64);
        let mut taken = vec![0u64; log.words()];
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..PAGES).for_each(|page| log.mark_dirty(page * 4096, 1)));
            while !writer.is_finished() {
                log.take_into(&mut taken);
            }
        });
        log.take_into(&mut taken);
        assert!(taken.iter().all(|word| *word == u64::MAX));
    }
}
