//! TCP connections through the harness, which can be cut, silenced, damaged and recorded.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

const BUFFER: usize = 64 << 10;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Towards {
    /// From whoever connected to the target.
    Destination,
    /// Back.
    Source,
}

/// What happens on the way. Bytes are counted from 0, over all connections of that direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    None,
    /// All connections are closed once so many bytes went to the destination; new ones too.
    CutAfter(u64),
    /// Nothing more goes either way once so many bytes went to the destination; nothing is closed.
    SilenceAfter(u64),
    /// Nothing more goes that way; the other way all is as before, and nothing is closed.
    SilenceTowards(Towards),
    /// One bit of this byte is flipped.
    Corrupt(Towards, u64),
    /// All connections are closed, and no new one is let through, once so much of a frame has gone over the control connection.
    /// The protocol is taken to be plain, and of version 2.
    CutAtFrame(ControlFrame, Part),
}

/// A frame of the control connection, the first of its kind that goes that way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlFrame {
    /// Its number in the protocol.
    pub kind: u8,
    /// Which way it goes.
    pub towards: Towards,
}

/// How much of a frame goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// None of it.
    Nothing,
    /// So many bytes, fewer than it has.
    Bytes(u64),
    /// All but the last byte.
    AllButOne,
    /// All of it, and nothing after it.
    Whole,
}

impl Part {
    fn of(self, length: u64) -> u64 {
        match self {
            Part::Nothing => 0,
            Part::Bytes(bytes) => {
                assert!(
                    bytes < length,
                    "a frame of {length} bytes has no {bytes} and more"
                );
                bytes
            }
            Part::AllButOne => length - 1,
            Part::Whole => length,
        }
    }
}

impl Trouble {
    /// Whether what would go that way is held back, after so many bytes.
    fn silences(self, towards: Towards, passed: u64) -> bool {
        match self {
            Trouble::SilenceAfter(limit) => passed >= limit,
            Trouble::SilenceTowards(way) => way == towards,
            Trouble::None | Trouble::CutAfter(_) | Trouble::Corrupt(..) | Trouble::CutAtFrame(..) => false,
        }
    }
}

/// What went through one connection.
#[derive(Debug, Clone, Default)]
pub struct Recording {
    /// From whoever connected.
    pub to_destination: Vec<u8>,
    /// From the target.
    pub to_source: Vec<u8>,
}

#[derive(Debug)]
struct State {
    trouble: Trouble,
    to_destination: u64,
    to_source: u64,
    streams: Vec<TcpStream>,
    recordings: Option<Vec<Recording>>,
    ended: bool,
    /// The trouble was a cut at a frame, and that has come.
    frame_came: bool,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    ended: Condvar,
}

/// Passes every connection on to a target.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Listens on loopback.
    #[must_use]
    pub fn start(target: SocketAddr, trouble: Trouble) -> Self {
        Self::new(target, trouble, None)
    }

    /// As [`Proxy::start`], and keeps what goes through.
    #[must_use]
    pub fn recording(target: SocketAddr) -> Self {
        Self::new(target, Trouble::None, Some(Vec::new()))
    }

    fn new(target: SocketAddr, trouble: Trouble, recordings: Option<Vec<Recording>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                trouble,
                to_destination: 0,
                to_source: 0,
                streams: Vec::new(),
                recordings,
                ended: false,
                frame_came: false,
            }),
            ended: Condvar::new(),
        });
        let for_thread = Arc::clone(&shared);
        thread::spawn(move || accept(&listener, target, &for_thread));
        Self { address, shared }
    }

    /// Where to connect instead of the target.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that went that way so far.
    #[must_use]
    pub fn passed(&self, towards: Towards) -> u64 {
        let state = self.shared.lock();
        match towards {
            Towards::Destination => state.to_destination,
            Towards::Source => state.to_source,
        }
    }

    /// Whether the frame has come at which the connections were to be cut.
    #[must_use]
    pub fn frame_came(&self) -> bool {
        self.shared.lock().frame_came
    }

    /// Lets new connections through from now on.
    pub fn heal(&self) {
        self.shared.lock().trouble = Trouble::None;
    }

    /// Cuts all connections now; new ones too, until [`Proxy::heal`].
    pub fn cut(&self) {
        let mut state = self.shared.lock();
        state.trouble = Trouble::CutAfter(0);
        state.close_all();
    }

    /// From now on nothing goes that way on the connections that there are; new ones too, until [`Proxy::heal`].
    pub fn silence(&self, towards: Towards) {
        self.shared.lock().trouble = Trouble::SilenceTowards(towards);
    }

    /// From now on nothing goes either way; new connections too, until [`Proxy::heal`].
    pub fn silence_both(&self) {
        self.shared.lock().trouble = Trouble::SilenceAfter(0);
    }

    /// Flips one bit of the next byte that goes that way.
    pub fn corrupt_next(&self, towards: Towards) {
        let mut state = self.shared.lock();
        let at = match towards {
            Towards::Destination => state.to_destination,
            Towards::Source => state.to_source,
        };
        state.trouble = Trouble::Corrupt(towards, at);
    }

    /// What went through so far, by connection, in the order in which they were made.
    #[must_use]
    pub fn recorded(&self) -> Vec<Recording> {
        self.shared.lock().recordings.clone().unwrap_or_default()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ended = true;
        state.close_all();
        self.shared.ended.notify_all();
        drop(state);
        drop(TcpStream::connect(self.address)); // wakes the thread that accepts; it may have ended
    }
}

