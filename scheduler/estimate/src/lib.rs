//! The mean of a measured figure over the last while, and how far it may be off.
//!
//! A figure that is sampled each second says little by itself: a guest that works for 20 s and rests for 20 s looks busy in one
//! sample and idle in the next. A [`Meter`] keeps the mean, weighed exponentially over [`TIME_CONSTANT`], and its standard
//! error. Samples of one guest are not independent, so the error counts fewer of them than there are: with the correlation r
//! of neighbouring samples, n samples tell as much as n (1 - r) / (1 + r) independent ones (those of a first-order
//! autoregressive process). A guest that alternates thus has a large error although it has been seen for long.
#![forbid(unsafe_code)]

use std::time::Duration;

/// A sample of that age weighs 1 / e of one taken now.
pub const TIME_CONSTANT: Duration = Duration::from_secs(20);
/// Figures that have been seen for less than this say nothing yet: what was asked for counts instead.
pub const WINDOW: Duration = Duration::from_secs(20);

/// More correlation than this cannot be told from a trend within the time that a meter remembers.
const MOST_CORRELATED: f64 = 0.95;

/// A measured figure.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Estimate {
    /// Its mean, in its own unit.
    pub mean: f64,
    /// Standard error of the mean, in the same unit.
    pub error: f64,
}

impl Estimate {
    /// A figure that is known.
    #[must_use]
    pub const fn exactly(mean: f64) -> Self {
        Self { mean, error: 0.0 }
    }

    /// The same with both values usable: no negative, no infinite and no undefined ones, none above `most`.
    #[must_use]
    pub fn sane(self, most: f64) -> Self {
        let sane = |value: f64| {
            if value.is_nan() {
                0.0
            } else {
                value.clamp(0.0, most)
            }
        };
        Self {
            mean: sane(self.mean),
            error: sane(self.error),
        }
    }

    /// So much of it.
    #[must_use]
    pub fn times(self, part: f64) -> Self {
        Self {
            mean: self.mean * part,
            error: self.error * part.abs(),
        }
    }
}

/// Takes samples of one figure.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Meter {
    /// Seconds that samples stand for: all, and weighed by age.
    seconds: f64,
    weight: f64,
    /// Sum of the squares of the weights.
    squares: f64,
    mean: f64,
    variance: f64,
    /// Of neighbouring samples.
    covariance: f64,
    last: f64,
}

impl Meter {
    /// Takes what the figure was over the last `elapsed`. No time, or no number, is no sample.
    pub fn update(&mut self, sample: f64, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        if seconds <= 0.0 || !sample.is_finite() {
            return;
        }
        let keep = (-seconds / TIME_CONSTANT.as_secs_f64()).exp();
        self.weight = self.weight * keep + seconds;
        self.squares = self.squares * keep * keep + seconds * seconds;
        let part = seconds / self.weight;
        let off = sample - self.mean;
        let last_off = if self.seconds > 0.0 {
            self.last - self.mean
        } else {
            0.0
        };
        self.mean += part * off;
        self.variance = (1.0 - part) * (self.variance + part * off * off);
        self.covariance = (1.0 - part) * (self.covariance + part * off * last_off);
        self.last = sample;
        self.seconds += seconds;
    }

    /// For how long it has been taking samples.
    #[must_use]
    pub fn age(&self) -> Duration {
        Duration::try_from_secs_f64(self.seconds).unwrap_or(Duration::MAX)
    }

    /// The mean and its error so far; 0 of no samples.
    #[must_use]
    pub fn value(&self) -> Estimate {
        if self.squares <= 0.0 {
            return Estimate::default();
        }
        let count = (self.weight * self.weight / self.squares).max(1.0);
        let correlation = if self.variance > 0.0 {
            (self.covariance / self.variance).clamp(0.0, MOST_CORRELATED)
        } else {
            0.0
        };
        let independent = (count * (1.0 - correlation) / (1.0 + correlation)).max(1.0);
        Estimate {
            mean: self.mean,
            error: (self.variance / independent).sqrt(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn after(samples: impl IntoIterator<Item = f64>) -> Meter {
        let mut meter = Meter::default();
        samples
            .into_iter()
            .for_each(|sample| meter.update(sample, SECOND));
        meter
    }

    #[test]
    fn what_does_not_change_is_known_from_the_first_sample_on() {
        assert_eq!(after([]).value(), Estimate::default());
        assert_eq!(after([0.7]).value(), Estimate::exactly(0.7));
        let meter = after([0.7; 30]);
        assert!((meter.value().mean - 0.7).abs() < 1e-12 && meter.value().error < 1e-6);
        assert_eq!(meter.age(), Duration::from_secs(30));
    }

    #[test]
    fn what_alternates_slowly_stays_uncertain() {
        // 20 s busy, 20 s idle, looked at in any second: its long-run mean is always within two errors.
        let cycle = |second: usize| f64::from(u8::from(second % 40 < 20));
        for end in 60..200 {
            let Estimate { mean, error } = after((0..end).map(cycle)).value();
            assert!((mean - 0.5).abs() <= 2.0 * error, "{end}: {mean} +- {error}");
            assert!(error > 0.15, "{end}: {error}");
        }
    }

    #[test]
    fn what_flickers_is_known_well() {
        let Estimate { mean, error } = after((0..100).map(|second| f64::from(second % 2))).value();
        assert!((mean - 0.5).abs() < 0.03 && error < 0.1, "{mean} +- {error}");
    }

    #[test]
    fn a_change_for_good_is_believed_after_a_while() {
        let meter = |seconds| {
            after(
                [0.0; 300]
                    .into_iter()
                    .chain([1.0].into_iter().cycle().take(seconds)),
            )
        };
        let low = |seconds| meter(seconds).value().mean - 2.0 * meter(seconds).value().error;
        assert!(low(10) < 0.3, "{}", low(10));
        assert!(low(90) > 0.7, "{}", low(90));
    }

    #[test]
    fn long_samples_weigh_more() {
        let mut meter = Meter::default();
        meter.update(1.0, Duration::from_secs(3));
        meter.update(0.0, SECOND);
        assert!(meter.value().mean > 0.7);
        let before = meter;
        meter.update(f64::NAN, SECOND);
        meter.update(5.0, Duration::ZERO);
        assert_eq!(meter, before);
    }

    proptest! {
        #[test]
        fn the_mean_is_within_the_samples(samples in prop::collection::vec((0.0..64.0_f64, 1_u64..5000), 1..200)) {
            let mut meter = Meter::default();
            for (sample, milliseconds) in &samples {
                meter.update(*sample, Duration::from_millis(*milliseconds));
            }
            let (least, most) = samples.iter().fold((f64::MAX, 0.0_f64), |(least, most), (sample, _)| {
                (least.min(*sample), most.max(*sample))
            });
            let Estimate { mean, error } = meter.value();
            prop_assert!(mean >= least - 1e-9 && mean <= most + 1e-9);
            prop_assert!(error >= 0.0 && error <= most - least + 1e-9);
        }

        #[test]
        fn nonsense_is_made_usable(mean in any::<f64>(), error in any::<f64>()) {
            let sane = Estimate { mean, error }.sane(1e6);
            prop_assert!((0.0..=1e6).contains(&sane.mean) && (0.0..=1e6).contains(&sane.error));
        }
    }
}
