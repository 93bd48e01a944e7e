//! Post-copy: the destination runs the VM while part of its memory is still at the source, which serves it page by page.
//!
//! The [`source`] is a page server over a paused VM: faults first, on a connection of their own, and everything else in
//! the background. The [`destination`] holds back whoever touches a missing page, by userfaultfd, until it has come. If the
//! connections break, both sides keep what they have and go on over new ones.

pub mod blocks;
pub mod destination;
pub mod frames;
pub mod page_set;
pub mod source;
#[cfg(test)]
mod tests;
pub mod uffd;

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use super::transport::Transport;
use super::wire::{self, Connection, FrameKind, WireError};

/// How often the destination tells the source how it goes; the source answers.
pub const HEARTBEAT: Duration = Duration::from_millis(500);
/// How long the source waits before it connects again.
pub const RECONNECT_EVERY: Duration = Duration::from_millis(500);

/// Ends a connection from another thread.
pub type Closer = Box<dyn Fn() + Send + Sync>;

/// A stream that another thread can end, and whose reads may be told to wait for as long as it takes.
pub trait Stream: Read + Write + Send + 'static {
    /// Longest wait of a read; `None` for as long as it takes.
    ///
    /// # Errors
    /// When the socket refuses.
    fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()>;

    /// Ends the stream for its reader and its writer.
    ///
    /// # Errors
    /// When there is no descriptor to do it with.
    fn closer(&self) -> io::Result<Closer>;
}

impl Stream for TcpStream {
    fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        TcpStream::set_read_timeout(self, limit)
    }

    fn closer(&self) -> io::Result<Closer> {
        let stream = self.try_clone()?;
        Ok(Box::new(move || {
            if let Err(error) = stream.shutdown(Shutdown::Both) {
                tracing::debug!(%error, "the connection had ended already");
            }
        }))
    }
}

impl Stream for Transport {
    fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        Transport::set_read_timeout(self, limit)
    }

    fn closer(&self) -> io::Result<Closer> {
        let closer = Transport::closer(self)?;
        Ok(Box::new(move || closer.close()))
    }
}

/// Whether this host offers what the destination of post-copy needs.
#[must_use]
pub fn is_possible() -> bool {
    uffd::Uffd::open().is_ok()
}

/// The connections of post-copy but the control connection.
#[derive(Debug)]
pub struct Links<S> {
    /// The background stream, from the source.
    pub pages: Vec<Connection<S>>,
    /// Pages the guest waits for: the destination asks.
    pub fault_requests: Connection<S>,
    /// Pages the guest waits for: the source answers.
    pub fault_pages: Connection<S>,
}

impl<S: Stream> Links<S> {
    /// What ends all of them. Reads wait for as long as it takes from now on: that the peer is gone is noticed on the
    /// control connection.
    fn closers(&self) -> io::Result<Vec<Closer>> {
        self.pages
            .iter()
            .chain([&self.fault_requests, &self.fault_pages])
            .map(|connection| {
                connection.stream().set_read_timeout(None)?;
                connection.stream().closer()
            })
            .collect()
    }
}

fn close_all(closers: &[Closer]) {
    for close in closers {
        close();
    }
}

/// Receives the payload of the frame that is due.
fn expect_frame<S: Read + Write>(
    connection: &mut Connection<S>,
    kind: FrameKind,
    expected: &'static str,
) -> Result<Vec<u8>, WireError> {
    let mut header = connection.receive_header()?;
    let found = header.kind;
    if found != kind && found != FrameKind::Abort {
        return Err(WireError::Unexpected { found, expected });
    }
    let payload = connection.receive_payload(&mut header)?;
    if found == FrameKind::Abort {
        return Err(wire::aborted(&payload));
    }
    Ok(payload)
}
