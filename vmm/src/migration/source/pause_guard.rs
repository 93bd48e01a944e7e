//! Lets the guest go on where the thread that paused it does not: it may hang in the kernel, on a disk or in a fault of
//! its own, and a guest that stands still for ever is as good as lost.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One for each migration, looked at by a thread of its own.
#[derive(Debug, Default)]
pub struct PauseGuard {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, Default)]
enum State {
    #[default]
    Runs,
    /// Until when at most.
    Paused(Instant),
    /// There is nothing to guard any more.
    Over,
}

impl PauseGuard {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: State) {
        *self.lock() = state;
        self.changed.notify_all();
    }

    /// The guest is being paused, and is to go on by itself unless Commit is sent or it is [`PauseGuard::over`] in time.
    pub fn paused(&self, at_most: Duration) {
        self.set(State::Paused(Instant::now() + at_most));
    }

    /// The migration has ended.
    fn over(&self) {
        self.set(State::Over);
    }

    /// Returns when it is over: `false`, or `true` if the time was up before.
    pub fn wait(&self) -> bool {
        let mut state = self.lock();
        loop {
            state = match *state {
                State::Over => return false,
                State::Runs => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                State::Paused(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return true;
                    }
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// Ends the guard's thread on every way out.
pub struct Guarded<'a>(pub &'a PauseGuard);

impl Drop for Guarded<'_> {
    fn drop(&mut self) {
        self.0.over();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_that_is_not_ended_in_time_is_noticed_and_one_that_is_is_not() {
        let guard = PauseGuard::default();
        guard.paused(Duration::from_millis(1));
        assert!(guard.wait());

        let guard = PauseGuard::default();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| guard.wait());
            guard.paused(Duration::from_secs(3600));
            drop(Guarded(&guard));
            assert!(!waits.join().expect("no panic"));
        });
    }
}
