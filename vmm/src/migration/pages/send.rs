//! The source's side: pages gathered into frames and sent without a copy, unless they are encoded.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_proto::LEAST_BANDWIDTH;
use shoal_proto::vm::Compression;
use vm_memory::{Address as _, GuestAddress};

use super::frame::{MAX_ENCODED_PAGES, MAX_PAGES, MAX_RUNS, PageFrame, RunKind};
use super::{PAGE, PageCounts, checksum, checksum_of, is_zero_at};
use crate::dirty;
use crate::memory::{GuestMemory, Region};
use crate::migration::codec::{Batch, CodecCounts, DeltaCache, Encoder};
use crate::migration::policy::MAX_CONNECTIONS;
use crate::migration::sched::Stopwatch;
use crate::migration::wire::{Connection, FrameKind, GuestStream, PEER_TIMEOUT, WireError};
use crate::spec::PAGE_SIZE;

/// Pages in a frame that goes as it is: what fits a core's own cache, so that the checksum's read serves the send too.
const RAW_PAGES: usize = 64;
const _: () = assert!(RAW_PAGES <= MAX_PAGES);
// Connections that take turns at the least bandwidth each have a frame within the time that a peer waits.
const _: () =
    assert!(MAX_CONNECTIONS as u64 * RAW_PAGES as u64 * PAGE_SIZE < LEAST_BANDWIDTH * PEER_TIMEOUT.as_secs());

/// Whether pages go for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resent {
    /// The destination has nothing there: zero pages need not be sent at all.
    No,
    /// It may have an older version.
    Yes,
}

/// A frame that is about to go out, and what was done before it.
#[derive(Debug, Clone, Copy)]
pub struct NextFrame {
    /// Bytes of guest memory in it, but for pages of zeros.
    pub page_bytes: usize,
    /// Pages so far, those in it included.
    pub counts: PageCounts,
    /// Bytes on the wire so far, on this connection.
    pub sent: u64,
}

/// Gathers pages into frames and sends them over one connection. Buffers are made once and reused.
pub struct PageSender<'a> {
    memory: &'a GuestMemory,
    encoder: Encoder,
    /// What was sent before, for the encoder; here to be told what went past it.
    cache: Arc<DeltaCache>,
    frame: PageFrame,
    meta: Vec<u8>,
    /// The first is for the frame itself.
    parts: Vec<libc::iovec>,
    /// Copies of the pages in the frame, where they are to be encoded; else empty.
    staged: Vec<u8>,
    staged_gpas: Vec<u64>,
    staging: bool,
    resent: Resent,
    counts: PageCounts,
    last_frame: Instant,
}

// SAFETY: the raw pointers in `parts` are into guest memory, which `memory` keeps mapped and any thread may read.
unsafe impl Send for PageSender<'_> {}

