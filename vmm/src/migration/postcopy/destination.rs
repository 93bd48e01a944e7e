//! The destination in post-copy: whoever touches a page that has not come waits for it, be it a vCPU, KVM or this VMM.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::super::wire::{Connection, FrameKind, WireError};
use super::blocks::{self, Mapping};
use super::frames::{self, MAX_REQUESTS, Status};
use super::page_set::PageSet;
use super::uffd::{Fault, HostRange, Uffd, UffdError};
use super::{Closer, HEARTBEAT, Links, Stream, close_all, expect_frame};
use crate::memory::GuestMemory;
use crate::spec::PAGE_SIZE;

/// Faults taken from the kernel at once.
const FAULT_BATCH: usize = 32;
/// Once nothing is missing, the source may still have to hear so over new connections.
const LAST_WORD_WAIT: Duration = Duration::from_secs(60);
static ZEROS: [u8; 4096] = [0; 4096];

/// Why post-copy cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum PostCopyError {
    /// userfaultfd.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// A stale copy of a missing page could not be thrown away.
    #[error("cannot discard {pages} pages at page {first:#x}: {source}")]
    Discard {
        /// First page number.
        first: u64,
        /// How many.
        pages: u64,
        /// Why.
        source: io::Error,
    },
    /// A thread or a descriptor.
    #[error("post-copy: {0}")]
    Io(#[from] io::Error),
}

/// What becomes of post-copy, for the owner of the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The connections are gone. The VM runs until it needs a page that is missing, and then waits.
    LinkLost(String),
    /// New connections were made.
    Recovered,
    /// Nothing is missing.
    Complete,
    /// What is missing will never come. The VM cannot go on.
    Lost(String),
}

/// Post-copy of one VM, from the moment when its missing pages are known. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PostCopy(Arc<Inner>);

struct Inner {
    memory: GuestMemory,
    mappings: Vec<Mapping>,
    uffd: Uffd,
    ranges: Mutex<Vec<HostRange>>,
    missing: PageSet,
    faults: Mutex<Faults>,
    waiting: AtomicUsize,
    requests: Mutex<Option<Requests>>,
    phase: Mutex<Phase>,
    changed: Condvar,
    end_of_faults: EventFd,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostCopy")
            .field("missing", &self.missing.count())
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}

/// Asks the source for pages.
struct Requests {
    session: u64,
    send: SendRequests,
}

type SendRequests = Box<dyn FnMut(&[u64]) -> Result<(), WireError> + Send>;

#[derive(Debug, Default)]
struct Faults {
    waited_for: HashMap<u64, Instant>,
    count: u64,
    worst: Duration,
    total: Duration,
}

#[derive(Debug, Default)]
struct Phase {
    session: u64,
    /// The VM runs here, or may soon.
    outlives_links: bool,
    broken: Option<String>,
    stopped: Option<String>,
    released: bool,
}

/// The threads that read from one set of connections.
pub struct Session {
    closers: Vec<Closer>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        close_all(&self.closers);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of post-copy panicked");
            }
        }
    }
}

/// How a session ended.
enum Ended {
    Complete,
    Stopped,
    Lost(String),
    Broken(String),
}

impl PostCopy {
    /// Throws away what this host has of the missing pages, and holds back whoever touches them from now on. vCPUs must
    /// not have run.
    ///
    /// # Errors
    /// When the host does not offer userfaultfd, or refuses a step.
    pub fn prepare(memory: &GuestMemory, missing: &PageSet) -> Result<Self, PostCopyError> {
        let post_copy = Self(Arc::new(Inner {
            memory: memory.clone(),
            mappings: blocks::mappings(memory),
            uffd: Uffd::open()?,
            ranges: Mutex::default(),
            missing: PageSet::empty(&memory.regions()),
            faults: Mutex::default(),
            waiting: AtomicUsize::new(0),
            requests: Mutex::default(),
            phase: Mutex::default(),
            changed: Condvar::new(),
            end_of_faults: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        }));
        let inner = Arc::clone(&post_copy.0);
        spawn("faults".into(), move || inner.serve_faults())?;
        if let Err(error) = post_copy.add(missing) {
            post_copy.stop(&error.to_string());
            return Err(error);
        }
        Ok(post_copy)
    }

