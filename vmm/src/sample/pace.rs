//! When samples are taken: as often as was asked for, and more seldom where that would cost too much. Not in step with
//! anything the guest does: each pause is longer or shorter by up to a half.

use std::time::Duration;

use shoal_proto::vm::{MemorySample, SampleMemoryRequest};
use tokio::sync::mpsc;
use tonic::Status;

use crate::control::{Command, ControlError, ControlHandle};
use crate::sample::SampleError;

const DEFAULT_INTERVAL_MS: u64 = 5000;
const DEFAULT_WINDOW_MS: u64 = 200;
const LONGEST_INTERVAL: Duration = Duration::from_secs(3600);
/// A two-hundredth of a CPU is spent at most, the VMM's time and the guest's together.
const INTERVAL_TO_COST: u32 = 200;
/// What a fault on a tracked page costs the guest, on the safe side.
const FAULT: Duration = Duration::from_micros(5);

/// How often, and for how long each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    interval: Duration,
    window: Duration,
}

/// A pace that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PaceError {
    /// Too often, or hardly ever.
    #[error("interval_ms: {0} is not 100 to 3600000")]
    Interval(u64),
    /// Too short to see anything, or too long.
    #[error("window_ms: {0} is not 10 to 1000, and at most half the interval")]
    Window(u64),
}

impl TryFrom<SampleMemoryRequest> for Pace {
    type Error = PaceError;

    fn try_from(request: SampleMemoryRequest) -> Result<Self, PaceError> {
        let or = |value: u64, default: u64| if value == 0 { default } else { value };
        let interval = or(request.interval_ms, DEFAULT_INTERVAL_MS);
        if !(100..=3_600_000).contains(&interval) {
            return Err(PaceError::Interval(interval));
        }
        let window = or(request.window_ms, DEFAULT_WINDOW_MS.min(interval / 2));
        if !(10..=1000).contains(&window) || window > interval / 2 {
            return Err(PaceError::Window(window));
        }
        Ok(Self {
            interval: Duration::from_millis(interval),
            window: Duration::from_millis(window),
        })
    }
}

impl Pace {
    /// From the end of this window to the start of the next.
    fn wait_after(self, sample: &MemorySample) -> Duration {
        let faults = FAULT.saturating_mul(u32::try_from(sample.faults).unwrap_or(u32::MAX));
        let cost = Duration::from_micros(sample.cost_us).saturating_add(faults);
        let affordable = cost.saturating_mul(INTERVAL_TO_COST).min(LONGEST_INTERVAL);
        self.interval.max(affordable).saturating_sub(self.window)
    }
}

/// Good enough to be out of step.
struct Random(u64);

impl Random {
    fn new() -> Self {
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let nanos = clock.map_or(0, |time| time.subsec_nanos());
        Self(u64::from(nanos) << 32 | u64::from(std::process::id()) | 1)
    }

    /// From 0 to 1.
    fn part(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let high = u32::try_from(self.0 >> 32).unwrap_or(0);
        f64::from(high) / f64::from(u32::MAX)
    }
}

/// Samples until nobody listens any more.
pub async fn stream(control: ControlHandle, pace: Pace, samples: mpsc::Sender<Result<MemorySample, Status>>) {
    let mut random = Random::new();
    // VMs whose agent has just started do not all sample at once.
    let mut wait = pace.interval.mul_f64(random.part());
    loop {
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = samples.closed() => return,
        }
        wait = pace.interval.mul_f64(0.5 + random.part());
        match control.ask(Command::BeginSample).await {
            Ok(()) => {}
            Err(ControlError::WrongState { .. } | ControlError::Sample(SampleError::UnderWay)) => continue,
            Err(error) => {
                // Nobody may be left to hear it.
                let _ = samples.send(Err(error.into())).await;
                return;
            }
        }
        tokio::time::sleep(pace.window).await;
        let sample = match control.ask(Command::EndSample).await {
            Ok(None) => continue,
            Ok(Some(sample)) => {
                let usual = pace.wait_after(&sample);
                wait = usual.mul_f64(0.5 + random.part());
                Ok(MemorySample {
                    interval_ms: u64::try_from((usual + pace.window).as_millis()).unwrap_or(u64::MAX),
                    ..sample
                })
            }
            Err(error) => Err(error.into()),
        };
        let failed = sample.is_err();
        if samples.send(sample).await.is_err() || failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(interval_ms: u64, window_ms: u64) -> Result<Pace, PaceError> {
        Pace::try_from(SampleMemoryRequest {
            interval_ms,
            window_ms,
        })
    }

    #[test]
    fn paces_have_bounds() {
        let default = pace(0, 0).expect("a pace");
        assert_eq!(default, pace(5000, 200).expect("a pace"));
        assert_eq!(pace(100, 0).expect("a pace").window, Duration::from_millis(50));
        assert_eq!(pace(99, 0), Err(PaceError::Interval(99)));
        assert_eq!(pace(u64::MAX, 0), Err(PaceError::Interval(u64::MAX)));
        assert_eq!(pace(1000, 501), Err(PaceError::Window(501)));
        assert_eq!(pace(1000, 9), Err(PaceError::Window(9)));
    }

    #[test]
    fn pauses_differ() {
        let mut random = Random::new();
        let parts: Vec<f64> = (0..64).map(|_| random.part()).collect();
        assert!(parts.iter().all(|part| (0.0..=1.0).contains(part)));
        assert!(parts.iter().any(|part| *part < 0.4) && parts.iter().any(|part| *part > 0.6));
    }

    #[test]
    fn what_costs_much_is_done_seldom() {
        let pace = pace(1000, 100).expect("a pace");
        let cheap = MemorySample {
            cost_us: 100,
            window_us: 100_000,
            ..MemorySample::default()
        };
        assert_eq!(pace.wait_after(&cheap), Duration::from_millis(900));
        let dear = MemorySample {
            cost_us: 50_000,
            ..cheap
        };
        assert_eq!(pace.wait_after(&dear), Duration::from_millis(9900));
        // Every tracked page is written: 41 ms of faults.
        let busy = MemorySample {
            faults: 8192,
            ..cheap
        };
        let wait = pace.wait_after(&busy);
        assert!(
            (Duration::from_secs(8)..Duration::from_secs(9)).contains(&wait),
            "{wait:?}"
        );
        let absurd = MemorySample {
            cost_us: u64::MAX,
            ..busy
        };
        assert!(pace.wait_after(&absurd) <= LONGEST_INTERVAL);
    }
}
