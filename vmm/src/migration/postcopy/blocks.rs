//! Which parts of this process's address space are held back in post-copy.

use std::io;

use super::page_set::PageSet;
use super::uffd::HostRange;
use crate::memory::GuestMemory;
use crate::spec::PAGE_SIZE;

/// Faults are caught in blocks of this size: those that huge pages are made of.
const BLOCK: usize = 2 << 20;
/// More ranges than this become larger ones: each is a mapping of its own, of which a process has 65,530.
const MAX_RANGES: usize = 8192;
const PAGE: usize = 4096;

/// Where a region of guest memory lies in this process.
#[derive(Debug, Clone, Copy)]
pub struct Mapping {
    start: usize,
    len: usize,
    first: u64,
}

impl Mapping {
    /// The number of the page at an address, if it lies here.
    #[must_use]
    pub fn page_at(&self, address: usize) -> Option<u64> {
        let offset = address
            .checked_sub(self.start)
            .filter(|&offset| offset < self.len)?;
        Some(self.first + (offset / PAGE) as u64)
    }

    fn address_of(&self, page: u64) -> Option<usize> {
        let offset = usize::try_from(page.checked_sub(self.first)?)
            .ok()?
            .checked_mul(PAGE)?;
        (offset < self.len).then(|| self.start + offset)
    }
}

/// Where guest memory lies in this process.
#[must_use]
pub fn mappings(memory: &GuestMemory) -> Vec<Mapping> {
    memory
        .regions()
        .iter()
        .filter_map(|region| {
            let host = memory.host_range(region.start, region.len)?;
            Some(Mapping {
                start: host.addr(),
                len: usize::try_from(region.len).ok()?,
                first: region.start.0 / PAGE_SIZE,
            })
        })
        .collect()
}

/// The blocks that hold missing pages, adjacent ones as one; larger blocks if there would be too many.
#[must_use]
pub fn ranges(mappings: &[Mapping], missing: &PageSet) -> Vec<HostRange> {
    let mut block = BLOCK;
    loop {
        let ranges = ranges_of(mappings, missing, block);
        if ranges.len() <= MAX_RANGES {
            return ranges;
        }
        block *= 2;
    }
}

fn ranges_of(mappings: &[Mapping], missing: &PageSet, block: usize) -> Vec<HostRange> {
    let mut ranges: Vec<HostRange> = vec![];
    for (first, pages) in missing.runs() {
        let at = mappings.iter().find_map(|mapping| {
            Some((
                mapping,
                mapping.address_of(first)?,
                mapping.address_of(first + pages - 1)?,
            ))
        });
        let Some((mapping, from, last)) = at else { continue };
        let start = (from / block * block).max(mapping.start);
        let end = ((last + PAGE).div_ceil(block) * block).min(mapping.start + mapping.len);
        match ranges.last_mut() {
            // Never across regions, even if they happen to be neighbours here.
            Some(range) if range.start >= mapping.start && range.start + range.len >= start => {
                range.len = range.len.max(end - range.start);
            }
            _ => ranges.push(HostRange {
                start,
                len: end - start,
            }),
        }
    }
    ranges
}

/// Makes pages unbacked, so that they are missing to userfaultfd.
///
/// # Errors
/// When they are not guest memory, or the host refuses.
pub fn discard(memory: &GuestMemory, first: u64, pages: u64) -> io::Result<()> {
    let region = memory.regions().into_iter().find(|region| {
        let start = region.start.0 / PAGE_SIZE;
        first >= start && first - start < region.pages()
    });
    let region = region.ok_or(io::ErrorKind::InvalidInput)?;
    memory.discard(region.slot, first - region.start.0 / PAGE_SIZE, pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    const START: usize = 1 << 40;

    fn parts(pages: u64, offset: usize) -> (Vec<Mapping>, PageSet) {
        let region = Region {
            slot: 0,
            start: GuestAddress(0),
            len: pages * PAGE_SIZE,
        };
        let mapping = Mapping {
            start: START + offset,
            len: usize::try_from(region.len).expect("64 bits"),
            first: 0,
        };
        (vec![mapping], PageSet::empty(&[region]))
    }

    proptest! {
        #[test]
        fn every_missing_page_lies_in_one_range_and_ranges_lie_in_guest_memory(
            missing in proptest::collection::btree_set(0u64..20_000, 1..60), offset in 0usize..512) {
            let (mappings, set) = parts(20_000, offset * PAGE);
            for &page in &missing {
                set.insert_run(page, 1);
            }
            let ranges = ranges(&mappings, &set);
            for page in missing {
                let address = mappings[0].address_of(page).expect("inside");
                prop_assert_eq!(mappings[0].page_at(address + 5), Some(page));
                let within = |range: &&HostRange| (range.start..range.start + range.len).contains(&address);
                prop_assert_eq!(ranges.iter().filter(within).count(), 1);
            }
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].start + pair[0].len < pair[1].start, "neighbours are one range");
            }
            for range in ranges {
                prop_assert!(range.start >= mappings[0].start && range.start + range.len <= mappings[0].start + mappings[0].len);
                prop_assert!(range.start.is_multiple_of(BLOCK) || range.start == mappings[0].start);
            }
        }
    }

    #[test]
    fn a_scattered_set_does_not_use_up_the_mappings_of_the_process() {
        let pages = (192u64 << 30) / PAGE_SIZE;
        let (mappings, set) = parts(pages, 0);
        for page in (0..pages).step_by(3072) {
            set.insert_run(page, 1);
        }
        let ranges = ranges(&mappings, &set);
        assert!(ranges.len() <= MAX_RANGES && ranges.len() > 1, "{}", ranges.len());
    }
}
