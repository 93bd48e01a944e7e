//! Where a destination waits for its source, and the first bytes of whoever comes.

use std::io;
use std::net::{IpAddr, Ipv6Addr, TcpListener};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::socket::{self, Socket};
use super::{Address, Closer, Identity, Transport, TransportError, tls};
use crate::migration::wire::{Abort, Connection, FrameKind, MAGIC};

/// How long whoever connects may take for the first bytes, and for the TLS handshake.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(2);
/// What a TLS client begins with: a handshake record.
const TLS_HANDSHAKE: u8 = 22;
/// A plaintext alert record of TLS: fatal, access denied. rustls sends that one for nothing else.
const NO_TLS_HERE: [u8; 7] = [21, 3, 3, 0, 2, 2, 49];

/// Why nobody was accepted.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// Nobody came.
    #[error("no source connected in time")]
    NobodyCame,
    /// A [`Closer`] ended the wait.
    #[error("the wait for a source was ended")]
    Closed,
    /// The listening socket failed.
    #[error("listening socket: {0}")]
    Listen(#[from] io::Error),
    /// Somebody came who is not who was expected. The wait can go on.
    #[cfg(test)]
    #[error("{peer}: {reason}")]
    TurnedAway {
        /// Who.
        peer: String,
        /// Why.
        reason: TransportError,
    },
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: Arc<Socket>,
    address: Address,
    /// Removed at the end.
    path: Option<PathBuf>,
}

/// A connection of which nothing is known yet.
#[derive(Debug)]
pub struct Accepted {
    socket: Arc<Socket>,
    peer: String,
    address: Option<IpAddr>,
}

impl Listener {
    /// Listens there. Port 0 is any free one. The path of a Unix socket must not exist; it is removed at the end.
    ///
    /// # Errors
    /// When the address cannot be used.
    pub fn bind(address: &Address) -> io::Result<Self> {
        let (socket, address, path) = match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                let address = Address::Tcp(listener.local_addr()?);
                (Socket::TcpListener(listener), address, None)
            }
            Address::Unix(path) => {
                let listener = UnixListener::bind(path)?;
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
                listener.set_nonblocking(true)?;
                (
                    Socket::UnixListener(listener),
                    address.clone(),
                    Some(path.clone()),
                )
            }
        };
        Ok(Self {
            socket: Arc::new(socket),
            address,
            path,
        })
    }

    /// Where it listens, with the port.
    #[must_use]
    pub fn local_address(&self) -> &Address {
        &self.address
    }

    /// What ends the wait from another thread.
    ///
    /// # Errors
    /// As [`Transport::closer`].
    pub fn closer(&self) -> io::Result<Closer> {
        Ok(Closer(Arc::downgrade(&self.socket)))
    }

    /// Waits for one connection and finds out who it is: the two steps in one, for tests, which know who comes.
    #[cfg(test)]
    pub(crate) fn accept(
        &self,
        identity: Option<&Identity>,
        deadline: Instant,
    ) -> Result<(Transport, String), AcceptError> {
        let accepted = self.accept_raw(deadline)?;
        let peer = accepted.peer.clone();
        match accepted.greet(identity) {
            Ok(transport) => Ok((transport, peer)),
            Err(reason) => Err(AcceptError::TurnedAway { peer, reason }),
        }
    }

    /// Waits for one connection.
    ///
    /// # Errors
    /// See [`AcceptError`].
    pub fn accept_raw(&self, deadline: Instant) -> Result<Accepted, AcceptError> {
        loop {
            match socket::poll_acceptable(self.socket.as_fd(), deadline)? {
                Some(true) => {}
                Some(false) => return Err(AcceptError::NobodyCame),
                None => return Err(AcceptError::Closed),
            }
            let accepted = match &*self.socket {
                Socket::TcpListener(listener) => listener.accept().map(|(stream, peer)| Accepted {
                    socket: Arc::new(Socket::Tcp(stream)),
                    peer: peer.to_string(),
                    address: Some(network_of(peer.ip())),
                }),
                Socket::UnixListener(listener) => listener.accept().map(|(stream, _)| Accepted {
                    socket: Arc::new(Socket::Unix(stream)),
                    peer: "this host".into(),
                    address: None,
                }),
                _ => unreachable!("bind makes no other"),
            };
            match accepted {
                Ok(accepted) => return Ok(accepted),
                // What shutdown makes of a listening socket.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Err(AcceptError::Closed),
                // Whoever it was has gone again, which is no reason to stop waiting for the right one.
                Err(error) if is_about_the_peer(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// What one host may have addresses of: IPv6 comes in networks of 64 bits.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & u128::MAX << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

/// accept(2) passes on network errors of the connection that it would have returned.
fn is_about_the_peer(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::EAGAIN
                | libc::EINTR
                | libc::ECONNABORTED
                | libc::ENETDOWN
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::ENONET
                | libc::EHOSTUNREACH
                | libc::EOPNOTSUPP
                | libc::ENETUNREACH
        )
    )
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::debug!(%error, "the socket of a migration had gone already");
        }
    }
}

