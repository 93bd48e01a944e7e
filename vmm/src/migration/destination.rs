//! The destination's side of a migration: the same phases as the source's, mirrored. The VM runs only after Commit.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;

use super::negotiate::{self, Prepared, Refusal};
use super::pages::{self, PageCounts};
use super::wire::{self, Abort, Connection, FrameKind, Hello, HelloAck, Pass, Step, WireError};
use crate::build::{self, BuildError};
use crate::ran_mark::RanMark;
use crate::vm::{Vm, VmError, VmHooks};

/// A source that has been told this address connects at once; one that has not come by then is not coming.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a connected peer may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);

/// What a destination waits for.
#[derive(Debug)]
pub struct Incoming {
    /// The migration and the VM.
    pub prepared: Prepared,
    /// How long to wait for Commit after everything is loaded.
    pub commit_timeout: Duration,
    /// Where to leave the mark that vCPUs have run, if anywhere.
    pub ran_mark: RanMark,
}

/// Decides between Commit and abort: whichever comes first wins, for good.
#[derive(Debug, Clone, Default)]
pub struct Arbiter(Arc<Mutex<ArbiterState>>);

#[derive(Debug, Default)]
struct ArbiterState {
    verdict: Option<Verdict>,
    stream: Option<TcpStream>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Committed,
    Aborted,
}

impl Arbiter {
    fn lock(&self) -> MutexGuard<'_, ArbiterState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the migration unless Commit came first; `true` if Commit came first.
    #[must_use]
    pub fn abort(&self) -> bool {
        let mut state = self.lock();
        let verdict = *state.verdict.get_or_insert(Verdict::Aborted);
        if verdict == Verdict::Aborted
            && let Some(stream) = state.stream.take()
            && let Err(error) = stream.shutdown(Shutdown::Both)
        {
            tracing::debug!(%error, "the source had gone already");
        }
        verdict == Verdict::Committed
    }

    /// Whether Commit came.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        self.lock().verdict == Some(Verdict::Committed)
    }

    /// Commit came: leaves the mark and decides, both or neither.
    fn commit(&self, mark: &RanMark) -> Result<(), DestinationError> {
        let mut state = self.lock();
        if state.verdict.is_some() {
            return Err(DestinationError::AbortedHere);
        }
        let marked = mark.leave();
        state.verdict = Some(if marked.is_ok() {
            Verdict::Committed
        } else {
            Verdict::Aborted
        });
        marked.map_err(DestinationError::Mark)
    }

    fn watch(&self, stream: &TcpStream) -> Result<(), DestinationError> {
        let mut state = self.lock();
        if state.verdict.is_some() {
            return Err(DestinationError::AbortedHere);
        }
        state.stream = Some(stream.try_clone().map_err(WireError::from)?);
        Ok(())
    }
}

/// Why an incoming migration ended before Commit.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// Nobody came.
    #[error("no source connected within {} s", ACCEPT_TIMEOUT.as_secs())]
    NobodyCame,
    /// The listening socket failed.
    #[error("listening socket: {0}")]
    Listen(std::io::Error),
    /// The stream.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It cannot run here.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The VM could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// State could not be loaded.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The two sides do not agree on what was sent.
    #[error("pass {pass}: {received} pages arrived of {sent} that were sent")]
    PagesLost {
        /// Which pass.
        pass: u32,
        /// What the source says.
        sent: u64,
        /// What came.
        received: u64,
    },
    /// State came twice or not at all, or pages after it.
    #[error("frame {0:?}: out of place")]
    OutOfPlace(FrameKind),
    /// The control plane ended it.
    #[error("ended on request before Commit")]
    AbortedHere,
    /// The mark could not be left, so the VM was not started.
    #[error("cannot record that the VM runs here: {0}")]
    Mark(std::io::Error),
}

/// Receives one VM and runs it. Returns once it runs, or with the reason why it never will.
///
/// # Errors
/// Before Commit only: the VM has never run here.
pub fn receive(
    listener: &TcpListener,
    kvm: &Kvm,
    incoming: &Incoming,
    arbiter: &Arbiter,
    hooks: VmHooks,
) -> Result<Vm, DestinationError> {
    let (mut connection, hello) = accept(listener, incoming, arbiter)?;
    let outcome = phases(&mut connection, kvm, incoming, arbiter, hooks, &hello);
    if let Err(error) = &outcome {
        // Commit can no longer win, and the source learns why.
        let _ = arbiter.abort();
        if !matches!(
            error,
            DestinationError::Wire(WireError::Io(_) | WireError::Aborted(_))
        ) && let Err(error) = connection.send(FrameKind::Abort, &Abort::because(&error.to_string()))
        {
            tracing::debug!(%error, "the source had gone already");
        }
    }
    outcome
}

fn phases(
    connection: &mut Connection<TcpStream>,
    kvm: &Kvm,
    incoming: &Incoming,
    arbiter: &Arbiter,
    hooks: VmHooks,
    hello: &Hello,
) -> Result<Vm, DestinationError> {
    let vm = negotiate(connection, kvm, incoming, hooks, hello)?;
    let (saved, last_running) = pre_copy_and_final_pages(connection, &vm)?;
    state(connection, &vm, &saved, last_running, incoming)?;
    commit(connection, vm, incoming, arbiter)
}

