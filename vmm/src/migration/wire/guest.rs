//! Guest memory on the wire, without a copy.

use std::io::{self, Read, Write};

use super::{Connection, FrameKind, HEADER_LEN, WireError};
use crate::migration::pages::frame::MAX_META;
use crate::migration::transport::Transport;

impl<S: GuestStream> Connection<S> {
    /// Sends a frame followed by guest pages, all in one go. `parts` has a free first element, for the frame itself.
    ///
    /// # Errors
    /// When the connection fails.
    ///
    /// # Safety
    /// `parts[1..]` are mapped and stay so; the guest may write to them meanwhile.
    pub unsafe fn send_with_pages(
        &mut self,
        kind: FrameKind,
        meta: &[u8],
        parts: &mut [libc::iovec],
    ) -> Result<(), WireError> {
        let header = self.header(kind, meta, &[])?;
        let mut front = [0u8; HEADER_LEN + MAX_META];
        front[..HEADER_LEN].copy_from_slice(&header);
        front[HEADER_LEN..HEADER_LEN + meta.len()].copy_from_slice(meta);
        parts[0] = libc::iovec {
            iov_base: front.as_mut_ptr().cast(),
            iov_len: HEADER_LEN + meta.len(),
        };
        let bytes: usize = parts.iter().map(|part| part.iov_len).sum();
        // SAFETY: `front` lives across the call; the caller answers for the rest.
        unsafe { self.stream.write_guest(parts) }?;
        self.bytes_sent += bytes as u64;
        Ok(())
    }

    /// Reads what follows a frame straight into guest memory.
    ///
    /// # Errors
    /// When the connection fails.
    ///
    /// # Safety
    /// `parts` are mapped, writable and stay so; no reference to them is alive.
    pub unsafe fn receive_pages(&mut self, parts: &mut [libc::iovec]) -> Result<(), WireError> {
        // SAFETY: the caller's.
        Ok(unsafe { self.stream.read_guest(parts) }?)
    }
}

/// A stream that moves bytes straight from and into guest memory, to which the guest may write meanwhile.
pub trait GuestStream: Read + Write {
    /// Writes all of `parts`.
    ///
    /// # Errors
    /// When the connection fails.
    ///
    /// # Safety
    /// `parts` are mapped and stay so.
    unsafe fn write_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()>;

    /// Fills all of `parts`.
    ///
    /// # Errors
    /// When the connection fails.
    ///
    /// # Safety
    /// `parts` are mapped, writable and stay so; no reference to them is alive.
    unsafe fn read_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()>;
}

impl GuestStream for Transport {
    unsafe fn write_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()> {
        // SAFETY: the caller's.
        unsafe { Transport::write_guest(self, parts) }
    }

    unsafe fn read_guest(&mut self, parts: &mut [libc::iovec]) -> io::Result<()> {
        // SAFETY: the caller's.
        unsafe { Transport::read_guest(self, parts) }
    }
}
