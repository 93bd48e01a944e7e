//! The order in which the working set is dirtied: every page once per round, far apart from one another, so that each page's
//! generation follows from how far the sweep has come and needs no table.

use crate::page::Identity;

/// The place of the sweep.
#[derive(Debug, Clone, Copy)]
pub struct Sweep {
    pages: u64,
    stride: u64,
    inverse: u64,
    /// Full rounds done.
    round: u64,
    /// Pages dirtied in this round.
    cursor: u64,
}

impl Sweep {
    /// A sweep over pages 0 to `pages` - 1, which must be fewer than 2^32.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        // About the golden ratio of the pages: successive pages then lie as far apart as can be.
        let wish = pages / 1000 * 618 + pages % 1000 * 618 / 1000;
        let (stride, inverse) = (wish.max(1)..)
            .find_map(|stride| Some((stride, inverse(stride, pages)?)))
            .unwrap_or((1, 1));
        Self {
            pages,
            stride,
            inverse,
            round: 0,
            cursor: 0,
        }
    }

    /// The page that comes next, as it is now; `None` for an empty working set.
    #[must_use]
    pub fn next(&self) -> Option<Identity> {
        (self.pages > 0).then(|| Identity {
            number: self.cursor * self.stride % self.pages,
            generation: self.round,
        })
    }

    /// Says that the next page has been dirtied.
    pub fn advance(&mut self) {
        self.cursor += 1;
        if self.cursor == self.pages {
            self.cursor = 0;
            self.round += 1;
        }
    }

    /// What page `number` is now. Pages outside the working set stay at generation 0.
    #[must_use]
    pub fn identity(&self, number: u64) -> Identity {
        let generation = if number >= self.pages {
            0
        } else if number * self.inverse % self.pages < self.cursor {
            self.round + 1
        } else {
            self.round
        };
        Identity { number, generation }
    }
}

/// The inverse of `value` modulo `modulus`, by Euclid; `None` if they have a common factor.
fn inverse(value: u64, modulus: u64) -> Option<u64> {
    if modulus <= 1 {
        return Some(0);
    }
    // Invariant: a = x * value and b = y * value, both modulo `modulus`.
    let (mut a, mut x) = (value % modulus, 1);
    let (mut b, mut y) = (modulus, 0);
    while a != 0 {
        let quotient = b / a;
        (a, b) = (b % a, a);
        (x, y) = ((y + (modulus - quotient * x % modulus)) % modulus, x);
    }
    (b == 1).then_some(y)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_match_a_table() {
        for pages in [1, 2, 3, 7, 16, 100, 1000, 4096, 4097] {
            let mut sweep = Sweep::new(pages);
            let mut table = vec![0; usize::try_from(pages).expect("small")];
            for step in 0..pages * 3 + pages / 2 {
                let next = sweep.next().expect("not empty");
                let entry = &mut table[usize::try_from(next.number).expect("small")];
                assert_eq!(next.generation, *entry, "step {step} of {pages} pages");
                *entry += 1;
                sweep.advance();
                assert_eq!(sweep.identity(next.number).generation, *entry);
            }
            for (number, generation) in (0..).zip(&table) {
                assert_eq!(
                    sweep.identity(number).generation,
                    *generation,
                    "page {number} of {pages}"
                );
            }
            assert_eq!(sweep.identity(pages).generation, 0);
        }
    }

    #[test]
    fn an_empty_working_set_has_no_next_page() {
        assert_eq!(Sweep::new(0).next(), None);
        assert_eq!(Sweep::new(0).identity(5).generation, 0);
    }

    #[test]
    fn the_largest_working_set_does_not_overflow() {
        let pages = u64::from(u32::MAX);
        let mut sweep = Sweep::new(pages);
        sweep.cursor = pages - 1;
        let last = sweep.next().expect("not empty");
        assert_eq!(sweep.identity(last.number).generation, 0);
        sweep.advance();
        assert_eq!(sweep.identity(last.number).generation, 1);
    }
}
