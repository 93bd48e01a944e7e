//! The one owner of the VM: a thread that takes commands from a queue, and the state machine they go through.
//!
//! While a migration runs, the VM belongs to the migration's thread; it comes back through the same queue. Status and
//! progress are published as they change, so nobody waits on this thread to read them.

mod incoming;
mod outgoing;
mod pause;
mod post_copy;
mod sampling;

use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvm_ioctls::Kvm;
use shoal_proto::vm::{MemoryBacking, MemorySample, MigrationPolicy, MigrationProgress, VmState, VmStatus};
use shoal_proto::{Epoch, MigrationId};
use tokio::sync::{oneshot, watch};

use crate::build::{self, BuildError};
use crate::console::Console;
use crate::devices::GuestGap;
use crate::migration::controls::Controls;
use crate::migration::destination::{Arbiter, DestinationError};
use crate::migration::negotiate::Prepared;
use crate::migration::policy::PolicyError;
use crate::migration::postcopy::destination::{Event, PostCopy};
use crate::migration::source::{Outgoing, Serving};
use crate::migration::transport::{Address, Identity};
use crate::ran_mark::RanMark;
use crate::sample::{SampleError, Sampler};
use crate::spec::{PAGE_SIZE, SpecError, VmSpec};
use crate::vcpu::GuestEnd;
use crate::vm::{Vm, VmError, VmHooks};

/// Why a command was refused.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A field of the spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The VM could not be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] VmError),
    /// Not in this state.
    #[error("the VM is {state}: {needs}")]
    WrongState {
        /// What it is.
        state: &'static str,
        /// What the command needs.
        needs: &'static str,
    },
    /// A migration nobody here knows.
    #[error("migration_id: {0} is not known here")]
    UnknownMigration(MigrationId),
    /// Commit has been sent.
    #[error("too late to cancel: Commit has been sent")]
    TooLate,
    /// Another epoch.
    #[error("epoch: {asked} was asked for and this VM has {has}")]
    Epoch {
        /// Asked for.
        asked: Epoch,
        /// The VM's.
        has: Epoch,
    },
    /// No listening socket.
    #[error("listen_address {address}: {source}")]
    Listen {
        /// Where.
        address: Address,
        /// Why not.
        source: std::io::Error,
    },
    /// A policy that cannot be.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// How memory is written cannot be sampled.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// No thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// The mark cannot be left, so the VM was not started.
    #[error("cannot record that the VM runs here: {0}")]
    Mark(std::io::Error),
    /// The process is ending.
    #[error("this VMM is ending")]
    Ending,
}

type Reply<T> = oneshot::Sender<Result<T, ControlError>>;

/// What can be asked of the owner.
#[derive(Debug)]
pub enum Command {
    /// Build and run a VM.
    Boot(Box<VmSpec>, Reply<VmStatus>),
    /// Wait for an incoming migration.
    PrepareIncoming(Box<IncomingRequest>, Reply<Address>),
    /// End it unless committed; answers whether it is.
    AbortIncoming(MigrationId, Reply<bool>),
    /// Begin an outgoing migration.
    StartMigration(Box<Outgoing>, Reply<()>),
    /// Cancel it.
    CancelMigration(MigrationId, Reply<()>),
    /// Change its policy; answers what is then in force.
    SetMigration(MigrationId, Box<MigrationPolicy>, Reply<MigrationPolicy>),
    /// Stop the vCPUs until resumed.
    Pause(Epoch, Reply<VmStatus>),
    /// Run again after a pause or an in-doubt migration.
    Resume(Epoch, Reply<VmStatus>),
    /// Power off.
    Stop(Reply<VmStatus>),
    /// Console input; answers how many bytes were taken.
    ConsoleInput(Vec<u8>, Reply<usize>),
    /// Track writes to memory for a while.
    BeginSample(Reply<()>),
    /// Say what was written since; nothing if something else has ended it.
    EndSample(Reply<Option<MemorySample>>),
    /// From a vCPU thread.
    GuestEnded(GuestEnd),
    /// From the outgoing migration's thread.
    OutgoingEnded(Box<Vm>, Box<MigrationProgress>),
    /// From the incoming migration's thread.
    IncomingEnded(Box<Result<Arrived, DestinationError>>),
    /// From the incoming migration's thread, in post-copy.
    Fetching(Event),
    /// From the outgoing migration's thread, in post-copy.
    Serving(Serving),
}