    /// More pages that are missing: those that the guest wrote at the source in the meantime. Not once the VM runs here.
    ///
    /// # Errors
    /// When the host refuses a step.
    pub fn add(&self, missing: &PageSet) -> Result<(), PostCopyError> {
        let inner = &self.0;
        for range in blocks::ranges(&inner.mappings, missing) {
            // SAFETY: `ranges` gives only parts of guest memory, which `memory` keeps mapped.
            unsafe { inner.uffd.register(range)? };
            lock(&inner.ranges).push(range);
        }
        inner.missing.insert(missing);
        // Last: from here on nothing but a page that comes can fill the hole.
        for (first, pages) in missing.runs() {
            blocks::discard(&inner.memory, first, pages).map_err(|source| PostCopyError::Discard {
                first,
                pages,
                source,
            })?;
        }
        tracing::debug!(missing = inner.missing.count(), "post-copy prepared");
        Ok(())
    }

    /// Pages that have not come.
    #[must_use]
    pub fn missing_pages(&self) -> u64 {
        self.0.missing.count()
    }

    /// The VM's state is loaded, and it may run here soon: from now on it outlives its connections, and who waits for
    /// a page waits until it comes. `false` if they broke before, or it was stopped: then it must not run.
    #[must_use]
    pub fn outlive_links(&self) -> bool {
        let mut phase = self.0.phase();
        phase.outlives_links = phase.stopped.is_none() && phase.broken.is_none();
        phase.outlives_links
    }

    /// Lets go of everything that waits: the VM is to end, and never runs on. To be called when vCPUs have been asked to
    /// stop and before they are waited for. The source hears `why`.
    pub fn stop(&self, why: &str) {
        self.0.phase().stopped.get_or_insert_with(|| why.to_owned());
        self.0.changed.notify_all();
        self.0.release();
    }

    /// Begins to take pages from `links`, and asks again for those that are waited for.
    ///
    /// # Errors
    /// When a thread cannot be started or a connection is gone already.
    pub fn attach<S: Stream>(&self, links: Links<S>) -> io::Result<Session> {
        let closers = links.closers()?;
        let Links {
            pages,
            mut fault_requests,
            fault_pages,
        } = links;
        let inner = &self.0;
        let number = {
            let mut phase = inner.phase();
            phase.session += 1;
            phase.broken = None;
            phase.session
        };
        let mut session = Session {
            closers,
            threads: vec![],
        };
        let names = std::iter::once("fault-pages".to_owned())
            .chain((0..pages.len()).map(|index| format!("post-copy{index}")));
        for (name, mut connection) in names.zip(std::iter::once(fault_pages).chain(pages)) {
            let inner = Arc::clone(inner);
            let reader = move || {
                let error = inner.receive_pages(&mut connection);
                inner.session_broken(number, &error);
            };
            session.threads.push(spawn(name, reader)?);
        }
        *lock(&inner.requests) = Some(Requests {
            session: number,
            send: Box::new(move |pages| frames::send_requests(&mut fault_requests, pages)),
        });
        let waited_for: Vec<u64> = lock(&inner.faults).waited_for.keys().copied().collect();
        inner.ask_for(&waited_for);
        Ok(session)
    }

    /// Goes on until nothing is missing or the VM is stopped: tells the source how it goes over `control`, and waits for
    /// new connections when they break. `accept` waits for the source to come again; it gives `None` when its second
    /// argument is over or its first says that there is no need any more.
    pub fn run<S: Stream>(
        &self,
        session: Session,
        control: Connection<S>,
        mut accept: impl FnMut(&dyn Fn() -> bool, Option<Instant>) -> Option<(Connection<S>, Links<S>)>,
        tell: impl Fn(Event),
    ) {
        let inner = &self.0;
        let mut last_word = None;
        let (mut session, mut control) = (session, control);
        loop {
            let ended = inner.heartbeats(&mut control);
            lock(&inner.requests).take();
            drop((session, control));
            if inner.missing.count() == 0 && inner.release() {
                tell(Event::Complete);
            }
            match ended {
                Ended::Complete | Ended::Stopped => return,
                Ended::Lost(why) => return tell(Event::Lost(why)),
                Ended::Broken(why) if inner.missing.count() == 0 => {
                    tracing::debug!(%why, "the source has not heard that nothing is missing");
                    last_word.get_or_insert_with(|| Instant::now() + LAST_WORD_WAIT);
                }
                Ended::Broken(why) => tell(Event::LinkLost(why)),
            }
            (session, control) = loop {
                let Some((mut again, links)) = accept(&|| inner.phase().stopped.is_some(), last_word) else {
                    return;
                };
                match inner
                    .missing
                    .send(&mut again)
                    .and_then(|()| Ok(self.attach(links)?))
                {
                    Ok(session) => break (session, again),
                    Err(error) => {
                        tracing::warn!(%error, "post-copy: the source came again, and was gone again");
                    }
                }
            };
            if last_word.is_none() {
                tell(Event::Recovered);
            }
        }
    }
}

