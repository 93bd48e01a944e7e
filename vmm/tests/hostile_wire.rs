//! Either side of a migration reads what a hostile peer may send: valid streams, changed in every way that comes to mind
//! and with checksums made right again, so that what lies behind them is reached. Nothing may panic, nor take much memory.
//! The same entry points as the targets in `fuzz/`, with so many cases as fit an ordinary test run.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use prost::Message;
use shoal_proto::vm::Compression;
use shoal_vmm::fuzz;
use shoal_vmm::memory::GuestMemory;
use shoal_vmm::migration::codec::DeltaCache;
use shoal_vmm::migration::pages::{PageSender, Resent};
use shoal_vmm::migration::wire::{
    Abort, Attach, Connection, Digest, FrameKind, Hello, HelloAck, Pass, PassAck, Role, Step, WireError,
};
use vm_memory::{Bytes as _, GuestAddress};

const CASES: u32 = 20_000;
const HEADER_LEN: usize = 16;
/// What one stream may make a reader allocate, at most: its largest frame and some.
const MOST_MEMORY: usize = 40 << 20;

/// Counts what is allocated and not yet freed.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator, as it came; counting touches none of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's layout.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's pointer, which came from `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next()).expect("64 bits") % end.max(1)
    }
}

/// A frame, and the bytes that follow it outside its checksum.
#[derive(Clone)]
struct Frame {
    kind: FrameKind,
    payload: Vec<u8>,
    after: Vec<u8>,
}

fn frame(kind: FrameKind, message: &impl Message) -> Frame {
    Frame {
        kind,
        payload: message.encode_to_vec(),
        after: vec![],
    }
}

/// With right lengths, sequence numbers and checksums.
fn encode(preamble: &[u8], frames: &[Frame]) -> Vec<u8> {
    let mut bytes = preamble.to_vec();
    let mut connection = Connection::new(Cursor::new(vec![]));
    let mut written = 0;
    for frame in frames {
        // A payload over the limit of its kind is no frame; a shorter one is.
        let length = frame.payload.len().min(frame.kind.max_len());
        connection
            .send_parts(frame.kind, &frame.payload[..length], &[])
            .expect("within the limit");
        let all = connection.stream().get_ref();
        bytes.extend_from_slice(&all[written..]);
        written = all.len();
        bytes.extend_from_slice(&frame.after);
    }
    bytes
}

fn preamble(role: Role) -> Vec<u8> {
    let mut connection = Connection::new(Cursor::new(vec![]));
    connection.send_preamble(role).expect("memory");
    connection.stream().get_ref().clone()
}

/// The recorded migration of protocol 1.
fn protocol_1() -> (Vec<u8>, Vec<Frame>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/migration-v1/stream.zst");
    let compressed = std::fs::read(path).expect("the recording");
    let mut stream = zstd::bulk::decompress(&compressed, 1 << 20).expect("zstd");
    let rest = stream.split_off(16);
    let kinds = [
        FrameKind::Hello,
        FrameKind::Pages,
        FrameKind::PassEnd,
        FrameKind::State,
        FrameKind::Commit,
    ];
    let mut frames = vec![];
    let mut rest = rest.as_slice();
    while let Some((header, after)) = rest.split_at_checked(HEADER_LEN) {
        let kind = kinds.into_iter().find(|&kind| kind as u8 == header[0]);
        let length = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        let (payload, after) = after.split_at(usize::try_from(length).expect("64 bits"));
        frames.push(Frame {
            kind: kind.expect("a kind that a source of protocol 1 sends"),
            payload: payload.to_vec(),
            after: vec![],
        });
        rest = after;
    }
    (stream, frames)
}

/// A data connection of protocol 2 with pages of every encoding.
fn data_connection(compression: Compression) -> Vec<Frame> {
    let memory = GuestMemory::new(fuzz::MEMORY).expect("map");
    let mut dice = Dice(99);
    for page in 0..64u64 {
        let bytes: Vec<u8> = match page % 4 {
            0 => (0..4096).map(|_| dice.next().to_le_bytes()[0]).collect(),
            1 => vec![0; 4096],
            _ => b"so it goes, again ".iter().copied().cycle().take(4096).collect(),
        };
        memory
            .mmap()
            .write_slice(&bytes, GuestAddress((page + page / 9) * 4096))
            .expect("inside");
    }
    let mut out = Connection::new(fuzz::Sink::default());
    let mut sender = PageSender::new(&memory, compression, Arc::new(DeltaCache::new(1 << 20)));
    let region = memory.regions()[0];
    let mut go_on = |_| Ok::<_, WireError>(());
    for resent in [Resent::No, Resent::Yes] {
        sender
            .send(&mut out, &region, 0, &[u64::MAX; 2], resent, &mut go_on)
            .expect("memory");
        sender.flush(&mut out, &mut go_on).expect("memory");
    }
    let stream = &out.stream().0;
    let at: Vec<usize> = starts(stream);
    let mut frames = vec![frame(FrameKind::Attach, &Attach::default())];
    for (index, &start) in at.iter().enumerate() {
        let end = at.get(index + 1).copied().unwrap_or(stream.len());
        let length = u32::from_le_bytes(stream[start + 4..start + 8].try_into().expect("4 bytes"));
        let body = start + HEADER_LEN + usize::try_from(length).expect("64 bits");
        frames.push(Frame {
            kind: FrameKind::PageRuns,
            payload: stream[start + HEADER_LEN..body].to_vec(),
            after: stream[body..end].to_vec(),
        });
    }
    let pass = Pass {
        pass: 1,
        pages: 64,
        last: true,
    };
    frames.push(frame(FrameKind::PassEnd, &pass));
    frames
}

