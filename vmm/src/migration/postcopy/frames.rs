//! Pages of a paused guest on the wire, and what the destination tells the source of post-copy.
//!
//! A PostPages frame is `runs u32, reserved u32`, then the runs (`gpa u64, pages u32, encoding u32`; encoding 0 is raw, 1 is
//! zeros), then the bytes of the raw runs in order; the frame's checksum covers all of it. A FaultRequest frame is guest
//! physical addresses, u64 each.

use std::io::{Read, Write};

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use super::super::pages::is_zero;
use super::super::wire::{Connection, FrameKind, WireError};
use crate::memory::GuestMemory;
use crate::spec::PAGE_SIZE;

/// Pages in one PostPages frame, at most.
pub const MAX_PAGES: usize = 64;
/// Addresses in one FaultRequest frame, at most.
pub const MAX_REQUESTS: usize = 256;
/// Longest payload of a PostPages frame.
pub const MAX_POST_PAGES: usize = HEAD_LEN + MAX_PAGES * (RUN_LEN + PAGE);
/// Longest payload of a FaultRequest frame.
pub const MAX_FAULT_REQUEST: usize = MAX_REQUESTS * 8;
const HEAD_LEN: usize = 8;
const RUN_LEN: usize = 16;
const PAGE: usize = 4096;
const RAW: u32 = 0;
const ZERO: u32 = 1;

/// How it goes at the destination.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Status {
    /// Pages that have not come.
    #[prost(uint64, tag = "1")]
    pub missing_pages: u64,
    /// Pages that somebody waited for and that came.
    #[prost(uint64, tag = "2")]
    pub faults: u64,
    /// Longest wait.
    #[prost(uint64, tag = "3")]
    pub worst_fault_us: u64,
    /// All waits together.
    #[prost(uint64, tag = "4")]
    pub fault_us: u64,
    /// Post-copy is over: nothing is missing, or the VM has ended there and needs nothing any more.
    #[prost(bool, tag = "5")]
    pub complete: bool,
    /// In a complete one: how the VM ended; empty if it runs.
    #[prost(string, tag = "6")]
    pub ended: String,
}

/// Gathers pages into frames. Buffers are made once and reused.
#[derive(Debug, Default)]
pub struct PageFrame {
    head: Vec<u8>,
    data: Vec<u8>,
    runs: u32,
    last: Option<(u64, u32, u32)>,
    pages: usize,
}

impl PageFrame {
    /// Whether it holds as many pages as one may.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.pages == MAX_PAGES
    }

    /// Adds a page, by its number. The guest must be paused.
    ///
    /// # Errors
    /// When it is not guest memory.
    pub fn add(&mut self, memory: &GuestMemory, page: u64) -> Result<(), GuestMemoryError> {
        let at = self.data.len();
        self.data.resize(at + PAGE, 0);
        let read = memory
            .mmap()
            .read_slice(&mut self.data[at..], GuestAddress(page * PAGE_SIZE));
        let zero = read.is_err() || is_zero(&self.data[at..]);
        if zero {
            self.data.truncate(at);
        }
        read?;
        self.pages += 1;
        let encoding = if zero { ZERO } else { RAW };
        match &mut self.last {
            Some((first, pages, last_encoding))
                if *last_encoding == encoding && *first + u64::from(*pages) == page =>
            {
                *pages += 1;
            }
            _ => {
                self.close_run();
                self.last = Some((page, 1, encoding));
            }
        }
        Ok(())
    }

    fn close_run(&mut self) {
        let Some((first, pages, encoding)) = self.last.take() else {
            return;
        };
        if self.head.is_empty() {
            self.head.extend_from_slice(&[0; HEAD_LEN]);
        }
        self.head.extend_from_slice(&(first * PAGE_SIZE).to_le_bytes());
        self.head.extend_from_slice(&pages.to_le_bytes());
        self.head.extend_from_slice(&encoding.to_le_bytes());
        self.runs += 1;
    }

    /// Sends what is gathered, if anything, and is empty again. Gives how many pages that were.
    ///
    /// # Errors
    /// When the connection fails.
    pub fn send<S: Read + Write>(&mut self, connection: &mut Connection<S>) -> Result<usize, WireError> {
        self.close_run();
        let pages = std::mem::take(&mut self.pages);
        if pages == 0 {
            return Ok(0);
        }
        self.head[..4].copy_from_slice(&self.runs.to_le_bytes());
        let sent = connection.send_parts(FrameKind::PostPages, &self.head, &self.data);
        self.head.clear();
        self.data.clear();
        self.runs = 0;
        sent.map(|()| pages)
    }
}

