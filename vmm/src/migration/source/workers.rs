//! Threads that send pages, one for each data connection. A pass is cut into chunks; each worker takes the next one until
//! none is left, says so on its connection and waits for the acknowledgement.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::Scope;
use std::time::{Duration, Instant};

use shoal_proto::vm::Compression;

use super::SourceError;
use crate::dirty::{Bitmap, DirtyLog};
use crate::memory::{GuestMemory, Region};
use crate::migration::codec::{CodecCounts, DeltaCache};
use crate::migration::controls::Controls;
use crate::migration::pages::{NextFrame, PageCounts, PageSender, Resent};
use crate::migration::sched::Gentleness;
use crate::migration::transport::Transport;
use crate::migration::wire::{Connection, Empty, FrameKind, KEEP_ALIVE, Pass, PassAck, WireError};
use crate::vm::Vm;

/// Pages of a chunk: write protection is re-armed for so many at once, right before they are read (16 MiB).
const CHUNK_PAGES: u64 = 4096;

/// So much of a chunk is sent between looks whether the pass is cut short (1 MiB).
const WORDS_BETWEEN_LOOKS: usize = 4;

/// Which pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassKind {
    /// Every page that the host has backed.
    First,
    /// Pages written since.
    Later,
    /// The guest is paused; no answer is waited for.
    Last,
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    region: Region,
    first: u64,
    pages: u64,
}

/// One pass, shared by the workers.
#[derive(Debug)]
pub struct PassPlan {
    number: u32,
    kind: PassKind,
    chunks: Vec<Chunk>,
    next: AtomicUsize,
    /// By region; empty in the first pass.
    dirty: Vec<Bitmap>,
    /// Nothing more is sent in it.
    cut: AtomicBool,
}

impl PassPlan {
    /// Over all of memory, or over what is `dirty`.
    #[must_use]
    pub fn new(number: u32, kind: PassKind, memory: &GuestMemory, dirty: Vec<Bitmap>) -> Self {
        let mut chunks = vec![];
        for (index, region) in memory.regions().into_iter().enumerate() {
            for first in (0..region.pages()).step_by(usize::try_from(CHUNK_PAGES).expect("4096")) {
                let pages = CHUNK_PAGES.min(region.pages() - first);
                let clean = dirty
                    .get(index)
                    .is_some_and(|dirty| dirty.chunk(first, pages).iter().all(|&word| word == 0));
                if !clean {
                    chunks.push(Chunk { region, first, pages });
                }
            }
        }
        Self {
            number,
            kind,
            chunks,
            next: AtomicUsize::new(0),
            dirty,
            cut: AtomicBool::new(false),
        }
    }

    fn next(&self) -> Option<&Chunk> {
        self.chunks.get(self.next.fetch_add(1, Ordering::Relaxed))
    }
}

/// Pages that a pass was to send, and that were not sent as it was cut short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsent {
    /// The number of their region.
    pub slot: u32,
    /// The page of bit 0, from the region's start.
    pub first: u64,
    /// One bit a page.
    pub words: Vec<u64>,
}

/// What one worker did in one pass.
#[derive(Debug, Default)]
pub struct PassShare {
    /// Pages.
    pub counts: PageCounts,
    /// Addresses that the destination wants again.
    pub damaged: Vec<u64>,
    /// What is left if the pass was cut short.
    pub unsent: Vec<Unsent>,
    /// From the end of the pass to its acknowledgement.
    pub round_trip: Option<Duration>,
}

/// What all workers and the coordinator look at.
#[derive(Debug)]
pub struct Shared {
    /// Bytes on the wire, on data connections.
    pub bytes: AtomicU64,
    /// Pages handled in the present pass.
    pub handled: AtomicU64,
    /// How many workers take chunks; the others wait.
    pub active: AtomicUsize,
    stop: AtomicBool,
}

impl Shared {
    /// With `active` workers that take chunks.
    #[must_use]
    pub fn new(active: usize) -> Self {
        Self {
            bytes: AtomicU64::new(0),
            handled: AtomicU64::new(0),
            active: AtomicUsize::new(active.max(1)),
            stop: AtomicBool::new(false),
        }
    }

