//! What changes the cluster. Each operation holds its VM's guard from its first step to its last; a step stands beside
//! its undo; what must survive a crash is stored before it is done.

pub mod decide;
pub mod finish;
pub mod guest_gap;
pub mod launch;
pub mod lost;
pub mod migrate;
pub mod preempt;
pub mod settle;
pub mod stop;
pub mod suspend;

use std::time::Duration;

/// The time between two attempts: doubles from 0.2 s to 2 s.
#[derive(Debug)]
struct Backoff(Duration);

impl Backoff {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(2);

    fn new() -> Self {
        Self(Self::FIRST)
    }

    fn next(&mut self) -> Duration {
        let now = self.0;
        self.0 = (now * 2).min(Self::LONGEST);
        now
    }

    async fn pause(&mut self) {
        tokio::time::sleep(self.next()).await;
    }
}

#[cfg(test)]
mod tests;
