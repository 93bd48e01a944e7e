//! Frames of the migration stream.
//!
//! ```text
//! preamble   magic "SHOALMIG" (8)  version u16  role u16  reserved u32              once, from whoever connects
//! frame      kind u8  reserved u8 x3  length u32  sequence u32  crc32c u32  payload
//! ```
//! Integers are little-endian. The checksum covers the frame header (with the checksum field zero) and the payload. Each
//! kind has its own length limit, checked before anything is allocated. Sequence numbers count frames per connection and
//! direction from zero, so that a frame lost, repeated or inserted is noticed. Page bytes of a PageRuns frame follow its
//! payload and have a checksum for each page instead ([`super::pages`]).

mod error;
mod guest;
mod messages;

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::time::Duration;

use prost::Message;

pub use error::WireError;
pub use guest::GuestStream;
pub use messages::{Abort, Attach, Damaged, Digest, Empty, Hello, HelloAck, Pass, PassAck, Step};

/// First bytes of every migration stream.
pub const MAGIC: [u8; 8] = *b"SHOALMIG";
/// The protocol version this build speaks.
pub const VERSION: u16 = 2;
/// The version before, which sent everything over one connection.
pub const VERSION_1: u16 = 1;
/// Versions this build accepts from a source: its own and the previous.
pub const ACCEPTED_VERSIONS: std::ops::RangeInclusive<u16> = VERSION_1..=VERSION;
/// A peer that neither sends nor takes a byte for this long is taken for gone.
pub const PEER_TIMEOUT: Duration = Duration::from_secs(5);
/// Who has nothing to say for this long says so.
pub const KEEP_ALIVE: Duration = Duration::from_secs(1);

const PREAMBLE_LEN: usize = 16;
const HEADER_LEN: usize = 16;
const CRC_AT: usize = 12;
/// What a connection is for; in its preamble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Role {
    /// The one that opens a migration and carries its decisions.
    Control = 0,
    /// Pages, from the source.
    Data = 1,
    /// Post-copy: addresses the guest waits for, from the destination.
    FaultRequests = 2,
    /// Post-copy: the pages asked for, from the source.
    FaultPages = 3,
}

impl Role {
    const ALL: [Role; 4] = [Role::Control, Role::Data, Role::FaultRequests, Role::FaultPages];
}

/// How a connection begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// Protocol version.
    pub version: u16,
    /// What it is for.
    pub role: Role,
}

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Post-copy, source: pages that are not sent before the VM runs. Destination, over new connections: pages it lacks.
    Missing = 32,
    /// Post-copy, source: pages of the paused VM.
    PostPages = 33,
    /// Post-copy, destination: pages that are waited for.
    FaultRequest = 34,
    /// Post-copy, destination: how it goes, and that it is complete.
    PostStatus = 35,
    /// Post-copy, source: it has heard so. Destination: it holds back who touches what is missing.
    PostAck = 36,
    /// Source: what comes on this data connection from here on are pages of post-copy.
    PostCopy = 37,
    /// Source: who it is and what the VM needs. First frame.
    Hello = 1,
    /// Destination: it can take the VM.
    HelloAck = 2,
    /// Source, version 1: page runs, with their bytes.
    Pages = 3,
    /// Source: a pass is complete.
    PassEnd = 4,
    /// Destination: everything up to that pass is in guest memory.
    PassAck = 5,
    /// Source: all but memory.
    State = 6,
    /// Destination: memory and state are loaded and verified.
    Ready = 7,
    /// Source: the VM is yours; from here on the source never resumes on its own.
    Commit = 8,
    /// Destination: the VM runs.
    Running = 9,
    /// Either side: it ends here, and why.
    Abort = 10,
    /// Source: first frame of every connection but the control connection.
    Attach = 11,
    /// Destination: it belongs to this migration.
    AttachAck = 12,
    /// Source: page runs, followed by their bytes.
    PageRuns = 13,
    /// Either side: it is still there.
    KeepAlive = 14,
    /// Source: both sides are to digest guest memory now.
    Verify = 15,
    /// Source: its digest.
    Digest = 16,
}

impl FrameKind {
    const ALL: [FrameKind; 16] = [
        FrameKind::Hello,
        FrameKind::HelloAck,
        FrameKind::Pages,
        FrameKind::PassEnd,
        FrameKind::PassAck,
        FrameKind::State,
        FrameKind::Ready,
        FrameKind::Commit,
        FrameKind::Running,
        FrameKind::Abort,
        FrameKind::Attach,
        FrameKind::AttachAck,
        FrameKind::PageRuns,
        FrameKind::KeepAlive,
        FrameKind::Verify,
        FrameKind::Digest,
    ];

