//! A set of guest pages that threads take from at once, and how it travels: runs of page numbers in frames of bounded size.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::wire::{Connection, FrameKind, WireError};
use crate::dirty::{self, Bitmap};
use crate::memory::Region;
use crate::spec::PAGE_SIZE;

/// Payload of a Missing frame before the runs: whether it is the last, then reserved.
const HEAD_LEN: usize = 8;
/// Longest payload of a Missing frame.
pub const MAX_MISSING: usize = 1 << 20;
/// Two numbers of 64 bits, seven bits a byte.
const LONGEST_RUN: usize = 20;
const WORD: u64 = 64;

/// Pages of guest memory by page number, which is guest physical address / 4096.
#[derive(Debug)]
pub struct PageSet {
    parts: Vec<Part>,
    count: AtomicU64,
}

#[derive(Debug)]
struct Part {
    first: u64,
    pages: u64,
    words: Box<[AtomicU64]>,
}

impl Part {
    fn word(&self, page: u64) -> (&AtomicU64, u64) {
        let index = page - self.first;
        let word = usize::try_from(index / WORD).expect("guest memory fits a 64-bit address space");
        (&self.words[word], 1 << (index % WORD))
    }

    fn end(&self) -> u64 {
        self.first + self.pages
    }

    /// The first page at or after `from`, which is in this part, that is in the set, or that is not.
    fn next(&self, from: u64, is_in: bool) -> Option<u64> {
        let flip = if is_in { 0 } else { u64::MAX };
        let index = from - self.first;
        let mut at = usize::try_from(index / WORD).ok()?;
        let mut mask = u64::MAX << (index % WORD);
        while let Some(word) = self.words.get(at) {
            let hit = (word.load(Ordering::Relaxed) ^ flip) & mask;
            if hit != 0 {
                return Some(self.first + at as u64 * WORD + u64::from(hit.trailing_zeros()));
            }
            mask = u64::MAX;
            at += 1;
        }
        None
    }
}

impl PageSet {
    /// No page of these regions.
    #[must_use]
    pub fn empty(regions: &[Region]) -> Self {
        let part = |region: &Region| Part {
            first: region.start.0 / PAGE_SIZE,
            pages: region.pages(),
            words: (0..region.pages().div_ceil(WORD))
                .map(|_| AtomicU64::new(0))
                .collect(),
        };
        Self {
            parts: regions.iter().map(part).collect(),
            count: AtomicU64::new(0),
        }
    }

    /// The pages of one bitmap a region.
    #[must_use]
    pub fn of_bitmaps(regions: &[Region], bitmaps: &[Bitmap]) -> Self {
        let set = Self::empty(regions);
        for (region, bitmap) in regions.iter().zip(bitmaps) {
            let first = region.start.0 / PAGE_SIZE;
            for (start, pages) in dirty::runs(bitmap.words()) {
                // KVM's bitmaps are whole words; a region need not be.
                let pages = pages.min(region.pages().saturating_sub(start));
                set.insert_run(first + start, pages);
            }
        }
        set
    }

    /// Pages in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Whether `page` is guest memory at all.
    #[must_use]
    pub fn covers(&self, page: u64) -> bool {
        self.part(page).is_some()
    }

    /// Whether it holds `page`.
    #[must_use]
    pub fn contains(&self, page: u64) -> bool {
        self.part(page).is_some_and(|part| {
            let (word, bit) = part.word(page);
            word.load(Ordering::Acquire) & bit != 0
        })
    }

    /// Takes `page` out; `true` for the one thread that did.
    pub fn take(&self, page: u64) -> bool {
        let Some(part) = self.part(page) else { return false };
        let (word, bit) = part.word(page);
        let had = word.fetch_and(!bit, Ordering::AcqRel) & bit != 0;
        if had {
            self.count.fetch_sub(1, Ordering::SeqCst);
        }
        had
    }

    /// Adds pages; `false`, and nothing added, if they are not all guest memory of one region.
    pub fn insert_run(&self, first: u64, pages: u64) -> bool {
        let fits = |part: &&Part| first >= part.first && pages <= part.end().saturating_sub(first);
        let Some(part) = self.parts.iter().find(fits) else {
            return false;
        };
        let mut added = 0;
        let mut page = first;
        while page < first + pages {
            let (word, _) = part.word(page);
            let offset = (page - part.first) % WORD;
            let here = (WORD - offset).min(first + pages - page);
            let bits = (u64::MAX >> (WORD - here)) << offset;
            let before = word.fetch_or(bits, Ordering::AcqRel);
            added += u64::from((bits & !before).count_ones());
            page += here;
        }
        self.count.fetch_add(added, Ordering::SeqCst);
        true
    }

