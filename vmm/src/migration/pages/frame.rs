//! The payload of a PageRuns frame.
//!
//! ```text
//! encoding u8  reserved u8 x3  runs u32  pages u32  data_len u32  delta u64
//! runs       gpa u64  pages u32  kind u32        each: 0 pages with bytes, 1 zero pages
//! checksums  xxh3 u32                            each page with bytes, in order, as it is in guest memory
//! ```
//! After the payload come `data_len` bytes: the pages in order, encoded as a whole (0 as they are, 1 LZ4 block, 2 Zstandard
//! frame). Bit i of `delta`: page i is the XOR with what was sent for it before; such a frame has at most 64 pages.

use crate::spec::PAGE_SIZE;

/// Runs in one frame, at most.
pub const MAX_RUNS: usize = 256;
/// Pages with bytes in one frame, at most.
pub const MAX_PAGES: usize = 256;
/// Pages in a frame that is encoded, at most: one bit each in `delta`.
pub const MAX_ENCODED_PAGES: usize = 64;
/// Longest payload.
pub const MAX_META: usize = HEAD_LEN + MAX_RUNS * RUN_LEN + MAX_PAGES * CHECKSUM_LEN;

const HEAD_LEN: usize = 24;
const RUN_LEN: usize = 16;
const CHECKSUM_LEN: usize = 4;

/// What a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// Its bytes follow.
    Data = 0,
    /// All zeros.
    Zero = 1,
}

/// Pages that lie one after another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Guest physical address of the first.
    pub gpa: u64,
    /// How many.
    pub pages: u32,
    /// What they are.
    pub kind: RunKind,
}

impl Run {
    /// The address after the last.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.gpa.saturating_add(u64::from(self.pages) * PAGE_SIZE)
    }
}

/// A frame's payload, gathered or parsed. Room is made once and reused.
#[derive(Debug, Default)]
pub struct PageFrame {
    /// How the bytes are encoded, as a whole.
    pub encoding: u8,
    /// Bytes that follow.
    pub data_len: usize,
    /// Pages that are differences.
    pub delta: u64,
    /// Ascending, without overlap.
    pub runs: Vec<Run>,
    /// Of the pages with bytes.
    pub checksums: Vec<u32>,
}

impl PageFrame {
    /// An empty one, with room.
    #[must_use]
    pub fn with_room() -> Self {
        Self {
            runs: Vec::with_capacity(MAX_RUNS),
            checksums: Vec::with_capacity(MAX_PAGES),
            ..Self::default()
        }
    }

    /// Empties it.
    pub fn clear(&mut self) {
        (self.encoding, self.data_len, self.delta) = (0, 0, 0);
        self.runs.clear();
        self.checksums.clear();
    }

    /// Whether another page may not fit.
    #[must_use]
    pub fn is_full(&self, max_pages: usize) -> bool {
        self.runs.len() == MAX_RUNS || self.checksums.len() >= max_pages
    }

    /// Adds one page; `true` if it made the last run longer.
    pub fn add(&mut self, gpa: u64, kind: RunKind) -> bool {
        if let Some(last) = self.runs.last_mut()
            && last.kind == kind
            && last.end() == gpa
        {
            last.pages += 1;
            return true;
        }
        self.runs.push(Run { gpa, pages: 1, kind });
        false
    }

    /// The payload.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let count = |count: usize| u32::try_from(count).expect("bounded").to_le_bytes();
        out.clear();
        out.extend_from_slice(&[self.encoding, 0, 0, 0]);
        out.extend_from_slice(&count(self.runs.len()));
        out.extend_from_slice(&count(self.checksums.len()));
        out.extend_from_slice(&count(self.data_len));
        out.extend_from_slice(&self.delta.to_le_bytes());
        for run in &self.runs {
            out.extend_from_slice(&run.gpa.to_le_bytes());
            out.extend_from_slice(&run.pages.to_le_bytes());
            out.extend_from_slice(&(run.kind as u32).to_le_bytes());
        }
        for checksum in &self.checksums {
            out.extend_from_slice(&checksum.to_le_bytes());
        }
    }

    /// Reads a payload. What it says of addresses is not yet checked against any memory.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(&mut self, payload: &[u8]) -> Result<(), String> {
        self.clear();
        let head = payload
            .get(..HEAD_LEN)
            .ok_or_else(|| format!("length {} is less than its own head", payload.len()))?;
        let number = |at: usize| {
            let bytes = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let (runs, pages, data_len) = (number(4), number(8), number(12));
        if runs > MAX_RUNS || pages > MAX_PAGES {
            return Err(format!(
                "{runs} runs and {pages} pages, and at most {MAX_RUNS} and {MAX_PAGES} go into one frame"
            ));
        }
        if payload.len() != HEAD_LEN + runs * RUN_LEN + pages * CHECKSUM_LEN {
            return Err(format!("{runs} runs and {pages} pages do not fit its length"));
        }
        self.encoding = head[0];
        self.data_len = data_len;
        self.delta = u64::from_le_bytes(head[16..24].try_into().expect("8 bytes"));
        let page_bytes = pages * usize::try_from(PAGE_SIZE).expect("4096");
        let fits = match self.encoding {
            0 if self.delta == 0 => data_len == page_bytes,
            0 => data_len == page_bytes && pages <= MAX_ENCODED_PAGES,
            _ => pages <= MAX_ENCODED_PAGES && data_len <= page_bytes + 1024,
        };
        if !fits {
            return Err(format!(
                "{data_len} bytes, encoding {}, for {pages} pages",
                self.encoding
            ));
        }
        let (run_table, checksums) = payload[HEAD_LEN..].split_at(runs * RUN_LEN);
        let (mut free_from, mut with_bytes) = (0u64, 0usize);
        for run in run_table.chunks_exact(RUN_LEN) {
            let gpa = u64::from_le_bytes(run[..8].try_into().expect("8 bytes"));
            let pages = u32::from_le_bytes(run[8..12].try_into().expect("4 bytes"));
            let kind = match u32::from_le_bytes(run[12..].try_into().expect("4 bytes")) {
                0 => RunKind::Data,
                1 => RunKind::Zero,
                other => return Err(format!("run kind {other} is unknown")),
            };
            let run = Run { gpa, pages, kind };
            if !gpa.is_multiple_of(PAGE_SIZE) || pages == 0 {
                return Err(format!("run of {pages} pages at {gpa:#x} is not guest memory"));
            }
            if gpa < free_from {
                return Err(format!("run at {gpa:#x} overlaps or precedes the run before it"));
            }
            free_from = run.end();
            if kind == RunKind::Data {
                with_bytes = with_bytes.saturating_add(usize::try_from(pages).unwrap_or(usize::MAX));
            }
            self.runs.push(run);
        }
        if with_bytes != pages {
            return Err(format!(
                "its runs have {with_bytes} pages with bytes, its head says {pages}"
            ));
        }
        let checksum = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
        self.checksums
            .extend(checksums.chunks_exact(CHECKSUM_LEN).map(checksum));
        Ok(())
    }
}
