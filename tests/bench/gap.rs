//! The guest's own view of a migration, from its heartbeats.

use std::time::Duration;

use shoal_tests::guest::{self, Heartbeat};

use crate::case::Case;

/// The first heartbeat after the fill still tells of the fill; then come the quiet ones.
const BEATS_AFTER_FILL: usize = 4;
/// Heartbeats, one a second, over which the baseline is taken.
const BASELINE_BEATS: usize = 3;
/// How long after the end of a migration its effects are looked for.
const AFTERMATH: Duration = Duration::from_secs(2);
const PAGE: u64 = 4096;

/// Worst gaps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gaps {
    /// In the three seconds before the migration.
    pub before: Duration,
    /// From its start until two seconds after its end.
    pub during: Duration,
}

/// The latest heartbeat, once the guest has done its fill and has been quiet for long enough to be moved.
pub fn settled(case: &Case, console: &str) -> Option<Heartbeat> {
    let beats = guest::heartbeats(console);
    let full = beats.iter().position(|beat| beat.filled >= case.filled)?;
    (beats.len() > full + BEATS_AFTER_FILL).then(|| beats.last().cloned())?
}

/// The gaps around a migration that began right after the heartbeat `before` and took `total`. `None` until the guest has
/// run for long enough since, and has checked every page that it filled.
pub fn around(case: &Case, console: &str, before: &Heartbeat, total: Duration) -> Option<Gaps> {
    let beats = guest::heartbeats(console);
    let last_before = beats.iter().position(|beat| beat.n == before.n)?;
    let (earlier, later) = beats.split_at(last_before + 1);
    let end = before.uptime_ms + millis(total);
    let arrived = later.iter().find(|beat| beat.uptime_ms >= end)?;
    let over = later
        .iter()
        .position(|beat| beat.uptime_ms >= end + millis(AFTERMATH))?;
    let pages_scanned = scanned(beats.last()?).saturating_sub(scanned(arrived));
    (pages_scanned >= case.filled / PAGE).then(|| Gaps {
        before: worst(&earlier[earlier.len().saturating_sub(BASELINE_BEATS)..]),
        during: worst(&later[..=over]),
    })
}

/// Pages looked at by the probe's scan. It also checks each page once before it dirties it.
fn scanned(beat: &Heartbeat) -> u64 {
    beat.checked.saturating_sub(beat.dirtied)
}

fn worst(beats: &[Heartbeat]) -> Duration {
    Duration::from_micros(beats.iter().map(|beat| beat.max_gap_us).max().unwrap_or(0))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write as _;

    const CASE: Case = Case {
        name: "",
        title: "",
        cmdline: "",
        filled: 2 * PAGE,
    };

    fn console(gaps: &[u64]) -> String {
        let mut text = String::new();
        for (n, gap) in gaps.iter().enumerate() {
            let filled = if n == 0 { PAGE } else { 2 * PAGE };
            writeln!(
                text,
                "hb n={n} uptime_ms={} max_gap_us={gap} dirtied=5 corrupt=0 filled={filled} checked={}",
                n * 1000,
                5 + n
            )
            .expect("a string");
        }
        text
    }

    #[test]
    fn a_guest_is_settled_four_heartbeats_after_the_one_that_says_full() {
        assert_eq!(settled(&CASE, &console(&[1; 5])), None);
        assert_eq!(settled(&CASE, &console(&[1; 6])).expect("settled").n, 5);
    }

    #[test]
    fn gaps_are_taken_from_three_seconds_before_until_two_after() {
        // The migration begins after heartbeat 5 and ends before heartbeat 7; 9 is the first that is two seconds later.
        let text = console(&[9000, 8000, 7000, 10, 30, 20, 500, 40, 50, 600, 70_000]);
        let before = settled(&CASE, &console(&[1; 6])).expect("settled");
        let gaps = around(&CASE, &text, &before, Duration::from_millis(1500)).expect("over");
        assert_eq!((gaps.before.as_micros(), gaps.during.as_micros()), (30, 600));
        let too_early = console(&[9000, 8000, 7000, 10, 30, 20, 500, 40, 50]);
        assert_eq!(
            around(&CASE, &too_early, &before, Duration::from_millis(1500)),
            None
        );
    }

    #[test]
    fn every_filled_page_must_have_been_checked_since() {
        let text = console(&[1; 11]);
        let before = settled(&CASE, &console(&[1; 6])).expect("settled");
        let large = Case {
            filled: 4 * PAGE,
            ..CASE
        };
        assert!(around(&CASE, &text, &before, Duration::from_millis(1500)).is_some());
        assert!(around(&large, &text, &before, Duration::from_millis(1500)).is_none());
    }
}