impl Inner {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        lock(&self.phase)
    }

    fn status(&self) -> Status {
        let faults = lock(&self.faults);
        let micros = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Status {
            missing_pages: self.missing.count(),
            faults: faults.count,
            worst_fault_us: micros(faults.worst),
            fault_us: micros(faults.total),
            complete: false,
            ended: String::new(),
        }
    }

    /// Tells the source how it goes until the session is over.
    fn heartbeats<S: Stream>(&self, control: &mut Connection<S>) -> Ended {
        if let Err(fault) = crate::fault::point("destination.post_copy") {
            return Ended::Broken(fault.to_string());
        }
        loop {
            let (broken, stopped) = {
                let waits = |phase: &mut Phase| {
                    phase.broken.is_none() && phase.stopped.is_none() && self.missing.count() > 0
                };
                let phase = self.changed.wait_timeout_while(self.phase(), HEARTBEAT, waits);
                let phase = phase.unwrap_or_else(PoisonError::into_inner).0;
                (phase.broken.clone(), phase.stopped.clone())
            };
            let complete = self.missing.count() == 0;
            if let Some(why) = broken
                && !complete
                && stopped.is_none()
            {
                return Ended::Broken(why);
            }
            let mut status = self.status();
            status.complete = complete || stopped.is_some();
            status.ended = stopped.clone().unwrap_or_default();
            let answer = control
                .send(FrameKind::PostStatus, &status)
                .and_then(|()| expect_frame(control, FrameKind::PostAck, "PostAck"));
            match answer {
                _ if stopped.is_some() => return Ended::Stopped,
                Ok(_) if complete => return Ended::Complete,
                Err(WireError::Aborted(why)) if !complete => return Ended::Lost(why),
                Err(error) => return Ended::Broken(error.to_string()),
                Ok(_) => {}
            }
        }
    }

    fn session_broken(&self, session: u64, error: &WireError) {
        let mut phase = self.phase();
        if phase.session == session && phase.broken.is_none() {
            phase.broken = Some(error.to_string());
            self.changed.notify_all();
            if !phase.outlives_links {
                // The VM never runs here, and loading its state must not wait for a page that will not come.
                drop(phase);
                self.release();
            }
        }
    }

    /// Nobody is held back any more. `true` for the first who says so.
    fn release(&self) -> bool {
        if std::mem::replace(&mut self.phase().released, true) {
            return false;
        }
        for &range in lock(&self.ranges).iter() {
            // Linux wakes those who wait before it stops holding back others (fs/userfaultfd.c, userfaultfd_unregister). A
            // fault that comes in between under the lock of its mapping alone would wait for ever, so they are woken again.
            let let_go = self.uffd.unregister(range).and_then(|()| self.uffd.wake(range));
            if let Err(error) = let_go {
                tracing::error!(%error, "cannot let go of guest memory");
            }
        }
        if let Err(error) = self.end_of_faults.write(1) {
            tracing::error!(%error, "cannot end the thread that takes faults");
        }
        true
    }

    /// Takes faults from the kernel until there can be no more.
    fn serve_faults(&self) {
        let mut faults = [Fault {
            address: 0,
            write: false,
        }; FAULT_BATCH];
        let mut wanted = Vec::with_capacity(FAULT_BATCH);
        loop {
            match wait_readable(self.uffd.as_raw_fd(), self.end_of_faults.as_raw_fd()) {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait for faults");
                    return;
                }
            }
            let count = self.uffd.read(&mut faults).unwrap_or_else(|error| {
                tracing::error!(%error, "cannot read faults");
                0
            });
            wanted.clear();
            for fault in &faults[..count] {
                self.take_fault(*fault, &mut wanted);
            }
            self.ask_for(&wanted);
        }
    }

    fn take_fault(&self, fault: Fault, wanted: &mut Vec<u64>) {
        let address = fault.address - fault.address % ZEROS.len();
        let Some(page) = self.mappings.iter().find_map(|mapping| mapping.page_at(address)) else {
            tracing::error!("a fault outside guest memory");
            return;
        };
        if self.missing.contains(page) {
            let mut faults = lock(&self.faults);
            if let std::collections::hash_map::Entry::Vacant(new) = faults.waited_for.entry(page) {
                new.insert(Instant::now());
                self.waiting.fetch_add(1, Ordering::SeqCst);
                wanted.push(page);
            }
            drop(faults);
            if !self.missing.contains(page) {
                // It came in between, and whoever placed it may not have seen that it was waited for.
                self.no_longer_waited_for(page, 1);
            }
            return;
        }
        // It was never missing, so the source has zeros there; or it has come in the meantime, and is left alone.
        let range = HostRange {
            start: address,
            len: ZEROS.len(),
        };
        // SAFETY: a page of guest memory, in a registered range, that was never missing: zeros are its content.
        let placed = unsafe {
            if fault.write {
                self.uffd.copy(address, &ZEROS)
            } else {
                self.uffd.zero(range)
            }
        };
        if let Err(error) = placed.and_then(|()| self.uffd.wake(range))
            && !self.phase().released
        {
            tracing::error!(%error, "cannot answer a fault; whoever waits for it goes on waiting");
        }
    }

    /// Pages have been placed, or were there already.
    fn no_longer_waited_for(&self, first: u64, pages: u64) {
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut faults = lock(&self.faults);
        for page in first..first + pages {
            if let Some(since) = faults.waited_for.remove(&page) {
                self.waiting.fetch_sub(1, Ordering::SeqCst);
                let waited = since.elapsed();
                faults.count += 1;
                faults.worst = faults.worst.max(waited);
                faults.total += waited;
            }
        }
    }

    /// Asks the source for pages. Without a connection it is asked when there is one again.
    fn ask_for(&self, pages: &[u64]) {
        let mut requests = lock(&self.requests);
        for some in pages.chunks(MAX_REQUESTS) {
            let Some(asked) = requests.as_mut() else { return };
            if let Err(error) = (asked.send)(some) {
                self.session_broken(asked.session, &error);
                *requests = None;
            }
        }
    }

    /// Places pages as they come, until the connection ends.
    fn receive_pages<S: Stream>(&self, connection: &mut Connection<S>) -> WireError {
        loop {
            let placed = expect_frame(connection, FrameKind::PostPages, "PostPages")
                .and_then(|payload| self.place(&payload));
            if let Err(error) = placed {
                return error;
            }
        }
    }

    fn place(&self, payload: &[u8]) -> Result<(), WireError> {
        for run in frames::runs(&self.memory, payload)? {
            let mut page = run.first;
            let end = run.first + run.pages;
            while page < end {
                if !self.missing.contains(page) {
                    // Again, or never asked for.
                    page += 1;
                    continue;
                }
                let from = page;
                while page < end && self.missing.contains(page) {
                    page += 1;
                }
                let bytes = run.bytes.map(|bytes| {
                    let at = |page| usize::try_from((page - run.first) * PAGE_SIZE).expect("within a frame");
                    &bytes[at(from)..at(page)]
                });
                self.place_run(from, page - from, bytes)
                    .map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    /// Places pages that are missing, unless another thread has been faster, and only then says that they are here: who
    /// sees that a page is not missing may take it for there.
    fn place_run(&self, first: u64, pages: u64, bytes: Option<&[u8]>) -> Result<(), UffdError> {
        let len = pages * PAGE_SIZE;
        let host = self
            .memory
            .host_range(GuestAddress(first * PAGE_SIZE), len)
            .expect("pages of the set of missing ones are guest memory");
        let range = HostRange {
            start: host.addr(),
            len: usize::try_from(len).expect("within a frame"),
        };
        // SAFETY: guest memory, and pages of it that are missing: nobody has seen any content of them here.
        unsafe {
            match bytes {
                Some(bytes) => self.uffd.copy(range.start, bytes)?,
                None => self.uffd.zero(range)?,
            }
        }
        for page in first..first + pages {
            self.missing.take(page);
        }
        self.no_longer_waited_for(first, pages);
        if self.missing.count() == 0 {
            drop(self.phase());
            self.changed.notify_all();
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name).spawn(body)
}

/// Waits until one of two descriptors can be read; whether it is the second.
fn wait_readable(first: i32, second: i32) -> io::Result<bool> {
    let watched = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut descriptors = [watched(first), watched(second)];
    loop {
        // SAFETY: two pollfds, on the stack, for descriptors that the caller keeps open.
        if unsafe { libc::poll(descriptors.as_mut_ptr(), 2, -1) } >= 0 {
            return Ok(descriptors[1].revents != 0);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
