//! Holds a migration to a bandwidth that may change while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What may be sent at once after a pause in sending.
const BURST: Duration = Duration::from_millis(20);
/// Longest sleep before whoever waits looks again: at the rate, and whether the migration goes on.
const SLICE: Duration = Duration::from_millis(20);
/// No debt is longer, so that instants stay within their range.
const LONGEST_DEBT: Duration = Duration::from_secs(365 * 24 * 3600);

/// Shared by everything that sends for one migration.
#[derive(Debug)]
pub struct Pacer {
    account: Mutex<Account>,
    waited_ns: AtomicU64,
}

/// What has been let through, in time. Knows no clock but what it is told.
#[derive(Debug)]
struct Account {
    /// Bytes per second; 0: as fast as it goes.
    rate: u64,
    /// Until when what has been let through takes at that rate.
    busy_until: Option<Instant>,
}

impl Account {
    /// How long whoever wants to send must wait; zero: it may.
    fn wait(&self, now: Instant) -> Duration {
        match self.busy_until {
            Some(busy_until) if self.rate > 0 => busy_until.saturating_duration_since(now),
            _ => Duration::ZERO,
        }
    }

    /// Counts bytes that are sent, whether or not they may be.
    fn charge(&mut self, bytes: usize, now: Instant) {
        if self.rate == 0 {
            return;
        }
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let from = self.busy_until.unwrap_or(earliest).max(earliest);
        let takes = Duration::try_from_secs_f64(bytes as f64 / self.rate as f64).unwrap_or(LONGEST_DEBT);
        self.busy_until = from.checked_add(takes).map(|until| until.min(now + LONGEST_DEBT));
    }

    /// Changes the rate. What is owed at the old one is owed at the new one.
    fn set(&mut self, rate: u64, now: Instant) {
        let owed = self.wait(now).as_secs_f64() * self.rate as f64;
        self.busy_until = (rate > 0 && owed > 0.0).then(|| {
            let takes = Duration::try_from_secs_f64(owed / rate as f64).unwrap_or(LONGEST_DEBT);
            now + takes.min(LONGEST_DEBT)
        });
        self.rate = rate;
    }
}

impl Pacer {
    /// At `rate` bytes per second; 0: as fast as it goes.
    #[must_use]
    pub fn new(rate: u64) -> Self {
        Self {
            account: Mutex::new(Account {
                rate,
                busy_until: None,
            }),
            waited_ns: AtomicU64::new(0),
        }
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the rate; whoever waits for the old one notices soon.
    pub fn set(&self, rate: u64) {
        self.account().set(rate, Instant::now());
    }

    /// Time spent waiting, of all who waited.
    #[must_use]
    pub fn waited(&self) -> Duration {
        Duration::from_nanos(self.waited_ns.load(Ordering::Relaxed))
    }

    /// Waits until `bytes` may be sent, or `go_on` says no.
    ///
    /// # Errors
    /// What `go_on` says.
    pub fn take<E>(&self, bytes: usize, go_on: impl Fn() -> Result<(), E>) -> Result<(), E> {
        while let Err(wait) = self.try_take(bytes) {
            let slice = wait.min(SLICE);
            std::thread::sleep(slice);
            self.waited_ns.fetch_add(
                u64::try_from(slice.as_nanos()).unwrap_or(u64::MAX),
                Ordering::Relaxed,
            );
            go_on()?;
        }
        Ok(())
    }

    /// Takes `bytes` if they may be sent now.
    ///
    /// # Errors
    /// How long they must wait otherwise; nothing is taken then.
    pub fn try_take(&self, bytes: usize) -> Result<(), Duration> {
        let now = Instant::now();
        let mut account = self.account();
        match account.wait(now) {
            Duration::ZERO => {
                account.charge(bytes, now);
                Ok(())
            }
            wait => Err(wait),
        }
    }

    /// Counts `bytes` that are sent whether or not they may be: whoever asks next waits for them as well.
    pub fn charge(&self, bytes: usize) {
        self.account().charge(bytes, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn account(rate: u64) -> Account {
        Account {
            rate,
            busy_until: None,
        }
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        let pacer = Pacer::new(0);
        for _ in 0..1000 {
            pacer.take(usize::MAX, || Err("asked")).expect("no wait");
            pacer.charge(usize::MAX);
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

    #[test]
    fn what_is_sent_without_asking_is_waited_for_by_who_asks() {
        let pacer = Pacer::new(MIB);
        pacer.charge(1 << 30);
        pacer.charge(1 << 30);
        let wait = pacer.try_take(4096).expect_err("it is owed for");
        assert!(wait > Duration::from_secs(1024), "{wait:?}");
        assert!(pacer.waited().is_zero(), "nobody has waited");
    }

    #[test]
    fn in_any_time_no_more_goes_than_the_rate_allows_and_a_burst() {
        let (start, mut account) = (Instant::now(), account(MIB));
        let (mut now, mut sent) = (start + Duration::from_secs(60), 0u64);
        let began = now;
        for step in 0..1000u64 {
            now += account.wait(now) + Duration::from_micros(step % 7 * 100);
            account.charge(64 << 10, now);
            sent += 64 << 10;
            let allowed = (now - began + BURST).as_secs_f64() * MIB as f64;
            assert!(
                sent as f64 <= allowed + f64::from(64 << 10),
                "{sent} bytes, {allowed} allowed"
            );
        }
    }

    #[test]
    fn a_debt_outlives_a_change_of_the_rate() {
        let (now, mut account) = (Instant::now(), account(MIB));
        account.charge(100 << 20, now);
        let owed = account.wait(now);
        account.set(2 * MIB, now);
        let half = account.wait(now);
        assert!(
            half.abs_diff(owed / 2) < Duration::from_millis(1),
            "{owed:?}, then {half:?}"
        );
        account.set(0, now);
        assert!(account.wait(now).is_zero());
        account.set(MIB, now);
        assert!(account.wait(now).is_zero(), "there was no cap in between");
        account.set(1, now);
        account.charge(usize::MAX, now);
        assert!(account.wait(now) <= LONGEST_DEBT);
    }
}
