//! What keeps strangers from filling a daemon's table of connections: who connects has to begin to speak HTTP/2 within some
//! seconds, and one address gets no more than its share of connections. Knows nothing of what is said on them.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// The client's half of the connection preface of HTTP/2 (RFC 9113, 3.4), in bytes.
const PREFACE: usize = 24;
/// Between two words in the log about connections that were refused.
const QUIET: Duration = Duration::from_secs(1);

/// What one who connects may do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long it may say nothing, or not all of the preface.
    pub greeting: Duration,
    /// Connections from one address at a time; of IPv6 the first 64 bits are one.
    pub of_one: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            greeting: Duration::from_secs(5),
            of_one: 512,
        }
    }
}

/// Accepts connections within limits: a stream of them for a server.
#[derive(Debug)]
pub struct Door {
    listener: TcpListener,
    limits: Limits,
    seats: Arc<Seats>,
    told: Option<Instant>,
}

impl Door {
    /// For connections to this socket.
    #[must_use]
    pub fn new(listener: TcpListener, limits: Limits) -> Self {
        Self {
            listener,
            limits,
            seats: Arc::default(),
            told: None,
        }
    }

    fn tell(&mut self, from: IpAddr) {
        if self.told.is_none_or(|told| told.elapsed() >= QUIET) {
            self.told = Some(Instant::now());
            let most = self.limits.of_one;
            tracing::warn!(%from, most, "connections are refused: the address has too many");
        }
    }
}

impl Stream for Door {
    type Item = io::Result<Guest>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let door = self.get_mut();
        loop {
            let (stream, peer) = match ready!(door.listener.poll_accept(context)) {
                Ok(accepted) => accepted,
                Err(error) => return Poll::Ready(Some(Err(error))),
            };
            let Some(seat) = Seats::take(&door.seats, peer.ip(), door.limits.of_one) else {
                door.tell(peer.ip());
                continue;
            };
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "a connection that has ended already");
                continue;
            }
            return Poll::Ready(Some(Ok(Guest {
                stream,
                greeting: Some((Box::pin(tokio::time::sleep(door.limits.greeting)), 0)),
                _seat: seat,
            })));
        }
    }
}

/// Connections by address.
#[derive(Debug, Default)]
struct Seats(Mutex<HashMap<IpAddr, usize>>);

impl Seats {
    fn take(seats: &Arc<Self>, address: IpAddr, most: usize) -> Option<Seat> {
        let address = network(address);
        let mut taken = seats.lock();
        let of_one = taken.entry(address).or_default();
        if *of_one >= most {
            return None;
        }
        *of_one += 1;
        Some(Seat {
            seats: Arc::clone(seats),
            address,
        })
    }

    // A number in a map, which no panic can leave half changed.
    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one who connects cannot have many of: an address, or the network that a host of IPv6 may choose its address from.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        address @ IpAddr::V4(_) => address,
    }
}

#[derive(Debug)]
struct Seat {
    seats: Arc<Seats>,
    address: IpAddr,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.seats.lock();
        if let Some(of_one) = taken.get_mut(&self.address) {
            *of_one -= 1;
            if *of_one == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

/// A connection. Reading from it fails if the other side has not begun to speak in time.
#[derive(Debug)]
pub struct Guest {
    stream: TcpStream,
    /// Until when it has to have sent the preface, and how much of that has come.
    greeting: Option<(Pin<Box<Sleep>>, usize)>,
    _seat: Seat,
}

impl Connected for Guest {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let guest = self.get_mut();
        let before = buffer.filled().len();
        let read = Pin::new(&mut guest.stream).poll_read(context, buffer);
        let Some((limit, came)) = &mut guest.greeting else {
            return read;
        };
        *came += buffer.filled().len() - before;
        if *came >= PREFACE {
            guest.greeting = None;
        } else if limit.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Guest {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_stream::StreamExt as _;

    use super::*;

    async fn door(limits: Limits) -> (Door, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("an address");
        (Door::new(listener, limits), address)
    }

    async fn next(door: &mut Door) -> Guest {
        door.next().await.expect("it goes on").expect("accepted")
    }

    #[tokio::test]
    async fn who_does_not_greet_in_time_is_sent_away_and_who_does_may_be_silent_then() {
        let limits = Limits {
            greeting: Duration::from_millis(50),
            of_one: 10,
        };
        let (mut door, address) = door(limits).await;
        for said in [0, PREFACE - 1] {
            let mut client = TcpStream::connect(address).await.expect("connected");
            client.write_all(&vec![b'x'; said]).await.expect("sent");
            let mut guest = next(&mut door).await;
            let mut heard = Vec::new();
            let error = guest.read_to_end(&mut heard).await.expect_err("too late");
            assert_eq!((error.kind(), heard.len()), (io::ErrorKind::TimedOut, said));
        }
        let mut client = TcpStream::connect(address).await.expect("connected");
        client.write_all(&[b'x'; PREFACE]).await.expect("sent");
        let mut guest = next(&mut door).await;
        let mut heard = [0; PREFACE];
        guest.read_exact(&mut heard).await.expect("greeted");
        let later = async {
            tokio::time::sleep(3 * limits.greeting).await;
            client.write_all(b"y").await
        };
        let (sent, read) = tokio::join!(later, guest.read_u8());
        sent.expect("sent");
        assert_eq!(read.expect("no limit any more"), b'y');
    }

    #[tokio::test]
    async fn one_address_gets_so_many_connections_and_another_when_one_has_ended() {
        let limits = Limits {
            of_one: 2,
            ..Limits::default()
        };
        let (mut door, address) = door(limits).await;
        let mut clients = Vec::new();
        let mut guests = Vec::new();
        for _ in 0..2 {
            clients.push(TcpStream::connect(address).await.expect("connected"));
            guests.push(next(&mut door).await);
        }
        let mut third = TcpStream::connect(address).await.expect("the kernel takes it");
        let mut byte = [0];
        let refused = tokio::select! {
            _ = door.next() => panic!("one too many"),
            read = third.read(&mut byte) => read,
        };
        assert!(matches!(refused, Ok(0) | Err(_)), "it is closed at once");
        guests.pop();
        let _fourth = TcpStream::connect(address).await.expect("connected");
        next(&mut door).await;
    }

    #[test]
    fn a_host_of_ipv6_is_one_whatever_address_it_takes() {
        let of = |text: &str| network(text.parse().expect("an address"));
        assert_eq!(of("2001:db8:1:2::3"), of("2001:db8:1:2:ffff::4"));
        assert_ne!(of("2001:db8:1:2::3"), of("2001:db8:1:3::3"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
