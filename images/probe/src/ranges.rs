//! Guest RAM as one run of numbered pages, whatever holes lie between.

use crate::PAGE_SIZE;

/// Most separate ranges of RAM that are used.
const MAX_RANGES: usize = 16;

/// A guest physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GuestAddress(pub u64);

#[derive(Debug, Clone, Copy, Default)]
struct Range {
    start: u64,
    pages: u64,
}

/// Ranges of RAM, in the order in which they were added.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ranges {
    ranges: [Range; MAX_RANGES],
    count: usize,
}

impl Ranges {
    /// Adds the whole pages of `size` bytes at `start` that lie from `floor` up to `ceiling`. Ranges beyond the sixteenth are
    /// passed over.
    pub fn add(&mut self, start: GuestAddress, size: u64, floor: GuestAddress, ceiling: GuestAddress) {
        let end = start.0.saturating_add(size).min(ceiling.0) / PAGE_SIZE;
        let start = start.0.max(floor.0).div_ceil(PAGE_SIZE);
        if start < end && self.count < MAX_RANGES {
            self.ranges[self.count] = Range {
                start: start * PAGE_SIZE,
                pages: end - start,
            };
            self.count += 1;
        }
    }

    /// How many pages there are.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.pages).sum()
    }

    /// The address just above the highest page.
    #[must_use]
    pub fn end(&self) -> GuestAddress {
        GuestAddress(
            self.ranges
                .iter()
                .map(|range| range.start + range.pages * PAGE_SIZE)
                .max()
                .unwrap_or(0),
        )
    }

    /// Where page `number` lies; `None` if there are not so many.
    #[must_use]
    pub fn address(&self, number: u64) -> Option<GuestAddress> {
        let mut left = number;
        for range in &self.ranges[..self.count] {
            if left < range.pages {
                return Some(GuestAddress(range.start + left * PAGE_SIZE));
            }
            left -= range.pages;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(parts: &[(u64, u64)], floor: u64, ceiling: u64) -> Ranges {
        let mut ranges = Ranges::default();
        for &(start, size) in parts {
            ranges.add(
                GuestAddress(start),
                size,
                GuestAddress(floor),
                GuestAddress(ceiling),
            );
        }
        ranges
    }

    #[test]
    fn pages_run_on_across_a_hole() {
        let ranges = ranges(
            &[(0, 0x3000), (0x10_0000, 0x2000), (0x1_0000_0000, 0x1000)],
            0x1000,
            u64::MAX,
        );
        let addresses: Vec<_> = (0..6)
            .map(|page| ranges.address(page).map(|address| address.0))
            .collect();
        assert_eq!(
            addresses,
            [
                Some(0x1000),
                Some(0x2000),
                Some(0x10_0000),
                Some(0x10_1000),
                Some(0x1_0000_0000),
                None
            ]
        );
        assert_eq!((ranges.pages(), ranges.end().0), (5, 0x1_0000_1000));
    }

    #[test]
    fn parts_of_pages_and_what_is_out_of_bounds_are_left_out() {
        assert_eq!(ranges(&[(0x1800, 0x1000)], 0, u64::MAX).pages(), 0);
        assert_eq!(
            ranges(&[(0x1800, 0x1800)], 0, u64::MAX).address(0),
            Some(GuestAddress(0x2000))
        );
        assert_eq!(ranges(&[(0, 0x10_0000)], 0x8_0000, 0x9_0000).pages(), 16);
        assert_eq!(ranges(&[(0, 0x1000)], 0x8000, 0x9000).pages(), 0);
    }

    #[test]
    fn a_hostile_map_is_harmless() {
        assert_eq!(ranges(&[(u64::MAX, u64::MAX)], 0, 0x1000).pages(), 0);
        assert_eq!(ranges(&[(0, 0x1000); 40], 0, u64::MAX).pages(), 16);
    }
}