impl State {
    fn close_all(&mut self) {
        for stream in self.streams.drain(..) {
            drop(stream.shutdown(Shutdown::Both)); // it may be closed already
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic elsewhere")
    }
}

fn accept(listener: &TcpListener, target: SocketAddr, shared: &Arc<Shared>) {
    for source in listener.incoming() {
        let mut state = shared.lock();
        if state.ended {
            return;
        }
        let cut = matches!(state.trouble, Trouble::CutAfter(limit) if state.to_destination >= limit);
        let Some(source) = source.ok().filter(|_| !cut) else {
            continue;
        };
        let Ok(destination) = TcpStream::connect(target) else {
            continue;
        };
        let clone = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
        for stream in [&source, &destination] {
            drop(stream.set_nodelay(true)); // a socket that has gone is noticed below
            state.streams.push(clone(stream));
        }
        let number = state.recordings.as_mut().map(|recordings| {
            recordings.push(Recording::default());
            recordings.len() - 1
        });
        drop(state);
        for (from, to, towards) in [
            (clone(&source), clone(&destination), Towards::Destination),
            (destination, source, Towards::Source),
        ] {
            let shared = Arc::clone(shared);
            let frames = Frames::new(towards);
            thread::spawn(move || relay(from, to, frames, number, &shared));
        }
    }
}

/// Finds frames in what goes one way over one connection.
struct Frames {
    towards: Towards,
    /// Of the preamble or frame at hand, what has come of its first bytes.
    head: Vec<u8>,
    /// Where that began, and what came is to be cut if anywhere, in bytes since the beginning.
    began: u64,
    cut_at: Option<u64>,
    passed: u64,
    /// Where the next frame begins, if not at once.
    next: u64,
    preamble_due: bool,
    /// Frames are looked for. Not in pages, which are more than frames.
    looks: bool,
}

/// Bytes of a preamble, and of a frame's header.
const HEAD: usize = 16;

impl Frames {
    fn new(towards: Towards) -> Self {
        Self {
            towards,
            head: vec![],
            began: 0,
            cut_at: None,
            passed: 0,
            next: 0,
            preamble_due: towards == Towards::Destination,
            looks: true,
        }
    }

    /// Whether these bytes, which come next, are to be cut, and after how many.
    fn cut(&mut self, bytes: &[u8], wanted: ControlFrame, part: Part) -> Option<u64> {
        let (start, end) = (self.passed, self.passed + bytes.len() as u64);
        self.passed = end;
        while self.looks && self.cut_at.is_none() && self.next < end {
            let at = usize::try_from(self.next.saturating_sub(start)).expect("within the buffer");
            if self.head.is_empty() {
                self.began = start + at as u64;
            }
            let missing = HEAD - self.head.len();
            self.head.extend(bytes[at..].iter().take(missing));
            if self.head.len() < HEAD {
                break;
            }
            let head = std::mem::take(&mut self.head);
            self.next = self.began + HEAD as u64;
            if std::mem::take(&mut self.preamble_due) {
                self.looks = head[10..12] == [0, 0];
                continue;
            }
            let length = u32::from_le_bytes(head[4..8].try_into().expect("4 bytes"));
            self.next += u64::from(length);
            if head[0] == wanted.kind && wanted.towards == self.towards {
                self.cut_at = Some(self.began + part.of(self.next - self.began));
            }
        }
        let cut_at = self.cut_at.filter(|&at| at <= end)?;
        Some(cut_at.checked_sub(start).expect("a frame's header in one piece"))
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, mut frames: Frames, number: Option<usize>, shared: &Shared) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let bytes = &mut buffer[..length];
        match pass(bytes, &mut frames, number, shared) {
            Passed::All => {
                if to.write_all(bytes).is_err() {
                    break;
                }
            }
            Passed::Last(allowed) => {
                drop(to.write_all(&bytes[..allowed])); // what follows is the end anyway
                shared.lock().close_all();
                return;
            }
            Passed::Nothing => return,
        }
    }
    // Only this way: what the other still has to bring, such as the last words of a process that died, arrives.
    drop(to.shutdown(Shutdown::Write)); // it may be closed already
    drop(from.shutdown(Shutdown::Read));
}