    /// The first page of it at or after `from`.
    #[must_use]
    pub fn next(&self, from: u64) -> Option<u64> {
        self.parts
            .iter()
            .filter(|part| from < part.end())
            .find_map(|part| part.next(from.max(part.first), true))
    }

    /// Its runs, ascending, as (first page, pages); no run leaves its region.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let first = self.next(from)?;
            let part = self.part(first)?;
            from = part.next(first, false).unwrap_or(u64::MAX).min(part.end());
            Some((first, from - first))
        })
    }

    /// Adds every page of another set of the same regions.
    pub fn insert(&self, other: &Self) {
        for (first, pages) in other.runs() {
            self.insert_run(first, pages);
        }
    }

    fn part(&self, page: u64) -> Option<&Part> {
        self.parts
            .iter()
            .find(|part| page >= part.first && page < part.end())
    }

    /// Sends it as Missing frames.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn send<S: Read + Write>(&self, connection: &mut Connection<S>) -> Result<(), WireError> {
        let mut payload = vec![0u8; HEAD_LEN];
        let mut end = 0;
        for (first, pages) in self.runs() {
            if payload.len() + LONGEST_RUN > MAX_MISSING {
                connection.send_parts(FrameKind::Missing, &payload, &[])?;
                payload.truncate(HEAD_LEN);
                end = 0;
            }
            put_number(&mut payload, first - end);
            put_number(&mut payload, pages);
            end = first + pages;
        }
        payload[0] = 1;
        connection.send_parts(FrameKind::Missing, &payload, &[])
    }

    /// Adds what one Missing frame says; whether it was the last. Each frame must go on after the one before, at page
    /// `end`, so that their number is bounded by guest memory.
    ///
    /// # Errors
    /// When the payload does not make sense.
    pub fn add_frame(&self, payload: &[u8], end: &mut u64) -> Result<bool, WireError> {
        let malformed = |why: String| WireError::Malformed {
            kind: FrameKind::Missing,
            why,
        };
        let last = match payload.get(..HEAD_LEN) {
            Some([last @ 0..=1, 0, 0, 0, 0, 0, 0, 0]) => *last == 1,
            _ => return Err(malformed("its head is not one".into())),
        };
        let mut rest = &payload[HEAD_LEN..];
        if rest.is_empty() && !last {
            return Err(malformed("no runs, and it is not the last".into()));
        }
        let mut at = 0u64;
        while !rest.is_empty() {
            let run = take_number(&mut rest).zip(take_number(&mut rest));
            let (gap, pages) = run.ok_or_else(|| malformed("a run is cut off".into()))?;
            let first = at.checked_add(gap).filter(|first| first >= end);
            let first = first.ok_or_else(|| malformed("its runs do not ascend".into()))?;
            if pages == 0 || !self.insert_run(first, pages) {
                return Err(malformed(format!(
                    "run of {pages} pages at page {first:#x} is not guest memory"
                )));
            }
            at = first + pages;
            *end = at;
        }
        Ok(last)
    }

    /// Receives a set of pages of `regions`.
    ///
    /// # Errors
    /// When the connection fails, another frame comes or one does not make sense.
    pub fn receive<S: Read + Write>(
        connection: &mut Connection<S>,
        regions: &[Region],
    ) -> Result<Self, WireError> {
        let first = super::expect_frame(connection, FrameKind::Missing, "Missing")?;
        Self::receive_from(&first, connection, regions)
    }

    /// As [`PageSet::receive`], when the first frame has come.
    ///
    /// # Errors
    /// As [`PageSet::receive`].
    pub fn receive_from<S: Read + Write>(
        first: &[u8],
        connection: &mut Connection<S>,
        regions: &[Region],
    ) -> Result<Self, WireError> {
        let set = Self::empty(regions);
        let mut end = 0;
        let mut is_last = set.add_frame(first, &mut end)?;
        while !is_last {
            let payload = super::expect_frame(connection, FrameKind::Missing, "Missing")?;
            is_last = set.add_frame(&payload, &mut end)?;
        }
        Ok(set)
    }
}

/// Seven bits a byte, the lowest first; the top bit says that more follow (LEB128).
fn put_number(to: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        to.push(u8::try_from(number & 0x7f).expect("seven bits") | 0x80);
        number >>= 7;
    }
    to.push(u8::try_from(number).expect("seven bits"));
}

