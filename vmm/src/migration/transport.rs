//! What a migration's bytes travel over: TCP, TLS 1.3 over TCP, or a Unix socket within this host.
//!
//! A [`Transport`] belongs to one thread; a [`Closer`] ends it from another. Guest memory is sent and received as raw
//! buffers, because vCPUs may be writing to it: no reference to it is ever made.

mod address;
mod identity;
mod listener;
mod socket;
mod tls;

#[cfg(test)]
mod tests;

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

pub use address::{Address, AddressError};
pub use identity::{Identity, TlsError};
pub use listener::{AcceptError, Accepted, Listener};

use socket::Socket;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Nobody answers there.
    #[error("connecting to {address}: {source}")]
    Connect {
        /// Where to.
        address: Address,
        /// What the system says.
        source: io::Error,
    },
    /// The connection failed before the first byte of the migration.
    #[error("connection: {0}")]
    Io(#[from] io::Error),
    /// The peer did not say who it is in time.
    #[error("the other side did not introduce itself in time")]
    Silent,
    /// TLS says no.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A source without TLS.
    #[error(
        "this destination requires TLS, and the source speaks plain TCP; give the source's node a certificate (shoal certs issue)"
    )]
    PlaintextSource,
    /// A source with TLS.
    #[error(
        "the source speaks TLS, and this destination has no certificate; give the destination's node one (shoal certs issue)"
    )]
    TlsSource,
    /// Something else altogether.
    #[error("preamble: not a Shoal migration stream")]
    Stranger,
    /// A Unix socket that another user connected to.
    #[error("the other side belongs to user {0}, not to the user of this VMM")]
    OtherUser(u32),
    /// The other side says no.
    #[error("the other side refused the connection: {0}")]
    Refused(String),
}

impl TransportError {
    /// Whether it may be otherwise the next time, with the same addresses and certificates at both ends.
    #[must_use]
    pub fn can_pass(&self) -> bool {
        match self {
            // A certificate may not be valid yet, and a peer that refuses may not be ready yet.
            Self::Connect { .. } | Self::Io(_) | Self::Silent | Self::Tls(_) | Self::Refused(_) => true,
            Self::PlaintextSource | Self::TlsSource | Self::Stranger | Self::OtherUser(_) => false,
        }
    }
}

/// A connection of a migration.
#[derive(Debug)]
pub struct Transport {
    socket: Arc<Socket>,
    tls: Option<Box<tls::Session>>,
}

impl Transport {
    /// Connects; with an identity, over TLS (but for a Unix socket, which the kernel guards). All of it within `timeout`.
    ///
    /// # Errors
    /// In words: nobody there, not the peer expected, no TLS at the other side.
    pub fn connect(
        address: &Address,
        identity: Option<&Identity>,
        timeout: Duration,
    ) -> Result<Self, TransportError> {
        let deadline = Instant::now() + timeout;
        let connected = match address {
            Address::Tcp(address) => TcpStream::connect_timeout(address, timeout).map(Socket::Tcp),
            Address::Unix(path) => UnixStream::connect(path).map(Socket::Unix),
        };
        let socket = connected.map_err(|source| TransportError::Connect {
            address: address.clone(),
            source,
        })?;
        socket.tune()?;
        let tls = match (&socket, identity) {
            (Socket::Tcp(_), Some(identity)) => {
                Some(Box::new(tls::Session::connect(&socket, identity, deadline)?))
            }
            _ => None,
        };
        let transport = Self::new(Arc::new(socket), tls);
        transport.set_timeouts(None)?;
        Ok(transport)
    }

    fn new(socket: Arc<Socket>, tls: Option<Box<tls::Session>>) -> Self {
        Self { socket, tls }
    }

    /// How long a read or write may wait for the peer to send or take a byte; `None`: for ever.
    ///
    /// # Errors
    /// When the socket refuses, or the time is zero.
    pub fn set_timeouts(&self, read_and_write: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(read_and_write)?;
        self.set_write_timeout(read_and_write)
    }

