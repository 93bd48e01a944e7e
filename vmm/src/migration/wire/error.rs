//! What can be wrong with a stream, in words.

use std::io;

use super::{ACCEPTED_VERSIONS, FrameKind};

/// What is wrong with the stream.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection failed or ended.
    #[error("connection: {}", in_words(.0))]
    Io(#[from] io::Error),
    /// Not a migration stream.
    #[error("preamble: not a Shoal migration stream")]
    Magic,
    /// A role this build does not know.
    #[error("preamble: role {0} is unknown")]
    Role(u16),
    /// Another protocol version.
    #[error("preamble: protocol version {0}, this build accepts {first} to {last}", first = ACCEPTED_VERSIONS.start(), last = ACCEPTED_VERSIONS.end())]
    Version(u16),
    /// A kind this build does not know.
    #[error("frame kind {0}: unknown")]
    UnknownKind(u8),
    /// Longer than its kind may be.
    #[error("frame {kind:?}: length {length} is over the limit of {limit}")]
    TooLong {
        /// The kind.
        kind: FrameKind,
        /// What it claims.
        length: usize,
        /// What is allowed.
        limit: usize,
    },
    /// A frame is missing, repeated or inserted.
    #[error("frame {kind:?}: sequence {found}, expected {expected}")]
    Sequence {
        /// The kind.
        kind: FrameKind,
        /// Its number.
        found: u32,
        /// The number it should have.
        expected: u32,
    },
    /// Damaged on the way.
    #[error("frame {kind:?}: checksum does not match; the link or a host damages data")]
    Checksum {
        /// The kind.
        kind: FrameKind,
    },
    /// Another frame was due.
    #[error("frame {found:?}: expected {expected}")]
    Unexpected {
        /// What came.
        found: FrameKind,
        /// What was due.
        expected: &'static str,
    },
    /// A payload that does not make sense.
    #[error("frame {kind:?}: {why}")]
    Malformed {
        /// The kind.
        kind: FrameKind,
        /// What is wrong.
        why: String,
    },
    /// The peer ended the migration.
    #[error("the other side ended the migration: {0}")]
    Aborted(String),
}

impl WireError {
    /// Whether it may be otherwise over a new connection. The peer speaks another language otherwise: it is another program, or
    /// a fault of this one.
    #[must_use]
    pub fn can_pass(&self) -> bool {
        match self {
            // A peer says no also because it is not ready yet.
            Self::Io(_) | Self::Sequence { .. } | Self::Checksum { .. } | Self::Aborted(_) => true,
            Self::Magic
            | Self::Role(_)
            | Self::Version(_)
            | Self::UnknownKind(_)
            | Self::TooLong { .. }
            | Self::Unexpected { .. }
            | Self::Malformed { .. } => false,
        }
    }
}

/// The usual ends of a connection, as a user would say them.
fn in_words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "the other side was silent for too long".into()
        }
        io::ErrorKind::UnexpectedEof => "the other side closed it".into(),
        _ => error.to_string(),
    }
}
