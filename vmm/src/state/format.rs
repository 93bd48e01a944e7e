//! The container: header and self-describing sections.
//!
//! ```text
//! header   magic "SHOALST1" (8)  version u16  sections u16  reserved u32
//! section  kind u16  version u16  index u32  length u32  payload
//! ```
//! Integers are little-endian.

use std::collections::BTreeMap;
use std::fmt;

use prost::Message;

const MAGIC: &[u8; 8] = b"SHOALST1";
const VERSION: u16 = 1;
const HEADER_LEN: usize = 16;
const SECTION_HEADER_LEN: usize = 12;

/// What a section is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum Kind {
    /// A vCPU, by index.
    Vcpu = 1,
    /// An interrupt controller, by chip id.
    IrqChip = 2,
    /// The i8254.
    Pit = 3,
    /// kvmclock and TSC.
    Clock = 4,
    /// COM1.
    Serial = 5,
    /// Console output.
    Console = 6,
    /// Exit status.
    Power = 7,
}

impl Kind {
    const ALL: [Kind; 7] = [
        Kind::Vcpu,
        Kind::IrqChip,
        Kind::Pit,
        Kind::Clock,
        Kind::Serial,
        Kind::Console,
        Kind::Power,
    ];

    /// The version this build writes and reads.
    fn version(self) -> u16 {
        1
    }

    fn from_wire(value: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == value)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// Why saved state cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Not saved state at all.
    #[error("state header: not saved VM state (magic {0:02x?})")]
    Magic(Vec<u8>),
    /// Written by another version of the format.
    #[error("state header: version {found}, this build reads {VERSION}")]
    Version {
        /// Its version.
        found: u16,
    },
    /// Ends too early.
    #[error("state: cut short at byte {at}")]
    Truncated {
        /// Where.
        at: usize,
    },
    /// Bytes after the last section.
    #[error("state: {0} bytes after the last section")]
    Trailing(usize),
    /// A section this build does not know.
    #[error("state section kind {kind}: unknown to this build")]
    UnknownKind {
        /// Its number.
        kind: u16,
    },
    /// A known section in another version.
    #[error("state section {kind}: version {found}, this build reads {wanted}")]
    SectionVersion {
        /// The section.
        kind: Kind,
        /// Its version.
        found: u16,
        /// What could be read.
        wanted: u16,
    },
    /// The same section twice.
    #[error("state section {kind} {index}: repeated")]
    Repeated {
        /// The section.
        kind: Kind,
        /// Its index.
        index: u32,
    },
    /// A section that must be there is not.
    #[error("state section {kind} {index}: missing")]
    Missing {
        /// The section.
        kind: Kind,
        /// Its index.
        index: u32,
    },
    /// A payload that does not make sense.
    #[error("state section {kind}: {why}")]
    Malformed {
        /// The section.
        kind: Kind,
        /// What is wrong.
        why: String,
    },
}

/// Builds saved state.
#[derive(Debug)]
pub struct Writer {
    bytes: Vec<u8>,
    sections: u16,
}

impl Default for Writer {
    fn default() -> Self {
        Self::new()
    }
}

impl Writer {
    /// An empty state.
    #[must_use]
    pub fn new() -> Self {
        let mut bytes = Vec::with_capacity(32 * 1024);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 6]);
        Self { bytes, sections: 0 }
    }

    /// Appends one section.
    pub fn section(&mut self, kind: Kind, index: u32, payload: &impl Message) {
        self.bytes.extend_from_slice(&(kind as u16).to_le_bytes());
        self.bytes.extend_from_slice(&kind.version().to_le_bytes());
        self.bytes.extend_from_slice(&index.to_le_bytes());
        let length =
            u32::try_from(payload.encoded_len()).expect("sections are at most the console's capacity");
        self.bytes.extend_from_slice(&length.to_le_bytes());
        payload.encode(&mut self.bytes).expect("a Vec grows");
        self.sections += 1;
    }

    /// The finished state.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes[10..12].copy_from_slice(&self.sections.to_le_bytes());
        self.bytes
    }
}

/// Saved state whose container has been checked.
#[derive(Debug)]
pub struct Reader<'a> {
    sections: BTreeMap<(Kind, u32), &'a [u8]>,
}

