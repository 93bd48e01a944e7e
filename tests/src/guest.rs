//! What guests print, and checks that nothing is missing and nothing comes twice.

use std::collections::BTreeMap;

/// From one heartbeat to the next of a probe that is not told otherwise; see [`with_quick_beat`].
const QUICK_BEAT_MS: u32 = 200;

/// A line that the probe prints at each heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heartbeat {
    /// Rises by one.
    pub n: u64,
    /// Since boot, by the guest's clock.
    pub uptime_ms: u64,
    /// Worst pause that the guest saw since the last heartbeat.
    pub max_gap_us: u64,
    /// Pages written since boot.
    pub dirtied: u64,
    /// Pages that did not hold what was written to them, since boot.
    pub corrupt: u64,
    /// Bytes of the fill that are written.
    pub filled: u64,
    /// Checks of pages since boot, before each write and by the scan of all that is filled.
    pub checked: u64,
    /// The longest pauses that the guest saw since the last heartbeat, in order, as far as they are worth telling.
    pub gaps: Vec<Gap>,
}

/// A pause that the guest saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Its end, since boot, by the guest's clock.
    pub end_us: u64,
    /// Its length.
    pub length_us: u64,
}

impl Gap {
    fn parse(text: &str) -> Option<Self> {
        let (end, length) = text.split_once(':')?;
        Some(Self {
            end_us: end.parse().ok()?,
            length_us: length.parse().ok()?,
        })
    }
}

impl Heartbeat {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.trim_end().split(' ');
        if words.next() != Some("hb") {
            return None;
        }
        let gaps = words.clone().find_map(|word| word.strip_prefix("gaps="));
        let fields: BTreeMap<&str, u64> = words
            .filter_map(|word| word.split_once('='))
            .filter_map(|(key, n)| Some((key, n.parse().ok()?)))
            .collect();
        let get = |key| fields.get(key).copied();
        Some(Self {
            n: get("n")?,
            uptime_ms: get("uptime_ms")?,
            max_gap_us: get("max_gap_us")?,
            dirtied: get("dirtied")?,
            corrupt: get("corrupt")?,
            filled: get("filled").unwrap_or(0),
            checked: get("checked").unwrap_or(0),
            gaps: gaps.map_or(vec![], |gaps| gaps.split(',').filter_map(Gap::parse).collect()),
        })
    }
}

/// The heartbeats of a console, as far as their lines are complete.
#[must_use]
pub fn heartbeats(console: &str) -> Vec<Heartbeat> {
    complete_lines(console).filter_map(Heartbeat::parse).collect()
}

/// A number of the last heartbeat that has them all.
#[must_use]
pub fn last_word(console: &str, name: &str) -> u64 {
    let line = console
        .lines()
        .rfind(|line| line.starts_with("hb ") && line.contains("checked="));
    let found = line.and_then(|line| {
        let value = line
            .split(' ')
            .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))?;
        value.trim().parse().ok()
    });
    found.unwrap_or_else(|| panic!("no {name}= in the last heartbeat of:\n{}", tail(console)))
}

/// Whether the heartbeats are without hole or repeat, the guest's clock rises and no page was ever corrupt.
///
/// # Errors
/// What was wrong, in words.
pub fn check_unharmed(console: &str) -> Result<(), String> {
    let beats = heartbeats(console);
    let Some(last) = beats.last() else {
        return Err(format!("no heartbeat in:\n{}", tail(console)));
    };
    let numbers: Vec<u64> = beats.iter().map(|beat| beat.n).collect();
    check_consecutive("heartbeats", &numbers)?;
    for pair in beats.windows(2) {
        if pair[1].uptime_ms <= pair[0].uptime_ms {
            return Err(format!("the guest's clock went back: {pair:?}"));
        }
        if pair[1].dirtied < pair[0].dirtied {
            return Err(format!("the guest lost work: {pair:?}"));
        }
    }
    if last.corrupt == 0 {
        Ok(())
    } else {
        Err(format!("memory was corrupted: {last:?}"))
    }
}

/// [`check_unharmed`], as an assertion.
pub fn assert_unharmed(console: &str) {
    check_unharmed(console).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// A part of what a guest has written, as one side has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Console {
    /// Where it begins, in bytes since the guest's first boot.
    pub from: u64,
    /// What follows.
    pub bytes: Vec<u8>,
}

