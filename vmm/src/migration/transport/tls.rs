//! TLS over a socket, by rustls without buffers of its own: records are read many at a time and decrypted where they
//! are; guest memory is copied once, into the buffer it is encrypted from.

use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::time::Instant;

use rustls::client::UnbufferedClientConnection;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus,
};

use super::socket::{Socket, advance, linger, within};
use super::{Identity, TlsError, TransportError};
use rustls::CommonState;

/// Received at once, at most: many records, each of up to 16 KiB and a little.
const INCOMING: usize = 256 << 10;
/// Encrypted at once, at most: eight records, which stay in the cache.
const STAGING: usize = 128 << 10;
/// Room for what encryption adds to that.
const OUTGOING: usize = STAGING + 4096;
/// The server's word that the client is who it should be. Without it a client would learn only later, or never.
const WELCOME: u8 = 1;
/// The server's word that it is not; a length of one byte and the reason follow.
const UNWELCOME: u8 = 0;

/// The TLS half of a connection.
pub struct Session {
    engine: Engine,
    identity: Identity,
    /// Decrypted, and not yet asked for: at most what `engine` can hold, and a record.
    decrypted: Vec<u8>,
    decrypted_at: usize,
    staging: Vec<u8>,
    /// Part of a record may have been sent: nothing can follow it.
    broken: bool,
    /// Nothing can come any more.
    ended: bool,
    /// rustls is not to be asked again.
    failed: Option<TlsError>,
}

enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

struct Engine {
    side: Side,
    /// Received and not yet decrypted: `start..end`.
    incoming: Box<[u8]>,
    start: usize,
    end: usize,
    /// To be sent.
    outgoing: Outgoing,
}

#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    used: usize,
}

/// What one step did.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// Decrypted something.
    Data,
    /// Put something of the handshake into `outgoing`.
    Queued,
    /// `outgoing` is to be sent.
    Transmit,
    /// More has to come first.
    Blocked,
    /// Nothing to do; application data may be sent.
    Idle,
    /// Encrypted what was given.
    Encrypted,
    /// The peer said that no more will come.
    PeerClosed,
}

/// Where decrypted bytes go: first into `rest`, the others into `overflow`.
struct Target<'a> {
    rest: &'a mut [libc::iovec],
    filled: usize,
    overflow: &'a mut Vec<u8>,
}

impl<'a> Target<'a> {
    /// # Safety
    /// Each of `parts` is mapped, writable and nobody else's as long as this lives.
    unsafe fn new(parts: &'a mut [libc::iovec], overflow: &'a mut Vec<u8>) -> Self {
        Self {
            rest: advance(parts, 0),
            filled: 0,
            overflow,
        }
    }

    fn nowhere(overflow: &'a mut Vec<u8>) -> Self {
        Self {
            rest: &mut [],
            filled: 0,
            overflow,
        }
    }

    fn is_full(&self) -> bool {
        self.rest.is_empty()
    }

    /// Copies as much of `data` as there is room for in `rest`; gives what is left.
    fn fill<'d>(&mut self, mut data: &'d [u8]) -> &'d [u8] {
        while !data.is_empty()
            && let Some(first) = self.rest.first()
        {
            let count = first.iov_len.min(data.len());
            // SAFETY: `count` bytes are within `data` and within a part which, as `new` was promised, is writable and
            // nobody else's, so that it does not overlap with `data` either.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), first.iov_base.cast(), count) };
            self.filled += count;
            data = &data[count..];
            self.rest = advance(std::mem::take(&mut self.rest), count);
        }
        data
    }

    fn put(&mut self, data: &[u8]) {
        let left = self.fill(data);
        self.overflow.extend_from_slice(left);
    }
}

impl Outgoing {
    /// Lets `write` have the free room, and grows once if it asks for more.
    fn write<E>(
        &mut self,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, E>,
        needs: impl Fn(&E) -> Option<usize>,
    ) -> Result<(), E> {
        let written = match write(&mut self.bytes[self.used..]) {
            Err(error) => match needs(&error) {
                Some(required) => {
                    self.bytes.resize((self.used + required).max(OUTGOING), 0);
                    write(&mut self.bytes[self.used..])?
                }
                None => return Err(error),
            },
            Ok(written) => written,
        };
        self.used += written;
        Ok(())
    }
}

impl Engine {
    fn new(side: Side) -> Self {
        Self {
            side,
            incoming: vec![0; INCOMING].into(),
            start: 0,
            end: 0,
            outgoing: Outgoing::default(),
        }
    }

