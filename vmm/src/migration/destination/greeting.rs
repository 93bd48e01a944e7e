//! A connection that has come in: who is it, and what for? Whoever does not belong here is told so.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use crate::migration::negotiate::{self, Prepared, Refusal};
use crate::migration::transport::{Accepted, Identity, Transport, TransportError};
use crate::migration::wire::{
    Abort, Attach, Connection, FrameKind, Hello, PEER_TIMEOUT, Preamble, Role, WireError,
};

/// How long a connected peer may take to say who it is.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);

/// A connection whose peer has not yet said who it is: all of that has one deadline, so that nobody can hold the
/// destination by sending a byte now and then.
struct Greeting {
    transport: Transport,
    deadline: Instant,
}

impl Greeting {
    fn bound(&self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.transport.set_timeouts(Some(left))
    }
}

impl Read for Greeting {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.bound()?;
        self.transport.read(buffer)
    }
}

impl Write for Greeting {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.bound()?;
        self.transport.write(data)
    }

    fn write_vectored(&mut self, data: &[IoSlice<'_>]) -> io::Result<usize> {
        self.bound()?;
        self.transport.write_vectored(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.transport.flush()
    }
}

/// Why a peer is turned away.
#[derive(Debug, thiserror::Error)]
pub enum Stranger {
    /// Before its first frame.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// In its first frame.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It is not who may come.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// What a connection's first frame says.
#[derive(Debug, PartialEq)]
pub enum Introduction {
    /// It is the control connection.
    Control(Preamble, Box<Hello>),
    /// It is another one of the migration under way: for what, and its index among those.
    Attached(Role, u32),
}

/// A connection of the source.
#[derive(Debug)]
pub struct Introduced {
    /// The connection.
    pub connection: Connection<Transport>,
    /// What it is for.
    pub as_what: Introduction,
}

impl Introduced {
    /// Whether it is a control connection.
    #[must_use]
    pub fn is_control(&self) -> bool {
        matches!(self.as_what, Introduction::Control(..))
    }
}

/// Has the peer say who it is, and `admits` decide.
///
/// # Errors
/// Why it was turned away; it has been told, if it could understand that.
pub fn greet(
    accepted: Accepted,
    identity: Option<&Identity>,
    prepared: &Prepared,
    admits: impl FnOnce(&Introduction) -> Result<(), Refusal>,
) -> Result<Introduced, Stranger> {
    let mut connection = Connection::new(Greeting {
        transport: accepted.greet(identity)?,
        deadline: Instant::now() + GREETING_TIMEOUT,
    });
    let introduced = introduce(&mut connection, prepared).and_then(|introduction| {
        admits(&introduction)?;
        Ok(introduction)
    });
    match introduced {
        Ok(as_what) => {
            let connection = connection.map_stream(|greeting| greeting.transport);
            let timeouts = connection.stream().set_timeouts(Some(PEER_TIMEOUT));
            timeouts.map_err(WireError::from)?;
            Ok(Introduced { connection, as_what })
        }
        Err(stranger) => {
            // A stranger need not hear it.
            let _ = connection.send(FrameKind::Abort, &Abort::because(&stranger.to_string()));
            Err(stranger)
        }
    }
}

fn introduce(connection: &mut Connection<Greeting>, prepared: &Prepared) -> Result<Introduction, Stranger> {
    let preamble = connection.receive_preamble()?;
    if preamble.role == Role::Control {
        let hello: Hello = connection.expect(FrameKind::Hello, "Hello")?;
        negotiate::check_identity(&hello, prepared)?;
        return Ok(Introduction::Control(preamble, Box::new(hello)));
    }
    let attach: Attach = connection.expect(FrameKind::Attach, "Attach")?;
    negotiate::check_attach(&attach, prepared)?;
    Ok(Introduction::Attached(preamble.role, attach.index))
}