impl std::fmt::Debug for PageSender<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageSender")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl<'a> PageSender<'a> {
    /// A sender of pages of `memory`.
    #[must_use]
    pub fn new(memory: &'a GuestMemory, compression: Compression, cache: Arc<DeltaCache>) -> Self {
        Self {
            memory,
            encoder: Encoder::new(compression, Arc::clone(&cache)),
            cache,
            frame: PageFrame::with_room(),
            meta: Vec::with_capacity(super::frame::MAX_META),
            parts: Vec::with_capacity(1 + MAX_RUNS),
            staged: vec![],
            staged_gpas: Vec::with_capacity(MAX_ENCODED_PAGES),
            staging: false,
            resent: Resent::No,
            counts: PageCounts::default(),
            last_frame: Instant::now(),
        }
    }

    /// Pages handled so far.
    #[must_use]
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    /// What encoding did so far.
    #[must_use]
    pub fn encoded(&self) -> CodecCounts {
        self.encoder.saved()
    }

    /// From here on each page goes the way that is known to be best: a guest waits.
    pub fn try_nothing_new(&mut self) {
        self.encoder.try_nothing_new();
    }

    /// These pages did not arrive as they were sent.
    pub fn forget(&self, damaged: &[u64]) {
        for gpa in damaged {
            self.cache.forget(*gpa, 1);
        }
    }

    /// Pages that need not even be looked at.
    pub fn count_untouched(&mut self, pages: u64) {
        self.counts.zero += pages;
    }

    /// Since a frame was sent.
    #[must_use]
    pub fn idle(&self) -> Duration {
        self.last_frame.elapsed()
    }

    /// Sends the pages of `region` whose bits are set in `words`, bit 0 being page `first`. Before each frame goes out
    /// `before_frame` is told what it has, and may end it. Call [`PageSender::flush`] at the end of a pass.
    ///
    /// # Errors
    /// When the connection fails, or what `before_frame` says.
    pub fn send<S: GuestStream, E: From<WireError>>(
        &mut self,
        connection: &mut Connection<S>,
        region: &Region,
        first: u64,
        words: &[u64],
        resent: Resent,
        before_frame: &mut impl FnMut(NextFrame) -> Result<(), E>,
    ) -> Result<(), E> {
        self.resent = resent;
        for (start, pages) in dirty::runs(words) {
            let pages = pages.min(region.pages().saturating_sub(first + start));
            let gpa = region.start.unchecked_add((first + start) * PAGE_SIZE);
            let Some(host) = self.memory.host_range(gpa, pages * PAGE_SIZE) else {
                continue; // beyond the region's end: nothing is there
            };
            self.send_run(connection, gpa, host, pages, before_frame)?;
        }
        Ok(())
    }

    fn send_run<S: GuestStream, E: From<WireError>>(
        &mut self,
        connection: &mut Connection<S>,
        gpa: GuestAddress,
        host: *mut u8,
        pages: u64,
        before_frame: &mut impl FnMut(NextFrame) -> Result<(), E>,
    ) -> Result<(), E> {
        for page in 0..usize::try_from(pages).expect("guest memory fits a 64-bit address space") {
            if self.frame.is_full(if self.staging {
                MAX_ENCODED_PAGES
            } else {
                RAW_PAGES
            }) {
                self.flush(connection, before_frame)?;
            }
            if self.frame.runs.is_empty() {
                self.begin_frame();
            }
            // SAFETY: host_range says that `pages` pages from `host` on are one mapping, which `memory` keeps.
            let at = unsafe { host.add(page * PAGE) };
            let gpa = gpa.raw_value() + page as u64 * PAGE_SIZE;
            self.add_page(gpa, at);
        }
        Ok(())
    }

    fn begin_frame(&mut self) {
        self.staging = self.encoder.wants(self.resent == Resent::Yes);
        self.parts.clear();
        self.parts.push(libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        });
        self.staged.clear();
        self.staged_gpas.clear();
    }

    fn add_page(&mut self, gpa: u64, at: *mut u8) {
        // SAFETY: `at` is a mapped page of guest memory; see send_run.
        if unsafe { is_zero_at(at) } {
            self.counts.zero += 1;
            self.cache.forget(gpa, 1);
            if self.resent == Resent::Yes {
                self.frame.add(gpa, RunKind::Zero);
            }
            return;
        }
        self.counts.raw += 1;
        let longer = self.frame.add(gpa, RunKind::Data);
        if self.staging {
            let start = self.staged.len();
            self.staged.resize(start + PAGE, 0);
            // SAFETY: a mapped page, and a buffer of that size. The guest may write meanwhile: like a device's DMA, it
            // makes the copy a mixture, which the dirty log then has as written.
            unsafe { std::ptr::copy_nonoverlapping(at, self.staged[start..].as_mut_ptr(), PAGE) };
            self.frame.checksums.push(checksum_of(&self.staged[start..]));
            self.staged_gpas.push(gpa);
            return;
        }
        // SAFETY: as above.
        self.frame.checksums.push(unsafe { checksum(at) });
        self.cache.forget(gpa, 1);
        match self.parts.last_mut() {
            // In one run pages lie one after another here, as they do in the guest.
            Some(last) if longer => last.iov_len += PAGE,
            _ => self.parts.push(libc::iovec {
                iov_base: at.cast(),
                iov_len: PAGE,
            }),
        }
    }

    /// Sends what is gathered.
    ///
    /// # Errors
    /// When the connection fails, or what `before_frame` says.
    pub fn flush<S: GuestStream, E: From<WireError>>(
        &mut self,
        connection: &mut Connection<S>,
        before_frame: &mut impl FnMut(NextFrame) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.frame.runs.is_empty() {
            return Ok(());
        }
        let page_bytes = self.frame.checksums.len() * PAGE;
        let asked = Instant::now();
        before_frame(NextFrame {
            page_bytes,
            counts: self.counts,
            sent: connection.bytes_sent(),
        })?;
        let held_back = asked.elapsed();
        let before = connection.bytes_sent();
        if self.staging && page_bytes > 0 {
            let batch = Batch {
                gpas: &self.staged_gpas,
                bytes: &mut self.staged,
            };
            let encoded = self.encoder.encode(batch, self.resent == Resent::Yes);
            self.frame.encoding = encoded.encoding as u8;
            self.frame.delta = encoded.delta;
            self.frame.data_len = encoded.payload.len();
            self.frame.encode(&mut self.meta);
            self.parts.truncate(1);
            self.parts.push(libc::iovec {
                iov_base: encoded.payload.as_ptr().cast_mut().cast(),
                iov_len: encoded.payload.len(),
            });
        } else {
            self.frame.data_len = page_bytes;
            self.frame.encode(&mut self.meta);
        }
        // Encoding is no part of what the connection takes: counted in, a link would look as slow as the compression.
        let sending = self.encoder.learns().then(Stopwatch::start);
        // SAFETY: the parts are guest memory, which `memory` keeps mapped, or the encoder's payload, which lives on.
        unsafe { connection.send_with_pages(FrameKind::PageRuns, &self.meta, &mut self.parts) }?;
        let spent = sending.map(Stopwatch::stop);
        self.last_frame = Instant::now();
        if let Some(spent) = spent {
            let wire_bytes = usize::try_from(connection.bytes_sent() - before).unwrap_or(usize::MAX);
            self.encoder.sent(wire_bytes, spent, held_back);
        }
        self.frame.clear();
        Ok(())
    }
}