impl<'a> Reader<'a> {
    /// Checks header and section headers.
    ///
    /// # Errors
    /// What is wrong with the container.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, StateError> {
        let (header, mut rest) = bytes
            .split_at_checked(HEADER_LEN)
            .ok_or(StateError::Truncated { at: bytes.len() })?;
        if &header[..8] != MAGIC {
            return Err(StateError::Magic(header[..8].to_vec()));
        }
        let version = u16::from_le_bytes([header[8], header[9]]);
        if version != VERSION {
            return Err(StateError::Version { found: version });
        }
        let count = u16::from_le_bytes([header[10], header[11]]);
        let mut sections = BTreeMap::new();
        for _ in 0..count {
            let cut = || StateError::Truncated { at: bytes.len() };
            let (section, after) = rest.split_at_checked(SECTION_HEADER_LEN).ok_or_else(cut)?;
            let u16_at = |at: usize| u16::from_le_bytes([section[at], section[at + 1]]);
            let u32_at = |at: usize| {
                u32::from_le_bytes([section[at], section[at + 1], section[at + 2], section[at + 3]])
            };
            let kind = Kind::from_wire(u16_at(0)).ok_or(StateError::UnknownKind { kind: u16_at(0) })?;
            if u16_at(2) != kind.version() {
                return Err(StateError::SectionVersion {
                    kind,
                    found: u16_at(2),
                    wanted: kind.version(),
                });
            }
            let length = usize::try_from(u32_at(8)).map_err(|_| cut())?;
            let (payload, after) = after.split_at_checked(length).ok_or_else(cut)?;
            let index = u32_at(4);
            if sections.insert((kind, index), payload).is_some() {
                return Err(StateError::Repeated { kind, index });
            }
            rest = after;
        }
        if !rest.is_empty() {
            return Err(StateError::Trailing(rest.len()));
        }
        Ok(Self { sections })
    }

    /// How many sections of a kind there are.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        self.sections.keys().filter(|(found, _)| *found == kind).count()
    }

    /// The section of this kind and index.
    ///
    /// # Errors
    /// When it is missing or its payload does not decode.
    pub fn section<M: Message + Default>(&self, kind: Kind, index: u32) -> Result<M, StateError> {
        let payload = self
            .sections
            .get(&(kind, index))
            .ok_or(StateError::Missing { kind, index })?;
        M::decode(*payload).map_err(|error| StateError::Malformed {
            kind,
            why: error.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{PitState, PowerState};
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut writer = Writer::new();
        writer.section(
            Kind::Power,
            0,
            &PowerState {
                exit_status: Some(3),
                guest_gap_us: None,
                last_words: vec![],
            },
        );
        writer.section(Kind::Pit, 0, &PitState { pit: vec![1, 2, 3] });
        writer.finish()
    }

    #[test]
    fn sections_come_back() {
        let bytes = sample();
        let reader = Reader::parse(&bytes).expect("own state");
        assert_eq!(
            reader
                .section::<PowerState>(Kind::Power, 0)
                .expect("there")
                .exit_status,
            Some(3)
        );
        let missing = reader
            .section::<PowerState>(Kind::Clock, 0)
            .expect_err("not there");
        assert_eq!(missing.to_string(), "state section Clock 0: missing");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut unknown = sample();
        unknown[HEADER_LEN] = 99;
        assert_eq!(
            Reader::parse(&unknown).expect_err("unknown"),
            StateError::UnknownKind { kind: 99 }
        );
        let mut newer = sample();
        newer[HEADER_LEN + 2] = 9;
        let error = Reader::parse(&newer).expect_err("newer").to_string();
        assert_eq!(error, "state section Power: version 9, this build reads 1");
        let mut foreign = sample();
        foreign[0] = b'X';
        assert!(matches!(Reader::parse(&foreign), Err(StateError::Magic(_))));
        let mut trailing = sample();
        trailing.push(0);
        assert_eq!(
            Reader::parse(&trailing).expect_err("trailing"),
            StateError::Trailing(1)
        );
    }

    proptest! {
        #[test]
        fn no_bytes_panic_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0usize..60, at in 0usize..60, with: u8) {
            let _ = Reader::parse(&bytes);
            let mut damaged = sample();
            if let Some(byte) = damaged.get_mut(at) {
                *byte = with;
            }
            damaged.truncate(cut);
            if let Ok(reader) = Reader::parse(&damaged) {
                let _ = reader.section::<PowerState>(Kind::Power, 0);
            }
        }
    }
}
