//! Sizes, durations and times: as typed and as shown.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytesize::ByteSize;

/// A size as typed: "256MiB", "1.5GiB", or a number of bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    text.parse::<ByteSize>()
        .map(|size| size.as_u64())
        .map_err(|_| format!("'{text}' is not a size such as 256MiB or 2GiB"))
}

/// A duration as typed: "50ms", "2m"; at least a millisecond, because the wire counts in those.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|_| format!("'{text}' is not a duration such as 50ms or 2m"))?;
    if duration < Duration::from_millis(1) {
        return Err(format!("'{text}' is too short: the least is 1ms"));
    }
    Ok(duration)
}

/// Whole milliseconds for the wire.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A rate as typed: "100MiB" or "100MiB/s"; a second is meant.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    parse_size(text.strip_suffix("/s").unwrap_or(text))
}

/// A size as shown: "256.0 MiB".
#[must_use]
pub fn size(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// A rate as shown: "1.0 MiB/s", or "-" where it is not known.
#[must_use]
pub fn known_rate(bytes_per_second: Option<u64>) -> String {
    bytes_per_second.map_or("-".to_owned(), |rate| format!("{}/s", size(rate)))
}

/// A duration of microseconds as shown: "1.24 s", "12.3 ms", "87 us".
#[must_use]
pub fn micros(us: u64) -> String {
    let ms = milliseconds(us);
    if us >= 60_000_000 {
        humantime::format_duration(Duration::from_secs(us / 1_000_000)).to_string()
    } else if us >= 1_000_000 {
        format!("{:.2} s", ms / 1e3)
    } else if us >= 1_000 {
        format!("{ms:.1} ms")
    } else {
        format!("{us} us")
    }
}

/// Microseconds as milliseconds.
#[must_use]
pub fn milliseconds(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64() * 1e3
}

/// A whole number of seconds as shown: "2m 3s".
#[must_use]
pub fn age(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

/// Seconds since a moment of the cluster's clock; 0 if it lies ahead of ours.
#[must_use]
pub fn seconds_since(unix_ms: i64) -> u64 {
    let then = UNIX_EPOCH + Duration::from_millis(u64::try_from(unix_ms).unwrap_or(0));
    SystemTime::now().duration_since(then).map_or(0, |d| d.as_secs())
}

/// Words as a shell takes them: those that it would take apart are quoted.
#[must_use]
pub fn words(words: &[String]) -> String {
    let plain = |c: char| c.is_alphanumeric() || "_-+=:,./@%".contains(c);
    let shown = words.iter().map(|word| {
        if !word.is_empty() && word.chars().all(plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    });
    shown.collect::<Vec<_>>().join(" ")
}

/// A moment as shown: RFC 3339 with milliseconds.
#[must_use]
pub fn time(unix_ms: i64) -> String {
    // A moment past year 9999 cannot be written; a hostile clock must not bring us down.
    let ms = u64::try_from(unix_ms).unwrap_or(0).min(253_402_300_799_000);
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_as_typed() {
        assert_eq!(parse_size("256MiB"), Ok(256 << 20));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert!(parse_size("much").is_err());
        assert_eq!(parse_rate("100MiB/s"), Ok(100 << 20));
        assert_eq!(parse_rate("0"), Ok(0));
        assert_eq!(parse_duration("50ms"), Ok(Duration::from_millis(50)));
        assert!(parse_duration("0s").is_err());
        assert!(parse_duration("soon").is_err());
    }

    #[test]
    fn words_can_be_given_to_a_shell_again() {
        let said = ["sh", "-c", "echo $x", "", "it's", "wss=1MiB", "ü"].map(str::to_owned);
        assert_eq!(words(&said), r"sh -c 'echo $x' '' 'it'\''s' wss=1MiB ü");
    }

    #[test]
    fn figures_as_shown() {
        assert_eq!(size(256 << 20), "256.0 MiB");
        assert_eq!(known_rate(Some(1 << 20)), "1.0 MiB/s");
        assert_eq!(known_rate(None), "-");
        assert_eq!(micros(87), "87 us");
        assert_eq!(micros(12_345), "12.3 ms");
        assert_eq!(micros(1_240_000), "1.24 s");
        assert_eq!(micros(125_000_000), "2m 5s");
        assert_eq!(time(i64::MAX), "9999-12-31T23:59:59.000Z");
        assert_eq!(seconds_since(i64::MAX), 0);
    }
}