    /// The same for reads alone.
    ///
    /// # Errors
    /// When the socket refuses, or the time is zero.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(timeout)
    }

    /// The same for writes alone.
    ///
    /// # Errors
    /// When the socket refuses, or the time is zero.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_write_timeout(timeout)
    }

    /// What ends this connection from another thread. It does not keep the connection open.
    ///
    /// # Errors
    /// None today; a kind of transport that needs a descriptor of its own for it may run out of them.
    pub fn closer(&self) -> io::Result<Closer> {
        Ok(Closer(Arc::downgrade(&self.socket)))
    }

    /// Whether it is encrypted and both ends have proved who they are.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Whether the peer is on this host for certain: descriptors can be sent.
    #[must_use]
    pub fn local_host(&self) -> bool {
        matches!(*self.socket, Socket::Unix(_))
    }

    /// Whether there is something to read, waiting at most `timeout` for it. With TLS it may turn out to be less than a
    /// record: the read then waits for the rest.
    ///
    /// # Errors
    /// When the socket cannot be asked.
    pub fn readable_within(&self, timeout: Duration) -> io::Result<bool> {
        if self.tls.as_ref().is_some_and(|tls| tls.has_received()) {
            return Ok(true);
        }
        socket::poll_readable(self.as_fd(), Instant::now() + timeout)
    }

    /// Writes all of `parts`, straight from guest memory, which vCPUs may be writing to: what arrives is then a mixture
    /// of old and new bytes. `parts` is used up.
    ///
    /// # Errors
    /// When the connection fails, or the peer takes no byte for the write timeout. The stream is then of no more use.
    ///
    /// # Safety
    /// Each of `parts` is memory that stays mapped and readable for the length of the call. Nothing is assumed about
    /// what it holds, and it may change meanwhile.
    pub unsafe fn write_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()> {
        match &mut self.tls {
            // SAFETY: as the caller promises.
            None => unsafe { self.socket.write_all_raw(parts) },
            // SAFETY: as the caller promises.
            Some(tls) => unsafe { tls.write_all_raw(&self.socket, parts) },
        }
    }

    /// Fills all of `parts`. They are used up.
    ///
    /// # Errors
    /// When the connection fails or ends, or nothing comes for the read timeout. The stream is then of no more use.
    ///
    /// # Safety
    /// Each of `parts` is memory that stays mapped and writable for the length of the call, that nobody else reads or
    /// writes meanwhile, and that may hold any bytes.
    pub unsafe fn read_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()> {
        match &mut self.tls {
            // SAFETY: as the caller promises.
            None => unsafe { self.socket.read_all_raw(parts) },
            // SAFETY: as the caller promises.
            Some(tls) => unsafe { tls.read_all_raw(&self.socket, parts) },
        }
    }

    /// Sends an open file to a peer on this host.
    ///
    /// # Errors
    /// When the peer is not known to be on this host, or the connection fails.
    pub fn send_descriptor(&mut self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        self.socket.send_descriptor(descriptor)
    }

    /// Receives an open file from a peer on this host. It is closed on exec.
    ///
    /// # Errors
    /// When the peer is not known to be on this host, the connection fails, or something else comes.
    pub fn receive_descriptor(&mut self) -> io::Result<OwnedFd> {
        self.socket.receive_descriptor()
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl From<TcpStream> for Transport {
    fn from(stream: TcpStream) -> Self {
        Self::new(Arc::new(Socket::Tcp(stream)), None)
    }
}

impl From<UnixStream> for Transport {
    fn from(stream: UnixStream) -> Self {
        Self::new(Arc::new(Socket::Unix(stream)), None)
    }
}

impl Read for Transport {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(buffer)])
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.read_vectored(buffers),
            Some(tls) => tls.read_vectored(&self.socket, buffers),
        }
    }
}

impl Write for Transport {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(data)])
    }

    /// Over TLS all of it is sent, or none.
    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.tls {
            None => self.socket.write_vectored(buffers),
            Some(tls) => tls.write_vectored(&self.socket, buffers),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends a [`Transport`] or a [`Listener`] from another thread.
#[derive(Debug, Clone)]
pub struct Closer(Weak<Socket>);

impl Closer {
    /// Whoever waits on it now, or will, is told that it has ended. Does nothing where it has gone already.
    pub fn close(&self) {
        if let Some(socket) = self.0.upgrade() {
            socket.shutdown();
        }
    }

    /// Whoever reads from it is told that it has ended; it can still be written to.
    pub fn stop_reading(&self) {
        if let Some(socket) = self.0.upgrade() {
            socket.shutdown_read();
        }
    }
}
