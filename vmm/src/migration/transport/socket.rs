//! Sockets, and I/O on them from and to raw buffers.

use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket as _;

use super::{TlsError, TransportError};

/// `UIO_MAXIOV`: what one call takes.
const MAX_PARTS: usize = 1024;
/// Goes beside a descriptor: a stream carries none without a byte.
const DESCRIPTOR_BYTE: u8 = b'D';
/// How long a peer that was turned away may take to read why.
const LINGER: Duration = Duration::from_millis(500);
/// What it may still send meanwhile.
const LINGER_BYTES: usize = 1 << 20;

/// A socket of either family.
#[derive(Debug)]
pub enum Socket {
    /// Over the network.
    Tcp(TcpStream),
    /// Within this host.
    Unix(UnixStream),
    /// Waits for connections over the network.
    TcpListener(TcpListener),
    /// Waits for connections within this host.
    UnixListener(UnixListener),
}

fn not_connected() -> io::Error {
    io::ErrorKind::NotConnected.into()
}

impl Socket {
    /// No waiting for more to send. Buffers are left to the kernel, which sizes them by the link as long as nobody sets them.
    pub fn tune(&self) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_nodelay(true),
            _ => Ok(()),
        }
    }

    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(timeout),
            Self::Unix(stream) => stream.set_read_timeout(timeout),
            _ => Err(not_connected()),
        }
    }

    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_write_timeout(timeout),
            Self::Unix(stream) => stream.set_write_timeout(timeout),
            _ => Err(not_connected()),
        }
    }

    /// Ends it in both directions, as far as it has not ended.
    pub fn shutdown(&self) {
        self.shutdown_how(libc::SHUT_RDWR);
    }

    /// Takes no more; whoever waits for something to read is told that it has ended.
    pub fn shutdown_read(&self) {
        self.shutdown_how(libc::SHUT_RD);
    }

    /// Says that no more will be sent.
    pub fn shutdown_write(&self) {
        self.shutdown_how(libc::SHUT_WR);
    }

    // The standard library has it for streams only; on a listener it wakes whoever waits in accept or poll.
    fn shutdown_how(&self, how: libc::c_int) {
        // SAFETY: a descriptor that `self` keeps open; no memory is involved. It fails where the peer has gone already,
        // which is as good.
        unsafe { libc::shutdown(self.as_fd().as_raw_fd(), how) };
    }

    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).read(buffer),
            Self::Unix(stream) => (&mut &*stream).read(buffer),
            _ => Err(not_connected()),
        }
    }

    pub fn read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).read_vectored(buffers),
            Self::Unix(stream) => (&mut &*stream).read_vectored(buffers),
            _ => Err(not_connected()),
        }
    }

    pub fn write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).write_vectored(buffers),
            Self::Unix(stream) => (&mut &*stream).write_vectored(buffers),
            _ => Err(not_connected()),
        }
    }

    pub fn write_all(&self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => (&mut &*stream).write_all(data),
            Self::Unix(stream) => (&mut &*stream).write_all(data),
            _ => Err(not_connected()),
        }
    }

    /// Looks at the first byte without taking it; `None` if the peer has ended the connection.
    pub fn peek(&self) -> io::Result<Option<u8>> {
        let mut byte = 0u8;
        let count = retry(|| {
            // SAFETY: at most one byte is written, to a byte on the stack, from a descriptor that `self` keeps open.
            unsafe {
                libc::recv(
                    self.as_fd().as_raw_fd(),
                    (&raw mut byte).cast(),
                    1,
                    libc::MSG_PEEK,
                )
            }
        })?;
        Ok((count == 1).then_some(byte))
    }

    /// # Safety
    /// Each of `parts` stays mapped and readable for the length of the call.
    pub unsafe fn write_all_raw(&self, parts: &mut [libc::iovec]) -> io::Result<()> {
        let mut rest = advance(parts, 0);
        while !rest.is_empty() {
            // SAFETY: all zeros is a valid msghdr: no name, no buffers, no control data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = rest.as_mut_ptr();
            message.msg_iovlen = rest.len().min(MAX_PARTS);
            let count = retry(|| {
                // SAFETY: `message` holds that many of `parts`, which the kernel reads only; the caller promises that they
                // are mapped. That they change meanwhile is no matter to the kernel.
                unsafe { libc::sendmsg(self.as_fd().as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
            })?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = advance(rest, count);
        }
        Ok(())
    }

    /// # Safety
    /// Each of `parts` stays mapped and writable for the length of the call, nobody else uses it, and any bytes will do.
    pub unsafe fn read_all_raw(&self, parts: &mut [libc::iovec]) -> io::Result<()> {
        let mut rest = advance(parts, 0);
        while !rest.is_empty() {
            // SAFETY: all zeros is a valid msghdr: no name, no buffers, no control data.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = rest.as_mut_ptr();
            message.msg_iovlen = rest.len().min(MAX_PARTS);
            let count = retry(|| {
                // SAFETY: `message` holds that many of `parts`; the caller promises that they are mapped and his alone.
                unsafe { libc::recvmsg(self.as_fd().as_raw_fd(), &raw mut message, 0) }
            })?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            rest = advance(rest, count);
        }
        Ok(())
    }

    pub fn send_descriptor(&self, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        let stream = self.unix()?;
        loop {
            match stream.send_with_fd(&[DESCRIPTOR_BYTE][..], descriptor.as_raw_fd()) {
                Ok(1) => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub fn receive_descriptor(&self) -> io::Result<OwnedFd> {
        let stream = self.unix()?;
        let mut byte = [0u8];
        let (count, file) = loop {
            match stream.recv_with_fd(&mut byte) {
                Ok(received) => break received,
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error.into()),
            }
        };
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (DESCRIPTOR_BYTE, Some(file)) = (byte[0], file) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a descriptor was due, something else came",
            ));
        };
        // SAFETY: a descriptor that `file` keeps open; no memory is involved.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(file.into())
    }

    fn unix(&self) -> io::Result<&UnixStream> {
        match self {
            Self::Unix(stream) => Ok(stream),
            _ => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "descriptors travel within one host only, over a Unix socket",
            )),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
            Self::TcpListener(socket) => socket.as_fd(),
            Self::UnixListener(socket) => socket.as_fd(),
        }
    }
}