/// What a guest has written twice, differently, by what several sides have of it: then it ran at two of them. Its heartbeats tell
/// the time in ms and its pauses in us.
#[must_use]
pub fn written_twice(parts: &[Console]) -> Option<String> {
    let pairs = parts
        .iter()
        .enumerate()
        .flat_map(|(n, one)| parts[n + 1..].iter().map(move |two| (one, two)));
    pairs.into_iter().find_map(|(one, two)| {
        let from = one.from.max(two.from);
        let rest = |part: &Console| -> Vec<u8> {
            let skipped = usize::try_from(from - part.from).unwrap_or(usize::MAX);
            part.bytes.get(skipped..).unwrap_or_default().to_vec()
        };
        let (one, two) = (rest(one), rest(two));
        let at = one.iter().zip(&two).position(|(one, two)| one != two)?;
        let begin = at.saturating_sub(200);
        let text =
            |bytes: &[u8]| String::from_utf8_lossy(&bytes[begin..bytes.len().min(at + 200)]).into_owned();
        Some(format!(
            "the guest ran twice: at byte {} it wrote\n{}\nand\n{}",
            from + at as u64,
            text(&one),
            text(&two)
        ))
    })
}

/// All that a guest has ever written, from what several sides have of it, of which at most one may have run it at a time.
///
/// # Errors
/// Where it wrote two things, or that something is missing in between.
pub fn whole_log(parts: &[Console]) -> Result<String, String> {
    if let Some(twice) = written_twice(parts) {
        return Err(twice);
    }
    let mut parts: Vec<&Console> = parts.iter().filter(|part| !part.bytes.is_empty()).collect();
    parts.sort_by_key(|part| part.from);
    let mut whole: Vec<u8> = vec![];
    for part in parts {
        let from = usize::try_from(part.from).map_err(|error| error.to_string())?;
        let Some(known) = whole.len().checked_sub(from) else {
            return Err(format!(
                "nobody has what was written from byte {} to {from}",
                whole.len()
            ));
        };
        whole.extend_from_slice(part.bytes.get(known..).unwrap_or_default());
    }
    Ok(String::from_utf8_lossy(&whole).into_owned())
}

/// That at most one side ran the guest at a time, and that it is unharmed, by the heartbeats of its whole log.
pub fn assert_ran_once(parts: &[Console]) {
    let checked = whole_log(parts).and_then(|whole| check_unharmed(&whole));
    checked.unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// Numbers that a shell loop printed as `count N`.
#[must_use]
pub fn counts(console: &str) -> Vec<u64> {
    complete_lines(console)
        .filter_map(|line| line.trim_end().strip_prefix("count ")?.parse().ok())
        .collect()
}

/// Whether each number is one more than the number before.
///
/// # Errors
/// Between which it is not.
pub fn check_consecutive(what: &str, numbers: &[u64]) -> Result<(), String> {
    match numbers.windows(2).find(|pair| pair[1] != pair[0].wrapping_add(1)) {
        None => Ok(()),
        Some(pair) => Err(format!(
            "{what} have a hole or a repeat between {} and {}",
            pair[0], pair[1]
        )),
    }
}

/// [`check_consecutive`], as an assertion.
pub fn assert_consecutive(what: &str, numbers: &[u64]) {
    check_consecutive(what, numbers).unwrap_or_else(|wrong| panic!("{wrong}"));
}

/// A line that `checks stress` prints once a second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StressBeat {
    /// Rises by one.
    pub n: u64,
    /// Checks that have run.
    pub rounds: u64,
    /// Those that have failed.
    pub fails: u64,
    /// Since boot, by the guest's clock.
    pub uptime_ms: u64,
}

/// The heartbeats of `checks stress`, as far as their lines are complete.
#[must_use]
pub fn stress_beats(console: &str) -> Vec<StressBeat> {
    let parse = |line: &str| {
        let words = line.trim_end().strip_prefix("stress n=")?;
        let line = format!("n={words}");
        let get = |name: &str| {
            let value = line
                .split(' ')
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            value?.parse().ok()
        };
        Some(StressBeat {
            n: get("n")?,
            rounds: get("rounds")?,
            fails: get("fails")?,
            uptime_ms: get("uptime_ms")?,
        })
    };
    complete_lines(console).filter_map(parse).collect()
}

/// Whether the heartbeats of `checks stress` are without hole or repeat, the guest's clock never goes back and no check failed. After a
/// pause of more than a second the beats that are due follow at once, maybe in the same millisecond.
///
/// # Errors
/// What was wrong, in words.
pub fn check_stress(console: &str) -> Result<(), String> {
    let beats = stress_beats(console);
    let failed: Vec<&str> = complete_lines(console)
        .filter(|line| line.starts_with("FAIL "))
        .collect();
    if let Some(first) = failed.first() {
        return Err(format!("{} failed, first: {first}", failed.len()));
    }
    let Some(last) = beats.last() else {
        return Err(format!("no heartbeat in:\n{}", tail(console)));
    };
    let numbers: Vec<u64> = beats.iter().map(|beat| beat.n).collect();
    check_consecutive("heartbeats", &numbers)?;
    if let Some(pair) = beats
        .windows(2)
        .find(|pair| pair[1].uptime_ms < pair[0].uptime_ms)
    {
        return Err(format!("the guest's clock went back: {pair:?}"));
    }
    if beats[0].n != 1 || last.fails > 0 {
        return Err(format!(
            "{last:?}, the first was {:?}:\n{}",
            beats[0],
            tail(console)
        ));
    }
    Ok(())
}

