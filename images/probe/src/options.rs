//! The command line: `name=value` words.

use core::fmt;

use crate::PAGE_SIZE;
use crate::page::Pattern;

/// Most pages per second that can be asked for.
const MAX_RATE: u64 = 10_000_000;
/// Milliseconds between heartbeats that can be asked for.
const BEATS: core::ops::RangeInclusive<u64> = 50..=60_000;

/// What the command line asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Pages of the working set.
    pub working_set_pages: u64,
    /// Pages to dirty per second; 0: none.
    pub rate: u64,
    /// Pages to fill, at least the working set.
    pub fill_pages: u64,
    /// Pages to fill per second; 0: as fast as possible.
    pub fill_rate: u64,
    /// What filled pages hold.
    pub pattern: Pattern,
    /// Milliseconds from one heartbeat to the next.
    pub beat_ms: u64,
    /// When to stop; 0: never.
    pub seconds: u64,
    /// Pages to dirty before it stops; 0: no such end.
    pub work: u64,
    /// TSC frequency; 0: find it out.
    pub tsc_khz: u32,
    /// Exit status; absent: 0, or 1 if pages were corrupt.
    pub status: Option<u8>,
}

/// A word of the command line that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionsError<'a> {
    word: &'a str,
    expected: &'static str,
}

impl fmt::Display for OptionsError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}': expected {}", self.word, self.expected)
    }
}

impl Options {
    /// Reads a command line. Words whose name has a dot are a VMM's own (`virtio_mmio.device=`) and are passed over.
    ///
    /// # Errors
    /// The first word that is not an option, or whose value is not what that option takes.
    pub fn parse(command_line: &str) -> Result<Self, OptionsError<'_>> {
        let mut options = Self {
            working_set_pages: 0,
            rate: 0,
            fill_pages: 0,
            fill_rate: 0,
            pattern: Pattern::Random,
            beat_ms: 1000,
            seconds: 0,
            work: 0,
            tsc_khz: 0,
            status: None,
        };
        for word in command_line.split_ascii_whitespace() {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            if name.contains('.') {
                continue;
            }
            options
                .set(name, value)
                .map_err(|expected| OptionsError { word, expected })?;
        }
        options.fill_pages = options.fill_pages.max(options.working_set_pages);
        Ok(options)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), &'static str> {
        const SIZE: &str = "a size in whole pages, such as 64MiB";
        match name {
            "wss" => self.working_set_pages = pages(value).ok_or(SIZE)?,
            "fill" => self.fill_pages = pages(value).ok_or(SIZE)?,
            "fill_rate" => {
                let rate = pages(value).filter(|&rate| rate <= MAX_RATE);
                self.fill_rate = rate.ok_or("a size per second, at most 38GiB")?;
            }
            "rate" => {
                let rate = value.parse().ok().filter(|&rate| rate <= MAX_RATE);
                self.rate = rate.ok_or("pages per second, at most 10000000")?;
            }
            "pattern" => {
                self.pattern = match value {
                    "random" => Pattern::Random,
                    "zero" => Pattern::Zero,
                    "text" => Pattern::Text,
                    _ => return Err("pattern=random, pattern=zero or pattern=text"),
                }
            }
            "beat" => {
                let beat = value.parse().ok().filter(|beat| BEATS.contains(beat));
                self.beat_ms = beat.ok_or("milliseconds from 50 to 60000")?;
            }
            "seconds" => self.seconds = value.parse::<u32>().map_err(|_| "a number of seconds")?.into(),
            "work" => self.work = value.parse().map_err(|_| "a number of pages")?,
            "tsc_khz" => self.tsc_khz = value.parse().map_err(|_| "a frequency in kHz")?,
            "status" => self.status = Some(value.parse().map_err(|_| "an exit status of 0 to 255")?),
            "panic" if !value.is_empty() => {} // see `last_words`
            _ => {
                return Err(
                    "wss=, rate=, fill=, fill_rate=, pattern=, beat=, seconds=, work=, tsc_khz=, status= or panic=TEXT",
                );
            }
        }
        Ok(())
    }
}

/// What the probe is to say of its failure, if it is asked to fail: when it is time to stop, or at once if there is no such
/// time. Of a command line that [`Options::parse`] takes.
pub fn last_words(command_line: &str) -> Option<&str> {
    let mut words = command_line.split_ascii_whitespace();
    words.find_map(|word| word.strip_prefix("panic="))
}

/// Reads a size with an optional unit (`4096`, `64K`, `64KiB`, and so on up to `T`), as pages.
fn pages(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return None,
    };
    let bytes = number.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    bytes.is_multiple_of(PAGE_SIZE).then_some(bytes / PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_line_is_an_idle_probe() {
        let options = Options::parse("  ").expect("valid");
        assert_eq!(
            (options.fill_pages, options.rate, options.seconds, options.status),
            (0, 0, 0, None)
        );
    }

    #[test]
    fn every_option_is_read() {
        let line = "wss=1MiB rate=20000 fill=512M pattern=zero beat=200 seconds=30 work=900 fill_rate=8MiB tsc_khz=2100000 status=7";
        let options = Options::parse(line).expect("valid");
        assert_eq!(
            options,
            Options {
                working_set_pages: 256,
                rate: 20_000,
                fill_pages: 131_072,
                fill_rate: 2048,
                pattern: Pattern::Zero,
                beat_ms: 200,
                seconds: 30,
                work: 900,
                tsc_khz: 2_100_000,
                status: Some(7),
            }
        );
    }

    #[test]
    fn the_working_set_is_filled_too() {
        assert_eq!(Options::parse("wss=64K fill=4096").expect("valid").fill_pages, 16);
    }

    #[test]
    fn a_vmm_may_add_words_of_its_own() {
        assert!(Options::parse("virtio_mmio.device=512@0xd0000000:5 seconds=1").is_ok());
    }

    #[test]
    fn last_words_are_found_beside_the_options() {
        let line = "seconds=3 panic=no_root=/dev/vda";
        assert_eq!(Options::parse(line).expect("valid").seconds, 3);
        assert_eq!(last_words(line), Some("no_root=/dev/vda"));
        assert_eq!(last_words("seconds=3"), None);
    }

    #[test]
    fn bad_words_are_named() {
        for bad in [
            "wss=1",
            "wss=",
            "wss=-4096",
            "wss=99999999T",
            "rate=x",
            "rate=10000001",
            "pattern=ones",
            "beat=49",
            "beat=60001",
            "work=1MiB",
            "status=256",
            "panic=",
            "fil=1M",
            "=",
        ] {
            let error = Options::parse(bad).expect_err(bad);
            assert_eq!(error.word, bad);
        }
    }
}
