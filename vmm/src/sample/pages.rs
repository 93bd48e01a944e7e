//! Which pages are tracked, in how many windows each was written, and what that says of all.

use std::collections::BTreeMap;

/// So many pages are tracked at most: as many faults a window can cost the guest.
pub const TRACKED_PAGES: u64 = 64 * ROW;
/// Pages in a row: a huge page. To track any page of one, KVM maps all of it in small pages; where it cannot split the huge
/// page it takes it away, and the guest takes a fault for each small one that it touches. So shorter rows, spread over more
/// huge pages, would cost the guest more.
const ROW: u64 = 512;
/// The same pages are tracked in so many windows, then others.
pub(super) const WINDOWS: u32 = 8;
/// What no window saw counts at most so many times what they saw: a guest that goes through its memory in order is hardly ever
/// seen twice in one place, which looks like a set without end.
const UNSEEN_AT_MOST: u64 = 1;

/// 64 pages of a region, some of them tracked.
#[derive(Debug, Clone, Copy, Default)]
struct Word {
    tracked: u64,
    /// Written in one window at least, in two, in three.
    seen: [u64; 3],
}

/// Pages under a magnifying glass.
#[derive(Debug, Default)]
pub(super) struct Tracked {
    /// By region and place in it.
    words: BTreeMap<(u32, u64), Word>,
    pages: u64,
    all_pages: u64,
    windows: u32,
}

impl Tracked {
    /// Pages of regions of so many pages: all of them if they are few, otherwise one row in each of equal parts of memory.
    pub(super) fn draw(regions: &[u64], random: u64) -> Self {
        let all_pages: u64 = regions.iter().sum();
        let mut tracked = Self {
            all_pages,
            ..Self::default()
        };
        let rows = all_pages.div_ceil(ROW).max(1);
        let wanted = (TRACKED_PAGES / ROW).min(rows);
        let mut random = random;
        for part in 0..wanted {
            let within = |part: u64| u128::from(rows) * u128::from(part) / u128::from(wanted);
            let (start, end) = (within(part), within(part + 1));
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let row = start + u128::from(random) % (end - start).max(1);
            tracked.add_row(regions, u64::try_from(row).unwrap_or(0) * ROW);
        }
        tracked.pages = tracked
            .words
            .values()
            .map(|word| u64::from(word.tracked.count_ones()))
            .sum();
        tracked
    }

    /// From this page of all on; what lies past a region's end is left out.
    fn add_row(&mut self, regions: &[u64], first: u64) {
        for page in first..first + ROW {
            let mut left = page;
            for (&pages, slot) in regions.iter().zip(0..) {
                if left < pages {
                    let word = self.words.entry((slot, left / 64)).or_default();
                    word.tracked |= 1 << (left % 64);
                    break;
                }
                left -= pages;
            }
        }
    }

    /// The tracked pages of a region as one bit each, from a multiple of 64 on; `None` if there are none.
    pub(super) fn bitmap(&self, slot: u32) -> Option<(u64, Vec<u64>)> {
        let of_slot = || self.words.range((slot, 0)..=(slot, u64::MAX));
        let first = of_slot().next()?.0.1;
        let last = of_slot().next_back()?.0.1;
        let mut words = vec![0; usize::try_from(last - first + 1).ok()?];
        for (&(_, index), word) in of_slot() {
            words[usize::try_from(index - first).ok()?] = word.tracked;
        }
        Some((first * 64, words))
    }

    /// Takes the logs of all regions at the end of a window; answers how many of the tracked pages were written.
    pub(super) fn add(&mut self, logs: &[Vec<u64>]) -> u64 {
        let mut written = 0;
        for (&(slot, index), word) in &mut self.words {
            let log = usize::try_from(slot).ok().and_then(|slot| logs.get(slot));
            let place = usize::try_from(index).ok();
            let log = log.zip(place).and_then(|(log, place)| log.get(place));
            let now = word.tracked & log.copied().unwrap_or(0);
            let [once, twice, thrice] = &mut word.seen;
            *thrice |= *twice & now;
            *twice |= *once & now;
            *once |= now;
            written += u64::from(now.count_ones());
        }
        self.windows += 1;
        written
    }

    /// How many of the tracked pages are in the working set.
    pub(super) fn working_set(&self) -> u64 {
        let count = |at_least: usize| -> u64 {
            let ones = |word: &Word| u64::from(word.seen[at_least - 1].count_ones());
            self.words.values().map(ones).sum()
        };
        let (seen, twice, thrice) = (count(1), count(2), count(3));
        estimate(seen, seen - twice, twice - thrice, self.windows).min(self.pages)
    }

