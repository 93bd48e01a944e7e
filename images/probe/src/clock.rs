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
}

impl KvmClock {
    /// The flag by which the host tells that it stopped the VM.
    pub const STOPPED: u8 = 2;

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
        }
    }
}

/// Looks that the clock never goes back, and counts stops.
#[derive(Debug, Clone, Copy, Default)]
pub struct ClockWatch {
    last: u64,
    backwards: u64,
    stops: u64,
}

impl ClockWatch {
    /// To be told every reading.
    pub fn reading(&mut self, nanoseconds: u64, was_stopped: bool) {
        self.backwards += u64::from(nanoseconds < self.last);
        self.stops += u64::from(was_stopped);
        self.last = nanoseconds;
    }

    /// The last one, in milliseconds.
    #[must_use]
    pub fn milliseconds(&self) -> u64 {
        self.last / 1_000_000
    }

    /// How often it went back.
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

    #[test]
    fn time_going_back_and_stops_are_counted() {
        let mut watch = ClockWatch::default();
        for (time, stopped) in [(5, false), (9, true), (8, false), (2_000_000, true)] {
            watch.reading(time, stopped);
        }
        assert_eq!(
            (watch.backwards(), watch.stops(), watch.milliseconds()),
            (1, 2, 2)
        );
    }
}
