//! Time: ticks of the TSC, rates, and the worst gap.

/// A reading of the TSC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticks(pub u64);

impl Ticks {
    /// Ticks since `earlier`; 0 if time went backwards.
    #[must_use]
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// How fast the TSC runs.
#[derive(Debug, Clone, Copy)]
pub struct Frequency {
    khz: u64,
}

impl Frequency {
    /// `None` for 0.
    #[must_use]
    pub fn from_khz(khz: u32) -> Option<Self> {
        (khz > 0).then_some(Self { khz: khz.into() })
    }

    /// From the scale of KVM's pvclock: nanoseconds = (ticks << `shift`) * `multiplier` >> 32. `None` if it makes no sense.
    #[must_use]
    pub fn from_pvclock(multiplier: u32, shift: i8) -> Option<Self> {
        let khz = (1_000_000u64 << 32).checked_div(multiplier.into())?;
        let khz = if shift < 0 {
            khz.checked_shl(shift.unsigned_abs().into())?
        } else {
            khz.checked_shr(shift.unsigned_abs().into())?
        };
        Self::from_khz(u32::try_from(khz).ok()?)
    }

    /// In kHz.
    #[must_use]
    pub fn khz(self) -> u64 {
        self.khz
    }

    /// Whole milliseconds in a number of ticks.
    #[must_use]
    pub fn milliseconds(self, ticks: u64) -> u64 {
        ticks / self.khz
    }

    /// Whole microseconds in a number of ticks.
    #[must_use]
    pub fn microseconds(self, ticks: u64) -> u64 {
        (ticks / self.khz).saturating_mul(1000) + ticks % self.khz * 1000 / self.khz
    }

    /// Ticks in a number of milliseconds.
    #[must_use]
    pub fn ticks(self, milliseconds: u64) -> u64 {
        milliseconds.saturating_mul(self.khz)
    }
}

/// Says when the next piece of work is due.
#[derive(Debug, Clone, Copy)]
pub struct Pacer {
    interval: u64,
    /// How far work may fall behind before what is owed is forgiven.
    patience: u64,
    next: Ticks,
}

impl Pacer {
    /// `per_second` pieces of work a second from `now` on; 0: always due. After a pause at most 10 ms of work is made up for.
    #[must_use]
    pub fn new(per_second: u64, frequency: Frequency, now: Ticks) -> Self {
        let interval = frequency.ticks(1000).checked_div(per_second).unwrap_or(0);
        Self {
            interval,
            patience: frequency.ticks(10),
            next: now,
        }
    }

    /// Whether a piece of work is due.
    #[must_use]
    pub fn is_due(&self, now: Ticks) -> bool {
        now >= self.next
    }

    /// Says that a piece of work has been done.
    pub fn advance(&mut self, now: Ticks) {
        let oldest = now.0.saturating_sub(self.patience);
        self.next = Ticks(self.next.0.max(oldest).saturating_add(self.interval));
    }
}

/// The longest time between two iterations of the main loop.
#[derive(Debug, Clone, Copy)]
pub struct GapMeter {
    last: Ticks,
    /// In ticks, since [`GapMeter::take_max`] was called.
    max: u64,
    /// In ticks, since the start.
    worst: u64,
    /// How often the TSC went backwards.
    backwards: u64,
}

impl GapMeter {
    /// Starts at `now`.
    #[must_use]
    pub fn new(now: Ticks) -> Self {
        Self {
            last: now,
            max: 0,
            worst: 0,
            backwards: 0,
        }
    }

    /// To be called in every iteration.
    pub fn iteration(&mut self, now: Ticks) {
        self.backwards += u64::from(now < self.last);
        self.max = self.max.max(now.since(self.last));
        self.last = now;
    }

    /// The longest gap in ticks since the last call.
    pub fn take_max(&mut self) -> u64 {
        self.worst = self.worst.max(self.max);
        core::mem::take(&mut self.max)
    }

    /// The longest gap in ticks that [`GapMeter::take_max`] ever returned.
    #[must_use]
    pub fn worst(&self) -> u64 {
        self.worst
    }

    /// How often the TSC went backwards.
    #[must_use]
    pub fn backwards(&self) -> u64 {
        self.backwards
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequency() -> Frequency {
        Frequency::from_khz(2_000_000).expect("not zero")
    }

    #[test]
    fn pvclock_scale_gives_the_frequency() {
        // 2 GHz: half a nanosecond a tick. 4 GHz needs a shift the other way.
        assert_eq!(
            Frequency::from_pvclock(0x8000_0000, 0).expect("valid").khz(),
            2_000_000
        );
        assert_eq!(
            Frequency::from_pvclock(0x8000_0000, -1).expect("valid").khz(),
            4_000_000
        );
        assert_eq!(
            Frequency::from_pvclock(0x8000_0000, 1).expect("valid").khz(),
            1_000_000
        );
        assert!(Frequency::from_pvclock(0, 0).is_none());
        assert!(Frequency::from_pvclock(1, -128).is_none());
        assert!(Frequency::from_pvclock(1, 127).is_none());
    }

    #[test]
    fn times_do_not_overflow() {
        assert_eq!(frequency().microseconds(3_000), 1);
        assert_eq!(frequency().milliseconds(6_000_000), 3);
        assert_eq!(frequency().microseconds(u64::MAX), u64::MAX / 2_000);
    }

    #[test]
    fn a_pacer_keeps_its_rate_and_forgives_a_long_pause() {
        let mut pacer = Pacer::new(1000, frequency(), Ticks(0));
        let mut done = 0;
        let mut run = |from: u64, to: u64| {
            let before = done;
            for now in (from..to).step_by(10_000).map(Ticks) {
                if pacer.is_due(now) {
                    pacer.advance(now);
                    done += 1;
                }
            }
            done - before
        };
        assert_eq!(run(0, 2_000_000_000), 1000);
        let after_a_pause = run(20_000_000_000, 22_000_000_000);
        assert!((1000..=1012).contains(&after_a_pause), "{after_a_pause}");
    }

    #[test]
    fn gaps_are_seen_and_time_going_back_is_counted() {
        let mut meter = GapMeter::new(Ticks(100));
        for now in [110, 150, 140, 145] {
            meter.iteration(Ticks(now));
        }
        assert_eq!((meter.take_max(), meter.backwards()), (40, 1));
        meter.iteration(Ticks(150));
        assert_eq!((meter.take_max(), meter.worst()), (5, 40));
    }
}
