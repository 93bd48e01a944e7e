//! Lines on their way to the console, which takes one byte at a time.

use core::fmt::{self, Write};

/// Most bytes that wait at a time.
const CAPACITY: usize = 1024;

/// Whole lines, waiting. A line that does not fit is dropped.
#[derive(Debug)]
pub struct Lines {
    bytes: [u8; CAPACITY],
    start: usize,
    end: usize,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            bytes: [0; CAPACITY],
            start: 0,
            end: 0,
        }
    }
}

impl Lines {
    /// Adds a line and its newline, or nothing.
    pub fn push(&mut self, line: fmt::Arguments<'_>) {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let mut tail = Tail {
            space: &mut self.bytes[self.end..],
            used: 0,
        };
        if tail.write_fmt(line).and_then(|()| tail.write_char('\n')).is_ok() {
            self.end += tail.used;
        }
    }

    /// The next byte for the console.
    pub fn pop(&mut self) -> Option<u8> {
        let byte = *self.bytes[..self.end].get(self.start)?;
        self.start += 1;
        Some(byte)
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

struct Tail<'a> {
    space: &'a mut [u8],
    used: usize,
}

impl Write for Tail<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.used + text.len();
        self.space
            .get_mut(self.used..end)
            .ok_or(fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.used = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(lines: &mut Lines) -> String {
        std::iter::from_fn(|| lines.pop()).map(char::from).collect()
    }

    #[test]
    fn lines_come_out_as_they_went_in() {
        let mut lines = Lines::default();
        lines.push(format_args!("a={}", 1));
        assert_eq!(lines.pop(), Some(b'a'));
        lines.push(format_args!("b"));
        assert_eq!(drain(&mut lines), "=1\nb\n");
        assert!(lines.is_empty());
    }

    #[test]
    fn a_line_that_does_not_fit_is_dropped_whole() {
        let mut lines = Lines::default();
        let long = "x".repeat(CAPACITY - 10);
        lines.push(format_args!("{long}"));
        lines.push(format_args!("0123456789"));
        lines.push(format_args!("ok"));
        assert_eq!(drain(&mut lines), format!("{long}\nok\n"));
        lines.push(format_args!("0123456789"));
        assert_eq!(drain(&mut lines), "0123456789\n");
    }
}