/// A VM that has come in.
#[derive(Debug)]
pub struct Arrived {
    /// The VM.
    pub vm: Vm,
    /// What of its memory still arrives, in post-copy.
    pub fetching: Option<PostCopy>,
    /// It came paused.
    pub paused: bool,
}

/// What PrepareIncoming asks for.
#[derive(Debug)]
pub struct IncomingRequest {
    /// The VM and the migration.
    pub prepared: Prepared,
    /// Where to listen.
    pub listen: Address,
    /// How long to wait for Commit once everything is loaded.
    pub commit_timeout: Duration,
    /// How long to wait for a source.
    pub accept_timeout: Duration,
    /// What the two sides know each other by.
    pub identity: Option<Identity>,
}

enum State {
    Empty,
    Running(Box<Vm>),
    Migrating(Arc<Controls>),
    Incoming(MigrationId, Arbiter),
    InDoubt(Box<Vm>),
    Paused(Box<Vm>),
    Ended,
}

/// How others reach the owner.
#[derive(Debug, Clone)]
pub struct ControlHandle {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<VmStatus>,
    progress: watch::Receiver<Option<MigrationProgress>>,
    console: Arc<Console>,
    guest_gap: Arc<GuestGap>,
    fetching: SharedFetching,
}

/// Post-copy at the destination, while it goes on.
type SharedFetching = Arc<Mutex<Option<PostCopy>>>;

impl ControlHandle {
    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    /// The owner's refusal.
    pub async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ControlError> {
        let (reply, answer) = oneshot::channel();
        self.commands
            .send(command(reply))
            .map_err(|_| ControlError::Ending)?;
        answer.await.map_err(|_| ControlError::Ending)?
    }

    /// The VM's status, now and at every change.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<VmStatus> {
        self.status.clone()
    }

    /// A status with the counters that change without an event.
    #[must_use]
    pub fn with_counters(&self, mut status: VmStatus) -> VmStatus {
        status.console_offset = self.console.end();
        status.guest_gap_us = self.guest_gap.longest_us();
        if let Some(fetching) = &*self.fetching.lock().unwrap_or_else(PoisonError::into_inner) {
            status.missing_bytes = fetching.missing_pages() * PAGE_SIZE;
        }
        status
    }

    /// Progress of the latest outgoing migration.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Option<MigrationProgress>> {
        self.progress.clone()
    }

    /// Console output.
    #[must_use]
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }
}

/// Settings of the process.
#[derive(Debug, Default)]
pub struct ControlConfig {
    /// Where to leave the mark that vCPUs have run.
    pub ran_mark: RanMark,
    /// Console output also goes to standard output.
    pub mirror_console: bool,
}

struct Control {
    kvm: Kvm,
    config: ControlConfig,
    commands: mpsc::Sender<Command>,
    console: Arc<Console>,
    guest_gap: Arc<GuestGap>,
    status: watch::Sender<VmStatus>,
    progress: watch::Sender<Option<MigrationProgress>>,
    state: State,
    spec: Option<VmSpec>,
    /// An incoming migration was committed here.
    came_in: bool,
    /// Pause was asked for and Resume was not since, here or at the source: the vCPUs stand still whatever becomes of a
    /// migration. Always so in [`State::Paused`].
    held: bool,
    stops: Vec<Reply<VmStatus>>,
    /// Asked for while the outgoing migration's thread still has the VM.
    resumes: Vec<Reply<VmStatus>>,
    fetching: SharedFetching,
    sampler: Sampler,
}

