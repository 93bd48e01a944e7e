//! One VM's console log on disk: segments named by the absolute offset of their first byte.
//!
//! The offset of a byte is its place in all that the guest has written since its first boot, wherever it ran. Because
//! a segment's name and length say which bytes it holds, the files alone tell what is stored: a restart needs nothing
//! else to drop what comes twice and to see what is missing.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A new segment begins when one has this many bytes.
pub const SEGMENT_BYTES: u64 = 1 << 20;
/// The oldest segments are dropped when more than this is stored.
pub const KEPT_BYTES: u64 = 16 << 20;
/// Many gaps make many small segments; the oldest are dropped above this number.
const KEPT_SEGMENTS: usize = 256;
/// Bytes that may wait for those before them.
const EARLY_BYTES: usize = 1 << 20;
/// How long they wait until what is before them counts as lost.
const EARLY_WAIT: Duration = Duration::from_secs(3);

/// Part of a log, as it is given to a reader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Absolute offset of the first byte that the piece stands for.
    pub offset: u64,
    /// Where to read on.
    pub next_offset: u64,
    /// Console bytes, or one line that says how many are missing.
    pub data: Vec<u8>,
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    start: u64,
    length: u64,
}

impl Segment {
    fn end(self) -> u64 {
        self.start + self.length
    }
}

/// The log of one VM.
#[derive(Debug)]
pub struct LogFile {
    directory: PathBuf,
    /// Ascending, not overlapping.
    segments: Vec<Segment>,
    /// Bytes that came before their predecessors, by offset.
    early: BTreeMap<u64, Vec<u8>>,
    early_since: Option<Instant>,
}