    /// Nothing more is to be sent.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What a worker needs, but for its connection.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The VM.
    pub vm: &'a Vm,
    /// Its dirty log.
    pub log: &'a DirtyLog<'a>,
    /// Cancel and bandwidth.
    pub controls: &'a Controls,
    /// Counters.
    pub shared: &'a Shared,
}

/// The workers.
#[derive(Debug)]
pub struct Workers {
    passes: Vec<mpsc::Sender<Arc<PassPlan>>>,
    shares: mpsc::Receiver<Result<PassShare, SourceError>>,
    handed_back: mpsc::Receiver<Connection<Transport>>,
    waiting_for: usize,
    pass: Option<Arc<PassPlan>>,
    codec: Arc<Mutex<Vec<CodecCounts>>>,
}

impl Workers {
    /// Starts one for each connection.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        connections: Vec<Connection<Transport>>,
        compression: Compression,
        context: Context<'scope>,
    ) -> Result<Self, SourceError> {
        let (sender, shares) = mpsc::channel();
        let (hand_back, handed_back) = mpsc::channel();
        let mut passes = vec![];
        let codec = Arc::new(Mutex::new(vec![CodecCounts::default(); connections.len()]));
        let cache = Arc::new(DeltaCache::for_guest(context.vm.memory().len()));
        let gentleness = Gentleness::of_host();
        for (index, connection) in connections.into_iter().enumerate() {
            let (pass, queue) = mpsc::channel();
            passes.push(pass);
            let worker = Worker {
                index,
                connection,
                sender: PageSender::new(context.vm.memory(), compression, Arc::clone(&cache)),
                pagemap: None,
                context,
                kept_alive: Instant::now(),
                reported: PageCounts::default(),
                unsent: vec![],
                told: Told::default(),
                codec: Arc::clone(&codec),
            };
            let (sender, hand_back) = (sender.clone(), hand_back.clone());
            std::thread::Builder::new()
                .name(format!("send{index}"))
                .spawn_scoped(scope, move || {
                    gentleness.apply();
                    worker.run(&queue, &sender, &hand_back);
                })
                .map_err(SourceError::Thread)?;
        }
        Ok(Self {
            passes,
            shares,
            handed_back,
            waiting_for: 0,
            pass: None,
            codec,
        })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.passes.len()
    }

    /// Lets them begin a pass. The one before must have been finished.
    pub fn begin(&mut self, pass: PassPlan) {
        let pass = Arc::new(pass);
        for worker in &self.passes {
            // A worker that has gone has left an error in `shares`.
            let _ = worker.send(Arc::clone(&pass));
        }
        self.waiting_for = self.passes.len();
        self.pass = Some(pass);
    }

    /// Has the pass under way end soon: what was not sent is told with the workers' shares.
    pub fn cut_short(&self) {
        if let Some(pass) = &self.pass {
            pass.cut.store(true, Ordering::Relaxed);
        }
    }

    /// Waits a while for the pass to be finished; `None` while it is not.
    ///
    /// # Errors
    /// What went wrong first.
    pub fn wait(&mut self, so_far: &mut PassShare, at_most: Duration) -> Result<bool, SourceError> {
        let deadline = Instant::now() + at_most;
        while self.waiting_for > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.shares.recv_timeout(left) {
                Ok(share) => {
                    let share = share?;
                    so_far.counts += share.counts;
                    so_far.damaged.extend(share.damaged);
                    so_far.unsent.extend(share.unsent);
                    so_far.round_trip = so_far.round_trip.max(share.round_trip);
                    self.waiting_for -= 1;
                }
                Err(mpsc::RecvTimeoutError::Timeout) => return Ok(false),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(SourceError::WorkerGone),
            }
        }
        Ok(true)
    }

    /// Ends the workers between two passes, and gives their connections.
    ///
    /// # Errors
    /// When one has failed.
    pub fn hand_back(&mut self) -> Result<Vec<Connection<Transport>>, SourceError> {
        let count = self.passes.len();
        self.passes.clear();
        let connections: Vec<_> = self.handed_back.iter().collect();
        if connections.len() == count {
            return Ok(connections);
        }
        let failed = self.shares.try_iter().find_map(Result::err);
        Err(failed.unwrap_or(SourceError::WorkerGone))
    }

    /// What encoding did so far.
    #[must_use]
    pub fn codec(&self) -> CodecCounts {
        let mut all = CodecCounts::default();
        for counts in self.codec.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            all.add(counts);
        }
        all
    }
}