/// A run of pages that came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacedRun<'a> {
    /// First page number.
    pub first: u64,
    /// How many.
    pub pages: u64,
    /// Their bytes; `None` for zeros.
    pub bytes: Option<&'a [u8]>,
}

/// The runs of a PostPages payload, each whole and within guest memory.
///
/// # Errors
/// When the payload does not make sense.
pub fn runs<'a>(memory: &GuestMemory, payload: &'a [u8]) -> Result<Vec<PlacedRun<'a>>, WireError> {
    let malformed = |why: String| WireError::Malformed {
        kind: FrameKind::PostPages,
        why,
    };
    let (head, rest) = payload
        .split_at_checked(HEAD_LEN)
        .ok_or_else(|| malformed("shorter than its own head".into()))?;
    let count = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    let count = usize::try_from(count).ok().filter(|&count| count <= MAX_PAGES);
    let count = count.ok_or_else(|| malformed(format!("more than {MAX_PAGES} runs")))?;
    let (heads, mut bytes) = rest
        .split_at_checked(count * RUN_LEN)
        .ok_or_else(|| malformed(format!("{count} runs do not fit its length")))?;
    let (mut runs, mut total) = (Vec::with_capacity(count), 0);
    for head in heads.chunks_exact(RUN_LEN) {
        let gpa = u64::from_le_bytes(head[..8].try_into().expect("8 bytes"));
        let pages = u32::from_le_bytes(head[8..12].try_into().expect("4 bytes"));
        let encoding = u32::from_le_bytes(head[12..].try_into().expect("4 bytes"));
        let length = u64::from(pages) * PAGE_SIZE;
        let inside = gpa.is_multiple_of(PAGE_SIZE)
            && pages > 0
            && memory.host_range(GuestAddress(gpa), length).is_some();
        if !inside {
            return Err(malformed(format!(
                "run of {pages} pages at {gpa:#x} is not guest memory"
            )));
        }
        total += u64::from(pages);
        if total > MAX_PAGES as u64 {
            return Err(malformed(format!("more than {MAX_PAGES} pages")));
        }
        let run_bytes = match encoding {
            RAW => {
                let length = usize::try_from(length).expect("at most MAX_PAGES");
                let (run_bytes, after) = bytes
                    .split_at_checked(length)
                    .ok_or_else(|| malformed("its raw runs need more bytes than it has".into()))?;
                bytes = after;
                Some(run_bytes)
            }
            ZERO => None,
            other => return Err(malformed(format!("run encoding {other} is unknown"))),
        };
        runs.push(PlacedRun {
            first: gpa / PAGE_SIZE,
            pages: u64::from(pages),
            bytes: run_bytes,
        });
    }
    if !bytes.is_empty() {
        return Err(malformed(format!(
            "{} bytes more than its raw runs need",
            bytes.len()
        )));
    }
    Ok(runs)
}

/// Asks for pages, by number; at most [`MAX_REQUESTS`].
///
/// # Errors
/// When the connection fails.
pub fn send_requests<S: Read + Write>(
    connection: &mut Connection<S>,
    pages: &[u64],
) -> Result<(), WireError> {
    let addresses: Vec<u8> = pages
        .iter()
        .flat_map(|page| (page * PAGE_SIZE).to_le_bytes())
        .collect();
    connection.send_parts(FrameKind::FaultRequest, &addresses, &[])
}