/// The user at the other end of a Unix socket.
pub fn peer_user(stream: &UnixStream) -> io::Result<u32> {
    let mut credentials = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut length = libc::socklen_t::try_from(size_of::<libc::ucred>()).expect("a few bytes");
    // SAFETY: the kernel writes at most `length` bytes to `credentials`, which has that many, and the length to `length`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(credentials.uid)
}

/// Waits until there is something to read or accept, or the other side has ended it; `false` at the deadline.
pub fn poll_readable(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    Ok(poll(socket, deadline)? != 0)
}

/// The same for a listening socket: `None` once it was shut down.
pub fn poll_acceptable(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<Option<bool>> {
    let events = poll(socket, deadline)?;
    Ok((events & libc::POLLHUP == 0).then_some(events != 0))
}

/// What happened to it; 0 at the deadline.
fn poll(socket: BorrowedFd<'_>, deadline: Instant) -> io::Result<libc::c_short> {
    let mut descriptor = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: not to turn in circles in the last millisecond.
        let timeout = libc::c_int::try_from(left.as_micros().div_ceil(1000)).unwrap_or(libc::c_int::MAX);
        // SAFETY: one pollfd, on the stack, for a descriptor that `socket` borrows.
        match unsafe { libc::poll(&raw mut descriptor, 1, timeout) } {
            0 if Instant::now() >= deadline => return Ok(0),
            0 => {}
            1.. => return Ok(descriptor.revents),
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Repeats a system call while signals interrupt it.
fn retry(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        let result = call();
        if let Ok(count) = usize::try_from(result) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// What is left of `parts` after `count` bytes, without empty parts in front.
pub fn advance(mut parts: &mut [libc::iovec], mut count: usize) -> &mut [libc::iovec] {
    while let Some(first) = parts.first_mut() {
        if first.iov_len > count {
            first.iov_base = first.iov_base.wrapping_byte_add(count);
            first.iov_len -= count;
            break;
        }
        count -= first.iov_len;
        parts = &mut parts[1..];
    }
    parts
}

/// One operation on a socket, with the time left until `deadline`.
pub fn within<T>(
    socket: &Socket,
    deadline: Instant,
    operation: impl FnOnce(&Socket) -> io::Result<T>,
) -> Result<T, TransportError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(TransportError::Silent);
    }
    socket.set_read_timeout(Some(left))?;
    socket.set_write_timeout(Some(left))?;
    operation(socket).map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => TransportError::Silent,
        // The reason is inside.
        _ => match error.downcast::<TlsError>() {
            Ok(error) => error.into(),
            Err(error) => error.into(),
        },
    })
}

/// Ends a connection so that the peer can read what was sent last: closing with something unread would take it away.
pub fn linger(socket: &Socket, deadline: Instant) {
    let deadline = deadline.min(Instant::now() + LINGER);
    socket.shutdown_write();
    let mut scrap = [0; 4096];
    let mut left = LINGER_BYTES;
    while left > 0 && matches!(poll_readable(socket.as_fd(), deadline), Ok(true)) {
        match socket.read(&mut scrap) {
            Ok(0) | Err(_) => return,
            Ok(count) => left = left.saturating_sub(count),
        }
    }
}
