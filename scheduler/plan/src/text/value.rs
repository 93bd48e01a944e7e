//! Single values: sizes, durations, names.

use std::fmt::Write;
use std::time::Duration;

const SIZES: [(&str, u64); 4] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
];
const TIMES: [(&str, u64); 4] = [("ms", 1_000_000), ("us", 1000), ("ns", 1), ("s", 1_000_000_000)];

/// Bytes, or whole KiB, MiB, GiB or TiB.
#[must_use]
pub fn parse_size(text: &str) -> Option<u64> {
    for (unit, size) in SIZES {
        if let Some(number) = text.strip_suffix(unit) {
            return digits(number)?.checked_mul(size);
        }
    }
    digits(text)
}

pub(super) fn print_size(bytes: u64) -> String {
    match SIZES
        .iter()
        .find(|(_, size)| bytes > 0 && bytes.is_multiple_of(*size))
    {
        Some((unit, size)) => format!("{}{unit}", bytes / size),
        None => bytes.to_string(),
    }
}

/// Whole s, ms, us or ns.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (unit, nanoseconds) = TIMES.iter().find(|(unit, _)| text.ends_with(unit))?;
    let number = digits(text.strip_suffix(unit)?)?;
    if *nanoseconds == 1_000_000_000 {
        return Some(Duration::from_secs(number));
    }
    Some(Duration::from_nanos(number.checked_mul(*nanoseconds)?))
}

pub(super) fn print_duration(duration: Duration) -> String {
    if duration.subsec_nanos() == 0 {
        return format!("{}s", duration.as_secs());
    }
    // Sub-second parts matter only for short times; long ones are cut to what can be read back.
    let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    match TIMES[..2]
        .iter()
        .find(|(_, unit)| nanoseconds.is_multiple_of(*unit))
    {
        Some((unit, size)) => format!("{}{unit}", nanoseconds / size),
        None => format!("{nanoseconds}ns"),
    }
}

/// A number that is finite and not negative.
#[must_use]
pub fn parse_number(text: &str) -> Option<f64> {
    text.parse()
        .ok()
        .filter(|number: &f64| number.is_finite() && *number >= 0.0)
}

pub(super) fn parse_name(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (hex, tail) = rest.split_at_checked(2)?;
        if !hex.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        bytes.push(u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok().filter(|name| !name.is_empty())
}

pub(super) fn print_name(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for &byte in name.as_bytes() {
        if byte.is_ascii_graphic() && !b"%=#".contains(&byte) {
            text.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

fn digits(text: &str) -> Option<u64> {
    // `parse` would take a sign.
    text.bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back() {
        for bytes in [0, 1, 1023, 1024, 384 << 20, (1 << 40) + 1, u64::MAX] {
            assert_eq!(parse_size(&print_size(bytes)), Some(bytes));
        }
        for nanoseconds in [0, 1, 1500, 1_500_000, 60_000_000_000, u64::MAX] {
            let duration = Duration::from_nanos(nanoseconds);
            assert_eq!(parse_duration(&print_duration(duration)), Some(duration));
        }
        for name in ["web-1", "a b", "50%", "ü=#\n"] {
            assert_eq!(parse_name(&print_name(name)).as_deref(), Some(name));
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "-1", "+1", "1.5GiB", "GiB", "99999999TiB", "1 GiB", "½"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
        for text in [
            "",
            "s",
            "5",
            "-5s",
            "5m",
            "99999999999999999999s",
            "18446744073709551615ms",
        ] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
        for text in ["", "%", "%4", "%zz", "%+1", "%FF"] {
            assert_eq!(parse_name(text), None, "{text}");
        }
        for text in ["NaN", "inf", "-1", "", "1e999"] {
            assert_eq!(parse_number(text), None, "{text}");
        }
    }
}
