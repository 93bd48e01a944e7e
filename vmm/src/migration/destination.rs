//! The destination's side of a migration: the same phases as the source's, mirrored. The VM runs only after Commit.

use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

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

    fn commit(&self) -> Result<(), DestinationError> {
        match *self.lock().verdict.get_or_insert(Verdict::Committed) {
            Verdict::Committed => Ok(()),
            Verdict::Aborted => Err(DestinationError::AbortedHere),
        }
    }

    fn watch(&self, stream: &TcpStream) -> std::io::Result<()> {
        self.lock().stream = Some(stream.try_clone()?);
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
        ) && let Err(error) = connection.send(
            FrameKind::Abort,
            &Abort {
                reason: error.to_string(),
            },
        ) {
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
    let saved = pre_copy_and_final_pages(connection, &vm)?;
    state(connection, &vm, &saved, incoming)?;
    commit(connection, vm, incoming, arbiter)
}

/// Waits for the source this was prepared for. Others are turned away, and the wait goes on.
fn accept(
    listener: &TcpListener,
    incoming: &Incoming,
    arbiter: &Arbiter,
) -> Result<(Connection<TcpStream>, Hello), DestinationError> {
    loop {
        wait_readable(listener)?;
        let (stream, peer) = listener.accept().map_err(DestinationError::Listen)?;
        wire::tune(&stream)
            .and_then(|()| stream.set_read_timeout(Some(HELLO_TIMEOUT)))
            .map_err(WireError::from)?;
        let mut connection = Connection::new(stream);
        let hello = connection
            .receive_preamble()
            .and_then(|_| connection.expect::<Hello>(FrameKind::Hello, "Hello"));
        let refused = match hello {
            Ok(hello) => match negotiate::check_identity(&hello, &incoming.prepared) {
                Ok(()) => {
                    arbiter.watch(connection.stream()).map_err(WireError::from)?;
                    connection
                        .stream()
                        .set_read_timeout(Some(wire::PEER_TIMEOUT))
                        .map_err(WireError::from)?;
                    return Ok((connection, hello));
                }
                Err(refusal) => refusal.to_string(),
            },
            Err(error) => error.to_string(),
        };
        tracing::warn!(%peer, reason = %refused, "turned a connection away");
        // A stranger need not hear it.
        let _ = connection.send(FrameKind::Abort, &Abort { reason: refused });
    }
}

fn wait_readable(listener: &TcpListener) -> Result<(), DestinationError> {
    let mut descriptor = libc::pollfd {
        fd: listener.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let timeout = libc::c_int::try_from(ACCEPT_TIMEOUT.as_millis()).expect("a minute");
    loop {
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

/// Writes pages as they come, pass after pass, until the state comes. The final pass looks like every other.
fn pre_copy_and_final_pages(
    connection: &mut Connection<TcpStream>,
    vm: &Vm,
) -> Result<Vec<u8>, DestinationError> {
    let mut counts = PageCounts::default();
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
                connection.send(FrameKind::PassAck, &pass)?;
            }
            FrameKind::State => return Ok(connection.receive_payload(&mut header)?),
            FrameKind::Abort => return Err(wire::aborted(&connection.receive_payload(&mut header)?).into()),
            other => return Err(DestinationError::OutOfPlace(other)),
        }
    }
}

fn state(
    connection: &mut Connection<TcpStream>,
    vm: &Vm,
    saved: &[u8],
    incoming: &Incoming,
) -> Result<(), DestinationError> {
    vm.restore(saved)?;
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
    arbiter.commit()?;
    incoming.ran_mark.leave();
    vm.resume();
    if let Err(error) = connection.send(FrameKind::Running, &step) {
        tracing::warn!(%error, "the VM runs here, but the source could not be told; the scheduler will find out");
    }
    Ok(vm)
}