/// The page numbers of a FaultRequest payload, each within guest memory.
///
/// # Errors
/// When the payload does not make sense.
pub fn requests(memory: &GuestMemory, payload: &[u8]) -> Result<Vec<u64>, WireError> {
    let malformed = |why: String| WireError::Malformed {
        kind: FrameKind::FaultRequest,
        why,
    };
    if payload.is_empty() || !payload.len().is_multiple_of(8) {
        return Err(malformed(format!("{} bytes are no addresses", payload.len())));
    }
    let address = |bytes: &[u8]| {
        let gpa = u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        let inside =
            gpa.is_multiple_of(PAGE_SIZE) && memory.host_range(GuestAddress(gpa), PAGE_SIZE).is_some();
        inside
            .then_some(gpa / PAGE_SIZE)
            .ok_or_else(|| malformed(format!("{gpa:#x} is not the address of a page of guest memory")))
    };
    payload.chunks_exact(8).map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    const MEMORY: u64 = 4 << 20;

    fn payload_of(connection: &Connection<Cursor<Vec<u8>>>) -> (FrameKind, Vec<u8>) {
        Connection::new(Cursor::new(connection.stream().get_ref().clone()))
            .receive()
            .expect("own frame")
    }

    #[test]
    fn pages_come_back_as_runs() {
        let memory = GuestMemory::new(MEMORY).expect("map");
        for page in [3u64, 4, 9] {
            memory
                .mmap()
                .write_obj(page, GuestAddress(page * PAGE_SIZE))
                .expect("inside");
        }
        let mut frame = PageFrame::default();
        for page in [3, 4, 5, 6, 9] {
            frame.add(&memory, page).expect("inside");
        }
        let mut connection = Connection::new(Cursor::new(vec![]));
        assert_eq!(frame.send(&mut connection).expect("memory"), 5);
        assert_eq!(frame.send(&mut connection).expect("nothing to send"), 0);
        let (kind, payload) = payload_of(&connection);
        assert_eq!(kind, FrameKind::PostPages);
        let runs = runs(&memory, &payload).expect("own frame");
        let shape: Vec<_> = runs
            .iter()
            .map(|run| (run.first, run.pages, run.bytes.is_some()))
            .collect();
        assert_eq!(shape, [(3, 2, true), (5, 2, false), (9, 1, true)]);
        let first = runs[0].bytes.expect("raw");
        assert_eq!((first[0], first[PAGE]), (3, 4));
    }

    #[test]
    fn a_page_outside_guest_memory_is_not_sent_or_asked_for() {
        let memory = GuestMemory::new(MEMORY).expect("map");
        let mut frame = PageFrame::default();
        assert!(frame.add(&memory, MEMORY / PAGE_SIZE).is_err());
        for bad in [MEMORY, 1, u64::MAX - 4095] {
            let error = requests(&memory, &bad.to_le_bytes())
                .expect_err("outside")
                .to_string();
            assert!(error.contains("is not the address of a page"), "{error}");
        }
        assert!(requests(&memory, &[0; 7]).is_err());
        assert!(requests(&memory, &[]).is_err());
        let mut connection = Connection::new(Cursor::new(vec![]));
        send_requests(&mut connection, &[0, 7]).expect("memory");
        assert_eq!(
            requests(&memory, &payload_of(&connection).1).expect("own frame"),
            [0, 7]
        );
    }

    proptest! {
        #[test]
        fn no_payload_panics_the_reader(payload in proptest::collection::vec(any::<u8>(), 0..200), runs_claimed in 0u32..8, gpa in 0u64..2048, pages in 0u32..70) {
            let memory = GuestMemory::new(MEMORY).expect("map");
            let _ = runs(&memory, &payload);
            let _ = requests(&memory, &payload);
            let mut plausible = [runs_claimed.to_le_bytes(), [0; 4]].concat();
            plausible.extend_from_slice(&(gpa * PAGE_SIZE).to_le_bytes());
            plausible.extend_from_slice(&pages.to_le_bytes());
            plausible.extend_from_slice(&ZERO.to_le_bytes());
            plausible.extend_from_slice(&payload);
            if let Ok(runs) = runs(&memory, &plausible) {
                prop_assert!(runs.iter().all(|run| (run.first + run.pages) * PAGE_SIZE <= MEMORY));
                prop_assert!(runs.iter().map(|run| run.pages).sum::<u64>() <= MAX_PAGES as u64);
            }
        }
    }
}
