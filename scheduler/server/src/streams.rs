//! How many calls that may go on for long one connection, and all together, may have open.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Status};

/// Counts them.
#[derive(Debug)]
pub struct Streams {
    most_of_one: usize,
    most: usize,
    /// By connection. One without an address is a test's.
    open: Mutex<HashMap<Option<SocketAddr>, usize>>,
}

/// One that is open, until it is dropped.
#[derive(Debug)]
pub struct Seat {
    streams: Arc<Streams>,
    connection: Option<SocketAddr>,
}

impl Streams {
    /// So many on one connection, and in all.
    pub fn new(most_of_one: usize, most: usize) -> Arc<Self> {
        Arc::new(Self {
            most_of_one,
            most,
            open: Mutex::default(),
        })
    }

    /// Opens one, unless there are too many.
    pub fn enter<T>(self: &Arc<Self>, request: &Request<T>) -> Result<Seat, Status> {
        let connection = request.remote_addr();
        let mut open = self.lock();
        if open.values().sum::<usize>() >= self.most {
            return Err(Status::resource_exhausted(format!(
                "{} calls that stream or wait are open here, which is the most; try again later",
                self.most
            )));
        }
        let own = open.entry(connection).or_default();
        if *own >= self.most_of_one {
            return Err(Status::resource_exhausted(format!(
                "{} calls that stream or wait are open on this connection, which is the most; end some, or use another one",
                self.most_of_one
            )));
        }
        *own += 1;
        drop(open);
        Ok(Seat {
            streams: Arc::clone(self),
            connection,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Option<SocketAddr>, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Seat {
    /// Held as long as the stream.
    pub fn hold<T: Send + 'static>(
        self,
        stream: impl Stream<Item = Result<T, Status>> + Send + 'static,
    ) -> Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> {
        Box::pin(stream.map(move |item| {
            let _seat = &self;
            item
        }))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut open = self.streams.lock();
        if let Some(own) = open.get_mut(&self.connection) {
            *own -= 1;
            if *own == 0 {
                open.remove(&self.connection);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;
    use tonic::transport::server::TcpConnectInfo;

    fn request(port: u16) -> Request<()> {
        let mut request = Request::new(());
        request.extensions_mut().insert(TcpConnectInfo {
            local_addr: None,
            remote_addr: Some(([127, 0, 0, 1], port).into()),
        });
        request
    }

    #[test]
    fn one_connection_and_all_together_are_held_to_their_numbers() {
        let streams = Streams::new(2, 3);
        let first = streams.enter(&request(1)).expect("free");
        let second = streams.enter(&request(1)).expect("free");
        let refused = streams.enter(&request(1)).expect_err("two on one connection");
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.message().contains("on this connection"), "{refused}");
        let _third = streams.enter(&request(2)).expect("free");
        let refused = streams.enter(&request(3)).expect_err("three in all");
        assert!(refused.message().contains("open here"), "{refused}");
        drop(first);
        drop(second.hold(tokio_stream::empty::<Result<(), Status>>()));
        let _again = streams.enter(&request(3)).expect("freed");
        assert_eq!(streams.lock().len(), 2, "what is closed is forgotten");
    }
}
