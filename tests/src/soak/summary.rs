//! What a soak has to tell: how many moves of which kind, their pauses, and what was held at the start and at the end.

use std::collections::BTreeMap;
use std::fmt;

use crate::process;

/// What a process held after a move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Open descriptors.
    pub descriptors: usize,
    /// Resident memory but for guest RAM, in bytes.
    pub memory: u64,
}

impl Held {
    /// By a process now.
    #[must_use]
    pub fn by(pid: u32) -> Self {
        Self {
            descriptors: process::descriptors(pid),
            memory: process::memory(pid).beyond_guest,
        }
    }
}

/// The first moves warm things up.
const WARM_UP: usize = 5;
/// Descriptors by which a process may hold more or less for the kind of its latest move, such as its memory file.
const DESCRIPTORS_BY_KIND: usize = 2;
/// Memory that may come and go.
const MEMORY_MARGIN: u64 = 8 << 20;

/// What a process held after each move.
#[derive(Debug, Clone, Default)]
pub struct History(Vec<Held>);

impl History {
    /// One more.
    pub fn push(&mut self, held: Held) {
        self.0.push(held);
    }

    /// The largest of the moves after the first few, and the largest of as many at the end.
    #[must_use]
    pub fn ends(&self) -> Option<(Held, Held)> {
        let counted = self.0.get(WARM_UP..)?;
        let window = (counted.len() / 4).clamp(1, 25);
        let largest = |held: &[Held]| {
            Some(Held {
                descriptors: held.iter().map(|held| held.descriptors).max()?,
                memory: held.iter().map(|held| held.memory).max()?,
            })
        };
        Some((
            largest(counted.get(..window)?)?,
            largest(counted.get(counted.len() - window..)?)?,
        ))
    }

    /// Panics if more was held at the end than after the first moves.
    pub fn assert_no_growth(&self, who: &str) {
        let Some((first, last)) = self.ends() else { return };
        assert!(
            last.descriptors <= first.descriptors + DESCRIPTORS_BY_KIND
                && last.memory <= first.memory + MEMORY_MARGIN,
            "{who} grows: {first:?}, and in the end {last:?}"
        );
    }
}

/// What a soak has to tell.
#[derive(Debug, Default)]
pub struct Summary {
    /// Moves by what was special about them, `KIND VALUE`.
    pub counts: BTreeMap<String, u32>,
    /// Downtimes of those that completed, in µs.
    pub downtimes: Vec<u64>,
    /// By process: the VM's VMM, whichever it was, and the daemons of the cluster.
    pub held: BTreeMap<String, History>,
}

impl Summary {
    /// Counts one.
    pub fn count(&mut self, what: impl Into<String>) {
        *self.counts.entry(what.into()).or_default() += 1;
    }

    /// How many there were.
    #[must_use]
    pub fn counted(&self, what: &str) -> u32 {
        self.counts.get(what).copied().unwrap_or(0)
    }

    /// Notes what a process holds.
    pub fn hold(&mut self, who: &str, pid: u32) {
        self.held.entry(who.to_owned()).or_default().push(Held::by(pid));
    }

    /// Panics if anything grew.
    pub fn assert_no_growth(&self) {
        for (who, history) in &self.held {
            history.assert_no_growth(who);
        }
    }
}

/// The value that so many hundredths of all are at most.
fn percentile(sorted: &[u64], percent: usize) -> u64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).copied().unwrap_or(0)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, count) in &self.counts {
            writeln!(f, "{what:<44} {count:>5}")?;
        }
        let mut sorted = self.downtimes.clone();
        sorted.sort_unstable();
        let ms = |percent| percentile(&sorted, percent) as f64 / 1000.0;
        let (median, p99, most) = (ms(50), ms(99), ms(100));
        writeln!(
            f,
            "downtime: median {median:.2} ms, p99 {p99:.2} ms, most {most:.2} ms"
        )?;
        for (who, history) in &self.held {
            let Some((first, last)) = history.ends() else {
                continue;
            };
            let mib = |held: Held| held.memory as f64 / f64::from(1 << 20);
            writeln!(
                f,
                "{who}: {} descriptors and {:.1} MiB after the first moves, {} and {:.1} MiB in the end",
                first.descriptors,
                mib(first),
                last.descriptors,
                mib(last)
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(held: impl Fn(u64) -> (usize, u64)) -> History {
        let mut history = History::default();
        for n in 0..100 {
            let (descriptors, memory) = held(n);
            history.push(Held { descriptors, memory });
        }
        history
    }

    #[test]
    fn what_stays_level_passes() {
        history(|n| (20 + usize::from(n % 3 == 0), (n % 7) << 20)).assert_no_growth("it");
    }

    #[test]
    #[should_panic(expected = "it grows")]
    fn a_descriptor_lost_every_ten_moves_is_found() {
        let ten = |n: u64| usize::try_from(n / 10).expect("small");
        history(|n| (20 + ten(n), 0)).assert_no_growth("it");
    }

    #[test]
    #[should_panic(expected = "it grows")]
    fn memory_that_grows_is_found() {
        history(|n| (20, n << 18)).assert_no_growth("it");
    }

    #[test]
    fn percentiles_are_of_the_values() {
        let sorted: Vec<u64> = (1..=100).collect();
        assert_eq!([50, 99, 100].map(|p| percentile(&sorted, p)), [50, 99, 100]);
        assert_eq!(percentile(&[], 50), 0);
    }
}
