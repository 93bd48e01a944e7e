//! What keeps strangers from filling a daemon's table of connections: who connects has to begin to speak HTTP/2 within some
//! seconds, and neither one address nor all together get more than so many connections. Where there are too many, one that
//! has never made a call is closed for the next, the oldest first. Knows nothing of what the calls are.
#![forbid(unsafe_code)]

mod frames;
mod guest;
mod seats;
#[cfg(test)]
mod tests;

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use tokio::net::TcpListener;
use tokio::time::Sleep;
use tokio_stream::Stream;

pub use guest::Guest;
use seats::Seats;

/// From one line in the log to the next of its kind.
const QUIET: Duration = Duration::from_secs(1);
/// How long to leave a listening socket alone that fails, as it does when descriptors run out.
const BETWEEN_FAILURES: Duration = Duration::from_millis(100);
/// Connections from one address, where there are descriptors enough.
const OF_ONE: usize = 512;
/// Descriptors that are left to the rest of the process, at least.
const RESERVE: u64 = 64;

/// What those who connect may do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long one may say nothing, or not all of the preface.
    pub greeting: Duration,
    /// Connections from one address at a time; of IPv6 the first 64 bits are one.
    pub of_one: usize,
    /// Connections from all addresses at a time.
    pub of_all: usize,
}

impl Limits {
    /// What this process can afford: half of the file descriptors that it may open are for connections, and one address gets
    /// 512 of them, or three quarters if that is less.
    #[must_use]
    pub fn of_this_process() -> Self {
        Self::with_descriptors(getrlimit(Resource::Nofile).current)
    }

    fn with_descriptors(most: Option<u64>) -> Self {
        let most = most.unwrap_or(u64::MAX);
        let of_all = (most / 2).min(most.saturating_sub(RESERVE)).max(1);
        let of_all = usize::try_from(of_all).unwrap_or(usize::MAX);
        Self {
            greeting: Duration::from_secs(5),
            of_one: OF_ONE.min(of_all - of_all / 4),
            of_all,
        }
    }
}

/// Accepts connections within limits: a stream of them for a server, without end and without errors.
#[derive(Debug)]
pub struct Door {
    listener: TcpListener,
    limits: Limits,
    seats: Arc<Seats>,
    /// Until when a socket that failed is left alone.
    rest: Option<Pin<Box<Sleep>>>,
    crowds: Complaints,
    failures: Complaints,
}

impl Door {
    /// For connections to this socket.
    #[must_use]
    pub fn new(listener: TcpListener, limits: Limits) -> Self {
        Self {
            listener,
            limits,
            seats: Arc::default(),
            rest: None,
            crowds: Complaints::default(),
            failures: Complaints::default(),
        }
    }

    /// Lets one in who has connected, if there is room or can be.
    fn admit(&mut self, from: IpAddr) -> Option<(seats::Seat, seats::End)> {
        match Seats::take(&self.seats, from, &self.limits) {
            Ok(taken) => {
                if let Some(closed) = taken.instead_of
                    && self.crowds.are_due()
                {
                    tracing::warn!(%from, of = %closed, "a connection that made no call was closed: there are too many");
                }
                Some((taken.seat, taken.end))
            }
            Err(full) => {
                if self.crowds.are_due() {
                    tracing::warn!(%from, "connections are refused: {full}");
                }
                None
            }
        }
    }
}

impl Stream for Door {
    type Item = io::Result<Guest>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let door = self.get_mut();
        loop {
            if let Some(rest) = &mut door.rest {
                ready!(rest.as_mut().poll(context));
                door.rest = None;
            }
            let (stream, peer) = match ready!(door.listener.poll_accept(context)) {
                Ok(accepted) => accepted,
                // A server that was told would ask again at once, and do nothing else.
                Err(error) => {
                    if door.failures.are_due() {
                        tracing::warn!(%error, "connections cannot be accepted; trying again");
                    }
                    door.rest = Some(Box::pin(tokio::time::sleep(BETWEEN_FAILURES)));
                    continue;
                }
            };
            let Some((seat, end)) = door.admit(peer.ip()) else {
                continue;
            };
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "a connection that has ended already");
                continue;
            }
            return Poll::Ready(Some(Ok(Guest::new(stream, door.limits.greeting, seat, end))));
        }
    }
}

/// When something was last said in the log of what may happen very often.
#[derive(Debug, Default)]
struct Complaints(Option<Instant>);

impl Complaints {
    fn are_due(&mut self) -> bool {
        let due = self.0.is_none_or(|latest| latest.elapsed() >= QUIET);
        if due {
            self.0 = Some(Instant::now());
        }
        due
    }
}
