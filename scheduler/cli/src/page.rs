//! Lines for people, safe for a terminal whoever wrote what is in them.

use std::fmt::{self, Display, Formatter, Write as _};

/// Lines for people. Text of guests, users and nodes may be in them: each line is escaped as it is added, so that none can move
/// the cursor, change the terminal, turn the direction of reading, or add a line that looks like one of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page(Vec<String>);

impl Page {
    /// Adds one line.
    pub fn line(&mut self, text: impl AsRef<str>) {
        self.0.push(escaped(text.as_ref().trim_end()));
    }

    /// Adds an empty line.
    pub fn blank(&mut self) {
        self.0.push(String::new());
    }

    /// Adds lines that have been escaped.
    pub fn add(&mut self, page: Self) {
        self.0.extend(page.0);
    }

    /// A message that may have several lines. Those after the first are indented, so that none looks like a message of its own.
    #[must_use]
    pub fn message(text: &str) -> Self {
        let mut page = Self::default();
        for (number, line) in text.lines().enumerate() {
            let indent = if number == 0 || line.starts_with("  ") {
                ""
            } else {
                "  "
            };
            page.line(format!("{indent}{line}"));
        }
        page
    }
}

/// Of one line.
impl From<String> for Page {
    fn from(line: String) -> Self {
        Self::from_iter([line])
    }
}

/// Of one line.
impl From<&str> for Page {
    fn from(line: &str) -> Self {
        Self::from_iter([line])
    }
}

impl<S: AsRef<str>> FromIterator<S> for Page {
    fn from_iter<I: IntoIterator<Item = S>>(lines: I) -> Self {
        let mut page = Self::default();
        lines.into_iter().for_each(|line| page.line(line));
        page
    }
}

impl Display for Page {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (number, line) in self.0.iter().enumerate() {
            if number > 0 {
                f.write_char('\n')?;
            }
            f.write_str(line)?;
        }
        Ok(())
    }
}

/// Text without anything but visible characters and spaces: others are shown as in a string of Rust, such as `\n` and `\u{1b}`.
#[must_use]
pub fn escaped(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '"' | '\'' | '\\' => shown.push(character),
            // Also what has no picture: directions, joiners, separators, private and unassigned characters.
            _ => shown.extend(character.escape_debug()),
        }
    }
    shown
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A title, a cleared screen, eight-bit CSI, a carriage return, a forged line, turned text, a line separator.
    pub const HOSTILE: &str = "x\u{1b}]0;title\u{7}\u{1b}[2J\u{9b}2J\rforged\nerror: forged\u{202e}txt\u{2066}\u{200b}\u{2028}\u{7f}\tend";

    /// Fails unless `shown` has the hostile text, once or more, and none of its effects.
    pub fn assert_tame(shown: &str) {
        assert!(shown.contains("forged"), "it is not shown at all: {shown:?}");
        for line in shown.lines() {
            assert!(
                !line.trim_start().starts_with("error: forged"),
                "a forged line: {shown:?}"
            );
            let tame = |c: char| c == ' ' || c.escape_debug().count() == 1 || "\"'\\".contains(c);
            assert!(line.chars().all(tame), "{line:?}");
        }
    }

    #[test]
    fn what_has_an_effect_on_a_terminal_is_shown_and_has_none() {
        assert_eq!(
            escaped("plain \"quoted\" 'ü' C:\\x 日本"),
            "plain \"quoted\" 'ü' C:\\x 日本"
        );
        assert_eq!(
            escaped("a\u{1b}[2Jb\nc\u{9b}\u{202e}"),
            "a\\u{1b}[2Jb\\nc\\u{9b}\\u{202e}"
        );
        assert_tame(&Page::from(HOSTILE).to_string());
    }

    #[test]
    fn a_message_keeps_its_lines_and_indents_them() {
        let page = Page::message("error: first\nsecond\n    third\u{1b}");
        assert_eq!(page.to_string(), "error: first\n  second\n    third\\u{1b}");
        let forged = Page::message(&format!("error: {HOSTILE}")).to_string();
        assert!(
            forged.lines().skip(1).all(|line| line.starts_with("  ")),
            "{forged:?}"
        );
    }
}