fn complete_lines(console: &str) -> impl Iterator<Item = &str> {
    let end = console.rfind('\n').map_or(0, |last| last + 1);
    console[..end].lines()
}

/// Options of a probe whose heartbeats come often, unless they say how often: what tests wait for comes sooner.
#[must_use]
pub fn with_quick_beat(options: &str) -> String {
    if options.contains("beat=") {
        return options.to_owned();
    }
    format!("beat={QUICK_BEAT_MS} {options}")
}

/// The end of a long text.
#[must_use]
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "probe: up\r\nhb n=1 uptime_ms=1000 max_gap_us=40 dirtied=7 corrupt=0 filled=4096\r\n\
                        hb n=2 uptime_ms=2000 max_gap_us=41 dirtied=9 corrupt=0 filled=8192 gaps=1500000:250,1600000:300\r\nhb n=3 upt";

    #[test]
    fn complete_heartbeats_are_read() {
        let beats = heartbeats(GOOD);
        assert_eq!(beats.len(), 2);
        assert_eq!((beats[1].n, beats[1].max_gap_us, beats[1].filled), (2, 41, 8192));
        assert_eq!(beats[0].gaps, []);
        let lengths: Vec<_> = beats[1].gaps.iter().map(|gap| gap.length_us).collect();
        assert_eq!((lengths, beats[1].gaps[0].end_us), (vec![250, 300], 1_500_000));
        assert_unharmed(GOOD);
        assert_eq!(counts("boot\ncount 0\ncount 1\r\ncount"), [0, 1]);
    }

    #[test]
    fn stress_that_fails_or_stumbles_is_found() {
        let good = "boot\nstress n=1 rounds=7 fails=0 skips=1 uptime_ms=1500\r\nstress n=2 rounds=9 fails=0 skips=1 uptime_ms=2500\nstr";
        assert_eq!(
            stress_beats(good).last().map(|beat| (beat.n, beat.rounds)),
            Some((2, 9))
        );
        check_stress(good).expect("good");
        for (from, to) in [
            ("n=2", "n=3"),
            ("n=1", "n=0"),
            ("=2500", "=1499"),
            ("rounds=9 fails=0", "rounds=9 fails=1"),
            ("boot", "FAIL x: y"),
        ] {
            assert!(check_stress(&good.replace(from, to)).is_err(), "{from} {to}");
        }
        assert!(check_stress("boot").is_err());
    }

    #[test]
    fn a_guest_that_ran_at_two_sides_is_found() {
        let part = |from: usize, text: &str| Console {
            from: from as u64,
            bytes: text.as_bytes().to_vec(),
        };
        let (first, second) = GOOD.split_at(90);
        let forked = GOOD.replace("max_gap_us=41", "max_gap_us=42");
        assert_eq!(whole_log(&[part(0, GOOD)]).as_deref(), Ok(GOOD));
        assert_eq!(
            whole_log(&[part(90, second), part(0, first)]).as_deref(),
            Ok(GOOD)
        );
        assert_eq!(
            whole_log(&[part(50, &GOOD[50..80]), part(0, GOOD)]).as_deref(),
            Ok(GOOD)
        );
        let twice = whole_log(&[part(0, GOOD), part(50, &forked[50..])]).expect_err("twice");
        assert!(
            twice.starts_with("the guest ran twice") && twice.contains("max_gap_us=42"),
            "{twice}"
        );
        let hole = whole_log(&[part(0, first), part(91, &second[1..])]).expect_err("a hole");
        assert!(hole.contains("byte 90 to 91"), "{hole}");
        assert_ran_once(&[part(0, GOOD), part(0, first)]);
    }

    #[test]
    #[should_panic(expected = "a hole or a repeat between 1 and 3")]
    fn holes_are_found() {
        assert_unharmed(&GOOD.replace("n=2", "n=3"));
    }

    #[test]
    #[should_panic(expected = "memory was corrupted")]
    fn corruption_is_found() {
        assert_unharmed(&GOOD.replace("dirtied=9 corrupt=0", "dirtied=9 corrupt=1"));
    }
}
