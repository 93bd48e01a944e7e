//! The source in post-copy: a page server over a VM that stays paused. Nothing that happens here gives up its memory.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;

use super::super::pacer::Pacer;
use super::super::wire::{Abort, Connection, FrameKind, WireError};
use super::frames::{self, MAX_PAGES, PageFrame, Status};
use super::page_set::PageSet;
use super::{Closer, Links, RECONNECT_EVERY, Stream, close_all, expect_frame};
use crate::memory::{GuestMemory, Region};

/// Around a page that is waited for, the pages of this aligned window that have not been sent go with it.
pub const PREFETCH_PAGES: u64 = 16;
/// Pages of the background stream in one frame: a fault must not wait long behind them.
const BATCH_PAGES: usize = 32;
/// Faults this close, one after another, are a sweep through memory: the background stream goes ahead of it, so far.
const SWEEP_STEP: u64 = 64;
const SWEEP_AHEAD: u64 = 512;

const _: () = assert!(BATCH_PAGES <= MAX_PAGES);

/// Holds what is sent to a bandwidth.
pub trait Pace: Sync {
    /// Returns when `bytes` of the background stream may be sent, or when `is_over` says so.
    fn wait(&self, bytes: usize, is_over: &dyn Fn() -> bool);

    /// Whether `bytes` that nobody asked for may be sent now. They count only then.
    fn may_send_now(&self, bytes: usize) -> bool;

    /// Counts `bytes` that a guest waits for, and that are sent whether or not they may be.
    fn owe(&self, bytes: usize);
}

impl Pace for Pacer {
    fn wait(&self, bytes: usize, is_over: &dyn Fn() -> bool) {
        // Over: whoever asked looks for itself.
        let _ = self.take(bytes, || if is_over() { Err(()) } else { Ok(()) });
    }

    fn may_send_now(&self, bytes: usize) -> bool {
        self.try_take(bytes).is_ok()
    }

    fn owe(&self, bytes: usize) {
        self.charge(bytes);
    }
}

type Body<'scope> = Box<dyn FnOnce(&Session) -> Result<(), WireError> + Send + 'scope>;

/// So many errors in a row that cannot pass are believed: a link that damages data may make one look so.
pub const BELIEVED_AFTER: u32 = 10;

/// Why there is no new set of connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotConnected {
    /// In words.
    pub why: String,
    /// It may be otherwise the next time.
    pub can_pass: bool,
}

impl From<WireError> for NotConnected {
    fn from(error: WireError) -> Self {
        Self {
            can_pass: error.can_pass(),
            why: error.to_string(),
        }
    }
}

/// Errors in a row that cannot pass.
#[derive(Debug, Default)]
struct Hopeless(u32);

impl Hopeless {
    fn is_certain(&self) -> bool {
        self.0 >= BELIEVED_AFTER
    }

    /// Counts an error; says what is to be said of it.
    fn note(&mut self, error: NotConnected) -> String {
        let NotConnected { why, can_pass } = error;
        self.0 = if can_pass { 0 } else { self.0 + 1 };
        if self.is_certain() {
            format!(
                "{why}; that does not pass, so it is not tried again, and the memory is kept until the VM is stopped"
            )
        } else {
            why
        }
    }
}

/// What is heard of post-copy at the source.
#[derive(Debug)]
pub enum Heard<'a> {
    /// How it goes at the destination.
    Status(&'a Status),
    /// There is no connection, and why.
    LinkLost(&'a str),
    /// There is one again.
    Recovered,
}

/// Serves the memory of a paused VM.
#[derive(Debug)]
pub struct PageServer<'m> {
    memory: &'m GuestMemory,
    regions: Vec<Region>,
    /// What the destination lacks and nobody has taken to send.
    unsent: PageSet,
    /// Where to begin, hottest first.
    hot: Vec<PageSet>,
    cursor: Mutex<Cursor>,
    sent: AtomicU64,
    bytes: AtomicU64,
}

/// Where the background stream is.
#[derive(Debug, Default)]
struct Cursor {
    tier: usize,
    at: u64,
    /// Pages ahead of a sweep, to be sent first.
    sweep: Option<(u64, u64)>,
    last_fault: Option<u64>,
}

