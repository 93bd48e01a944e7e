//! The destination's side of a migration: the same phases as the source's, mirrored. The VM runs only after Commit, and not
//! even then if it came paused.

mod arbiter;
mod door;
mod greeting;
mod postcopy;
mod receivers;
mod v1;

use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;
use shoal_proto::vm::Verify;

use super::negotiate::{self, Prepared, Refusal};
use super::pages::WrittenPages;
use super::postcopy::destination::PostCopyError;
use super::postcopy::page_set::PageSet;
use super::sched::Gentleness;
use super::transport::{AcceptError, Closer, Identity, Transport};
use super::verify::{self, MemoryDigest, VerifyError};
use super::wire::{
    self, Abort, Connection, Digest, FrameKind, Hello, HelloAck, PEER_TIMEOUT, Pass, Role, Step, WireError,
};
use crate::build::{self, BuildError};
use crate::memory::{GuestMemory, MemoryError};
use crate::ran_mark::RanMark;
use crate::vm::{Vm, VmError, VmHooks};
pub use arbiter::Arbiter;
pub use door::Door;
pub use postcopy::Fetching;
use postcopy::Linked;
use receivers::Arrivals;

/// How long a source that is there may take to make its other connections.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections for pages, at most.
const MAX_CONNECTIONS: u32 = super::policy::MAX_CONNECTIONS;

/// What a destination waits for.
#[derive(Debug)]
pub struct Incoming {
    /// The migration and the VM.
    pub prepared: Prepared,
    /// How long to wait for Commit after everything is loaded.
    pub commit_timeout: Duration,
    /// How long to wait for a source that proves itself.
    pub accept_timeout: Duration,
    /// Where to leave the mark that vCPUs have run, if anywhere.
    pub ran_mark: RanMark,
    /// What the two sides know each other by; without, nothing is encrypted.
    pub identity: Option<Identity>,
}

