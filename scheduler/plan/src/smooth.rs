//! Smoothing of reports, one sample a second. The server keeps one of these per measured thing. CPU figures come with their
//! own mean and error: see `shoal_estimate`.

use std::time::Duration;

use shoal_estimate::{Estimate, Meter};

use crate::model::{Bytes, BytesPerSecond};

/// How much a sample weighs against what was known, when it is above that and when it is below.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights {
    /// Above.
    pub rising: f64,
    /// Below.
    pub falling: f64,
}

/// Every constant of smoothing; docs/planning.md has the same table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Smoothing {
    /// How fast memory grows. The first sample counts in full.
    pub growth: Weights,
    /// A VM's dirty rate, and the working set of its writes: what a move would meet is the worst of late.
    pub peak: Weights,
}

/// The constants in use.
pub const SMOOTHING: Smoothing = Smoothing {
    growth: Weights {
        rising: 0.7,
        falling: 0.4,
    },
    peak: Weights {
        rising: 1.0,
        falling: 1.0 / 8.0,
    },
};

impl Weights {
    fn mean(self, old: f64, sample: f64) -> f64 {
        let weight = self.of(old, sample);
        (1.0 - weight) * old + weight * sample
    }

    fn of(self, old: f64, sample: f64) -> f64 {
        if sample > old { self.rising } else { self.falling }
    }
}

/// How fast an amount of memory grows: an exponentially weighted mean. A faster sample weighs 0.7 and the first one counts
/// in full, so that a guest that begins to fill its memory is seen in time; a slower one weighs 0.4.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Growth {
    last: Option<Bytes>,
    rate: Option<f64>,
}

impl Growth {
    /// Takes the amount now, `elapsed` after the last sample; answers the new rate. The first sample only sets the
    /// base, as does one that comes after no time. Start a new `Growth` when a VM arrives on another node.
    pub fn update(&mut self, amount: Bytes, elapsed: Duration) -> BytesPerSecond {
        let seconds = elapsed.as_secs_f64();
        if let Some(last) = self.last
            && seconds > 0.0
        {
            let sample = (amount.0 as f64 - last.0 as f64) / seconds;
            let rate = self.rate.unwrap_or(sample);
            let weight = SMOOTHING.growth.of(rate, sample);
            self.rate = Some(rate + weight * (sample - rate));
        }
        self.last = Some(amount);
        self.value()
    }

    /// The rate; 0 while the amount shrinks.
    #[must_use]
    pub fn value(self) -> BytesPerSecond {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // float casts saturate, and it is not negative
        BytesPerSecond(self.rate.unwrap_or(0.0).max(0.0) as u64)
    }
}

/// How fast memory grows for good, of what is not VMs: others' programs take some and give it back all the time, and a jump is no
/// growth. The mean over the last while, less one and a half standard errors.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SteadyGrowth {
    last: Option<Bytes>,
    rate: Meter,
}

impl SteadyGrowth {
    /// Takes the amount now, `elapsed` after the last sample; answers the new rate. The first sample only sets the base.
    pub fn update(&mut self, amount: Bytes, elapsed: Duration) -> BytesPerSecond {
        let seconds = elapsed.as_secs_f64();
        if let Some(last) = self.last
            && seconds > 0.0
        {
            self.rate
                .update((amount.0 as f64 - last.0 as f64) / seconds, elapsed);
        }
        self.last = Some(amount);
        self.value()
    }

    /// The rate; 0 while the amount shrinks, stands still, or has only jumped.
    #[must_use]
    pub fn value(self) -> BytesPerSecond {
        // One sample has no error yet.
        const LEAST: Duration = Duration::from_secs(3);
        // Of a single jump the mean is not above so many errors.
        const ERRORS: f64 = 1.5;
        if self.rate.age() < LEAST {
            return BytesPerSecond(0);
        }
        let Estimate { mean, error } = self.rate.value();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // float casts saturate, and it is not negative
        BytesPerSecond((mean - ERRORS * error).max(0.0) as u64)
    }
}

/// An amount, or a rate, whose worst of late matters: it rises at once and falls slowly.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Peak(f64);

impl Peak {
    /// The value after one more sample.
    #[must_use]
    pub fn next(self, sample: u64) -> Self {
        Self(SMOOTHING.peak.mean(self.0, sample as f64))
    }

    /// The value.
    #[must_use]
    pub fn value(self) -> u64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        // float casts saturate, and it is not negative
        let value = self.0 as u64;
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_rises_at_once_and_falls_slowly() {
        let peak = Peak::default().next(800);
        assert_eq!(peak.value(), 800);
        assert_eq!(peak.next(0).value(), 700);
        assert_eq!(peak.next(900).value(), 900);
        assert_eq!(peak.next(u64::MAX).value(), u64::MAX);
    }

    #[test]
    fn a_jump_is_no_steady_growth_and_a_leak_is() {
        let second = Duration::from_secs(1);
        let mut growth = SteadyGrowth::default();
        for _ in 0..30 {
            growth.update(Bytes::gib(4), second);
        }
        for _ in 0..30 {
            let rate = growth.update(Bytes::gib(5), second);
            assert!(rate < BytesPerSecond(2 << 20), "a jump of 1 GiB: {rate}");
        }
        let mut growth = SteadyGrowth::default();
        for n in 0..80_u64 {
            growth.update(Bytes::mib(20 * n.saturating_sub(40)), second);
        }
        let rate = growth.value();
        assert!(
            (5 << 20..=20 << 20).contains(&rate.0),
            "a leak of 20 MiB/s: {rate}"
        );
    }

    #[test]
    fn growth_follows_and_forgets() {
        let mut growth = Growth::default();
        let second = Duration::from_secs(1);
        for n in 0..20 {
            growth.update(Bytes::mib(40 * n), second);
            let expected = if n == 0 { 0 } else { 40 << 20 };
            assert_eq!(growth.value(), BytesPerSecond(expected));
        }
        for _ in 0..20 {
            growth.update(Bytes::mib(760), second);
        }
        assert!(growth.value() < BytesPerSecond(4096));
        assert_eq!(growth.update(Bytes(0), second), BytesPerSecond(0));
        assert_eq!(growth.update(Bytes(u64::MAX), Duration::ZERO), BytesPerSecond(0));
    }
}
