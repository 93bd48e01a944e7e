//! The guest's own view of a migration, from its heartbeats.

use std::time::Duration;

use shoal_tests::guest::{self, Gap, Heartbeat};

use crate::case::Case;

/// The first heartbeat after the fill still tells of the fill; then come the quiet ones.
const BEATS_AFTER_FILL: usize = 4;
/// Heartbeats, one a second, over which the baseline is taken.
const BASELINE_BEATS: usize = 3;
/// How long after the end of a migration its effects are looked for.
const AFTERMATH: Duration = Duration::from_secs(2);
/// A heartbeat is printed byte by byte and looked for now and then, so it is heard up to this much late.
const HEARD_LATE: Duration = Duration::from_millis(30);
/// And a clock may differ by this much.
const CLOCK_SLACK: Duration = Duration::from_millis(2);
const PAGE: u64 = 4096;

/// When what happened, by the benchmark's clock.
#[derive(Debug, Clone)]
pub struct Timeline {
    /// The heartbeat after which the migration was asked for.
    pub before: Heartbeat,
    /// From hearing it to asking.
    pub asked_after: Duration,
    /// From asking to the pause, and the pause itself, if the VMM tells.
    pub pause: Option<(Duration, Duration)>,
    /// From asking to the end.
    pub total: Duration,
}

/// Worst gaps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gaps {
    /// In the three seconds before the migration.
    pub before: Duration,
    /// From its start until two seconds after its end.
    pub during: Duration,
    /// Of these, before the pause: at the source.
    pub source: Option<Duration>,
    /// The pause itself, as the guest saw it.
    pub pause: Option<Duration>,
    /// After it: at the destination.
    pub destination: Option<Duration>,
}

/// The latest heartbeat, once the guest has done its fill and has been quiet for long enough to be moved.
pub fn settled(case: &Case, console: &str) -> Option<Heartbeat> {
    let beats = guest::heartbeats(console);
    let full = beats.iter().position(|beat| beat.filled >= case.filled)?;
    (beats.len() > full + BEATS_AFTER_FILL).then(|| beats.last().cloned())?
}

/// The gaps around a migration. `None` until the guest has run for long enough since, and has checked every page that it
/// filled.
pub fn around(case: &Case, console: &str, timeline: &Timeline) -> Option<Gaps> {
    let beats = guest::heartbeats(console);
    let last_before = beats.iter().position(|beat| beat.n == timeline.before.n)?;
    let (earlier, later) = beats.split_at(last_before + 1);
    let start = timeline.before.uptime_ms * 1000 + micros(timeline.asked_after);
    let end = start + micros(timeline.total);
    let past = |time: u64| move |beat: &Heartbeat| beat.uptime_ms * 1000 >= time;
    let last = end + micros(AFTERMATH) + micros(HEARD_LATE);
    let arrived = later.iter().find(|beat| past(end)(beat))?;
    let over = later.iter().position(past(last))?;
    let pages_scanned = scanned(beats.last()?).saturating_sub(scanned(arrived));
    if pages_scanned < case.filled / PAGE {
        return None;
    }
    let gaps: Vec<Gap> = later[..=over]
        .iter()
        .flat_map(|beat| beat.gaps.iter().copied())
        .filter(|gap| gap.end_us >= start && gap.end_us - gap.length_us <= last)
        .collect();
    let pause = timeline.pause.and_then(|(after, length)| {
        let from = (start + micros(after)).saturating_sub(micros(CLOCK_SLACK));
        find_pause(&gaps, from, length)
    });
    // A pause that was too short to be told one by one still ends one part and begins the other.
    let boundary = pause
        .map(|gap| gap.end_us)
        .or(timeline.pause.map(|(after, _)| start + micros(after)));
    let side = |wanted: &dyn Fn(u64) -> bool| {
        longest(
            gaps.iter()
                .filter(|&&gap| Some(gap) != pause && wanted(gap.end_us)),
        )
    };
    Some(Gaps {
        before: worst(&earlier[earlier.len().saturating_sub(BASELINE_BEATS)..]),
        during: if gaps.is_empty() {
            worst(&later[..=over])
        } else {
            longest(&gaps)
        },
        source: boundary.map(|boundary| side(&|end| end < boundary)),
        pause: pause.map(|gap| Duration::from_micros(gap.length_us)),
        destination: boundary.map(|boundary| side(&|end| end >= boundary)),
    })
}

/// Among the gaps that end about when the pause did, the one whose length is most like its.
fn find_pause(gaps: &[Gap], from: u64, length: Duration) -> Option<Gap> {
    let until = from + micros(length) + micros(CLOCK_SLACK) + micros(HEARD_LATE);
    let unlike = |gap: &Gap| {
        (gap.length_us.max(1) as f64 / micros(length).max(1) as f64)
            .ln()
            .abs()
    };
    gaps.iter()
        .filter(|gap| (from..=until).contains(&gap.end_us))
        .min_by(|a, b| unlike(a).total_cmp(&unlike(b)))
        .copied()
}

