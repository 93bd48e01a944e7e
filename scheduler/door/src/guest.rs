//! A connection that was let in.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::frames::Frames;
use crate::seats::{End, Seat};

/// A connection. Reading and writing fail if the other side has not begun to speak in time, and, until it has made a call, when
/// its place is given to another. One task has to do both.
#[derive(Debug)]
pub struct Guest {
    stream: TcpStream,
    /// Until when it has to have sent the preface.
    greeting: Option<Pin<Box<Sleep>>>,
    /// Until it has made a call.
    unproved: Option<Unproved>,
    seat: Seat,
}

#[derive(Debug)]
struct Unproved {
    frames: Frames,
    end: End,
}

impl Guest {
    pub(crate) fn new(stream: TcpStream, greeting: Duration, seat: Seat, end: End) -> Self {
        let frames = Frames::new();
        Self {
            stream,
            greeting: Some(Box::pin(tokio::time::sleep(greeting))),
            unproved: Some(Unproved { frames, end }),
            seat,
        }
    }

    /// The stream, unless its place was given to another. If it is later, the task of this context is woken.
    fn stream(&mut self, context: &mut Context<'_>) -> io::Result<Pin<&mut TcpStream>> {
        if let Some(Unproved { end, .. }) = &mut self.unproved
            && (end.is_terminated() || Pin::new(end).poll(context).is_ready())
        {
            return Err(gave_way());
        }
        Ok(Pin::new(&mut self.stream))
    }

    /// Notes what came.
    fn hear(&mut self, bytes: &[u8], context: &mut Context<'_>) -> io::Result<()> {
        let Some(Unproved { frames, .. }) = &mut self.unproved else {
            return Ok(());
        };
        frames.hear(bytes);
        if frames.have_greeting() {
            self.greeting = None;
        }
        if let Some(limit) = &mut self.greeting
            && limit.as_mut().poll(context).is_ready()
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if frames.have_call() {
            if !self.seat.keep() {
                return Err(gave_way());
            }
            self.unproved = None;
        }
        Ok(())
    }
}

fn gave_way() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        "closed for another connection, as it made no call",
    )
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
        let read = guest.stream(context)?.poll_read(context, buffer);
        guest.hear(&buffer.filled()[before..], context)?;
        read
    }
}

impl AsyncWrite for Guest {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().stream(context)?.poll_write(context, bytes)
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
        self.get_mut()
            .stream(context)?
            .poll_write_vectored(context, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
