//! Guest pages on the wire: runs of pages, gathered into frames on one side and written once into guest memory on the other.
//!
//! A Pages frame is `runs u32, reserved u32`, then the runs (`gpa u64, pages u32, encoding u32`), then the bytes of the
//! raw runs in order. The source copies pages into the frame before it sends it: the guest goes on writing, and the
//! checksum must be of what is sent.

use std::io::{IoSliceMut, Read, Write};
use std::time::{Duration, Instant};

use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryError};

use super::wire::{
    Connection, FrameHeader, FrameKind, MAX_PAGE_DATA, MAX_RUNS, PAGES_HEAD_LEN, RUN_LEN, WireError,
};
use crate::dirty;
use crate::memory::{GuestMemory, Region};
use crate::spec::PAGE_SIZE;

const PAGE: usize = 4096;
const KEEP_ALIVE: Duration = Duration::from_secs(1);
const RAW: u32 = 0;
const ZERO: u32 = 1;

/// What becomes of pages that are all zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroPages {
    /// Not sent: the destination has never been written and is zero already.
    Skip,
    /// Sent as a run without bytes.
    Send,
}

/// Pages handled so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Sent with their bytes.
    pub raw: u64,
    /// Found to be zero.
    pub zero: u64,
}

impl PageCounts {
    /// All of them.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.raw + self.zero
    }
}

/// Why pages could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The stream.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Guest memory.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Gathers pages into frames. Buffers are made once and reused.
#[derive(Debug)]
pub struct PageSender<'a> {
    memory: &'a GuestMemory,
    head: Vec<u8>,
    runs: u32,
    last: Option<(GuestAddress, u32, u32)>,
    data: Vec<u8>,
    filled: usize,
    counts: PageCounts,
    last_frame: Instant,
}

impl<'a> PageSender<'a> {
    /// A sender of pages of `memory`.
    pub fn new(memory: &'a GuestMemory) -> Self {
        let head = Vec::with_capacity(PAGES_HEAD_LEN + MAX_RUNS * RUN_LEN);
        Self {
            memory,
            head,
            runs: 0,
            last: None,
            data: vec![0; MAX_PAGE_DATA],
            filled: 0,
            counts: PageCounts::default(),
            last_frame: Instant::now(),
        }
    }

    /// Pages handled so far.
    pub fn counts(&self) -> PageCounts {
        self.counts
    }

    /// Pages that need not even be looked at.
    pub fn count_untouched(&mut self, pages: u64) {
        self.counts.zero += pages;
    }

    /// Sends the pages of `region` whose bits are set in `words`, bit 0 being page `first`. A full frame goes out at once,
    /// after which `after_frame` may end it; call [`PageSender::flush`] at the end of a pass.
    pub fn send<S: Read + Write, E: From<PagesError>>(
        &mut self,
        connection: &mut Connection<S>,
        region: &Region,
        first: u64,
        words: &[u64],
        zero_pages: ZeroPages,
        mut after_frame: impl FnMut(&Connection<S>, PageCounts) -> Result<(), E>,
    ) -> Result<(), E> {
        for (start, pages) in dirty::runs(words) {
            let pages = pages.min(region.pages().saturating_sub(first + start));
            let run = region.start.unchecked_add((first + start) * PAGE_SIZE);
            for page in 0..pages {
                let gpa = run.unchecked_add(page * PAGE_SIZE);
                if self.filled == MAX_PAGE_DATA || self.head.len() == self.head.capacity() {
                    self.flush(connection).map_err(PagesError::from)?;
                    after_frame(connection, self.counts)?;
                }
                self.add_page(gpa, zero_pages).map_err(PagesError::from)?;
            }
        }
        Ok(())
    }

    fn add_page(&mut self, gpa: GuestAddress, zero_pages: ZeroPages) -> Result<(), GuestMemoryError> {
        let target = &mut self.data[self.filled..self.filled + PAGE];
        self.memory.mmap().read_slice(target, gpa)?;
        if is_zero(target) {
            self.counts.zero += 1;
            if zero_pages == ZeroPages::Send {
                self.add_to_runs(gpa, ZERO);
            }
        } else {
            self.counts.raw += 1;
            self.filled += PAGE;
            self.add_to_runs(gpa, RAW);
        }
        Ok(())
    }

    fn add_to_runs(&mut self, gpa: GuestAddress, encoding: u32) {
        if let Some((start, pages, last_encoding)) = &mut self.last
            && *last_encoding == encoding
            && start.unchecked_add(u64::from(*pages) * PAGE_SIZE) == gpa
        {
            *pages += 1;
            return;
        }
        self.close_run();
        self.last = Some((gpa, 1, encoding));
    }

    fn close_run(&mut self) {
        let Some((start, pages, encoding)) = self.last.take() else {
            return;
        };
        if self.head.is_empty() {
            self.head.extend_from_slice(&[0; PAGES_HEAD_LEN]);
        }
        self.head.extend_from_slice(&start.raw_value().to_le_bytes());
        self.head.extend_from_slice(&pages.to_le_bytes());
        self.head.extend_from_slice(&encoding.to_le_bytes());
        self.runs += 1;
    }

