//! How fast one CPU of this host is, measured once, so that faster nodes can be given more.

use std::hint::black_box;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

const NUMBERS: usize = 1 << 14;
const ROUNDS: usize = 15;
/// What one round takes on the machine that counts as 1, an AMD EPYC 7003 at 2.45 GHz.
const REFERENCE: Duration = Duration::from_micros(REFERENCE_US);
const REFERENCE_US: u64 = 240;

/// Relative to the reference; 0 if it cannot be measured. Takes a few milliseconds. The thread's own CPU time counts, and the
/// best of several rounds, so that it matters little what else the host does.
pub(crate) fn measure() -> f64 {
    let best = (1..=ROUNDS).filter_map(|round| sort(round as u64)).min();
    best.filter(|best| !best.is_zero())
        .map_or(0.0, |best| REFERENCE.as_secs_f64() / best.as_secs_f64())
}

/// CPU time that it takes to sort some numbers: branches, arithmetic, and memory that the nearest caches hold.
fn sort(seed: u64) -> Option<Duration> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut numbers: Vec<u64> = (0..NUMBERS)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        })
        .collect();
    let start = cpu_time()?;
    black_box(&mut numbers).sort_unstable();
    let took = cpu_time()?.checked_sub(start);
    black_box(numbers);
    took
}

fn cpu_time() -> Option<Duration> {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).ok()?;
    let nanos = u32::try_from(time.tv_nsec).ok()?;
    Some(Duration::new(seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cpu_has_a_speed() {
        let speed = measure();
        assert!(speed.is_finite() && speed > 0.0, "{speed}");
    }
}