    /// Goes one step on with what has come; encrypts `data` if it is time for that.
    fn step(&mut self, target: &mut Target<'_>, data: Option<&[u8]>) -> Result<Step, rustls::Error> {
        let incoming = &mut self.incoming[self.start..self.end];
        let (discard, step) = match &mut self.side {
            Side::Client(side) => handle(
                side.process_tls_records(incoming),
                &mut self.outgoing,
                target,
                data,
            ),
            Side::Server(side) => handle(
                side.process_tls_records(incoming),
                &mut self.outgoing,
                target,
                data,
            ),
        };
        self.start += discard;
        step
    }

    fn common(&self) -> &CommonState {
        match &self.side {
            Side::Client(side) => side,
            Side::Server(side) => side,
        }
    }

    /// Receives what has come, at least a byte; 0 at the end. Called when what is there is less than a record.
    fn receive(&mut self, socket: &Socket) -> io::Result<usize> {
        self.incoming.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if self.end == self.incoming.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "TLS: a message of the handshake is too long",
            ));
        }
        let count = socket.read(&mut self.incoming[self.end..])?;
        self.end += count;
        Ok(count)
    }

    fn transmit(&mut self, socket: &Socket) -> io::Result<()> {
        let used = std::mem::take(&mut self.outgoing.used);
        socket.write_all(&self.outgoing.bytes[..used])
    }
}