/// Why an incoming migration ended before Commit.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The source did not connect, or the listening socket failed.
    #[error(transparent)]
    Accept(#[from] AcceptError),
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
    /// A page of the last pass is not what was sent; the guest was paused, so nobody wrote it.
    #[error("the page at {gpa:#x} does not match its checksum; the link or a host damages data")]
    Damaged {
        /// Guest physical address.
        gpa: u64,
    },
    /// Memory differs although every page matched.
    #[error("verify: guest memory differs from the source's at {gpa:#x}")]
    Differs {
        /// Guest physical address of the first block that does.
        gpa: u64,
    },
    /// A frame that belongs to verifying makes no sense.
    #[error("verify: {0}")]
    Verify(#[from] VerifyError),
    /// An unknown way to verify.
    #[error("verify: mode: {0}")]
    VerifyMode(prost::UnknownEnumValue),
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// A fault made for a test.
    #[error(transparent)]
    Fault(#[from] crate::fault::Fault),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Memory cannot be fetched while the VM runs.
    #[error(transparent)]
    PostCopy(#[from] PostCopyError),
    /// The connections of post-copy broke before the VM could have gone on without them.
    #[error("the connections for missing memory broke while the state was loaded")]
    LinksBroke,
    /// The control plane ended it.
    #[error("ended on request before Commit")]
    AbortedHere,
    /// The mark could not be left, so the VM was not started.
    #[error("cannot record that the VM runs here: {0}")]
    Mark(std::io::Error),
}

/// A VM that came, and runs or is paused.
#[derive(Debug)]
pub struct Received {
    /// The VM.
    pub vm: Vm,
    /// It was paused at its source, and is here.
    pub paused: bool,
    /// In post-copy: what has to go on until all of its memory is here.
    pub fetching: Option<Fetching>,
}

/// Receives one VM and runs it, unless it was paused. Returns once it runs or could, or with the reason why it never will.
///
/// # Errors
/// Before Commit only: the VM has never run here.
pub fn receive(
    door: &Door,
    kvm: &Kvm,
    incoming: &Incoming,
    arbiter: &Arbiter,
    hooks: VmHooks,
) -> Result<Received, DestinationError> {
    let deadline = Instant::now() + incoming.accept_timeout;
    // Before the source comes: on one host with this, its threads would count.
    let gentleness = Gentleness::of_host();
    let (mut control, preamble, hello) = door.first_control(deadline)?;
    let mut destination = Destination {
        door,
        kvm,
        incoming,
        arbiter,
        version: preamble.version,
        hello: &hello,
        gentleness,
    };
    let outcome = arbiter
        .watch(control.stream())
        .and_then(|()| crate::fault::point("destination.connect").map_err(Into::into))
        .and_then(|()| match preamble.version {
            wire::VERSION_1 => v1::phases(&mut destination, &mut control, hooks).map(|vm| (vm, None)),
            _ => destination.phases(&mut control, hooks),
        });
    if let Err(error) = &outcome {
        // Commit can no longer win, and the source learns why.
        let told = match error {
            DestinationError::Wire(WireError::Io(_) | WireError::Aborted(_)) => Ok(()),
            error => control.send(FrameKind::Abort, &Abort::because(&error.to_string())),
        };
        let _ = arbiter.abort();
        if let Err(error) = told {
            tracing::debug!(%error, "the source had gone already");
        }
    }
    outcome.map(|(vm, links)| Received {
        vm,
        paused: hello.paused,
        fetching: links.map(|links| Fetching::new(links, control)),
    })
}

struct Destination<'a> {
    door: &'a Door,
    kvm: &'a Kvm,
    incoming: &'a Incoming,
    arbiter: &'a Arbiter,
    version: u16,
    hello: &'a Hello,
    gentleness: Gentleness,
}

impl Destination<'_> {
    fn phases(
        &mut self,
        control: &mut Connection<Transport>,
        hooks: VmHooks,
    ) -> Result<(Vm, Option<Linked>), DestinationError> {
        let vm = self.negotiate(control, hooks)?;
        if self.hello.handover {
            // The source pauses the guest after HelloAck, never before it.
            let last_running = Instant::now();
            let saved = self.expect_state(control, &vm, None, &mut None)?;
            self.state(control, &vm, &saved, last_running, None)?;
            return Ok((self.commit(control, vm)?, None));
        }
        let connections = self.accept_data(control)?;
        let closers = closers(&connections)?;
        let written = WrittenPages::none(vm.memory());
        let arrivals = Arrivals::of(
            connections.len(),
            control.stream().closer().map_err(WireError::from)?,
        );
        let mut linked: Option<Linked> = None;
        let outcome = std::thread::scope(|scope| {
            let outcome = receivers::start(
                scope,
                connections,
                vm.memory(),
                &written,
                &arrivals,
                self.gentleness,
            )
            .and_then(|()| self.expect_state(control, &vm, Some(&arrivals), &mut linked))
            .and_then(|saved| {
                let last_running = linked
                    .as_ref()
                    .map_or_else(|| arrivals.last_running(), |linked| linked.since);
                self.state(control, &vm, &saved, last_running, linked.as_ref())
            })
            .and_then(|()| self.await_commit(control, &vm));
            // Before the connections are closed, at which receivers fail that had not: that would pass for the cause.
            let cause = arrivals.failure();
            if outcome.is_err() || linked.is_none() {
                // The receivers end with their connections; in post-copy they have ended, and it needs them.
                closers.iter().for_each(Closer::close);
            }
            outcome.map_err(|error| cause.unwrap_or(error))
        });
        if let (Err(error), Some(linked)) = (&outcome, &linked) {
            linked.post_copy.stop(&error.to_string());
        }
        outcome.map(|()| (vm, linked))
    }

    fn negotiate(&self, control: &mut Connection<Transport>, hooks: VmHooks) -> Result<Vm, DestinationError> {
        crate::fault::point("destination.negotiate")?;
        let platform = negotiate::check(self.hello, &self.incoming.prepared, self.kvm)?;
        let spec = &self.incoming.prepared.spec;
        let handed_over = if self.hello.handover {
            let descriptor = control
                .stream_mut()
                .receive_descriptor()
                .map_err(WireError::from)?;
            Some(GuestMemory::from_file(descriptor.into(), spec.memory_bytes)?)
        } else {
            None
        };
        let vm = build::incoming_vm(self.kvm, spec, handed_over, platform, hooks)?;
        let ack = HelloAck {
            version: u32::from(self.version),
            // Version 1 does not know of it, and gets the answer that it has always had.
            post_copy: self.version != wire::VERSION_1 && super::postcopy::is_possible(),
            paused: self.hello.paused,
        };
        control.send(FrameKind::HelloAck, &ack)?;
        Ok(vm)
    }

    fn accept_data(
        &self,
        control: &Connection<Transport>,
    ) -> Result<Vec<Connection<Transport>>, DestinationError> {
        let wanted = self.hello.connections;
        if !(1..=MAX_CONNECTIONS).contains(&wanted) {
            return Err(Refusal::Connections(wanted).into());
        }
        let deadline = Instant::now() + ATTACH_TIMEOUT;
        let mut connections = vec![];
        for index in 0..wanted {
            let connection = self.door.attached(Role::Data, index, deadline)?;
            self.arbiter.watch(connection.stream())?;
            connections.push(connection);
        }
        debug_assert!(!control.stream().local_host() || !self.hello.handover);
        Ok(connections)
    }

    /// Follows the control connection until the state comes. By then all pages are in memory, and were compared if asked.
    fn expect_state(
        &self,
        control: &mut Connection<Transport>,
        vm: &Vm,
        arrivals: Option<&Arrivals>,
        linked: &mut Option<Linked>,
    ) -> Result<Vec<u8>, DestinationError> {
        let mut complete = arrivals.is_none();
        let mut own_digest: Option<MemoryDigest> = None;
        let mut to_compare = false;
        loop {
            let mut header = control.receive_header()?;
            match header.kind {
                FrameKind::KeepAlive => drop(control.receive_payload(&mut header)?),
                FrameKind::PassEnd => {
                    let end: Pass = wire::decode(header.kind, &control.receive_payload(&mut header)?)?;
                    if let Some(arrivals) = arrivals {
                        arrivals.wait_for_last(end, PEER_TIMEOUT)?;
                    }
                    complete = true;
                    crate::fault::point("destination.pause")?;
                }
                // A VM that runs before its memory is there is one that runs.
                FrameKind::Missing if !complete && !self.hello.paused => {
                    let first = control.receive_payload(&mut header)?;
                    let missing = PageSet::receive_from(&first, control, &vm.memory().regions())?;
                    match (&linked, arrivals) {
                        (Some(linked), _) => {
                            linked.post_copy.add(&missing)?;
                            complete = true;
                            crate::fault::point("destination.pause")?;
                        }
                        (None, Some(arrivals)) => {
                            *linked = Some(self.link(control, vm, arrivals, &missing)?);
                        }
                        (None, None) => return Err(DestinationError::OutOfPlace(FrameKind::Missing)),
                    }
                }
                FrameKind::Verify if complete => {
                    crate::fault::point("destination.verify")?;
                    let asked: Digest = wire::decode(header.kind, &control.receive_payload(&mut header)?)?;
                    let mode = Verify::try_from(asked.mode).map_err(DestinationError::VerifyMode)?;
                    let threads = std::thread::available_parallelism().map_or(1, usize::from);
                    own_digest = Some(verify::digest(vm.memory(), mode, asked.seed, threads)?);
                    to_compare = true;
                }
                FrameKind::Digest => {
                    let sent: Digest = wire::decode(header.kind, &control.receive_payload(&mut header)?)?;
                    compare(own_digest.as_ref(), &sent.digest, vm.memory().len())?;
                    to_compare = false;
                }
                FrameKind::State if complete && !to_compare => {
                    return Ok(control.receive_payload(&mut header)?);
                }
                FrameKind::Abort => return Err(wire::aborted(&control.receive_payload(&mut header)?).into()),
                other => return Err(DestinationError::OutOfPlace(other)),
            }
        }
    }

    fn state(
        &self,
        control: &mut Connection<Transport>,
        vm: &Vm,
        saved: &[u8],
        last_running: Instant,
        linked: Option<&Linked>,
    ) -> Result<(), DestinationError> {
        crate::fault::point("destination.state")?;
        vm.restore(saved, last_running)?;
        if linked.is_some_and(|linked| !linked.post_copy.outlive_links()) {
            return Err(DestinationError::LinksBroke);
        }
        let migration_id = self.incoming.prepared.migration_id.as_bytes().to_vec();
        control
            .stream()
            .set_timeouts(Some(self.incoming.commit_timeout))
            .map_err(WireError::from)?;
        control.send(FrameKind::Ready, &Step { migration_id })?;
        crate::fault::point("destination.ready")?;
        Ok(())
    }

    fn commit(&self, control: &mut Connection<Transport>, vm: Vm) -> Result<Vm, DestinationError> {
        self.await_commit(control, &vm)?;
        Ok(vm)
    }

    fn await_commit(&self, control: &mut Connection<Transport>, vm: &Vm) -> Result<(), DestinationError> {
        let step: Step = control.expect(FrameKind::Commit, "Commit")?;
        if step.migration_id != self.incoming.prepared.migration_id.as_bytes() {
            let field = "migration_id";
            return Err(Refusal::NotPrepared { field }.into());
        }
        crate::fault::point("destination.commit")?;
        // From its decision on nothing may fail: the VM runs here.
        self.arbiter.commit(&self.incoming.ran_mark, || {
            struck("destination.marked");
            if !self.hello.paused {
                vm.resume();
            }
        })?;
        struck("destination.running");
        if let Err(error) = control.send(FrameKind::Running, &step) {
            tracing::warn!(%error, "the VM runs here, but the source could not be told; the scheduler will find out");
        }
        Ok(())
    }
}

/// A fault that can kill or hang, and has nothing to fail.
fn struck(point: &'static str) {
    if let Err(fault) = crate::fault::point(point) {
        tracing::warn!(%fault, "goes on: Commit has been decided");
    }
}

fn closers(connections: &[Connection<Transport>]) -> Result<Vec<Closer>, DestinationError> {
    let closer = |connection: &Connection<Transport>| connection.stream().closer();
    Ok(connections
        .iter()
        .map(closer)
        .collect::<Result<_, _>>()
        .map_err(WireError::from)?)
}

fn compare(own: Option<&MemoryDigest>, sent: &[u8], memory_bytes: u64) -> Result<(), DestinationError> {
    let own = own.ok_or(DestinationError::OutOfPlace(FrameKind::Digest))?;
    let sent = MemoryDigest::decode(sent, memory_bytes)?;
    match own.first_difference(&sent) {
        None => Ok(()),
        Some(gpa) => Err(DestinationError::Differs { gpa: gpa.0 }),
    }
}