/// Starts the owner's thread.
///
/// # Errors
/// When KVM cannot be opened or a thread cannot be started.
pub fn start(config: ControlConfig) -> Result<ControlHandle, ControlError> {
    let kvm = build::open_kvm()?;
    crate::vcpu::install_kick_handler().map_err(VmError::from)?;
    let (commands, queue) = mpsc::channel();
    let pid = std::process::id();
    let (status, status_seen) = watch::channel(VmStatus {
        state: VmState::Empty.into(),
        pid,
        faults: crate::fault::armed().to_owned(),
        ..Default::default()
    });
    let (progress, progress_seen) = watch::channel(None);
    let console = Arc::new(Console::new(config.mirror_console));
    let guest_gap = Arc::new(GuestGap::default());
    let handle = ControlHandle {
        commands: commands.clone(),
        status: status_seen,
        progress: progress_seen,
        console: Arc::clone(&console),
        guest_gap: Arc::clone(&guest_gap),
        fetching: SharedFetching::default(),
    };
    let mut control = Control {
        kvm,
        config,
        commands,
        console,
        guest_gap,
        status,
        progress,
        state: State::Empty,
        spec: None,
        came_in: false,
        held: false,
        stops: vec![],
        resumes: vec![],
        fetching: Arc::clone(&handle.fetching),
        sampler: Sampler::default(),
    };
    spawn("control", move || {
        for command in queue {
            control.handle(command);
        }
    })?;
    Ok(handle)
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), ControlError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map(|_| ())
        .map_err(ControlError::Thread)
}

/// Answers a command; an asker that has gone away does not matter.
fn answer<T>(reply: Reply<T>, result: Result<T, ControlError>) {
    let _ = reply.send(result);
}

impl Control {
    fn handle(&mut self, command: Command) {
        match command {
            Command::Boot(spec, reply) => answer(reply, self.boot(*spec)),
            Command::PrepareIncoming(request, reply) => answer(reply, self.prepare_incoming(*request)),
            Command::AbortIncoming(id, reply) => answer(reply, self.abort_incoming(id)),
            Command::StartMigration(request, reply) => answer(reply, self.start_migration(*request)),
            Command::CancelMigration(id, reply) => answer(reply, self.cancel_migration(id)),
            Command::SetMigration(id, change, reply) => answer(reply, self.set_migration(id, &change)),
            Command::Pause(epoch, reply) => answer(reply, self.pause(epoch)),
            Command::Resume(epoch, reply) => self.resume(epoch, reply),
            Command::Stop(reply) => self.stop(reply),
            Command::ConsoleInput(data, reply) => answer(reply, self.console_input(&data)),
            Command::BeginSample(reply) => answer(reply, self.begin_sample()),
            Command::EndSample(reply) => answer(reply, self.end_sample()),
            Command::GuestEnded(end) => self.guest_ended(&end),
            Command::OutgoingEnded(vm, last) => self.outgoing_ended(vm, *last),
            Command::IncomingEnded(result) => self.incoming_ended(*result),
            Command::Fetching(event) => self.fetching(event),
            Command::Serving(serving) => self.serving(serving),
        }
    }

