//! What became of the planner's predictions, for the margins of the next ones: see `shoal_plan::Predictions`.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shoal_plan::Margins;

/// Agents report so often.
const INTERVAL: Duration = Duration::from_secs(1);
/// Growth is compared over at least so long: about what a move takes.
const GROWTH_OVER: Duration = Duration::from_secs(3);
/// Longer than this between two reports is silence, not a delay.
const LONGEST_DELAY: Duration = Duration::from_secs(10);

/// Of all nodes together.
#[derive(Debug, Default)]
pub struct Predictions(Mutex<shoal_plan::Predictions>);

impl Predictions {
    /// A move that a plan made has taken so long.
    pub fn moved(&self, expected: Duration, took: Duration) {
        self.lock().moved(expected, took);
    }

    /// A node has reported, `after` its report before; if its memory was looked ahead then, with what has become of that.
    pub fn reported(&self, after: Duration, grown: Option<Grown>) {
        let mut predictions = self.lock();
        if after < LONGEST_DELAY {
            predictions.reported(INTERVAL, after);
        }
        if let Some(Grown { predicted, by }) = grown {
            predictions.grew(predicted, by);
        }
    }

    /// What to allow for.
    pub fn margins(&self) -> Margins {
        self.lock().margins()
    }

    fn lock(&self) -> MutexGuard<'_, shoal_plan::Predictions> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// By how many bytes the VMs of a node were to grow, and by how many they did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grown {
    pub predicted: f64,
    pub by: f64,
}

/// What one node's memory was when it was looked ahead.
#[derive(Debug, Clone, Copy)]
pub struct Forecast {
    at: Instant,
    held: u64,
    rate: u64,
}

impl Forecast {
    /// The VMs of a node hold so much and grow so many bytes per second. Answers what became of the forecast before, once
    /// enough time has passed. While VMs come and go, or arrive, there is none: that is no growth.
    pub fn next(known: &mut Option<Self>, now: Instant, held: u64, rate: u64, steady: bool) -> Option<Grown> {
        let before = known.filter(|_| steady);
        let due = before.filter(|before| now.saturating_duration_since(before.at) >= GROWTH_OVER);
        if before.is_none() || due.is_some() {
            *known = steady.then_some(Self { at: now, held, rate });
        }
        let before = due?;
        let seconds = now.saturating_duration_since(before.at).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "bytes of memory are below 2^53")]
        let (predicted, by) = (before.rate as f64 * seconds, held as f64 - before.held as f64);
        Some(Grown { predicted, by })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_compared_with_what_was_expected_once_some_time_has_passed() {
        let (start, mut known) = (Instant::now(), None);
        let mut at = |second: u64, held, steady| {
            Forecast::next(&mut known, start + Duration::from_secs(second), held, 10, steady)
        };
        assert_eq!(at(0, 100, true), None);
        assert_eq!(at(2, 130, true), None);
        let grown = Grown {
            predicted: 30.0,
            by: 60.0,
        };
        assert_eq!(at(3, 160, true), Some(grown));
        assert_eq!(at(6, 900, false), None, "a VM has come");
        assert_eq!(at(9, 900, true), None);
        let shrunk = Grown {
            predicted: 30.0,
            by: -100.0,
        };
        assert_eq!(at(12, 800, true), Some(shrunk));
    }

    #[test]
    fn silence_is_no_delay() {
        let predictions = Predictions::default();
        for _ in 0..64 {
            predictions.reported(Duration::from_secs(60), None);
        }
        assert_eq!(predictions.margins().delay, Duration::ZERO);
        for _ in 0..64 {
            predictions.reported(Duration::from_secs(3), None);
        }
        assert_eq!(predictions.margins().delay, Duration::from_secs(2));
    }
}