/// Where the frames of a stream of page runs begin: each says its own kind, sequence and length in its header.
fn starts(stream: &[u8]) -> Vec<usize> {
    let mut found: Vec<usize> = vec![];
    for at in 0..stream.len().saturating_sub(HEADER_LEN) {
        let sequence = u32::try_from(found.len()).expect("few").to_le_bytes();
        if stream[at..at + 4] == [FrameKind::PageRuns as u8, 0, 0, 0]
            && stream[at + 8..at + 12] == sequence
            && found.last().is_none_or(|&last| at >= last + HEADER_LEN)
        {
            found.push(at);
        }
    }
    found
}

fn control_connection(state: Vec<u8>) -> Vec<Frame> {
    vec![
        frame(FrameKind::Hello, &Hello::default()),
        frame(FrameKind::PassEnd, &Pass::default()),
        frame(FrameKind::Verify, &Digest::default()),
        frame(
            FrameKind::Digest,
            &Digest {
                digest: vec![7; 64],
                ..Digest::default()
            },
        ),
        Frame {
            kind: FrameKind::State,
            payload: state,
            after: vec![],
        },
        frame(FrameKind::Commit, &Step::default()),
        frame(FrameKind::Abort, &Abort::because("no")),
    ]
}

fn answers() -> Vec<Frame> {
    let ack = PassAck {
        pass: 1,
        pages: 64,
        damaged: vec![4096, 8192],
    };
    vec![
        frame(
            FrameKind::HelloAck,
            &HelloAck {
                version: 2,
                ..HelloAck::default()
            },
        ),
        frame(FrameKind::PassAck, &ack),
        frame(FrameKind::Ready, &Step::default()),
        frame(FrameKind::Running, &Step::default()),
        frame(FrameKind::Abort, &Abort::because("no")),
    ]
}

/// Changes some bytes, as a number, a length or a field might be changed.
fn damage(bytes: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..=dice.below(3) {
        let at = dice.below(bytes.len());
        match dice.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << dice.below(8),
            1 if !bytes.is_empty() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.below(5)],
            2 if bytes.len() > 8 => {
                let at = at.min(bytes.len() - 8);
                let extreme = [0, 1, u64::MAX, 1 << 63, 4095, 4096, u64::from(u32::MAX)][dice.below(7)];
                bytes[at..at + 8].copy_from_slice(&extreme.to_le_bytes());
            }
            3 => bytes.truncate(at),
            4 => bytes.extend(std::iter::repeat_n(0xff, dice.below(64))),
            5 if bytes.len() > 4 => {
                let end = (at + dice.below(64)).min(bytes.len());
                let copied = bytes[at..end].to_vec();
                bytes.splice(at..at, copied);
            }
            _ => {}
        }
    }
}

fn mutate(preamble: &[u8], frames: &[Frame], dice: &mut Dice) -> Vec<u8> {
    let mut frames = frames.to_vec();
    let at = dice.below(frames.len());
    match dice.below(10) {
        0 => {
            let copied = frames[at].clone();
            frames.insert(dice.below(frames.len()), copied);
        }
        1 => drop(frames.remove(at)),
        2 => {
            let other = dice.below(frames.len());
            frames.swap(at, other);
        }
        3 => damage(&mut frames[at].after, dice),
        _ => damage(&mut frames[at].payload, dice),
    }
    let mut bytes = encode(preamble, &frames);
    // Now and then what is below the frames, too.
    if dice.below(4) == 0 {
        damage(&mut bytes, dice);
    }
    bytes
}

#[test]
fn hostile_bytes_neither_panic_nor_take_much_memory() {
    let memory = GuestMemory::new(fuzz::MEMORY).expect("map");
    let (first, old) = protocol_1();
    let state = old.iter().find(|frame| frame.kind == FrameKind::State);
    let state = state.expect("a state in the recording").payload.clone();
    let mut streams = vec![(first, old), (preamble(Role::Control), control_connection(state))];
    for compression in [Compression::Off, Compression::Lz4, Compression::Zstd] {
        streams.push((preamble(Role::Data), data_connection(compression)));
    }
    for (preamble, frames) in &streams {
        let whole = encode(preamble, frames);
        let taken = fuzz::destination_reads(&whole, &memory);
        assert_eq!(
            taken,
            frames.len(),
            "a stream that nobody touched is read to its end"
        );
    }
    assert_eq!(
        fuzz::source_reads(&encode(&[], &answers()), &memory),
        answers().len()
    );

    let mut dice = Dice(0x5eed);
    let mut refused = 0;
    for case in 0..CASES {
        let (preamble, frames) = &streams[dice.below(streams.len())];
        let bytes = mutate(preamble, frames, &mut dice);
        let answer = mutate(&[], &answers(), &mut dice);
        let live = LIVE.load(Ordering::Relaxed);
        PEAK.store(live, Ordering::Relaxed);
        let taken = fuzz::destination_reads(&bytes, &memory);
        fuzz::source_reads(&answer, &memory);
        refused += u32::from(taken < frames.len());
        let used = PEAK.load(Ordering::Relaxed) - live;
        assert!(
            used <= MOST_MEMORY,
            "case {case} made a reader allocate {used} bytes"
        );
    }
    // What was done to the streams must matter, or none of this was a test.
    assert!(refused > CASES / 4, "only {refused} of {CASES} were refused");
}
