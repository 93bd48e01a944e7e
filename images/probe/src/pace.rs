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

/// How many gaps are kept one by one.
const KEPT: usize = 8;

/// A stretch of time in which the main loop did not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Its end.
    pub end: Ticks,
    /// Its length in ticks.
    pub length: u64,
}

/// The longest times between two iterations of the main loop.
#[derive(Debug, Clone, Copy)]
pub struct GapMeter {
    last: Ticks,
    /// In ticks, since [`GapMeter::take_max`] was called.
    max: u64,
    /// In ticks, since the start.
    worst: u64,
    /// How often the TSC went backwards.
    backwards: u64,
    /// Shorter ones are not kept.
    least: u64,
    /// The longest since [`GapMeter::take_gaps`] was called.
    kept: [Option<Gap>; KEPT],
}

impl GapMeter {
    /// Starts at `now`. Gaps below `least` ticks are not kept.
    #[must_use]
    pub fn new(now: Ticks, least: u64) -> Self {
        Self {
            last: now,
            max: 0,
            worst: 0,
            backwards: 0,
            least,
            kept: [None; KEPT],
        }
    }

    /// To be called in every iteration.
    pub fn iteration(&mut self, now: Ticks) {
        self.backwards += u64::from(now < self.last);
        let gap = now.since(self.last);
        self.max = self.max.max(gap);
        if gap >= self.least {
            self.keep(Gap {
                end: now,
                length: gap,
            });
        }
        self.last = now;
    }

    /// In place of the shortest, if that is shorter.
    #[cold]
    fn keep(&mut self, gap: Gap) {
        let length = |kept: &Option<Gap>| kept.map_or(0, |gap| gap.length);
        if let Some(shortest) = self.kept.iter_mut().min_by_key(|kept| length(kept))
            && length(shortest) < gap.length
        {
            *shortest = Some(gap);
        }
    }

    /// What [`GapMeter::take_max`] would return.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The longest gap in ticks since the last call.
    pub fn take_max(&mut self) -> u64 {
        self.worst = self.worst.max(self.max);
        core::mem::take(&mut self.max)
    }

    /// The longest gaps since the last call, in the order in which they came.
    pub fn take_gaps(&mut self) -> impl Iterator<Item = Gap> + Clone + use<> {
        let mut kept = core::mem::take(&mut self.kept);
        kept.sort_unstable_by_key(|kept| kept.map(|gap| gap.end));
        kept.into_iter().flatten()
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
        let mut meter = GapMeter::new(Ticks(100), 1000);
        for now in [110, 150, 140, 145] {
            meter.iteration(Ticks(now));
        }
        assert_eq!((meter.take_max(), meter.backwards()), (40, 1));
        meter.iteration(Ticks(150));
        assert_eq!((meter.take_max(), meter.worst()), (5, 40));
    }

    #[test]
    fn the_longest_gaps_are_kept_in_order() {
        let mut meter = GapMeter::new(Ticks(0), 10);
        let (mut now, mut expected) = (0, vec![]);
        for length in [9, 10, 30, 5, 11, 12, 13, 50, 14, 15, 16, 17] {
            now += length;
            meter.iteration(Ticks(now));
            if length >= 12 {
                expected.push(Gap {
                    end: Ticks(now),
                    length,
                });
            }
        }
        assert_eq!(meter.take_gaps().collect::<Vec<_>>(), expected);
        assert_eq!(meter.take_gaps().next(), None);
    }
}
