//! The destination's side: pages read straight into guest memory, and checked there.

use vm_memory::GuestAddress;

use super::frame::{MAX_ENCODED_PAGES, MAX_PAGES, MAX_RUNS, PageFrame, RunKind};
use super::{PAGE, PageCounts, WrittenPages, checksum};
use crate::memory::GuestMemory;
use crate::migration::codec;
use crate::migration::wire::{Connection, Damaged, FrameHeader, FrameKind, GuestStream, WireError};
use crate::spec::PAGE_SIZE;

/// Receives pages from one connection. Buffers are made once and reused.
pub struct PageReceiver<'a> {
    memory: &'a GuestMemory,
    written: &'a WrittenPages,
    frame: PageFrame,
    parts: Vec<libc::iovec>,
    payload: Vec<u8>,
    decoded: Vec<u8>,
    counts: PageCounts,
    damaged: Damaged,
}

// SAFETY: the raw pointers in `parts` are into guest memory, which `memory` keeps mapped and any thread may write.
unsafe impl Send for PageReceiver<'_> {}

impl std::fmt::Debug for PageReceiver<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageReceiver")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

fn malformed(why: String) -> WireError {
    let kind = FrameKind::PageRuns;
    WireError::Malformed { kind, why }
}

impl<'a> PageReceiver<'a> {
    /// Into `memory`, whose vCPUs have never run.
    #[must_use]
    pub fn new(memory: &'a GuestMemory, written: &'a WrittenPages) -> Self {
        Self {
            memory,
            written,
            frame: PageFrame::with_room(),
            parts: Vec::with_capacity(MAX_RUNS),
            payload: vec![],
            decoded: vec![],
            counts: PageCounts::default(),
            damaged: Damaged::default(),
        }
    }

    /// Pages that arrived so far.
    #[must_use]
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    /// Pages that did not match their checksum since the last call.
    pub fn damaged(&mut self) -> &mut Damaged {
        &mut self.damaged
    }

    /// Receives the rest of a PageRuns frame and the pages after it.
    ///
    /// # Errors
    /// When the stream fails, or a run is malformed or outside guest memory.
    pub fn receive<S: GuestStream>(
        &mut self,
        connection: &mut Connection<S>,
        header: &mut FrameHeader,
    ) -> Result<(), WireError> {
        self.payload.resize(header.length, 0);
        connection.receive_into(header, &mut self.payload)?;
        header.verify()?;
        self.frame.parse(&self.payload).map_err(malformed)?;
        self.parts.clear();
        for run in &self.frame.runs {
            let bytes = u64::from(run.pages) * PAGE_SIZE;
            let host = self
                .memory
                .host_range(GuestAddress(run.gpa), bytes)
                .ok_or_else(|| {
                    malformed(format!(
                        "run of {} pages at {:#x} is not guest memory",
                        run.pages, run.gpa
                    ))
                })?;
            match run.kind {
                RunKind::Data => self.parts.push(libc::iovec {
                    iov_base: host.cast(),
                    iov_len: usize::try_from(bytes).expect("within guest memory"),
                }),
                RunKind::Zero => {
                    self.counts.zero += u64::from(run.pages);
                    zero(self.written, run.gpa, host, run.pages);
                }
            }
        }
        debug_assert!(self.frame.checksums.len() <= MAX_PAGES);
        if self.frame.encoding == 0 && self.frame.delta == 0 {
            // read_guest may change the parts, and the check below needs them as they are.
            let mut parts = [libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            }; MAX_RUNS];
            let parts = &mut parts[..self.parts.len()];
            parts.copy_from_slice(&self.parts);
            // SAFETY: host_range says that each part lies within a mapping of guest memory, which `memory` keeps, and
            // no vCPU has run; runs do not overlap (PageFrame::parse). No reference to guest memory exists here.
            unsafe { connection.receive_pages(parts) }?;
        } else {
            self.receive_encoded(connection)?;
        }
        self.check()
    }

    fn receive_encoded<S: GuestStream>(&mut self, connection: &mut Connection<S>) -> Result<(), WireError> {
        let pages = self.frame.checksums.len();
        debug_assert!(pages <= MAX_ENCODED_PAGES);
        self.payload.resize(self.frame.data_len, 0);
        connection.receive_exact(&mut self.payload)?;
        self.decoded.resize(pages * PAGE, 0);
        let encoding =
            codec::Encoding::try_from(self.frame.encoding).map_err(|error| malformed(error.to_string()))?;
        codec::decode(encoding, &self.payload, &mut self.decoded)
            .map_err(|error| malformed(error.to_string()))?;
        let mut pages = self.decoded.chunks_exact(PAGE).enumerate();
        for part in &self.parts {
            for (at, (index, page)) in (0..part.iov_len).step_by(PAGE).zip(&mut pages) {
                // SAFETY: within the part, which is guest memory as host_range says; no vCPU has run, and the slice is
                // gone before anything else looks at the page.
                let target =
                    unsafe { std::slice::from_raw_parts_mut(part.iov_base.cast::<u8>().add(at), PAGE) };
                if self.frame.delta >> index & 1 == 1 {
                    codec::apply_delta(target, page);
                } else {
                    target.copy_from_slice(page);
                }
            }
        }
        Ok(())
    }

    /// Compares every page with its checksum, while it is in the cache.
    fn check(&mut self) -> Result<(), WireError> {
        let mut checksums = self.frame.checksums.iter();
        for run in self.frame.runs.iter().filter(|run| run.kind == RunKind::Data) {
            self.written.insert_run(run.gpa, u64::from(run.pages));
            self.counts.raw += u64::from(run.pages);
            for (page, expected) in (0..u64::from(run.pages)).zip(&mut checksums) {
                let gpa = run.gpa + page * PAGE_SIZE;
                let Some(host) = self.memory.host_range(GuestAddress(gpa), PAGE_SIZE) else {
                    continue; // checked before
                };
                // SAFETY: a page of guest memory.
                if unsafe { checksum(host) } != *expected && !self.damaged.note(gpa) {
                    return Err(malformed(
                        "too many pages do not match their checksums; the link damages data".into(),
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Makes a run zero. A page that was never written is zero already, and stays untouched.
fn zero(written: &WrittenPages, gpa: u64, host: *mut u8, pages: u32) {
    for page in 0..u64::from(pages) {
        if written.contains(gpa + page * PAGE_SIZE) {
            let at = usize::try_from(page * PAGE_SIZE).expect("within guest memory");
            // SAFETY: host_range says that the run lies within a mapping of guest memory; no vCPU has run, and no
            // reference to it exists here.
            unsafe { std::ptr::write_bytes(host.add(at), 0, PAGE) };
        }
    }
}