impl<'m> PageServer<'m> {
    /// A server of the `missing` pages of `memory`, the pages of `hot` first, in their order. The VM must be paused, and
    /// stay so until the destination has everything.
    #[must_use]
    pub fn new(memory: &'m GuestMemory, missing: PageSet, hot: Vec<PageSet>) -> Self {
        Self {
            memory,
            regions: memory.regions(),
            unsent: missing,
            hot,
            cursor: Mutex::default(),
            sent: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    /// Pages sent so far, some more than once.
    #[must_use]
    pub fn pages_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Bytes sent so far on the connections of post-copy.
    #[must_use]
    pub fn bytes_sent(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Takes up after new connections were made: the destination says what it lacks.
    ///
    /// # Errors
    /// When it does not, or lacks what is not guest memory.
    pub fn take_up<S: Stream>(&mut self, control: &mut Connection<S>) -> Result<(), WireError> {
        self.unsent = PageSet::receive(control, &self.regions)?;
        *self.cursor() = Cursor::default();
        Ok(())
    }

    /// Serves over `links`: faults at once, the background stream once [`Session::open_background`] says so.
    ///
    /// # Errors
    /// When a thread cannot be started or a connection is gone already.
    pub fn serve<'scope, S: Stream>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        links: Links<S>,
        pace: &'scope dyn Pace,
    ) -> io::Result<Arc<Session>> {
        let session = Arc::new(Session {
            closers: links.closers()?,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let spawn = |name: String, body: Body<'scope>| {
            let session = Arc::clone(&session);
            std::thread::Builder::new()
                .name(name)
                .spawn_scoped(scope, move || {
                    if let Err(error) = body(&session) {
                        session.fail(error);
                    }
                })
                .map(|_| ())
        };
        let started = (|| {
            let Links {
                pages,
                fault_requests,
                fault_pages,
            } = links;
            let faults = move |_: &Session| self.answer_faults(fault_requests, fault_pages, pace);
            spawn("fault-pages".into(), Box::new(faults))?;
            for (index, connection) in pages.into_iter().enumerate() {
                let stream = move |session: &Session| self.stream(session, connection, pace);
                spawn(format!("post-copy{index}"), Box::new(stream))?;
            }
            Ok(())
        })();
        if let Err(error) = started {
            session.end();
            return Err(error);
        }
        Ok(session)
    }

    /// Follows the destination until it lacks nothing, or the session fails. Each report goes to `heard`. When `stop` says
    /// so, the destination is told that the rest will never come.
    ///
    /// # Errors
    /// What ended the session. The pages that did not arrive are still here.
    pub fn follow<S: Stream>(
        &self,
        session: &Session,
        control: &mut Connection<S>,
        stop: &AtomicBool,
        mut heard: impl FnMut(&Status),
    ) -> Result<Status, WireError> {
        session.watch(control.stream().closer()?);
        let ended = loop {
            let status = expect_frame(control, FrameKind::PostStatus, "PostStatus")
                .and_then(|payload| super::super::wire::decode::<Status>(FrameKind::PostStatus, &payload));
            let status = match status {
                Ok(status) => status,
                Err(error) => break Err(error),
            };
            heard(&status);
            crate::fault::point("source.post_copy").map_err(io::Error::other)?;
            if stop.load(Ordering::SeqCst) && !status.complete {
                let reason = Abort::because(STOPPED);
                let told = control.send(FrameKind::Abort, &reason);
                session.end();
                return Err(told.err().unwrap_or_else(|| WireError::Aborted(STOPPED.into())));
            }
            if let Err(error) = control.send_parts(FrameKind::PostAck, &[], &[])
                && !status.complete
            {
                break Err(error);
            }
            if status.complete {
                break Ok(status);
            }
        };
        session.end();
        // The first failure is the cause.
        ended.map_err(|error| session.take_failure().unwrap_or(error))
    }

    /// Connects again and again, and goes on where the connections broke, until nothing is missing; `heard` also gets the bytes
    /// sent so far. There is no limit in time, as nobody else has this memory. What says again and again that it cannot pass
    /// is not tried any more, but the memory stays here. `None` when `stop` says so.
    pub fn recover<S: Stream>(
        &mut self,
        mut connect: impl FnMut() -> Result<(Connection<S>, Links<S>), NotConnected>,
        pace: &dyn Pace,
        stop: &AtomicBool,
        mut heard: impl FnMut(Heard<'_>, u64),
    ) -> Option<Status> {
        let mut hopeless = Hopeless::default();
        while !stop.load(Ordering::SeqCst) {
            if hopeless.is_certain() {
                std::thread::sleep(RECONNECT_EVERY);
                continue;
            }
            let connected = connect().and_then(|(mut control, links)| {
                self.take_up(&mut control)?;
                Ok((control, links))
            });
            let (mut control, links) = match connected {
                Ok(connected) => connected,
                Err(error) => {
                    let why = hopeless.note(error);
                    heard(Heard::LinkLost(&why), self.bytes_sent());
                    std::thread::sleep(RECONNECT_EVERY);
                    continue;
                }
            };
            hopeless = Hopeless::default();
            heard(Heard::Recovered, self.bytes_sent());
            let server = &*self;
            let followed = std::thread::scope(|scope| {
                let session = server.serve(scope, links, pace)?;
                session.open_background();
                server.follow(&session, &mut control, stop, |status| {
                    heard(Heard::Status(status), server.bytes_sent());
                })
            });
            match followed {
                Ok(status) => return Some(status),
                Err(error) => heard(Heard::LinkLost(&error.to_string()), self.bytes_sent()),
            }
        }
        None
    }

    fn cursor(&self) -> MutexGuard<'_, Cursor> {
        self.cursor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers each request at once with the pages asked for, then with what lies around them, as far as the bandwidth has
    /// room for that. What it has no room for is left to the background stream.
    fn answer_faults<S: Stream>(
        &self,
        mut requests: Connection<S>,
        mut answers: Connection<S>,
        pace: &dyn Pace,
    ) -> Result<(), WireError> {
        let mut near = vec![];
        let mut frame = PageFrame::default();
        loop {
            let payload = expect_frame(&mut requests, FrameKind::FaultRequest, "FaultRequest")?;
            let pages = frames::requests(self.memory, &payload)?;
            for &page in &pages {
                // Also if it is under way: here it overtakes.
                self.unsent.take(page);
                self.add(&mut frame, page, &mut answers)?;
            }
            self.send(&mut frame, &mut answers)?;
            pace.owe(page_bytes(pages.len()));
            for &page in &pages {
                let window = page - page % PREFETCH_PAGES;
                near.extend((window..window + PREFETCH_PAGES).filter(|&near| self.unsent.contains(near)));
                if pace.may_send_now(page_bytes(near.len())) {
                    for page in near.drain(..).filter(|&page| self.unsent.take(page)) {
                        self.add(&mut frame, page, &mut answers)?;
                    }
                }
                near.clear();
                self.note_fault(page);
            }
            self.send(&mut frame, &mut answers)?;
        }
    }

    fn note_fault(&self, page: u64) {
        let mut cursor = self.cursor();
        let sweeps = cursor
            .last_fault
            .replace(page)
            .is_some_and(|last| page > last && page - last <= SWEEP_STEP);
        if sweeps {
            cursor.sweep = Some((page, page + SWEEP_AHEAD));
        }
    }

    fn add<S: Stream>(
        &self,
        frame: &mut PageFrame,
        page: u64,
        connection: &mut Connection<S>,
    ) -> Result<(), WireError> {
        if frame.is_full() {
            self.send(frame, connection)?;
        }
        frame
            .add(self.memory, page)
            .map_err(|error| io::Error::other(error).into())
    }

    fn send<S: Stream>(
        &self,
        frame: &mut PageFrame,
        connection: &mut Connection<S>,
    ) -> Result<(), WireError> {
        let before = connection.bytes_sent();
        let pages = frame.send(connection)?;
        self.sent.fetch_add(pages as u64, Ordering::Relaxed);
        self.bytes
            .fetch_add(connection.bytes_sent() - before, Ordering::Relaxed);
        Ok(())
    }

    /// One connection of the background stream, until there is nothing left to take. It stays open until the session ends.
    fn stream<S: Stream>(
        &self,
        session: &Session,
        mut connection: Connection<S>,
        pace: &dyn Pace,
    ) -> Result<(), WireError> {
        let mut frame = PageFrame::default();
        let mut pages = Vec::with_capacity(BATCH_PAGES);
        if session.wait_for_background() {
            loop {
                self.take_batch(&mut pages);
                if pages.is_empty() {
                    break;
                }
                pace.wait(page_bytes(pages.len()), &|| session.is_over());
                for page in pages.drain(..) {
                    self.add(&mut frame, page, &mut connection)?;
                }
                self.send(&mut frame, &mut connection)?;
                if session.is_over() {
                    return Ok(());
                }
            }
        }
        session.wait_until_over();
        Ok(())
    }

    /// Takes the next pages to send: ahead of a sweep, then the hot ones, then what is left.
    fn take_batch(&self, pages: &mut Vec<u64>) {
        let mut cursor = self.cursor();
        while pages.len() < BATCH_PAGES {
            let page = if let Some((at, end)) = cursor.sweep {
                match self.unsent.next(at).filter(|&page| page < end) {
                    Some(page) => {
                        cursor.sweep = Some((page + 1, end));
                        page
                    }
                    None => {
                        cursor.sweep = None;
                        continue;
                    }
                }
            } else {
                let tier = self.hot.get(cursor.tier);
                match (tier.unwrap_or(&self.unsent).next(cursor.at), tier) {
                    (Some(page), _) => {
                        cursor.at = page + 1;
                        page
                    }
                    (None, Some(_)) => {
                        (cursor.tier, cursor.at) = (cursor.tier + 1, 0);
                        continue;
                    }
                    (None, None) => return,
                }
            };
            if self.unsent.take(page) {
                pages.push(page);
            }
        }
    }
}

/// Of guest memory.
fn page_bytes(pages: usize) -> usize {
    pages * 4096
}

const STOPPED: &str = "the source was stopped, and the memory that the VM still had there is lost";

/// One set of connections, until one of them fails or nothing is missing.
pub struct Session {
    closers: Vec<Closer>,
    state: Mutex<SessionState>,
    changed: Condvar,
}

#[derive(Default)]
struct SessionState {
    background: bool,
    over: bool,
    failure: Option<WireError>,
    control: Option<Closer>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").finish_non_exhaustive()
    }
}

impl Session {
    fn lock(&self) -> MutexGuard<'_, SessionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM runs at the destination: everything else may follow.
    pub fn open_background(&self) {
        self.lock().background = true;
        self.changed.notify_all();
    }

    /// Ends it: its threads and connections.
    pub fn end(&self) {
        self.lock().over = true;
        self.changed.notify_all();
        close_all(&self.closers);
    }

    fn fail(&self, error: WireError) {
        {
            let mut state = self.lock();
            if state.over {
                return;
            }
            tracing::debug!(%error, "a connection of post-copy ended");
            state.failure.get_or_insert(error);
            if let Some(close) = state.control.take() {
                close();
            }
        }
        self.end();
    }

    /// One connection less is a session less, as what it had taken to send is lost: ends the control connection then.
    fn watch(&self, control: Closer) {
        let mut state = self.lock();
        if state.failure.is_some() {
            control();
        } else {
            state.control = Some(control);
        }
    }

    fn take_failure(&self) -> Option<WireError> {
        self.lock().failure.take()
    }

    fn is_over(&self) -> bool {
        self.lock().over
    }

    /// Whether there is to be any.
    fn wait_for_background(&self) -> bool {
        let waits = |state: &mut SessionState| !state.background && !state.over;
        let state = self.changed.wait_while(self.lock(), waits);
        !state.unwrap_or_else(PoisonError::into_inner).over
    }

    fn wait_until_over(&self) {
        let over = self.changed.wait_while(self.lock(), |state| !state.over);
        drop(over.unwrap_or_else(PoisonError::into_inner));
    }
}