    fn state_name(&self) -> &'static str {
        match &self.state {
            State::Empty => "not there yet",
            State::Running(_) => "running",
            State::Migrating(_) if self.is_serving() => {
                "running at its destination, which fetches memory from here"
            }
            State::Migrating(_) => "migrating",
            State::Incoming(..) => "waiting for an incoming migration",
            State::InDoubt(_) => "in doubt",
            State::Paused(_) => "paused",
            State::Ended => "not here any more",
        }
    }

    fn wrong_state(&self, needs: &'static str) -> ControlError {
        ControlError::WrongState {
            state: self.state_name(),
            needs,
        }
    }

    fn publish(&mut self, state: VmState, message: impl Into<String>) {
        let message = message.into();
        tracing::info!(state = state.as_str_name(), %message, "VM state");
        self.status.send_modify(|status| {
            status.state = state.into();
            status.status_message = message;
        });
    }

    fn describe(&mut self, spec: &VmSpec) {
        self.status.send_modify(|status| {
            status.vm_id = spec.vm_id.to_string();
            status.name.clone_from(&spec.name);
            status.epoch = spec.epoch.0;
            status.memory_bytes = spec.memory_bytes;
            status.cpus = spec.cpus;
        });
    }

    fn describe_memory(&mut self, vm: &Vm) {
        let backing = MemoryBacking::from(vm.memory().backing());
        self.status
            .send_modify(|status| status.memory_backing = backing.into());
    }

    fn hooks(&self) -> VmHooks {
        let commands = self.commands.clone();
        VmHooks {
            console: Arc::clone(&self.console),
            guest_gap: Arc::clone(&self.guest_gap),
            ended: Box::new(move |end| {
                // The queue is gone only when the process ends.
                let _ = commands.send(Command::GuestEnded(end));
            }),
        }
    }

    fn boot(&mut self, spec: VmSpec) -> Result<VmStatus, ControlError> {
        let State::Empty = self.state else {
            return Err(self.wrong_state("one VMM boots one VM, once"));
        };
        self.describe(&spec);
        self.console.begin_at(spec.console_offset);
        let vm = build::boot_vm(&self.kvm, &spec, self.hooks())?;
        self.describe_memory(&vm);
        self.config.ran_mark.leave().map_err(ControlError::Mark)?;
        vm.resume();
        self.state = State::Running(Box::new(vm));
        self.spec = Some(spec);
        self.publish(VmState::Running, "");
        Ok(self.status.borrow().clone())
    }

    fn stop(&mut self, reply: Reply<VmStatus>) {
        self.abandon_sample();
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Running(vm) | State::InDoubt(vm) | State::Paused(vm) => {
                self.halt(&vm, "stopped on request");
                self.end(*vm, VmState::Exited, "stopped on request");
            }
            State::Migrating(controls) => {
                // Too late to cancel: the destination has it, and the answer is this VMM's last state.
                controls.cancel();
                if matches!(self.status.borrow().state(), VmState::PostCopy | VmState::InDoubt) {
                    controls.stop_serving();
                }
                self.state = State::Migrating(controls);
                self.stops.push(reply);
                return;
            }
            State::Incoming(id, arbiter) => {
                let committed = arbiter.is_committed();
                self.state = State::Incoming(id, arbiter);
                if committed {
                    // It runs already; the migration's thread is about to hand it over.
                    return self.stops.push(reply);
                }
                return answer(
                    reply,
                    Err(self.wrong_state("abort the incoming migration instead")),
                );
            }
            State::Empty => {
                self.state = State::Empty;
                return answer(reply, Err(self.wrong_state("there is nothing to stop")));
            }
            State::Ended => {}
        }
        answer(reply, Ok(self.status.borrow().clone()));
    }

    fn console_input(&mut self, data: &[u8]) -> Result<usize, ControlError> {
        match &self.state {
            State::Running(vm) => Ok(vm.devices().console_input(data)),
            _ => Err(self.wrong_state("console input needs a running VM; try again once it runs")),
        }
    }

    fn guest_ended(&mut self, _end: &GuestEnd) {
        // While a migration has the VM, its thread finds the end and gives the VM back.
        if let State::Running(_) = self.state {
            self.take_guest_end();
        }
    }

    fn take_guest_end(&mut self) {
        let State::Running(vm) = &self.state else { return };
        let Some(end) = vm.guest_end() else { return };
        self.abandon_sample();
        let State::Running(vm) = std::mem::replace(&mut self.state, State::Ended) else {
            return;
        };
        self.halt(&vm, "the guest ended");
        match end {
            GuestEnd::PowerOff => self.end(*vm, VmState::Exited, "the guest powered off"),
            GuestEnd::Reset => self.end(
                *vm,
                VmState::Exited,
                "the guest reset, as by a reboot or a triple fault",
            ),
            GuestEnd::Failed(why) => self.end(*vm, VmState::Failed, &why),
        }
    }

    /// Frees the VM and publishes how it ended. Console output and status stay until the process is told to quit.
    fn end(&mut self, vm: Vm, state: VmState, message: &str) {
        let exit_status = vm.devices().exit_status().map(u32::from);
        drop(vm);
        self.status.send_modify(|status| status.exit_status = exit_status);
        self.publish(state, message);
    }
}

#[cfg(test)]
mod tests;
