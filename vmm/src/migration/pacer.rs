//! Holds a migration to a bandwidth that may change while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What may be sent at once after a pause in sending.
const BURST: Duration = Duration::from_millis(20);
/// Longest sleep before whoever waits looks again: at the rate, and whether the migration goes on.
const SLICE: Duration = Duration::from_millis(20);

/// Shared by everything that sends for one migration.
#[derive(Debug)]
pub struct Pacer {
    /// Bytes per second; 0: as fast as it goes.
    rate: AtomicU64,
    /// Until when what has been let through takes at that rate.
    busy_until: Mutex<Option<Instant>>,
    waited_ns: AtomicU64,
}

impl Pacer {
    /// At `rate` bytes per second; 0: as fast as it goes.
    #[must_use]
    pub fn new(rate: u64) -> Self {
        Self {
            rate: AtomicU64::new(rate),
            busy_until: Mutex::new(None),
            waited_ns: AtomicU64::new(0),
        }
    }

    /// Changes the rate; whoever waits for the old one notices soon.
    pub fn set(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
        *self.lock() = None;
    }

    /// Whether it holds anything back.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.rate.load(Ordering::Relaxed) > 0
    }

    /// Time spent waiting, of all who waited.
    #[must_use]
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.load(Ordering::Relaxed))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.busy_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `bytes` may be sent, or `go_on` says no.
    ///
    /// # Errors
    /// What `go_on` says.
    pub fn take<E>(&self, bytes: usize, go_on: impl Fn() -> Result<(), E>) -> Result<(), E> {
        loop {
            let rate = self.rate.load(Ordering::Relaxed);
            if rate == 0 {
                return Ok(());
            }
            let now = Instant::now();
            let wait = {
                let mut busy_until = self.lock();
                let earliest = now.checked_sub(BURST).unwrap_or(now);
                let from = busy_until.unwrap_or(earliest).max(earliest);
                let wait = from.saturating_duration_since(now);
                if wait.is_zero() {
                    let takes =
                        Duration::try_from_secs_f64(bytes as f64 / rate as f64).unwrap_or(Duration::MAX / 4);
                    *busy_until = from.checked_add(takes);
                    return Ok(());
                }
                wait
            };
            let slice = wait.min(SLICE);
            std::thread::sleep(slice);
            self.waited_ns.fetch_add(
                u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX),
                Ordering::Relaxed,
            );
            go_on()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_rate_nothing_waits() {
        let pacer = Pacer::new(0);
        for _ in 0..1000 {
            pacer.take(usize::MAX, || Err("asked")).expect("no wait");
        }
        assert!(pacer.waited().is_zero());
    }

    #[test]
    fn what_waits_can_be_ended_and_sees_a_new_rate() {
        let pacer = Pacer::new(1);
        pacer
            .take(1 << 20, || Ok::<_, ()>(()))
            .expect("the first is let through");
        assert_eq!(pacer.take(1, || Err("ended")), Err("ended"));
        pacer
            .take(1, || {
                pacer.set(0);
                Ok::<_, ()>(())
            })
            .expect("as fast as it goes");
        assert!(!pacer.waited().is_zero());
    }
}