fn take_number(from: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for (place, &byte) in from.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        let shifted = bits.checked_shl(u32::try_from(place * 7).ok()?)?;
        if shifted >> (place * 7) != bits {
            return None;
        }
        number |= shifted;
        if byte & 0x80 == 0 {
            *from = &from[place + 1..];
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::HIGH_RAM_START;
    use proptest::prelude::*;
    use std::io::Cursor;
    use vm_memory::GuestAddress;

    const LOW_PAGES: u64 = 1000;
    const HIGH_PAGES: u64 = 300;

    fn regions() -> Vec<Region> {
        let region = |slot, start, pages: u64| Region {
            slot,
            start: GuestAddress(start),
            len: pages * PAGE_SIZE,
        };
        vec![region(0, 0, LOW_PAGES), region(1, HIGH_RAM_START, HIGH_PAGES)]
    }

    fn page(index: u64) -> u64 {
        if index < LOW_PAGES {
            index
        } else {
            HIGH_RAM_START / PAGE_SIZE + index - LOW_PAGES
        }
    }

    proptest! {
        #[test]
        fn what_is_sent_arrives(pages in proptest::collection::btree_set(0..LOW_PAGES + HIGH_PAGES, 0..400)) {
            let set = PageSet::empty(&regions());
            for &index in &pages {
                prop_assert!(set.insert_run(page(index), 1));
            }
            prop_assert_eq!(set.count(), pages.len() as u64);
            let mut connection = Connection::new(Cursor::new(vec![]));
            set.send(&mut connection).expect("memory");
            let bytes = connection.stream().get_ref().clone();
            let came = PageSet::receive(&mut Connection::new(Cursor::new(bytes)), &regions()).expect("own frames");
            prop_assert_eq!(came.count(), set.count());
            prop_assert_eq!(came.runs().collect::<Vec<_>>(), set.runs().collect::<Vec<_>>());
            for index in 0..LOW_PAGES + HIGH_PAGES {
                prop_assert_eq!(came.contains(page(index)), pages.contains(&index));
                prop_assert_eq!(came.take(page(index)), pages.contains(&index));
                prop_assert!(!came.take(page(index)));
            }
            prop_assert_eq!(came.count(), 0);
        }

        #[test]
        fn no_payload_panics_or_leaves_guest_memory(payload in proptest::collection::vec(any::<u8>(), 0..60), last in 0u8..2) {
            let set = PageSet::empty(&regions());
            let payload = [vec![last, 0, 0, 0, 0, 0, 0, 0], payload].concat();
            let _ = set.add_frame(&payload, &mut 0);
            prop_assert!(set.count() <= LOW_PAGES + HIGH_PAGES);
            prop_assert_eq!(set.runs().map(|(_, pages)| pages).sum::<u64>(), set.count());
        }
    }

    #[test]
    fn runs_outside_guest_memory_are_refused() {
        for (first, pages) in [
            (LOW_PAGES - 1, 2),
            (LOW_PAGES, 1),
            (u64::MAX, 1),
            (5, 0),
            (5, u64::MAX),
            (page(LOW_PAGES), HIGH_PAGES + 1),
        ] {
            let mut payload = vec![1, 0, 0, 0, 0, 0, 0, 0];
            put_number(&mut payload, first);
            put_number(&mut payload, pages);
            let set = PageSet::empty(&regions());
            let error = set.add_frame(&payload, &mut 0).expect_err("outside").to_string();
            assert!(error.contains("is not guest memory"), "{error}");
            assert_eq!(set.count(), 0);
        }
    }

    #[test]
    fn a_large_set_goes_in_frames_of_bounded_size_and_a_repeated_frame_is_refused() {
        let pages = 2_200_000;
        let region = [Region {
            slot: 0,
            start: GuestAddress(0),
            len: pages * PAGE_SIZE,
        }];
        let set = PageSet::empty(&region);
        for page in (0..pages).step_by(2) {
            set.insert_run(page, 1);
        }
        let mut connection = Connection::new(Cursor::new(vec![]));
        set.send(&mut connection).expect("memory");
        let bytes = connection.stream().get_ref().clone();
        assert!(bytes.len() > 2 * MAX_MISSING);
        let mut input = Connection::new(Cursor::new(bytes.clone()));
        assert_eq!(
            PageSet::receive(&mut input, &region).expect("own frames").count(),
            pages / 2
        );

        let mut input = Connection::new(Cursor::new(bytes));
        let (_, first) = input.receive().expect("own frame");
        let (again, mut end) = (PageSet::empty(&region), 0);
        assert!(!again.add_frame(&first, &mut end).expect("own frame"));
        assert!(again.add_frame(&first, &mut end).is_err());
    }
}