impl Accepted {
    /// Who, as far as the network says.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The address that it comes from, for counting: of IPv6 the network. None within this host.
    #[must_use]
    pub fn address(&self) -> Option<IpAddr> {
        self.address
    }

    /// What ends it from another thread, greeted or not.
    #[must_use]
    pub fn closer(&self) -> Closer {
        Closer(Arc::downgrade(&self.socket))
    }

    /// Finds out who it is, within 2 s: with an identity only the node it names, over TLS; without one only plain
    /// streams. Whoever is turned away is told why, where it can understand that. A Unix socket is always plain, and for
    /// the same user (or root) only.
    ///
    /// # Errors
    /// Why it was turned away.
    pub fn greet(self, identity: Option<&Identity>) -> Result<Transport, TransportError> {
        let Self { socket, .. } = self;
        let deadline = Instant::now() + GREETING_TIMEOUT;
        socket.tune()?;
        if let Socket::Unix(stream) = &*socket {
            let user = socket::peer_user(stream)?;
            // SAFETY: no arguments, no memory, cannot fail.
            let own = unsafe { libc::geteuid() };
            if user != own && user != 0 {
                return Err(TransportError::OtherUser(user));
            }
            return finished(socket, None);
        }
        let first = socket::within(&socket, deadline, Socket::peek)?
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        match (first, identity) {
            (TLS_HANDSHAKE, Some(identity)) => {
                let session = tls::Session::accept(&socket, identity, deadline)?;
                finished(socket, Some(Box::new(session)))
            }
            (TLS_HANDSHAKE, None) => {
                let told = socket::within(&socket, deadline, |socket| socket.write_all(&NO_TLS_HERE));
                tracing::debug!(?told, "turned TLS away");
                socket::linger(&socket, deadline);
                Err(TransportError::TlsSource)
            }
            (_, None) if first == MAGIC[0] => finished(socket, None),
            (_, Some(_)) if first == MAGIC[0] => Err(turn_plaintext_away(socket, deadline)),
            _ => Err(TransportError::Stranger),
        }
    }
}

fn finished(socket: Arc<Socket>, session: Option<Box<tls::Session>>) -> Result<Transport, TransportError> {
    let transport = Transport::new(socket, session);
    transport.set_timeouts(None)?;
    Ok(transport)
}

/// Tells a source of any version, in a frame that all of them know.
fn turn_plaintext_away(socket: Arc<Socket>, deadline: Instant) -> TransportError {
    let refusal = TransportError::PlaintextSource;
    let transport = Transport::new(socket, None);
    let mut connection = Connection::new(transport);
    let told = connection.send(FrameKind::Abort, &Abort::because(&refusal.to_string()));
    tracing::debug!(?told, "turned a plaintext source away");
    socket::linger(&connection.stream().socket, deadline);
    refusal
}