struct Worker<'a> {
    index: usize,
    connection: Connection<Transport>,
    sender: PageSender<'a>,
    pagemap: Option<std::fs::File>,
    context: Context<'a>,
    kept_alive: Instant,
    reported: PageCounts,
    unsent: Vec<Unsent>,
    told: Told,
    codec: Arc<Mutex<Vec<CodecCounts>>>,
}

impl Worker<'_> {
    fn run(
        mut self,
        passes: &mpsc::Receiver<Arc<PassPlan>>,
        shares: &mpsc::Sender<Result<PassShare, SourceError>>,
        hand_back: &mpsc::Sender<Connection<Transport>>,
    ) {
        loop {
            let outcome = match passes.recv_timeout(KEEP_ALIVE) {
                Ok(pass) => self.pass(&pass).map(Some),
                Err(mpsc::RecvTimeoutError::Timeout) => self
                    .connection
                    .send(FrameKind::KeepAlive, &Empty {})
                    .map(|()| None)
                    .map_err(Into::into),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    // Whoever wants it takes it; else it ends here.
                    let _ = hand_back.send(self.connection);
                    return;
                }
            };
            let failed = outcome.is_err();
            if let Some(share) = outcome.transpose()
                && shares.send(share).is_err()
            {
                return;
            }
            if failed {
                return;
            }
        }
    }

    fn go_on(context: &Context<'_>) -> Result<(), SourceError> {
        if context.shared.stop.load(Ordering::Relaxed) || context.controls.is_cancelled() {
            return Err(SourceError::Cancelled);
        }
        Ok(())
    }

    fn pass(&mut self, pass: &PassPlan) -> Result<PassShare, SourceError> {
        if pass.kind == PassKind::Last {
            self.sender.try_nothing_new();
        }
        let share = self.send_pass(pass);
        self.tell();
        share
    }

    fn send_pass(&mut self, pass: &PassPlan) -> Result<PassShare, SourceError> {
        // Read once: a paused guest waits for all workers there are.
        while pass.kind == PassKind::First && self.index >= self.context.shared.active.load(Ordering::Relaxed)
        {
            if pass.next.load(Ordering::Relaxed) >= pass.chunks.len() {
                break;
            }
            Self::go_on(&self.context)?;
            self.keep_alive()?;
            std::thread::sleep(WAIT_FOR_TURN);
        }
        while let Some(chunk) = pass.next() {
            self.chunk(pass, chunk)?;
        }
        let mut before_frame = before_frame(self.context, pass.kind, &mut self.told);
        self.sender.flush(&mut self.connection, &mut before_frame)?;
        drop(before_frame);
        self.end_pass(pass)
    }

    /// Memory that is all zeros gives nothing to send, nor does a worker that waits for its turn, and the destination must
    /// not take the source for gone.
    fn keep_alive(&mut self) -> Result<(), SourceError> {
        let quiet_since = self.kept_alive.elapsed().min(self.sender.idle());
        if quiet_since >= KEEP_ALIVE {
            self.kept_alive = Instant::now();
            self.connection.send(FrameKind::KeepAlive, &Empty {})?;
        }
        Ok(())
    }

    fn chunk(&mut self, pass: &PassPlan, chunk: &Chunk) -> Result<(), SourceError> {
        Self::go_on(&self.context)?;
        let Chunk { region, first, pages } = *chunk;
        let (words, resent) = match pass.kind {
            PassKind::First => (self.backed(chunk)?, Resent::No),
            PassKind::Later | PassKind::Last => {
                let index = usize::try_from(region.slot).expect("u32 fits usize");
                let mut words = pass.dirty[index].chunk(first, pages).to_vec();
                if pass.kind == PassKind::Later {
                    self.context.log.clear(&region, first, &mut words)?;
                }
                (words, Resent::Yes)
            }
        };
        let mut before_frame = before_frame(self.context, pass.kind, &mut self.told);
        for (first, words) in (first..)
            .step_by(WORDS_BETWEEN_LOOKS * 64)
            .zip(words.chunks(WORDS_BETWEEN_LOOKS))
        {
            if pass.cut.load(Ordering::Relaxed) {
                self.unsent.push(Unsent {
                    slot: region.slot,
                    first,
                    words: words.to_vec(),
                });
                continue;
            }
            self.sender.send(
                &mut self.connection,
                &region,
                first,
                words,
                resent,
                &mut before_frame,
            )?;
        }
        drop(before_frame);
        self.tell();
        self.keep_alive()
    }

    /// Has what was done so far counted.
    fn tell(&mut self) {
        let (pages, bytes) = (self.sender.counts().pages(), self.connection.bytes_sent());
        self.told.tell(self.context.shared, pages, bytes);
    }

    /// Arms tracking for a chunk before it is looked at, so that a page touched afterwards is found by the next pass.
    fn backed(&mut self, chunk: &Chunk) -> Result<Vec<u64>, SourceError> {
        let mut all = Bitmap::clean(chunk.pages);
        all.set_run(0, chunk.pages);
        self.context
            .log
            .clear(&chunk.region, chunk.first, &mut all.into_words())?;
        let pagemap = match &self.pagemap {
            Some(pagemap) => pagemap,
            None => self.pagemap.insert(GuestMemory::open_pagemap()?),
        };
        let memory = self.context.vm.memory();
        let backed = memory.backed_pages(pagemap, chunk.region.slot, chunk.first, chunk.pages)?;
        let count: u64 = backed.iter().map(|word| u64::from(word.count_ones())).sum();
        self.sender.count_untouched(chunk.pages.saturating_sub(count));
        Ok(backed)
    }

    fn end_pass(&mut self, pass: &PassPlan) -> Result<PassShare, SourceError> {
        let counts = self.sender.counts();
        let end = Pass {
            pass: pass.number,
            pages: counts.raw,
            last: pass.kind == PassKind::Last,
        };
        let sent = Instant::now();
        self.connection.send(FrameKind::PassEnd, &end)?;
        let mut share = PassShare {
            counts: PageCounts {
                raw: counts.raw - self.reported.raw,
                zero: counts.zero - self.reported.zero,
            },
            unsent: std::mem::take(&mut self.unsent),
            ..PassShare::default()
        };
        self.reported = counts;
        if pass.kind != PassKind::Last {
            let ack: PassAck = self.connection.expect(FrameKind::PassAck, "PassAck")?;
            if ack.pass != pass.number {
                let why = format!("pass {} is acknowledged, not {}", ack.pass, pass.number);
                let kind = FrameKind::PassAck;
                return Err(WireError::Malformed { kind, why }.into());
            }
            share.round_trip = Some(sent.elapsed());
            self.sender.forget(&ack.damaged);
            share.damaged = ack.damaged;
        }
        self.codec.lock().unwrap_or_else(PoisonError::into_inner)[self.index] = self.sender.encoded();
        Ok(share)
    }
}

const WAIT_FOR_TURN: Duration = Duration::from_millis(1);

/// What of a worker's doings is in the shared figures. They grow frame by frame: on a slow link a chunk takes seconds.
#[derive(Debug, Default)]
struct Told {
    pages: u64,
    bytes: u64,
}

impl Told {
    /// Adds what is new.
    fn tell(&mut self, shared: &Shared, pages: u64, bytes: u64) {
        shared.handled.fetch_add(pages - self.pages, Ordering::Relaxed);
        shared.bytes.fetch_add(bytes - self.bytes, Ordering::Relaxed);
        *self = Self { pages, bytes };
    }
}

/// The pause is not held to the bandwidth: it would only last longer.
fn before_frame<'a>(
    context: Context<'a>,
    kind: PassKind,
    told: &'a mut Told,
) -> impl FnMut(NextFrame) -> Result<(), SourceError> + use<'a> {
    move |next| {
        Worker::go_on(&context)?;
        told.tell(context.shared, next.counts.pages(), next.sent);
        if kind == PassKind::Last {
            return Ok(());
        }
        let pacer = context.controls.pacer();
        pacer.take(next.page_bytes, || Worker::go_on(&context))
    }
}