/// What of some bytes goes on.
enum Passed {
    All,
    /// So many, and then all connections are closed.
    Last(usize),
    /// None, and nobody closes anything here.
    Nothing,
}

/// Counts, damages and records bytes. Returns at the end of a silence.
fn pass(bytes: &mut [u8], frames: &mut Frames, number: Option<usize>, shared: &Shared) -> Passed {
    let (length, towards) = (bytes.len() as u64, frames.towards);
    let mut state = shared.lock();
    if state.frame_came {
        return Passed::Nothing;
    }
    let start = match towards {
        Towards::Destination => state.to_destination,
        Towards::Source => state.to_source,
    };
    let mut allowed = length;
    match state.trouble {
        Trouble::CutAfter(limit) if towards == Towards::Destination => {
            allowed = length.min(limit.saturating_sub(start));
        }
        Trouble::CutAtFrame(frame, part) => {
            if let Some(cut) = frames.cut(bytes, frame, part) {
                allowed = cut;
                state.frame_came = true;
                state.trouble = Trouble::CutAfter(0);
            }
        }
        trouble if trouble.silences(towards, state.to_destination.max(start)) => {
            let ended = |state: &mut State| !state.ended;
            drop(shared.ended.wait_while(state, ended).expect("no panic elsewhere"));
            return Passed::Nothing;
        }
        Trouble::Corrupt(way, at) if way == towards && (start..start + length).contains(&at) => {
            bytes[usize::try_from(at - start).expect("within the buffer")] ^= 0x10;
        }
        _ => {}
    }
    match towards {
        Towards::Destination => state.to_destination += allowed,
        Towards::Source => state.to_source += allowed,
    }
    let cut = allowed < length || state.frame_came;
    let allowed = usize::try_from(allowed).expect("at most a buffer");
    if let (Some(number), Some(recordings)) = (number, &mut state.recordings) {
        let recording = &mut recordings[number];
        match towards {
            Towards::Destination => recording.to_destination.extend_from_slice(&bytes[..allowed]),
            Towards::Source => recording.to_source.extend_from_slice(&bytes[..allowed]),
        }
    }
    if cut { Passed::Last(allowed) } else { Passed::All }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: ControlFrame = ControlFrame {
        kind: 8,
        towards: Towards::Destination,
    };

    fn frame(kind: u8, payload: u8) -> Vec<u8> {
        let mut bytes = vec![0; HEAD + usize::from(payload)];
        (bytes[0], bytes[4]) = (kind, payload);
        bytes
    }

    #[test]
    fn a_frame_is_found_wherever_its_bytes_begin() {
        let stream = [vec![0; HEAD], frame(1, 200), frame(14, 0), frame(8, 20)].concat();
        let begins = (stream.len() - 36) as u64;
        for (part, of_frame) in [
            (Part::Nothing, 0),
            (Part::Bytes(17), 17),
            (Part::AllButOne, 35),
            (Part::Whole, 36),
        ] {
            // All at once, and cut into pieces, the last of which begins with the frame.
            let whole = Frames::new(Towards::Destination).cut(&stream, COMMIT, part);
            assert_eq!(whole, Some(begins + of_frame));
            let mut frames = Frames::new(Towards::Destination);
            let (before, last) = stream.split_at(stream.len() - 36);
            for piece in before.chunks(7) {
                assert_eq!(frames.cut(piece, COMMIT, part), None);
            }
            assert_eq!(frames.cut(last, COMMIT, part), Some(of_frame));
        }
        let mut data = stream;
        data[10] = 1;
        let found = Frames::new(Towards::Destination).cut(&data, COMMIT, Part::Whole);
        assert_eq!(found, None, "not the control connection");
    }
}
