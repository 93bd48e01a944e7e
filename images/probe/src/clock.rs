//! KVM's paravirtual clock (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).

use crate::pace::Ticks;

/// `struct pvclock_vcpu_time_info`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct KvmClock {
    /// Odd while KVM writes the rest.
    pub version: u32,
    /// Nothing.
    pub pad: u32,
    /// The TSC when the rest was written.
    pub tsc_timestamp: u64,
    /// Nanoseconds then.
    pub system_time: u64,
    /// Nanoseconds = (ticks << shift) * this >> 32.
    pub tsc_to_system_mul: u32,
    /// Negative: to the right.
    pub tsc_shift: i8,
    /// [`KvmClock::STOPPED`] and others.
    pub flags: u8,
    /// Nothing.
    pub pad_end: [u8; 2],
}

/// What the clock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Since the VM's first boot, roughly.
    pub nanoseconds: u64,
    /// Whoever runs the VM has stopped it since the flag was cleared.
    pub was_stopped: bool,
    /// KVM promises that it never goes back.
    pub is_steady: bool,
}

impl KvmClock {
    /// The flag by which the host tells that it stopped the VM.
    pub const STOPPED: u8 = 2;
    /// The flag (PVCLOCK_TSC_STABLE_BIT) by which the host promises a clock that never goes back. Without it the host's own clock is
    /// not the TSC; the two drift apart, and a guest has to hide steps back itself.
    pub const STEADY: u8 = 1;

    /// The time at `now`.
    #[must_use]
    pub fn at(&self, now: Ticks) -> Reading {
        let ticks = u128::from(now.since(Ticks(self.tsc_timestamp)));
        let shift = u32::from(self.tsc_shift.unsigned_abs()) % 64;
        let shifted = if self.tsc_shift < 0 {
            ticks >> shift
        } else {
            ticks << shift
        };
        let passed = shifted.saturating_mul(u128::from(self.tsc_to_system_mul)) >> 32;
        Reading {
            nanoseconds: self
                .system_time
                .saturating_add(u64::try_from(passed).unwrap_or(u64::MAX)),
            was_stopped: self.flags & Self::STOPPED != 0,
            is_steady: self.flags & Self::STEADY != 0,
        }
    }
}

/// Looks that the clock never goes back where that is promised, and counts stops.
#[derive(Debug, Clone, Copy, Default)]
pub struct ClockWatch {
    latest: u64,
    was_steady: bool,
    backwards: u64,
    stops: u64,
}

impl ClockWatch {
    /// To be told every reading.
    pub fn reading(&mut self, reading: Reading) {
        let goes_back = reading.nanoseconds < self.latest;
        self.backwards += u64::from(goes_back && self.was_steady && reading.is_steady);
        self.stops += u64::from(reading.was_stopped);
        // A step back that nobody promised not to make is hidden, as kernels do it.
        if !goes_back || reading.is_steady {
            self.latest = reading.nanoseconds;
        }
        self.was_steady = reading.is_steady;
    }

    /// What it shows, in milliseconds.
    #[must_use]
    pub fn milliseconds(&self) -> u64 {
        self.latest / 1_000_000
    }

    /// Whether KVM promises now that it never goes back.
    #[must_use]
    pub fn is_steady(&self) -> bool {
        self.was_steady
    }

    /// How often it went back though it was steady.
    #[must_use]
    pub fn backwards(&self) -> u64 {
        self.backwards
    }

    /// How often the host said that it had stopped the VM.
    #[must_use]
    pub fn stops(&self) -> u64 {
        self.stops
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_become_nanoseconds() {
        let mut clock = KvmClock {
            tsc_timestamp: 1000,
            system_time: 5_000_000,
            tsc_to_system_mul: 0x8000_0000,
            ..KvmClock::default()
        };
        // 2 GHz.
        assert_eq!(clock.at(Ticks(3000)).nanoseconds, 5_001_000);
        assert_eq!(clock.at(Ticks(0)).nanoseconds, 5_000_000);
        clock.tsc_shift = -1;
        assert_eq!(clock.at(Ticks(3000)).nanoseconds, 5_000_500);
        clock.tsc_shift = 1;
        clock.flags = KvmClock::STOPPED | 1;
        let reading = clock.at(Ticks(3000));
        assert_eq!((reading.nanoseconds, reading.was_stopped), (5_002_000, true));
        clock.tsc_shift = -128;
        clock.tsc_to_system_mul = u32::MAX;
        assert!(clock.at(Ticks(u64::MAX)).nanoseconds >= 5_000_000);
    }

    fn watch(readings: &[(u64, u8)]) -> ClockWatch {
        let mut watch = ClockWatch::default();
        for &(system_time, flags) in readings {
            let clock = KvmClock {
                system_time,
                flags,
                ..KvmClock::default()
            };
            watch.reading(clock.at(Ticks(0)));
        }
        watch
    }

    #[test]
    fn time_going_back_and_stops_are_counted() {
        let (running, stopped) = (KvmClock::STEADY, KvmClock::STEADY | KvmClock::STOPPED);
        let watch = watch(&[(5, running), (9, stopped), (8, running), (2_000_000, stopped)]);
        assert_eq!(
            (watch.backwards(), watch.stops(), watch.milliseconds()),
            (1, 2, 2)
        );
        assert!(watch.is_steady());
    }

    #[test]
    fn steps_back_are_hidden_where_nobody_promised_not_to_make_them() {
        let steady = KvmClock::STEADY;
        let drifts = watch(&[(5_000_000, 0), (3_000_000, 0)]);
        assert_eq!((drifts.backwards(), drifts.milliseconds()), (0, 5));
        assert!(!drifts.is_steady());
        // Moved from a host that promises it to one that does not, and back.
        let moved = watch(&[
            (5_000_000, steady),
            (3_000_000, 0),
            (4_000_000, steady),
            (3_000_000, steady),
        ]);
        assert_eq!((moved.backwards(), moved.milliseconds()), (1, 3));
    }
}
