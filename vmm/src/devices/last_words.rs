//! What a guest says of its own failure, when it can go no further.

use std::fmt::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Longest line that is kept, bytes. The rest is passed over.
const MAX_BYTES: usize = 255;

/// The line that the guest has begun, if it has.
#[derive(Debug, Default)]
pub struct LastWords(Mutex<Vec<u8>>);

impl LastWords {
    /// The guest wrote `byte` to the port. A newline ends the line, and with it the VM: the answer is the reason.
    pub fn write(&self, byte: u8) -> Option<String> {
        let mut line = self.line();
        if byte == b'\n' {
            return Some(reason(&line));
        }
        if line.len() < MAX_BYTES {
            line.push(byte);
        }
        None
    }

    /// The reason so far, if the guest has begun one.
    pub fn unfinished(&self) -> Option<String> {
        let line = self.line();
        (!line.is_empty()).then(|| reason(&line))
    }

    /// The bytes, for another VMM.
    pub fn save(&self) -> Vec<u8> {
        self.line().clone()
    }

    /// What came with the VM.
    pub fn restore(&self, mut saved: Vec<u8>) {
        saved.truncate(MAX_BYTES);
        *self.line() = saved;
    }

    fn line(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Printable ASCII as it is; whatever else the guest wrote, as `\xNN`.
fn reason(line: &[u8]) -> String {
    let mut text = "the guest says: ".to_owned();
    for &byte in line {
        match byte {
            b' '..=b'~' => text.push(byte.into()),
            _ => write!(text, "\\x{byte:02x}").expect("a String takes everything"),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(words: &LastWords, text: &[u8]) -> Option<String> {
        text.iter().find_map(|&byte| words.write(byte))
    }

    #[test]
    fn a_line_is_the_reason() {
        let words = LastWords::default();
        assert_eq!(words.unfinished(), None);
        assert_eq!(says(&words, b"no init\n"), Some("the guest says: no init".into()));
    }

    #[test]
    fn what_a_terminal_would_act_on_is_escaped_and_long_lines_are_cut() {
        let words = LastWords::default();
        assert_eq!(
            says(&words, b"\x1b[2J\r\xc3\xa4\n"),
            Some("the guest says: \\x1b[2J\\x0d\\xc3\\xa4".into())
        );
        let words = LastWords::default();
        let reason = says(&words, &[&[b'x'; 100_000][..], b"\n"].concat()).expect("a line");
        assert_eq!(reason.len(), "the guest says: ".len() + MAX_BYTES);
    }

    #[test]
    fn a_line_that_was_begun_moves_with_the_vm() {
        let words = LastWords::default();
        assert_eq!(says(&words, b"no "), None);
        let moved = LastWords::default();
        moved.restore(words.save());
        assert_eq!(moved.unfinished(), Some("the guest says: no ".into()));
        assert_eq!(says(&moved, b"init\n"), Some("the guest says: no init".into()));
        moved.restore(vec![b'x'; 1 << 20]);
        assert_eq!(moved.save().len(), MAX_BYTES);
    }
}
