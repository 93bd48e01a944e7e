//! The parts of init that make no system calls, so that they can be tested on any machine.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

/// Decodes `%XX` in place and returns how long the result is. A `%` without two hexadecimal digits stands for itself.
///
/// The kernel splits its command line at spaces and gives the words after `--` to init; whoever writes that command line encodes
/// what would not survive (docs/images.md). `%00` therefore stands for an argument that is empty.
#[must_use]
pub fn percent_decode(text: &mut [u8]) -> usize {
    let (mut from, mut to) = (0, 0);
    while from < text.len() {
        let (byte, length) = match text[from..] {
            [b'%', high, low, ..] => hex(high)
                .zip(hex(low))
                .map_or((b'%', 1), |(high, low)| (high << 4 | low, 3)),
            [byte, ..] => (byte, 1),
            [] => break,
        };
        text[to] = byte;
        from += length;
        to += 1;
    }
    to
}

fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

/// The exit status of a command as a shell would give it, from the status that wait4(2) gives: the exit code, or 128 + signal.
#[must_use]
pub fn exit_status(wait_status: u32) -> u8 {
    let [low, code, ..] = wait_status.to_le_bytes();
    let signal = low & 0x7f;
    if signal == 0 { code } else { 128 + signal }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(text: &str) -> Vec<u8> {
        let mut bytes = text.as_bytes().to_vec();
        let length = percent_decode(&mut bytes);
        bytes.truncate(length);
        bytes
    }

    #[test]
    fn encoded_bytes_come_back() {
        assert_eq!(decoded("plain"), b"plain");
        assert_eq!(decoded("echo%20%22a%25b%22%3b"), b"echo \"a%b\";");
        assert_eq!(decoded("%C3%a4"), "ä".as_bytes());
        assert_eq!(decoded("%00"), [0]);
        assert_eq!(decoded(""), b"");
    }

    #[test]
    fn a_percent_sign_that_encodes_nothing_stands_for_itself() {
        for text in ["%", "100%", "%2", "%zz", "%%"] {
            assert_eq!(decoded(text), text.as_bytes());
        }
        assert_eq!(decoded("%%41"), b"%A");
    }

    #[test]
    fn every_byte_survives() {
        for byte in 0..=255u8 {
            assert_eq!(decoded(&format!("{:%>1}{byte:02X}", "%")), [byte]);
        }
    }

    #[test]
    fn statuses_are_a_shells() {
        assert_eq!(exit_status(0), 0);
        assert_eq!(exit_status(3 << 8), 3);
        assert_eq!(exit_status(9), 137);
        assert_eq!(exit_status(11 | 0x80), 139);
    }
}
