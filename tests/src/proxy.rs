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
}

impl Trouble {
    /// Whether what would go that way is held back, after so many bytes.
    fn silences(self, towards: Towards, passed: u64) -> bool {
        match self {
            Trouble::SilenceAfter(limit) => passed >= limit,
            Trouble::SilenceTowards(way) => way == towards,
            Trouble::None | Trouble::CutAfter(_) | Trouble::Corrupt(..) => false,
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
            thread::spawn(move || relay(from, to, towards, number, &shared));
        }
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, towards: Towards, number: Option<usize>, shared: &Shared) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let bytes = &mut buffer[..length];
        match pass(bytes, towards, number, shared) {
            Some(allowed) if allowed == length => {
                if to.write_all(bytes).is_err() {
                    break;
                }
            }
            Some(allowed) => {
                drop(to.write_all(&bytes[..allowed])); // what follows is the end anyway
                shared.lock().close_all();
                return;
            }
            None => return,
        }
    }
    // Only this way: what the other still has to bring, such as the last words of a process that died, arrives.
    drop(to.shutdown(Shutdown::Write)); // it may be closed already
    drop(from.shutdown(Shutdown::Read));
}

/// Counts, damages and records bytes; answers how many may go on before the cut. `None` at the end of a silence.
fn pass(bytes: &mut [u8], towards: Towards, number: Option<usize>, shared: &Shared) -> Option<usize> {
    let length = bytes.len() as u64;
    let mut state = shared.lock();
    let start = match towards {
        Towards::Destination => state.to_destination,
        Towards::Source => state.to_source,
    };
    let mut allowed = length;
    match state.trouble {
        Trouble::CutAfter(limit) if towards == Towards::Destination => {
            allowed = length.min(limit.saturating_sub(start));
        }
        trouble if trouble.silences(towards, state.to_destination.max(start)) => {
            let ended = |state: &mut State| !state.ended;
            drop(shared.ended.wait_while(state, ended).expect("no panic elsewhere"));
            return None;
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
    let allowed = usize::try_from(allowed).expect("at most a buffer");
    if let (Some(number), Some(recordings)) = (number, &mut state.recordings) {
        let recording = &mut recordings[number];
        match towards {
            Towards::Destination => recording.to_destination.extend_from_slice(&bytes[..allowed]),
            Towards::Source => recording.to_source.extend_from_slice(&bytes[..allowed]),
        }
    }
    Some(allowed)
}