    const POST_COPY: [FrameKind; 6] = [
        FrameKind::Missing,
        FrameKind::PostPages,
        FrameKind::FaultRequest,
        FrameKind::PostStatus,
        FrameKind::PostAck,
        FrameKind::PostCopy,
    ];

    /// Longest payload of this kind.
    #[must_use]
    pub fn max_len(self) -> usize {
        match self {
            FrameKind::Missing => super::postcopy::page_set::MAX_MISSING,
            FrameKind::PostPages => super::postcopy::frames::MAX_POST_PAGES,
            FrameKind::FaultRequest => super::postcopy::frames::MAX_FAULT_REQUEST,
            FrameKind::PostStatus => 2 << 10,
            FrameKind::Hello => 256 << 10,
            FrameKind::Pages => super::pages::v1::MAX_PAYLOAD,
            FrameKind::PageRuns => super::pages::frame::MAX_META,
            FrameKind::PassAck => 8 * messages::MAX_DAMAGED + 256,
            FrameKind::State | FrameKind::Digest => 16 << 20,
            FrameKind::Abort => 4 << 10,
            FrameKind::Attach => 1 << 10,
            _ => 256,
        }
    }
}

/// A frame's header, checked.
#[derive(Debug, Clone, Copy)]
pub struct FrameHeader {
    /// What the frame says.
    pub kind: FrameKind,
    /// Payload bytes that follow.
    pub length: usize,
    crc: u32,
    /// Checksum so far: over the header.
    running_crc: u32,
}

/// One end of the control stream.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    sent: u32,
    received: u32,
    bytes_sent: u64,
}