    /// Sends an empty frame if nothing was sent for a while: memory that is all zeros gives nothing to send, and the
    /// destination must not take the source for gone.
    pub fn keep_alive<S: Read + Write>(&mut self, connection: &mut Connection<S>) -> Result<(), WireError> {
        if self.last_frame.elapsed() < KEEP_ALIVE {
            return Ok(());
        }
        self.last_frame = Instant::now();
        connection.send_parts(FrameKind::Pages, &[0; PAGES_HEAD_LEN], &[])
    }

    /// Sends what is gathered.
    pub fn flush<S: Read + Write>(&mut self, connection: &mut Connection<S>) -> Result<(), WireError> {
        self.close_run();
        if self.runs == 0 {
            return Ok(());
        }
        self.head[..4].copy_from_slice(&self.runs.to_le_bytes());
        let sent = connection.send_parts(FrameKind::Pages, &self.head, &self.data[..self.filled]);
        self.last_frame = Instant::now();
        self.head.clear();
        (self.runs, self.filled) = (0, 0);
        sent
    }
}

/// Whether a page holds only zeros. In blocks that the compiler turns into vector instructions; most pages that are not
/// zero say so in the first.
#[must_use]
pub fn is_zero(page: &[u8]) -> bool {
    page.chunks(256)
        .all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// Receives the rest of a Pages frame, straight into guest memory. vCPUs must never have run.
///
/// # Errors
/// When the stream fails, or a run is malformed or outside guest memory.
pub fn receive<S: Read + Write>(
    connection: &mut Connection<S>,
    header: &mut FrameHeader,
    memory: &GuestMemory,
    counts: &mut PageCounts,
) -> Result<(), WireError> {
    let malformed = |why: String| WireError::Malformed {
        kind: FrameKind::Pages,
        why,
    };
    let mut head = [0u8; PAGES_HEAD_LEN];
    if header.length < PAGES_HEAD_LEN {
        return Err(malformed(format!(
            "length {} is less than its own head",
            header.length
        )));
    }
    connection.receive_into(header, &mut head)?;
    let count = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    let count = usize::try_from(count).ok().filter(|&count| count <= MAX_RUNS);
    let count = count.ok_or_else(|| malformed(format!("more than {MAX_RUNS} runs")))?;
    let data_len = header.length.checked_sub(PAGES_HEAD_LEN + count * RUN_LEN);
    let data_len = data_len.ok_or_else(|| malformed(format!("{count} runs do not fit its length")))?;
    let mut runs = vec![0u8; count * RUN_LEN];
    connection.receive_into(header, &mut runs)?;

    let mut targets: Vec<(*mut u8, usize)> = Vec::with_capacity(count);
    let mut zero_runs: Vec<(*mut u8, usize)> = vec![];
    let mut expected = 0usize;
    let mut free_from = 0u64;
    for run in runs.chunks_exact(RUN_LEN) {
        let gpa = u64::from_le_bytes(run[..8].try_into().expect("8 bytes"));
        let pages = u32::from_le_bytes(run[8..12].try_into().expect("4 bytes"));
        let encoding = u32::from_le_bytes(run[12..].try_into().expect("4 bytes"));
        let bytes = u64::from(pages) * PAGE_SIZE;
        let host =
            (gpa.is_multiple_of(PAGE_SIZE) && pages > 0).then(|| memory.host_range(GuestAddress(gpa), bytes));
        let host = host
            .flatten()
            .ok_or_else(|| malformed(format!("run of {pages} pages at {gpa:#x} is not guest memory")))?;
        let length = usize::try_from(bytes).expect("within guest memory");
        // Ascending, so that no two slices below can overlap.
        if gpa < free_from {
            return Err(malformed(format!(
                "run at {gpa:#x} overlaps or precedes the run before it"
            )));
        }
        free_from = gpa + bytes;
        match encoding {
            RAW => {
                targets.push((host, length));
                expected += length;
                counts.raw += u64::from(pages);
            }
            ZERO => {
                zero_runs.push((host, length));
                counts.zero += u64::from(pages);
            }
            other => return Err(malformed(format!("run encoding {other} is unknown"))),
        }
    }
    if expected != data_len {
        return Err(malformed(format!(
            "its raw runs need {expected} bytes and it has {data_len}"
        )));
    }
    {
        let mut buffers: Vec<_> = targets
            .iter()
            // SAFETY: host_range says that the range lies within one guest memory mapping, and runs ascend without
            // overlap (checked above), so the slices are disjoint; no vCPU of this VM has run, so
            // nothing else accesses it, and `buffers` is dropped before `targets` is read again.
            .map(|&(host, length)| IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(host, length) }))
            .collect();
        connection.receive_vectored(&mut buffers)?;
    }
    for &(host, length) in &targets {
        // SAFETY: as above; the mutable slices are gone.
        header.add_to_checksum(unsafe { std::slice::from_raw_parts(host, length) });
    }
    header.verify()?;
    for &(host, length) in &zero_runs {
        // SAFETY: as above; zero runs are written after the raw ones, through their own slices.
        let run = unsafe { std::slice::from_raw_parts_mut(host, length) };
        for page in run.chunks_exact_mut(PAGE) {
            // Reading a page that was never touched costs less than writing it, and keeps it unbacked.
            if !is_zero(page) {
                page.fill(0);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    const MEMORY: u64 = 4 << 20;
    const PAGES: u64 = MEMORY / PAGE_SIZE;

    fn transfer(
        source: &GuestMemory,
        destination: &GuestMemory,
        words: &[u64],
        zero: ZeroPages,
    ) -> (PageCounts, PageCounts) {
        let mut out = Connection::new(Cursor::new(vec![]));
        let mut sender = PageSender::new(source);
        let region = source.regions()[0];
        sender
            .send::<_, PagesError>(&mut out, &region, 0, words, zero, |_, _| Ok(()))
            .expect("memory");
        sender.flush(&mut out).expect("memory");
        let bytes = out.stream().get_ref().clone();
        let length = bytes.len() as u64;
        let mut input = Connection::new(Cursor::new(bytes));
        let mut counts = PageCounts::default();
        while input.stream().position() < length {
            let mut header = input.receive_header().expect("own frame");
            receive(&mut input, &mut header, destination, &mut counts).expect("own frame");
        }
        (sender.counts(), counts)
    }

    fn contents(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0u8; usize::try_from(MEMORY).expect("small")];
        memory
            .mmap()
            .read_slice(&mut bytes, GuestAddress(0))
            .expect("inside");
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn what_is_sent_arrives(written in proptest::collection::vec((0..PAGES, any::<u64>()), 0..600)) {
            let (source, destination) = (GuestMemory::new(MEMORY).expect("map"), GuestMemory::new(MEMORY).expect("map"));
            let mut bitmap = dirty::Bitmap::clean(PAGES);
            for (page, value) in written {
                source.mmap().write_obj(value, GuestAddress(page * PAGE_SIZE + 8)).expect("inside");
                destination.mmap().write_obj(!value, GuestAddress(page * PAGE_SIZE)).expect("inside");
                bitmap.set_run(page, 1);
            }
            let (sent, received) = transfer(&source, &destination, bitmap.chunk(0, PAGES), ZeroPages::Send);
            prop_assert_eq!(sent, received);
            prop_assert_eq!(sent.raw + sent.zero, bitmap.count());
            prop_assert!(contents(&source) == contents(&destination));
        }

        #[test]
        fn no_payload_panics_the_receiver(payload in proptest::collection::vec(any::<u8>(), 0..200), runs in 0u32..8) {
            let memory = GuestMemory::new(MEMORY).expect("map");
            let mut payload = payload;
            if payload.len() >= 4 {
                payload[..4].copy_from_slice(&runs.to_le_bytes());
            }
            let mut out = Connection::new(Cursor::new(vec![]));
            out.send_parts(FrameKind::Pages, &payload, &[]).expect("memory");
            let mut input = Connection::new(Cursor::new(out.stream().get_ref().clone()));
            let mut header = input.receive_header().expect("own header");
            let _ = receive(&mut input, &mut header, &memory, &mut PageCounts::default());
        }
    }

    #[test]
    fn a_run_outside_guest_memory_is_refused() {
        for (gpa, pages) in [
            (MEMORY, 1u32),
            (MEMORY - PAGE_SIZE, 2),
            (1, 1),
            (0, 0),
            (u64::MAX - 4095, 1),
        ] {
            let mut head = vec![1, 0, 0, 0, 0, 0, 0, 0];
            head.extend_from_slice(&gpa.to_le_bytes());
            head.extend_from_slice(&pages.to_le_bytes());
            head.extend_from_slice(&ZERO.to_le_bytes());
            let mut out = Connection::new(Cursor::new(vec![]));
            out.send_parts(FrameKind::Pages, &head, &[]).expect("memory");
            let mut input = Connection::new(Cursor::new(out.stream().get_ref().clone()));
            let mut header = input.receive_header().expect("own header");
            let memory = GuestMemory::new(MEMORY).expect("map");
            let error =
                receive(&mut input, &mut header, &memory, &mut PageCounts::default()).expect_err("outside");
            assert!(error.to_string().contains("is not guest memory"), "{error}");
        }
    }

    #[test]
    fn pages_that_are_zero_in_a_fresh_destination_are_not_sent() {
        let (source, destination) = (
            GuestMemory::new(MEMORY).expect("map"),
            GuestMemory::new(MEMORY).expect("map"),
        );
        source.mmap().write_obj(1u8, GuestAddress(0)).expect("inside");
        let (sent, received) = transfer(&source, &destination, &[u64::MAX], ZeroPages::Skip);
        assert_eq!(sent, PageCounts { raw: 1, zero: 63 });
        assert_eq!(received, PageCounts { raw: 1, zero: 0 });
    }
}