impl LogFile {
    /// Finds what is stored in `directory`, which need not exist.
    pub fn open(directory: PathBuf) -> io::Result<Self> {
        let mut segments = Vec::new();
        match fs::read_dir(&directory) {
            Ok(entries) => {
                for entry in entries {
                    let entry = entry?;
                    let start = entry.file_name().to_str().and_then(|name| name.parse().ok());
                    if let Some(start) = start {
                        segments.push(Segment {
                            start,
                            length: entry.metadata()?.len(),
                        });
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        segments.sort_by_key(|segment| segment.start);
        Ok(Self {
            directory,
            segments,
            early: BTreeMap::new(),
            early_since: None,
        })
    }

    /// The offset after the last byte stored; all before it may be forgotten by whoever sent it.
    pub fn end(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.end())
    }

    /// Bytes wait for those before them.
    pub fn has_early(&self) -> bool {
        !self.early.is_empty()
    }

    /// Takes bytes from any source in any order: what is stored already is dropped, what comes early waits.
    pub fn append(&mut self, offset: u64, data: &[u8], now: Instant) -> io::Result<()> {
        if data.is_empty() || offset.checked_add(data.len() as u64).is_none() {
            return Ok(());
        }
        if offset > self.end() {
            self.hold(offset, data, now);
            let held: usize = self.early.values().map(Vec::len).sum();
            if held > EARLY_BYTES {
                self.accept_gap()
            } else {
                Ok(())
            }
        } else {
            self.store(offset, data)?;
            self.store_early()
        }
    }

    /// Gives up waiting for bytes that have not come in time. True if something was stored.
    pub fn expire_early(&mut self, now: Instant) -> io::Result<bool> {
        match self.early_since {
            Some(since) if now.duration_since(since) >= EARLY_WAIT => {
                self.accept_gap()?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Reads at most `limit` bytes from an offset. None: nothing there yet.
    pub fn read(&self, from: u64, limit: usize) -> io::Result<Option<Piece>> {
        let index = self.segments.partition_point(|segment| segment.end() <= from);
        let Some(segment) = self.segments.get(index) else {
            return Ok(None);
        };
        if from < segment.start {
            let lost = segment.start - from;
            let data = format!("\n[shoal: {lost} bytes of console output are missing here]\n").into_bytes();
            return Ok(Some(Piece {
                offset: from,
                next_offset: segment.start,
                data,
            }));
        }
        let mut file = fs::File::open(self.path(segment.start))?;
        file.seek(SeekFrom::Start(from - segment.start))?;
        let mut data = Vec::new();
        file.take((segment.end() - from).min(limit as u64))
            .read_to_end(&mut data)?;
        if data.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "console log segment became shorter",
            ));
        }
        Ok(Some(Piece {
            offset: from,
            next_offset: from + data.len() as u64,
            data,
        }))
    }

    fn path(&self, start: u64) -> PathBuf {
        self.directory.join(format!("{start:020}"))
    }

    fn hold(&mut self, offset: u64, data: &[u8], now: Instant) {
        let held = self.early.entry(offset).or_default();
        if held.len() < data.len() {
            *held = data.to_vec();
        }
        self.early_since.get_or_insert(now);
    }

    /// Gives up waiting for whatever has not come.
    pub fn accept_gaps(&mut self) -> io::Result<()> {
        while self.has_early() {
            self.accept_gap()?;
        }
        Ok(())
    }

    /// What is before the first early byte is lost: goes on after it.
    fn accept_gap(&mut self) -> io::Result<()> {
        if let Some((&offset, _)) = self.early.first_key_value() {
            self.create_segment(offset)?;
            self.store_early()?;
        }
        Ok(())
    }

    /// Stores the early bytes whose predecessors have come.
    fn store_early(&mut self) -> io::Result<()> {
        let mut end = self.end();
        while let Some(entry) = self.early.first_entry() {
            if *entry.key() > end {
                break;
            }
            let (offset, data) = entry.remove_entry();
            self.store(offset, &data)?;
            end = self.end();
        }
        if self.early.is_empty() {
            self.early_since = None;
        }
        Ok(())
    }

    /// Stores bytes that begin at or before the end.
    fn store(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let known = usize::try_from(self.end() - offset).unwrap_or(usize::MAX);
        let Some(mut fresh) = data.get(known..).filter(|fresh| !fresh.is_empty()) else {
            return Ok(());
        };
        while !fresh.is_empty() {
            let segment = match self.segments.last().copied() {
                Some(segment) if segment.length < SEGMENT_BYTES => segment,
                _ => self.create_segment(self.end())?,
            };
            let room = usize::try_from(SEGMENT_BYTES - segment.length).unwrap_or(usize::MAX);
            let (now, later) = fresh.split_at(fresh.len().min(room));
            append_to(&self.path(segment.start), segment.length, now)?;
            if let Some(last) = self.segments.last_mut() {
                last.length += now.len() as u64;
            }
            fresh = later;
        }
        self.drop_oldest()
    }

    fn create_segment(&mut self, start: u64) -> io::Result<Segment> {
        let first = !self.directory.exists();
        fs::create_dir_all(&self.directory)?;
        let segment = Segment { start, length: 0 };
        fs::File::create(self.path(start))?;
        // The names are to last, too.
        fs::File::open(&self.directory)?.sync_all()?;
        if let Some(above) = self.directory.parent().filter(|_| first) {
            fs::File::open(above)?.sync_all()?;
        }
        self.segments.push(segment);
        Ok(segment)
    }

    fn drop_oldest(&mut self) -> io::Result<()> {
        let mut stored: u64 = self.segments.iter().map(|segment| segment.length).sum();
        while self.segments.len() > 1 && (stored > KEPT_BYTES || self.segments.len() > KEPT_SEGMENTS) {
            let oldest = self.segments.remove(0);
            stored -= oldest.length;
            fs::remove_file(self.path(oldest.start))?;
        }
        Ok(())
    }
}

/// Appends at a known length, so that the rest of a write that failed half-way is overwritten by the next. The bytes are on
/// the disk when this returns.
fn append_to(path: &Path, length: u64, data: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).open(path)?;
    file.seek(SeekFrom::Start(length))?;
    file.write_all(data)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn log() -> (tempfile::TempDir, LogFile) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let log = LogFile::open(directory.path().join("log")).expect("empty log");
        (directory, log)
    }

    fn text(log: &LogFile) -> Vec<u8> {
        let mut all = Vec::new();
        let mut from = 0;
        while let Some(piece) = log.read(from, 7).expect("readable") {
            from = piece.next_offset;
            all.extend(piece.data);
        }
        all
    }

    #[test]
    fn repeated_bytes_are_stored_once() {
        let (_directory, mut log) = log();
        let now = Instant::now();
        for (offset, data) in [
            (0, &b"hello "[..]),
            (0, b"hello "),
            (3, b"lo world"),
            (11, b""),
            (0, b"hello world"),
        ] {
            log.append(offset, data, now).expect("stored");
        }
        assert_eq!(text(&log), b"hello world");
        assert_eq!(log.end(), 11);
    }

    #[test]
    fn early_bytes_wait_and_then_a_gap_is_marked() {
        let (directory, mut log) = log();
        let now = Instant::now();
        log.append(0, b"one ", now).expect("stored");
        log.append(8, b"three", now).expect("held");
        assert_eq!(log.end(), 4);
        assert!(!log.expire_early(now + Duration::from_secs(1)).expect("too early"));
        log.append(4, b"two ", now).expect("stored");
        assert_eq!(text(&log), b"one two three");

        log.append(20, b"late", now).expect("held");
        assert!(log.expire_early(now + EARLY_WAIT).expect("expired"));
        let expected = b"one two three\n[shoal: 7 bytes of console output are missing here]\nlate";
        assert_eq!(text(&log), expected);

        let again = LogFile::open(directory.path().join("log")).expect("reopened");
        assert_eq!(text(&again), expected);
        assert_eq!(again.end(), 24);
    }

    #[test]
    fn early_bytes_are_bounded() {
        let (_directory, mut log) = log();
        let now = Instant::now();
        let chunk = vec![b'x'; 64 << 10];
        for index in 0..64u64 {
            log.append(10 + index * chunk.len() as u64, &chunk, now)
                .expect("held or stored");
            assert!(log.early.values().map(Vec::len).sum::<usize>() <= EARLY_BYTES);
        }
        assert!(log.end() > 10, "the gap was accepted");
    }

    #[test]
    fn the_newest_bytes_are_kept() {
        let (directory, mut log) = log();
        let now = Instant::now();
        let chunk = vec![b'y'; 1 << 20];
        for index in 0..20u64 {
            log.append(index << 20, &chunk, now).expect("stored");
        }
        assert_eq!(log.end(), 20 << 20);
        assert_eq!(
            fs::read_dir(directory.path().join("log"))
                .expect("directory")
                .count(),
            16
        );
        let first = log.read(0, 100).expect("readable").expect("marker");
        assert_eq!(first.next_offset, 4 << 20);
        assert!(String::from_utf8_lossy(&first.data).contains("4194304 bytes"));
    }

    #[test]
    fn absurd_offsets_are_ignored() {
        let (_directory, mut log) = log();
        log.append(u64::MAX, b"xy", Instant::now()).expect("ignored");
        assert!(!log.has_early());
        assert_eq!(log.end(), 0);
    }

    /// Cuts `stream[from..to]` into chunks at `cuts`.
    fn chunks(stream: &[u8], from: usize, to: usize, cuts: &[usize]) -> Vec<(u64, Vec<u8>)> {
        let mut points: Vec<usize> = cuts.iter().map(|cut| from + cut % (to - from).max(1)).collect();
        points.extend([from, to]);
        points.sort_unstable();
        points
            .windows(2)
            .map(|pair| (pair[0] as u64, stream[pair[0]..pair[1]].to_vec()))
            .collect()
    }

    proptest! {
        /// A source that stops anywhere and a destination that repeats some of it, interleaved in any way.
        #[test]
        fn two_sources_give_the_stream_once_and_in_order(
            stream in proptest::collection::vec(any::<u8>(), 1..400),
            stop in any::<prop::sample::Index>(),
            resume in any::<prop::sample::Index>(),
            source_cuts in proptest::collection::vec(any::<usize>(), 0..6),
            destination_cuts in proptest::collection::vec(any::<usize>(), 0..6),
            order in proptest::collection::vec(any::<bool>(), 0..20),
        ) {
            let stop = stop.index(stream.len() + 1);
            let resume = resume.index(stop + 1);
            let mut source = chunks(&stream, 0, stop, &source_cuts).into_iter();
            let mut destination = chunks(&stream, resume, stream.len(), &destination_cuts).into_iter();
            let (_directory, mut log) = log();
            let now = Instant::now();
            for from_source in order {
                let next = if from_source { source.next() } else { destination.next() };
                if let Some((offset, data)) = next {
                    log.append(offset, &data, now).expect("stored");
                }
            }
            for (offset, data) in source.chain(destination) {
                log.append(offset, &data, now).expect("stored");
            }
            prop_assert_eq!(text(&log), stream);
        }
    }
}