impl<S: Read + Write> Connection<S> {
    /// Over a connected stream.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            sent: 0,
            received: 0,
            bytes_sent: 0,
        }
    }

    /// The same connection over another view of its stream.
    pub fn map_stream<T>(self, map: impl FnOnce(S) -> T) -> Connection<T> {
        Connection {
            stream: map(self.stream),
            sent: self.sent,
            received: self.received,
            bytes_sent: self.bytes_sent,
        }
    }

    /// Bytes written to the stream so far.
    pub fn bytes_sent(&self) -> u64 {
        self.bytes_sent
    }

    /// The stream, to set its timeouts.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// The stream itself, for what is not a frame.
    pub fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Source: opens a connection.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn send_preamble(&mut self, role: Role) -> Result<(), WireError> {
        let mut bytes = [0u8; PREAMBLE_LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10..12].copy_from_slice(&(role as u16).to_le_bytes());
        self.stream.write_all(&bytes)?;
        self.bytes_sent += PREAMBLE_LEN as u64;
        Ok(())
    }

    /// Destination: checks who opens a connection, and what for.
    ///
    /// # Errors
    /// When it is not a migration stream, or of a version this build does not accept.
    pub fn receive_preamble(&mut self) -> Result<Preamble, WireError> {
        let mut bytes = [0u8; PREAMBLE_LEN];
        self.stream.read_exact(&mut bytes)?;
        if bytes[..8] != MAGIC {
            return Err(WireError::Magic);
        }
        let version = u16::from_le_bytes([bytes[8], bytes[9]]);
        if !ACCEPTED_VERSIONS.contains(&version) {
            return Err(WireError::Version(version));
        }
        let role = u16::from_le_bytes([bytes[10], bytes[11]]);
        let role = Role::ALL
            .into_iter()
            .find(|known| *known as u16 == role)
            .ok_or(WireError::Role(role))?;
        Ok(Preamble { version, role })
    }

    /// Sends a frame whose payload is a message.
    ///
    /// # Errors
    /// When the connection fails or the message is over its limit.
    pub fn send(&mut self, kind: FrameKind, message: &impl Message) -> Result<(), WireError> {
        self.send_parts(kind, &message.encode_to_vec(), &[])
    }

    /// Sends a frame whose payload is `head` followed by `body`.
    ///
    /// # Errors
    /// When the connection fails or the payload is over its limit.
    pub fn send_parts(&mut self, kind: FrameKind, head: &[u8], body: &[u8]) -> Result<(), WireError> {
        let header = self.header(kind, head, body)?;
        write_all_vectored(
            &mut self.stream,
            &mut [IoSlice::new(&header), IoSlice::new(head), IoSlice::new(body)],
        )?;
        self.bytes_sent += (HEADER_LEN + head.len() + body.len()) as u64;
        Ok(())
    }

    /// The header of the next frame; its number is used up.
    fn header(&mut self, kind: FrameKind, head: &[u8], body: &[u8]) -> Result<[u8; HEADER_LEN], WireError> {
        let length = head.len() + body.len();
        let limit = kind.max_len();
        let Some(wire_length) = u32::try_from(length).ok().filter(|_| length <= limit) else {
            return Err(WireError::TooLong { kind, length, limit });
        };
        let mut header = [0u8; HEADER_LEN];
        header[0] = kind as u8;
        header[4..8].copy_from_slice(&wire_length.to_le_bytes());
        header[8..12].copy_from_slice(&self.sent.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&header), head), body);
        header[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        self.sent = self.sent.wrapping_add(1);
        Ok(header)
    }

    /// Receives a frame's header. The payload is to be read next, whole.
    ///
    /// # Errors
    /// When the connection fails or the header is wrong.
    pub fn receive_header(&mut self) -> Result<FrameHeader, WireError> {
        let mut bytes = [0u8; HEADER_LEN];
        self.stream.read_exact(&mut bytes)?;
        let kind = FrameKind::ALL
            .into_iter()
            .chain(FrameKind::POST_COPY)
            .find(|kind| *kind as u8 == bytes[0])
            .ok_or(WireError::UnknownKind(bytes[0]))?;
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let length = usize::try_from(u32_at(4)).unwrap_or(usize::MAX);
        let limit = kind.max_len();
        if length > limit {
            return Err(WireError::TooLong { kind, length, limit });
        }
        let (found, expected) = (u32_at(8), self.received);
        if found != expected {
            return Err(WireError::Sequence {
                kind,
                found,
                expected,
            });
        }
        self.received = self.received.wrapping_add(1);
        let crc = u32_at(CRC_AT);
        bytes[CRC_AT..].fill(0);
        Ok(FrameHeader {
            kind,
            length,
            crc,
            running_crc: crc32c::crc32c(&bytes),
        })
    }

    /// Reads part of a payload.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn receive_into(&mut self, header: &mut FrameHeader, buffer: &mut [u8]) -> Result<(), WireError> {
        self.stream.read_exact(buffer)?;
        header.running_crc = crc32c::crc32c_append(header.running_crc, buffer);
        Ok(())
    }

    /// Reads bytes that follow a frame.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn receive_exact(&mut self, buffer: &mut [u8]) -> Result<(), WireError> {
        Ok(self.stream.read_exact(buffer)?)
    }

    /// Reads part of a payload into several buffers, in order.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn receive_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> Result<(), WireError> {
        let mut rest = buffers;
        while !rest.is_empty() {
            match self.stream.read_vectored(rest) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => IoSliceMut::advance_slices(&mut rest, count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Receives a whole small frame.
    ///
    /// # Errors
    /// When the connection fails or the frame is damaged.
    pub fn receive(&mut self) -> Result<(FrameKind, Vec<u8>), WireError> {
        let mut header = self.receive_header()?;
        let payload = self.receive_payload(&mut header)?;
        Ok((header.kind, payload))
    }

    /// Receives the rest of a frame whose header has come, and checks it.
    ///
    /// # Errors
    /// When the connection fails or the frame is damaged.
    pub fn receive_payload(&mut self, header: &mut FrameHeader) -> Result<Vec<u8>, WireError> {
        let mut payload = vec![0u8; header.length];
        self.receive_into(header, &mut payload)?;
        header.verify()?;
        Ok(payload)
    }

    /// Receives the frame that is due.
    ///
    /// # Errors
    /// When another frame comes; an Abort becomes [`WireError::Aborted`].
    pub fn expect<M: Message + Default>(
        &mut self,
        kind: FrameKind,
        name: &'static str,
    ) -> Result<M, WireError> {
        let mut header = self.receive_header()?;
        let found = header.kind;
        if found != kind && found != FrameKind::Abort {
            // Before its payload is read, or room is made for it.
            return Err(WireError::Unexpected {
                found,
                expected: name,
            });
        }
        let payload = self.receive_payload(&mut header)?;
        if found == FrameKind::Abort {
            return Err(aborted(&payload));
        }
        decode(kind, &payload)
    }
}

/// Decodes a message payload.
///
/// # Errors
/// When it is malformed.
pub fn decode<M: Message + Default>(kind: FrameKind, payload: &[u8]) -> Result<M, WireError> {
    M::decode(payload).map_err(|error| WireError::Malformed {
        kind,
        why: error.to_string(),
    })
}

/// The error that an Abort frame stands for.
#[must_use]
pub fn aborted(payload: &[u8]) -> WireError {
    match decode::<Abort>(FrameKind::Abort, payload) {
        Ok(abort) => WireError::Aborted(
            abort
                .reason
                .chars()
                .filter(|c| !c.is_control())
                .take(messages::MAX_REASON)
                .collect(),
        ),
        Err(error) => error,
    }
}

impl FrameHeader {
    /// Adds payload bytes that were read by other means to the checksum.
    pub fn add_to_checksum(&mut self, bytes: &[u8]) {
        self.running_crc = crc32c::crc32c_append(self.running_crc, bytes);
    }

    /// Whether what was read is what was sent.
    ///
    /// # Errors
    /// When it is not.
    pub fn verify(&self) -> Result<(), WireError> {
        if self.running_crc == self.crc {
            Ok(())
        } else {
            Err(WireError::Checksum { kind: self.kind })
        }
    }
}

fn write_all_vectored(stream: &mut impl Write, buffers: &mut [IoSlice<'_>]) -> io::Result<()> {
    let mut rest = buffers;
    IoSlice::advance_slices(&mut rest, 0);
    while !rest.is_empty() {
        match stream.write_vectored(rest) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut rest, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    fn written(kind: FrameKind, head: &[u8], body: &[u8]) -> Vec<u8> {
        let mut connection = Connection::new(Cursor::new(vec![]));
        connection.send_parts(kind, head, body).expect("within the limit");
        connection.stream.into_inner()
    }

    fn reader(bytes: Vec<u8>) -> Connection<Cursor<Vec<u8>>> {
        Connection::new(Cursor::new(bytes))
    }

    /// Guest memory on one end of a test is a vector.
    impl GuestStream for Cursor<Vec<u8>> {
        unsafe fn write_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()> {
            for part in parts {
                // SAFETY: as the caller says; tests have no guest that writes meanwhile.
                self.write_all(unsafe {
                    std::slice::from_raw_parts(part.iov_base.cast::<u8>(), part.iov_len)
                })?;
            }
            Ok(())
        }

        unsafe fn read_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()> {
            for part in parts {
                // SAFETY: as the caller says.
                self.read_exact(unsafe {
                    std::slice::from_raw_parts_mut(part.iov_base.cast::<u8>(), part.iov_len)
                })?;
            }
            Ok(())
        }
    }

    proptest! {
        #[test]
        fn frames_come_back_whole(head in proptest::collection::vec(any::<u8>(), 0..100), body in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let (kind, payload) = reader(written(FrameKind::State, &head, &body)).receive().expect("own frame");
            prop_assert_eq!(kind, FrameKind::State);
            prop_assert_eq!(payload, [head, body].concat());
        }

        #[test]
        fn one_damaged_bit_is_noticed(body in proptest::collection::vec(any::<u8>(), 1..200), at in 0usize..200, bit in 0u8..8) {
            let mut bytes = written(FrameKind::State, &[], &body);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            // Reserved bytes are covered by the checksum like all others.
            prop_assert!(reader(bytes).receive().is_err());
        }

        #[test]
        fn no_bytes_panic_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = reader(bytes.clone()).receive();
            let _ = reader(bytes).receive_preamble();
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_allocation() {
        let mut bytes = written(FrameKind::Ready, &[], &[]);
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            reader(bytes).receive(),
            Err(WireError::TooLong {
                kind: FrameKind::Ready,
                ..
            })
        ));
    }

    #[test]
    fn a_repeated_frame_is_refused() {
        let frame = written(FrameKind::Ready, &[], &[]);
        let mut connection = reader([frame.clone(), frame].concat());
        connection.receive().expect("the first");
        assert!(matches!(
            connection.receive(),
            Err(WireError::Sequence {
                found: 0,
                expected: 1,
                ..
            })
        ));
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let mut connection = Connection::new(Cursor::new(vec![]));
        connection.send_preamble(Role::Control).expect("memory");
        let mut bytes = connection.stream.into_inner();
        bytes[8] = 99;
        let error = reader(bytes).receive_preamble().expect_err("newer").to_string();
        assert_eq!(error, "preamble: protocol version 99, this build accepts 1 to 2");
    }
}