/// One status of rustls: how many bytes to discard, and what was done.
fn handle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Outgoing,
    target: &mut Target<'_>,
    data: Option<&[u8]>,
) -> (usize, Result<Step, rustls::Error>) {
    let UnbufferedStatus { mut discard, state } = status;
    let step = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
            match traffic.next_record() {
                Some(Ok(record)) => {
                    discard += record.discard;
                    target.put(record.payload);
                }
                Some(Err(error)) => break Err(error),
                None => break Ok(Step::Data),
            }
        },
        Ok(ConnectionState::EncodeTlsData(mut message)) => {
            let needs = |error: &EncodeError| match error {
                EncodeError::InsufficientSize(InsufficientSizeError { required_size }) => {
                    Some(*required_size)
                }
                EncodeError::AlreadyEncoded => None,
            };
            outgoing
                .write(|room| message.encode(room), needs)
                .map(|()| Step::Queued)
                .map_err(|error| rustls::Error::General(error.to_string()))
        }
        Ok(ConnectionState::TransmitTlsData(transmit)) => {
            transmit.done();
            Ok(Step::Transmit)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Step::Blocked),
        Ok(ConnectionState::WriteTraffic(mut traffic)) => match data {
            None => Ok(Step::Idle),
            Some(data) => {
                let needs = |error: &EncryptError| match error {
                    EncryptError::InsufficientSize(InsufficientSizeError { required_size }) => {
                        Some(*required_size)
                    }
                    EncryptError::EncryptExhausted => None,
                };
                outgoing
                    .write(|room| traffic.encrypt(data, room), needs)
                    .map(|()| Step::Encrypted)
                    .map_err(|error| rustls::Error::General(error.to_string()))
            }
        },
        Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(Step::PeerClosed),
        Ok(other) => Err(rustls::Error::General(format!("out of place: {other:?}"))),
    };
    (discard, step)
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("identity", &self.identity)
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Session {
    fn new(side: Side, identity: &Identity) -> Self {
        Self {
            engine: Engine::new(side),
            identity: identity.clone(),
            decrypted: Vec::new(),
            decrypted_at: 0,
            staging: Vec::new(),
            broken: false,
            ended: false,
            failed: None,
        }
    }

    /// The source's side: proves who it is, checks who the other is, and waits to be welcome.
    pub fn connect(socket: &Socket, identity: &Identity, deadline: Instant) -> Result<Self, TransportError> {
        let mut session = Self::new(Side::Client(identity.client()?), identity);
        session.handshake(socket, deadline)?;
        let mut answer = [0];
        session.read_by(socket, deadline, &mut answer)?;
        if answer == [WELCOME] {
            return Ok(session);
        }
        session.read_by(socket, deadline, &mut answer)?;
        let mut reason = vec![0; usize::from(answer[0])];
        session.read_by(socket, deadline, &mut reason)?;
        let reason = String::from_utf8_lossy(&reason);
        Err(TransportError::Refused(
            reason.chars().filter(|c| !c.is_control()).collect(),
        ))
    }

    /// The destination's side.
    pub fn accept(socket: &Socket, identity: &Identity, deadline: Instant) -> Result<Self, TransportError> {
        let mut session = Self::new(Side::Server(identity.server()?), identity);
        session.handshake(socket, deadline)?;
        let common = session.engine.common();
        let checked = identity.check_peer(common.peer_certificates(), common.alpn_protocol());
        let answer = match &checked {
            Ok(()) => vec![WELCOME],
            Err(error) => {
                let reason = error.to_string();
                let length = reason.floor_char_boundary(usize::from(u8::MAX));
                let reason = &reason.as_bytes()[..length];
                [&[UNWELCOME, u8::try_from(length).unwrap_or(u8::MAX)], reason].concat()
            }
        };
        within(socket, deadline, |socket| session.send(socket, &answer))?;
        if let Err(error) = checked {
            linger(socket, deadline);
            return Err(error.into());
        }
        Ok(session)
    }

    fn handshake(&mut self, socket: &Socket, deadline: Instant) -> Result<(), TransportError> {
        loop {
            let mut target = Target::nowhere(&mut self.decrypted);
            match self.engine.step(&mut target, None) {
                Ok(Step::Idle) if !self.engine.common().is_handshaking() => return Ok(()),
                Ok(Step::Blocked | Step::Idle) => {
                    if within(socket, deadline, |socket| self.engine.receive(socket))? == 0 {
                        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
                    }
                }
                Ok(Step::Transmit) => within(socket, deadline, |socket| self.engine.transmit(socket))?,
                Ok(Step::PeerClosed) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(Step::Data | Step::Queued | Step::Encrypted) => {}
                Err(error) => {
                    let reason = self.fail(socket, &error);
                    linger(socket, deadline);
                    return Err(reason.into());
                }
            }
        }
    }

    /// After an error of rustls: sends the alert it has prepared, if it can. Gives the reason in words.
    fn fail(&mut self, socket: &Socket, error: &rustls::Error) -> TlsError {
        self.broken = true;
        self.ended = true;
        let reason = self.identity.in_words(error);
        self.failed = Some(reason.clone());
        if self.engine.common().wants_write() {
            let told = self.engine.step(&mut Target::nowhere(&mut self.decrypted), None);
            tracing::debug!(?told, %reason, "ended a TLS connection");
            if let Err(error) = self.engine.transmit(socket) {
                tracing::debug!(%error, "the other side could not be told why");
            }
        }
        reason
    }

    /// Reads all of `buffer` within the time left.
    fn read_by(
        &mut self,
        socket: &Socket,
        deadline: Instant,
        buffer: &mut [u8],
    ) -> Result<(), TransportError> {
        let mut at = 0;
        while at < buffer.len() {
            let count = within(socket, deadline, |socket| {
                self.read_vectored(socket, &mut [IoSliceMut::new(&mut buffer[at..])])
            })?;
            if count == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            at += count;
        }
        Ok(())
    }

    /// Whether a read may give something without anything new coming.
    pub fn has_received(&self) -> bool {
        self.decrypted_at < self.decrypted.len() || self.engine.start < self.engine.end
    }

    /// Reads what there is into `buffers`, waiting for something if there is nothing.
    pub fn read_vectored(&mut self, socket: &Socket, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut total = 0;
        for buffer in buffers.iter_mut().filter(|buffer| !buffer.is_empty()) {
            if total > 0 && self.decrypted_at == self.decrypted.len() {
                break;
            }
            let part = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            // SAFETY: the part is `buffer`, borrowed for longer than the call; any bytes are valid in it.
            let count = unsafe { self.read_raw(socket, &mut [part], false) }?;
            total += count;
            if count < buffer.len() {
                break;
            }
        }
        Ok(total)
    }

    /// # Safety
    /// As [`super::Transport::read_guest`].
    pub unsafe fn read_all_raw(&mut self, socket: &Socket, parts: &mut [libc::iovec]) -> io::Result<()> {
        let wanted = parts.iter().map(|part| part.iov_len).sum::<usize>();
        // SAFETY: as the caller promises.
        if unsafe { self.read_raw(socket, parts, true) }? == wanted {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// Fills `parts`, all of them or as far as something has come. Less than all, or 0, at the end of the stream.
    ///
    /// # Safety
    /// As [`super::Transport::read_guest`].
    unsafe fn read_raw(
        &mut self,
        socket: &Socket,
        parts: &mut [libc::iovec],
        all: bool,
    ) -> io::Result<usize> {
        let mut overflow = Vec::new();
        // SAFETY: as the caller promises.
        let mut target = unsafe { Target::new(parts, &mut overflow) };
        let before = &self.decrypted[self.decrypted_at..];
        let left = target.fill(before).len();
        self.decrypted_at = self.decrypted.len() - left;
        if !target.is_full() {
            self.decrypted.clear();
            self.decrypted_at = 0;
            target.overflow = &mut self.decrypted;
        }
        if let Some(reason) = &self.failed {
            return Err(io::Error::other(reason.clone()));
        }
        while !target.is_full() && !self.ended && (all || target.filled == 0) {
            match self.engine.step(&mut target, None) {
                Ok(Step::Data | Step::Queued | Step::Encrypted) => {}
                Ok(Step::Transmit) => self.engine.transmit(socket).inspect_err(|_| self.broken = true)?,
                Ok(Step::PeerClosed) => self.ended = true,
                Ok(Step::Blocked | Step::Idle) => {
                    if self.engine.receive(socket)? == 0 {
                        self.ended = true;
                    }
                }
                Err(error) => return Err(io::Error::other(self.fail(socket, &error))),
            }
        }
        Ok(target.filled)
    }

    /// Sends all of `buffers`.
    pub fn write_vectored(&mut self, socket: &Socket, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        let total = buffers.iter().map(|buffer| buffer.len()).sum();
        if let [only] = buffers {
            for piece in only.chunks(STAGING) {
                self.send(socket, piece)?;
            }
            return Ok(total);
        }
        for buffer in buffers {
            let mut rest: &[u8] = buffer;
            while !rest.is_empty() {
                let count = rest.len().min(STAGING - self.staging.len());
                self.staging.extend_from_slice(&rest[..count]);
                rest = &rest[count..];
                self.send_staged(socket, STAGING)?;
            }
        }
        self.send_staged(socket, 1)?;
        Ok(total)
    }

    /// # Safety
    /// As [`super::Transport::write_guest`].
    pub unsafe fn write_all_raw(&mut self, socket: &Socket, parts: &mut [libc::iovec]) -> io::Result<()> {
        self.staging.reserve(STAGING);
        for part in parts {
            while part.iov_len > 0 {
                let at = self.staging.len();
                let count = part.iov_len.min(STAGING - at);
                // SAFETY: `staging` has room for STAGING bytes, reserved above, of which `at` are used; `count` more fit.
                // The caller promises that the part is mapped. It may change meanwhile: the bytes are only copied here,
                // and what is encrypted is the copy. Guest memory and `staging` are different mappings.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        part.iov_base.cast::<u8>(),
                        self.staging.as_mut_ptr().add(at),
                        count,
                    );
                    self.staging.set_len(at + count);
                }
                part.iov_base = part.iov_base.wrapping_byte_add(count);
                part.iov_len -= count;
                self.send_staged(socket, STAGING)?;
            }
        }
        self.send_staged(socket, 1)
    }

    /// Sends what is staged if it is at least so much.
    fn send_staged(&mut self, socket: &Socket, least: usize) -> io::Result<()> {
        if self.staging.len() < least {
            return Ok(());
        }
        let mut staging = std::mem::take(&mut self.staging);
        let sent = self.send(socket, &staging);
        staging.clear();
        self.staging = staging;
        sent
    }

    /// Encrypts and sends `data`, at most STAGING bytes.
    fn send(&mut self, socket: &Socket, data: &[u8]) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        if let Some(reason) = &self.failed {
            return Err(io::Error::other(reason.clone()));
        }
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        loop {
            // What has come and was not read yet is decrypted first; nothing new is received meanwhile.
            let mut target = Target::nowhere(&mut self.decrypted);
            match self.engine.step(&mut target, Some(data)) {
                Ok(Step::Encrypted) => break,
                // In order, before the data.
                Ok(Step::Data | Step::Queued | Step::Transmit) => {}
                Ok(Step::PeerClosed) => self.ended = true,
                Ok(Step::Blocked | Step::Idle) => return Err(io::ErrorKind::NotConnected.into()),
                Err(error) => return Err(io::Error::other(self.fail(socket, &error))),
            }
        }
        self.engine.transmit(socket).inspect_err(|_| self.broken = true)
    }
}
