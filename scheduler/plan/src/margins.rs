//! How far the planner's own predictions have been off lately, and what it allows for that.
//!
//! Ushering has to end in time. That a move takes longer than predicted, that memory grows faster, or that a report comes late, each
//! by chance, must not be what kills a VM. So whoever feeds the planner keeps what became of its predictions
//! ([`Predictions`]) and tells a high quantile of it ([`Margins`]).

use std::time::Duration;

use crate::cluster::bytes;
use crate::model::Bytes;

/// So many outcomes of each kind are remembered.
const REMEMBERED: usize = 64;
/// Of ten outcomes, nine are no worse than what is allowed for.
const QUANTILE: f64 = 0.9;
/// What is assumed at first, as if it had been seen: a tenth longer, and a fifth faster.
const ASSUMED_MOVE_TIME: f64 = 1.1;
const ASSUMED_GROWTH: f64 = 1.2;
/// However bad it has been: beyond this nothing could be planned at all.
const MOST_RATIO: f64 = 3.0;
const MOST_DELAY: Duration = Duration::from_secs(5);

/// What ushering allows for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Margins {
    /// Moves may take so many times as long as predicted; at least 1.
    pub move_time: f64,
    /// Memory may grow so many times as fast; at least 1.
    pub growth: f64,
    /// Beyond that it may jump by so much at once.
    pub burst: Bytes,
    /// Reports may be older than they should be by so much.
    pub delay: Duration,
}

impl Default for Margins {
    /// All predictions come true.
    fn default() -> Self {
        Self {
            move_time: 1.0,
            growth: 1.0,
            burst: Bytes(0),
            delay: Duration::ZERO,
        }
    }
}

impl Margins {
    /// The same with every value usable.
    pub(crate) fn sane(self) -> Self {
        let ratio = |ratio: f64| {
            if ratio.is_nan() {
                1.0
            } else {
                ratio.clamp(1.0, MOST_RATIO)
            }
        };
        Self {
            move_time: ratio(self.move_time),
            growth: ratio(self.growth),
            burst: self.burst,
            delay: self.delay.min(MOST_DELAY),
        }
    }
}

/// What became of predictions.
#[derive(Debug, Clone)]
pub struct Predictions {
    move_time: Outcomes,
    growth: Outcomes,
    burst: Outcomes,
    delay: Outcomes,
}

impl Default for Predictions {
    fn default() -> Self {
        Self {
            move_time: Outcomes::assuming(ASSUMED_MOVE_TIME),
            growth: Outcomes::assuming(ASSUMED_GROWTH),
            burst: Outcomes::assuming(0.0),
            delay: Outcomes::assuming(0.0),
        }
    }
}

impl Predictions {
    /// A move has taken so long.
    pub fn moved(&mut self, predicted: Duration, took: Duration) {
        self.move_time
            .add(took.as_secs_f64() / predicted.as_secs_f64().max(1e-3));
    }

    /// A node's memory has grown by so much in a while for which so much was predicted, both in bytes. What is predicted to grow
    /// by little says nothing of how fast that which matters grows.
    pub fn grew(&mut self, predicted: f64, by: f64) {
        const LEAST: f64 = 4_194_304.0;
        if predicted >= LEAST {
            self.growth.add(by / predicted);
        }
        self.burst.add((by - predicted).max(0.0));
    }

    /// A report has come so long after the one before, where `expected` is usual.
    pub fn reported(&mut self, expected: Duration, after: Duration) {
        self.delay.add(after.saturating_sub(expected).as_secs_f64());
    }

    /// What to allow for.
    #[must_use]
    pub fn margins(&self) -> Margins {
        Margins {
            move_time: self.move_time.quantile(),
            growth: self.growth.quantile(),
            burst: bytes(self.burst.quantile()),
            delay: Duration::try_from_secs_f64(self.delay.quantile()).unwrap_or(MOST_DELAY),
        }
        .sane()
    }
}

/// The latest outcomes of one kind of prediction.
#[derive(Debug, Clone)]
struct Outcomes {
    latest: [f64; REMEMBERED],
    next: usize,
}

impl Outcomes {
    fn assuming(outcome: f64) -> Self {
        Self {
            latest: [outcome; REMEMBERED],
            next: 0,
        }
    }

    fn add(&mut self, outcome: f64) {
        if outcome.is_finite() {
            self.latest[self.next] = outcome;
            self.next = (self.next + 1) % REMEMBERED;
        }
    }

    fn quantile(&self) -> f64 {
        let mut sorted = self.latest;
        sorted.sort_unstable_by(f64::total_cmp);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a place in a short array
        let place = (REMEMBERED as f64 * QUANTILE) as usize;
        sorted[place.min(REMEMBERED - 1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_allowed_for_follows_what_has_happened() {
        let mut predictions = Predictions::default();
        let first = predictions.margins();
        assert_eq!(
            (first.move_time, first.growth, first.delay),
            (1.1, 1.2, Duration::ZERO)
        );
        for n in 0..REMEMBERED {
            // One in eight takes half as long again, and comes 2 s late.
            let bad = n % 8 == 0;
            predictions.moved(2 * SECOND, if bad { 3 * SECOND } else { 2 * SECOND });
            predictions.grew(1e9, if bad { 1.6e9 } else { 0.9e9 });
            predictions.reported(SECOND, if bad { 3 * SECOND } else { SECOND });
        }
        let then = predictions.margins();
        assert_eq!((then.move_time, then.growth, then.delay), (1.5, 1.6, 2 * SECOND));
        for _ in 0..REMEMBERED {
            predictions.moved(SECOND, SECOND / 2);
            predictions.grew(1e9, 0.0);
            predictions.grew(1.0, -1e9);
            predictions.reported(SECOND, SECOND);
        }
        assert_eq!(
            predictions.margins(),
            Margins::default(),
            "never less than what is predicted"
        );
        // Of what grows by little the ratio says nothing; a jump is a jump.
        for _ in 0..REMEMBERED {
            predictions.grew(1.0, 1e6);
        }
        let jumps = predictions.margins();
        assert_eq!((jumps.growth, jumps.burst), (1.0, Bytes(999_999)));
    }

    #[test]
    fn nonsense_is_bounded() {
        let mut predictions = Predictions::default();
        for _ in 0..REMEMBERED {
            predictions.moved(Duration::ZERO, Duration::MAX);
            predictions.grew(f64::NAN, 1.0);
            predictions.grew(1e9, f64::INFINITY);
            predictions.reported(Duration::ZERO, Duration::MAX);
        }
        let margins = predictions.margins();
        assert_eq!(
            (margins.move_time, margins.growth, margins.delay),
            (MOST_RATIO, ASSUMED_GROWTH, MOST_DELAY)
        );
        let nan = Margins {
            move_time: f64::NAN,
            growth: -1.0,
            ..margins
        };
        assert_eq!((nan.sane().move_time, nan.sane().growth), (1.0, 1.0));
    }
}