/// Pages looked at by the probe's scan. It also checks each page once before it dirties it.
fn scanned(beat: &Heartbeat) -> u64 {
    beat.checked.saturating_sub(beat.dirtied)
}

fn worst(beats: &[Heartbeat]) -> Duration {
    Duration::from_micros(beats.iter().map(|beat| beat.max_gap_us).max().unwrap_or(0))
}

/// 0 if there is none that is worth telling.
fn longest<'a>(gaps: impl IntoIterator<Item = &'a Gap>) -> Duration {
    let lengths = gaps.into_iter().map(|gap| gap.length_us);
    Duration::from_micros(lengths.max().unwrap_or(0))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::case::CASES;
    use std::fmt::Write as _;

    const SMALL: Case = Case {
        filled: 2 * PAGE,
        ..CASES[0]
    };

    const QUIET: &[(u64, u64)] = &[];

    /// One heartbeat for each list of gaps: milliseconds after the heartbeat before, and length in microseconds.
    fn console(gaps: &[&[(u64, u64)]]) -> String {
        let mut text = String::new();
        for (n, gaps) in gaps.iter().enumerate() {
            let filled = if n == 0 { PAGE } else { 2 * PAGE };
            let max = gaps.iter().map(|gap| gap.1).max().unwrap_or(150);
            let told: Vec<_> = gaps
                .iter()
                .map(|(at, length)| {
                    format!(
                        "{}:{length}",
                        (n * 1000).saturating_sub(1000) as u64 * 1000 + at * 1000
                    )
                })
                .collect();
            writeln!(
                text,
                "hb n={n} uptime_ms={} max_gap_us={max} dirtied=5 corrupt=0 filled={filled} checked={} gaps={}",
                n * 1000,
                5 + n,
                told.join(",")
            )
            .expect("a string");
        }
        text
    }

    fn timeline(console: &str) -> Timeline {
        Timeline {
            before: settled(&SMALL, console).expect("settled"),
            asked_after: Duration::from_millis(100),
            pause: Some((Duration::from_millis(1480), Duration::from_millis(5))),
            total: Duration::from_millis(1500),
        }
    }

    #[test]
    fn a_guest_is_settled_four_heartbeats_after_the_one_that_says_full() {
        assert_eq!(settled(&SMALL, &console(&[QUIET; 5])), None);
        assert_eq!(settled(&SMALL, &console(&[QUIET; 6])).expect("settled").n, 5);
    }

    #[test]
    fn gaps_are_taken_from_the_start_to_two_seconds_after_the_end_and_told_apart_by_the_pause() {
        // Heartbeat 5 is heard, the migration asked for at 5.1 s, paused at 6.58 s and over at 6.6 s; 8.6 s is the last that counts.
        let early = [
            &[(1u64, 9000u64)][..],
            &[],
            &[],
            &[(1, 10)],
            &[(1, 30)],
            &[(1, 20)],
        ];
        let late = [
            &[(50, 70_000), (200, 700), (900, 400)][..], // 5.05 s: before the start
            &[(570, 800), (592, 5300), (595, 600)],      // the pause ends at 6.592
            &[(10, 1200)],
            &[(500, 1100), (800, 80_000)], // 8.8 s: too late
        ];
        let text = console(&[&early[..], &late[..]].concat());
        let timeline = timeline(&console(&early));
        let gaps = around(&SMALL, &text, &timeline).expect("over");
        let micros = |gap: Option<Duration>| gap.expect("told").as_micros();
        assert_eq!((gaps.before.as_micros(), gaps.during.as_micros()), (30, 5300));
        assert_eq!(
            (micros(gaps.source), micros(gaps.pause), micros(gaps.destination)),
            (800, 5300, 1200)
        );
        let too_early = console(&[&early[..], &late[..3]].concat());
        assert_eq!(around(&SMALL, &too_early, &timeline), None);
    }

    #[test]
    fn without_a_pause_that_is_told_the_worst_gap_is_still_there() {
        let mut timeline = timeline(&console(&[QUIET; 6]));
        timeline.pause = None;
        let text = console(&[&[], &[], &[], &[], &[], &[], &[], &[(592, 5300)], &[], &[], &[]]);
        let gaps = around(&SMALL, &text, &timeline).expect("over");
        assert_eq!(
            (gaps.during.as_micros(), gaps.source, gaps.destination),
            (5300, None, None)
        );
    }

    #[test]
    fn every_filled_page_must_have_been_checked_since() {
        let text = console(&[QUIET; 11]);
        let timeline = timeline(&console(&[QUIET; 6]));
        let large = Case {
            filled: 4 * PAGE,
            ..SMALL
        };
        assert!(around(&SMALL, &text, &timeline).is_some());
        assert!(around(&large, &text, &timeline).is_none());
    }
}