/// Waits for the source this was prepared for. Others are turned away, and the wait goes on.
fn accept(
    listener: &TcpListener,
    incoming: &Incoming,
    arbiter: &Arbiter,
) -> Result<(Connection<TcpStream>, Hello), DestinationError> {
    let deadline = Instant::now() + ACCEPT_TIMEOUT;
    loop {
        wait_readable(listener, deadline)?;
        // A peer that has gone again by now is no reason to stop waiting for the right one.
        let Ok((stream, peer)) = listener.accept() else {
            continue;
        };
        let greeting = Greeting {
            stream,
            deadline: Instant::now() + HELLO_TIMEOUT,
        };
        let mut connection = Connection::new(greeting);
        let hello = connection
            .receive_preamble()
            .and_then(|_| connection.expect::<Hello>(FrameKind::Hello, "Hello"));
        let refused = match hello.map(|hello| (negotiate::check_identity(&hello, &incoming.prepared), hello))
        {
            Ok((Ok(()), hello)) => {
                let connection = connection.map_stream(|greeting| greeting.stream);
                arbiter.watch(connection.stream())?;
                wire::tune(connection.stream()).map_err(WireError::from)?;
                return Ok((connection, hello));
            }
            Ok((Err(refusal), _)) => refusal.to_string(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(%peer, reason = %refused, "turned a connection away");
        // A stranger need not hear it.
        let _ = connection.send(FrameKind::Abort, &Abort::because(&refused));
    }
}

/// A connection whose peer has not yet said who it is: all of that has one deadline, so that nobody can hold the
/// destination by sending a byte now and then.
struct Greeting {
    stream: TcpStream,
    deadline: Instant,
}

impl Greeting {
    fn time_left(&self) -> std::io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            Err(std::io::ErrorKind::TimedOut.into())
        } else {
            Ok(left)
        }
    }
}

impl Read for Greeting {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.stream.set_read_timeout(Some(self.time_left()?))?;
        self.stream.read(buffer)
    }
}

impl Write for Greeting {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.stream.set_write_timeout(Some(self.time_left()?))?;
        self.stream.write(data)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

fn wait_readable(listener: &TcpListener, deadline: Instant) -> Result<(), DestinationError> {
    let mut descriptor = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = libc::c_int::try_from(left.as_millis()).expect("at most a minute");
        // SAFETY: one pollfd, on the stack, for a descriptor that `listener` keeps open.
        match unsafe { libc::poll(&raw mut descriptor, 1, timeout) } {
            0 => return Err(DestinationError::NobodyCame),
            1.. => return Ok(()),
            _ => {
                let error = std::io::Error::last_os_error();
                if error.kind() != std::io::ErrorKind::Interrupted {
                    return Err(DestinationError::Listen(error));
                }
            }
        }
    }
}

fn negotiate(
    connection: &mut Connection<TcpStream>,
    kvm: &Kvm,
    incoming: &Incoming,
    hooks: VmHooks,
    hello: &Hello,
) -> Result<Vm, DestinationError> {
    let platform = negotiate::check(hello, &incoming.prepared, kvm)?;
    let vm = build::incoming_vm(kvm, &incoming.prepared.spec, platform, hooks)?;
    connection.send(
        FrameKind::HelloAck,
        &HelloAck {
            version: u32::from(wire::VERSION),
        },
    )?;
    Ok(vm)
}

/// Writes pages as they come, pass after pass, until the state comes. The final pass looks like every other. Gives the
/// state, and a moment at which the guest still ran at the source.
fn pre_copy_and_final_pages(
    connection: &mut Connection<TcpStream>,
    vm: &Vm,
) -> Result<(Vec<u8>, Instant), DestinationError> {
    let mut counts = PageCounts::default();
    let mut last_running = Instant::now();
    loop {
        let mut header = connection.receive_header()?;
        match header.kind {
            FrameKind::Pages => pages::receive(connection, &mut header, vm.memory(), &mut counts)?,
            FrameKind::PassEnd => {
                let pass: Pass = wire::decode(header.kind, &connection.receive_payload(&mut header)?)?;
                if pass.pages != counts.raw {
                    return Err(DestinationError::PagesLost {
                        pass: pass.pass,
                        sent: pass.pages,
                        received: counts.raw,
                    });
                }
                // The source pauses the guest after an acknowledgement, never before it.
                last_running = Instant::now();
                connection.send(FrameKind::PassAck, &pass)?;
            }
            FrameKind::State => return Ok((connection.receive_payload(&mut header)?, last_running)),
            FrameKind::Abort => return Err(wire::aborted(&connection.receive_payload(&mut header)?).into()),
            other => return Err(DestinationError::OutOfPlace(other)),
        }
    }
}

fn state(
    connection: &mut Connection<TcpStream>,
    vm: &Vm,
    saved: &[u8],
    last_running: Instant,
    incoming: &Incoming,
) -> Result<(), DestinationError> {
    vm.restore(saved, last_running)?;
    let migration_id = incoming.prepared.migration_id.as_bytes().to_vec();
    connection
        .stream()
        .set_read_timeout(Some(incoming.commit_timeout))
        .map_err(WireError::from)?;
    Ok(connection.send(FrameKind::Ready, &Step { migration_id })?)
}

fn commit(
    connection: &mut Connection<TcpStream>,
    vm: Vm,
    incoming: &Incoming,
    arbiter: &Arbiter,
) -> Result<Vm, DestinationError> {
    let step: Step = connection.expect(FrameKind::Commit, "Commit")?;
    if step.migration_id != incoming.prepared.migration_id.as_bytes() {
        return Err(Refusal::NotPrepared {
            field: "migration_id",
        }
        .into());
    }
    arbiter.commit(&incoming.ran_mark)?;
    vm.resume();
    if let Err(error) = connection.send(FrameKind::Running, &step) {
        tracing::warn!(%error, "the VM runs here, but the source could not be told; the scheduler will find out");
    }
    Ok(vm)
}