    /// What so many of the tracked pages stand for.
    pub(super) fn of_all(&self, pages: u64) -> u64 {
        let all = u128::from(pages) * u128::from(self.all_pages) / u128::from(self.pages.max(1));
        u64::try_from(all).unwrap_or(u64::MAX)
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) fn windows(&self) -> u32 {
        self.windows
    }
}

/// Chao's estimate, in the form without bias, of how many pages are written if so many were seen, of them so many in one
/// window alone and so many in two.
fn estimate(seen: u64, once: u64, twice: u64, windows: u32) -> u64 {
    let windows = u64::from(windows);
    if windows < 2 {
        return seen;
    }
    let unseen = (windows - 1) * once * once.saturating_sub(1) / (windows * 2 * (twice + 1));
    seen + unseen.min(seen * UNSEEN_AT_MOST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn logs(regions: &[u64], mut written: impl FnMut(u64) -> bool) -> Vec<Vec<u64>> {
        let mut page = 0;
        let mut log = |pages: u64| -> Vec<u64> {
            let mut words = vec![0; usize::try_from(pages.div_ceil(64)).expect("small")];
            for bit in 0..pages {
                if written(page) {
                    words[usize::try_from(bit / 64).expect("small")] |= 1 << (bit % 64);
                }
                page += 1;
            }
            words
        };
        regions.iter().map(|&pages| log(pages)).collect()
    }

    proptest! {
        #[test]
        fn what_is_tracked_lies_in_memory_and_is_spread(low in 512u64..3000, high in 0u64..100_000, random in any::<u64>()) {
            let regions = [low, high];
            let tracked = Tracked::draw(&regions, random);
            prop_assert!(tracked.pages() <= TRACKED_PAGES && tracked.pages() > 0);
            for (slot, pages) in [(0, low), (1, high)] {
                let Some((first, words)) = tracked.bitmap(slot) else { continue };
                prop_assert_eq!(first % 64, 0);
                for (start, count) in crate::dirty::runs(&words) {
                    prop_assert!(first + start + count <= pages);
                }
            }
            // All of it was written: the sample says so.
            let mut tracked = tracked;
            let written = tracked.add(&logs(&regions, |_| true));
            prop_assert_eq!(written, tracked.pages());
            prop_assert_eq!(tracked.of_all(written), low + high);
        }

        #[test]
        fn hostile_logs_are_no_more_than_what_is_tracked(random in any::<u64>(), words in prop::collection::vec(any::<u64>(), 0..40)) {
            let mut tracked = Tracked::draw(&[4096], random);
            for _ in 0..WINDOWS {
                prop_assert!(tracked.add(std::slice::from_ref(&words)) <= tracked.pages());
                prop_assert!(tracked.working_set() <= tracked.pages());
            }
        }
    }

    #[test]
    fn a_small_guest_is_tracked_whole() {
        let tracked = Tracked::draw(&[512, 100], 7);
        assert_eq!(tracked.pages(), 612);
        assert_eq!(tracked.bitmap(0).expect("tracked").1, vec![u64::MAX; 8]);
    }

    /// A guest of 1 GiB that writes a random part of a working set of 200 MiB in each window.
    #[test]
    fn the_working_set_is_estimated_from_windows_that_each_see_a_part() {
        let (all, set) = (262_144_u64, 51_200);
        let mut tracked = Tracked::draw(&[all], 3);
        let mut random = 12_345_u64;
        for window in 1..=WINDOWS {
            let written = tracked.add(&logs(&[all], |page| {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695);
                (50_000..50_000 + set).contains(&page) && random >> 61 == 0
            }));
            let rate = tracked.of_all(written);
            assert!((set / 16..set / 4).contains(&rate), "window {window}: {rate}");
            let estimate = tracked.of_all(tracked.working_set());
            if window >= WINDOWS / 2 {
                assert!(
                    (set / 2..set * 3 / 2).contains(&estimate),
                    "window {window}: {estimate}"
                );
            }
        }
    }

    #[test]
    fn one_that_never_writes_a_page_again_has_no_more_than_twice_what_was_seen() {
        assert_eq!(estimate(100, 100, 0, 8), 200);
        assert_eq!(estimate(100, 50, 25, 8), 141);
        assert_eq!(estimate(100, 0, 0, 8), 100);
        assert_eq!(estimate(100, 100, 0, 1), 100);
        assert_eq!(estimate(0, 0, 0, 8), 0);
    }
}
