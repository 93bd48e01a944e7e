//! How many connections a link is worth: one more is kept if it makes the first pass faster.

use std::time::{Duration, Instant};

/// How long each number of connections is measured.
const INTERVAL: Duration = Duration::from_millis(60);
/// One more must be worth this much.
const WORTH: f64 = 1.1;

/// Climbs from one connection up, while it pays.
#[derive(Debug)]
pub struct Widen {
    most: usize,
    active: usize,
    best: f64,
    since: Instant,
    bytes: u64,
    done: bool,
}

impl Widen {
    /// Of at most so many.
    #[must_use]
    pub fn up_to(most: usize) -> Self {
        Self {
            most,
            active: 1,
            best: 0.0,
            since: Instant::now(),
            bytes: 0,
            done: most <= 1,
        }
    }

    /// Looks at what was sent so far; gives another number of connections if it is time for one.
    pub fn look(&mut self, bytes: u64) -> Option<usize> {
        let passed = self.since.elapsed();
        if self.done || passed < INTERVAL {
            return None;
        }
        let rate = bytes.saturating_sub(self.bytes) as f64 / passed.as_secs_f64();
        (self.since, self.bytes) = (Instant::now(), bytes);
        self.judge(rate)
    }

    fn judge(&mut self, rate: f64) -> Option<usize> {
        if rate > self.best * WORTH {
            self.best = rate;
            if self.active < self.most {
                self.active += 1;
                return Some(self.active);
            }
            self.done = true;
            return None;
        }
        self.done = true;
        self.active = (self.active - 1).max(1);
        Some(self.active)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_one_connection_fills_keeps_one() {
        let mut widen = Widen::up_to(4);
        assert_eq!(widen.judge(100.0), Some(2));
        assert_eq!(widen.judge(101.0), Some(1));
        assert!(widen.done);
    }

    #[test]
    fn connections_that_pay_are_kept() {
        let mut widen = Widen::up_to(3);
        assert_eq!(widen.judge(100.0), Some(2));
        assert_eq!(widen.judge(190.0), Some(3));
        assert_eq!(widen.judge(250.0), None);
        assert!(widen.done && widen.active == 3);
    }
}
