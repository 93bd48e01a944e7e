//! What a hostile peer may send, read as either side reads it: for fuzz targets (`fuzz/`) and a bounded test. No KVM, no
//! sockets; everything up to the point where KVM would be given a value.

use std::io::{self, Cursor, IoSliceMut, Read, Write};

use prost::Message;

use crate::memory::GuestMemory;
use crate::migration::pages::{self, PageCounts, PageReceiver, WrittenPages};
use crate::migration::postcopy::frames;
use crate::migration::verify::MemoryDigest;
use crate::migration::wire::{
    self, Attach, Connection, Digest, FrameKind, GuestStream, Hello, HelloAck, Pass, PassAck, Role, Step,
    VERSION_1, WireError,
};
use crate::state::{self, Kind};

/// Guest memory that the bytes may land in.
pub const MEMORY: u64 = 4 << 20;

/// Bytes to read; what is written is thrown away.
#[derive(Debug)]
struct Bytes<'a>(Cursor<&'a [u8]>);

impl Read for Bytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.0.read_vectored(buffers)
    }
}

impl Write for Bytes<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl GuestStream for Bytes<'_> {
    unsafe fn write_guest(&mut self, _: &mut [libc::iovec]) -> io::Result<()> {
        Ok(())
    }

    unsafe fn read_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()> {
        for part in parts {
            // SAFETY: the caller says that each part is mapped, writable and referred to by nobody else.
            let part = unsafe { std::slice::from_raw_parts_mut(part.iov_base.cast::<u8>(), part.iov_len) };
            self.0.read_exact(part)?;
        }
        Ok(())
    }
}

/// Keeps what is written; there is nothing to read.
#[derive(Debug, Default)]
pub struct Sink(pub Vec<u8>);

impl Read for Sink {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl GuestStream for Sink {
    unsafe fn write_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()> {
        for part in parts {
            // SAFETY: the caller says that each part is mapped; nothing writes to it meanwhile, as no guest runs here.
            let part = unsafe { std::slice::from_raw_parts(part.iov_base.cast::<u8>(), part.iov_len) };
            self.0.extend_from_slice(part);
        }
        Ok(())
    }

    unsafe fn read_guest(&mut self, _: &mut [libc::iovec]) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// A destination of this build reads `bytes`, which a source sent over one connection of either protocol. Answers how many
/// frames it took.
pub fn destination_reads(bytes: &[u8], memory: &GuestMemory) -> usize {
    let mut frames = 0;
    let mut connection = Connection::new(Bytes(Cursor::new(bytes)));
    // The end of what was sent is an error too.
    let _ = follow_source(&mut connection, memory, &mut frames);
    frames
}

fn follow_source(
    connection: &mut Connection<Bytes<'_>>,
    memory: &GuestMemory,
    frames: &mut usize,
) -> Result<(), WireError> {
    let preamble = connection.receive_preamble()?;
    if preamble.role == Role::Control {
        let _: Hello = connection.expect(FrameKind::Hello, "Hello")?;
    } else {
        let _: Attach = connection.expect(FrameKind::Attach, "Attach")?;
    }
    *frames += 1;
    let written = WrittenPages::none(memory);
    let mut receiver = PageReceiver::new(memory, &written);
    let mut counts = PageCounts::default();
    loop {
        let mut header = connection.receive_header()?;
        match header.kind {
            FrameKind::Pages if preamble.version == VERSION_1 => {
                pages::v1::receive(connection, &mut header, memory, &mut counts)?;
            }
            FrameKind::PageRuns => receiver.receive(connection, &mut header)?,
            kind => {
                let payload = connection.receive_payload(&mut header)?;
                read_payload(kind, &payload, memory)?;
                if preamble.role == Role::FaultPages || preamble.role == Role::Data {
                    drop(frames::runs(memory, &payload));
                }
            }
        }
        *frames += 1;
    }
}

fn read_payload(kind: FrameKind, payload: &[u8], memory: &GuestMemory) -> Result<(), WireError> {
    fn message<M: Message + Default>(kind: FrameKind, payload: &[u8]) -> Result<M, WireError> {
        wire::decode(kind, payload)
    }
    match kind {
        FrameKind::PassEnd => drop(message::<Pass>(kind, payload)?),
        FrameKind::Commit => drop(message::<Step>(kind, payload)?),
        FrameKind::Abort => drop(wire::aborted(payload)),
        FrameKind::Verify | FrameKind::Digest => {
            let digest: Digest = message(kind, payload)?;
            if let Ok(sent) = MemoryDigest::decode(&digest.digest, memory.len()) {
                let _ = sent.first_difference(&sent);
            }
        }
        FrameKind::State => read_state(payload),
        _ => {}
    }
    Ok(())
}

/// Saved state, as far as it is read before KVM sees any of it.
pub fn read_state(bytes: &[u8]) {
    let Ok(reader) = state::Reader::parse(bytes) else {
        return;
    };
    // What is missing or malformed is an error, and no other harm.
    let _ = reader.section::<state::VcpuState>(Kind::Vcpu, 0);
    let _ = reader.section::<state::IrqChipState>(Kind::IrqChip, 0);
    let _ = reader.section::<state::PitState>(Kind::Pit, 0);
    let _ = reader.section::<state::ClockState>(Kind::Clock, 0);
    let _ = reader.section::<state::SerialState>(Kind::Serial, 0);
    let _ = reader.section::<state::ConsoleState>(Kind::Console, 0);
    let _ = reader.section::<state::PowerState>(Kind::Power, 0);
}

/// A source of this build reads `bytes`, which a destination sent. Answers how many frames it took.
pub fn source_reads(bytes: &[u8], memory: &GuestMemory) -> usize {
    let mut frames = 0;
    let mut connection = Connection::new(Bytes(Cursor::new(bytes)));
    let _ = follow_destination(&mut connection, memory, &mut frames);
    frames
}

fn follow_destination(
    connection: &mut Connection<Bytes<'_>>,
    memory: &GuestMemory,
    frames: &mut usize,
) -> Result<(), WireError> {
    loop {
        let mut header = connection.receive_header()?;
        let kind = header.kind;
        let payload = connection.receive_payload(&mut header)?;
        match kind {
            FrameKind::HelloAck => drop(wire::decode::<HelloAck>(kind, &payload)?),
            FrameKind::PassAck => drop(wire::decode::<PassAck>(kind, &payload)?),
            FrameKind::Ready | FrameKind::Running => drop(wire::decode::<Step>(kind, &payload)?),
            FrameKind::Abort => drop(wire::aborted(&payload)),
            _ => drop(frames::requests(memory, &payload)),
        }
        *frames += 1;
    }
}
