//! Waits for conditions, never for time.

use std::thread;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(50);

/// Looks again and again until `look` answers something; panics, saying what was waited for, after `limit`.
pub fn until<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "waited {} s for {what}",
            limit.as_secs()
        );
        thread::sleep(POLL);
    }
}

/// [`until`] for a condition without a result.
pub fn until_true(what: &str, limit: Duration, mut look: impl FnMut() -> bool) {
    until(what, limit, || look().then_some(()));
}

/// Looks for the whole of a period and panics as soon as `look` answers something.
pub fn never<T: std::fmt::Debug>(what: &str, period: Duration, mut look: impl FnMut() -> Option<T>) {
    let end = Instant::now() + period;
    while Instant::now() < end {
        if let Some(found) = look() {
            panic!("{what}: {found:?}");
        }
        thread::sleep(POLL);
    }
}

/// Seconds.
#[must_use]
pub const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}
