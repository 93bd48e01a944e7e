//! Connections that come in: who are they, and what for. Whoever does not belong here is turned away, and the wait goes on.

use std::io::{self, IoSlice, Read, Write};
use std::time::{Duration, Instant};

use super::DestinationError;
use crate::migration::negotiate::{self, Prepared, Refusal};
use crate::migration::transport::{AcceptError, Identity, Listener, Transport};
use crate::migration::wire::{
    Abort, Attach, Connection, Empty, FrameKind, Hello, PEER_TIMEOUT, Preamble, Role, WireError,
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
enum Stranger {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

/// Waits for the source that this destination was prepared for; with `resume`, for it to take up post-copy.
///
/// # Errors
/// When it does not come.
pub fn accept_control(
    listener: &Listener,
    identity: Option<&Identity>,
    prepared: &Prepared,
    resume: bool,
    deadline: Instant,
) -> Result<(Connection<Transport>, Preamble, Hello), DestinationError> {
    let (connection, (preamble, hello)) = accept(listener, identity, deadline, |connection| {
        let preamble = connection.receive_preamble()?;
        not_its_role(preamble, Role::Control)?;
        let hello: Hello = connection.expect(FrameKind::Hello, "Hello")?;
        negotiate::check_identity(&hello, prepared)?;
        if hello.resume != resume {
            return Err(Refusal::NotPrepared { field: "resume" }.into());
        }
        Ok((preamble, hello))
    })?;
    Ok((connection, preamble, hello))
}

/// Waits for one more connection of the migration under way; gives its index.
///
/// # Errors
/// When it does not come.
pub fn accept_attached(
    listener: &Listener,
    identity: Option<&Identity>,
    prepared: &Prepared,
    role: Role,
    deadline: Instant,
) -> Result<(Connection<Transport>, u32), DestinationError> {
    accept(listener, identity, deadline, |connection| {
        not_its_role(connection.receive_preamble()?, role)?;
        let attach: Attach = connection.expect(FrameKind::Attach, "Attach")?;
        negotiate::check_attach(&attach, prepared)?;
        connection.send(FrameKind::AttachAck, &Empty {})?;
        Ok(attach.index)
    })
}

fn not_its_role(preamble: Preamble, expected: Role) -> Result<(), Stranger> {
    if preamble.role == expected {
        return Ok(());
    }
    Err(Refusal::Role {
        found: preamble.role,
        expected,
    }
    .into())
}

fn accept<T>(
    listener: &Listener,
    identity: Option<&Identity>,
    deadline: Instant,
    mut greet: impl FnMut(&mut Connection<Greeting>) -> Result<T, Stranger>,
) -> Result<(Connection<Transport>, T), DestinationError> {
    loop {
        let (transport, peer) = match listener.accept(identity, deadline) {
            Ok(accepted) => accepted,
            Err(error @ AcceptError::TurnedAway { .. }) => {
                tracing::warn!(%error, "turned a connection away");
                continue;
            }
            Err(error) => return Err(DestinationError::Accept(error)),
        };
        let mut connection = Connection::new(Greeting {
            transport,
            deadline: Instant::now() + GREETING_TIMEOUT,
        });
        match greet(&mut connection) {
            Ok(greeted) => {
                let connection = connection.map_stream(|greeting| greeting.transport);
                connection
                    .stream()
                    .set_timeouts(Some(PEER_TIMEOUT))
                    .map_err(WireError::from)?;
                return Ok((connection, greeted));
            }
            Err(stranger) => {
                tracing::warn!(%peer, reason = %stranger, "turned a connection away");
                // A stranger need not hear it.
                let _ = connection.send(FrameKind::Abort, &Abort::because(&stranger.to_string()));
            }
        }
    }
}
