//! The one owner of the VM: a thread that takes commands from a queue, and the state machine they go through.
//!
//! While a migration runs, the VM belongs to the migration's thread; it comes back through the same queue. Status and
//! progress are published as they change, so nobody waits on this thread to read them.

mod post_copy;
mod sampling;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvm_ioctls::Kvm;
use shoal_proto::vm::{
    MemoryBacking, MemorySample, MigrationPolicy, MigrationProgress, MigrationResult, VmState, VmStatus,
};
use shoal_proto::{Epoch, MigrationId};
use tokio::sync::{oneshot, watch};

use crate::build::{self, BuildError};
use crate::console::Console;
use crate::devices::GuestGap;
use crate::migration::controls::Controls;
use crate::migration::destination::{self, Arbiter, DestinationError, Fetching, Incoming, Received};
use crate::migration::negotiate::Prepared;
use crate::migration::policy::PolicyError;
use crate::migration::postcopy::destination::{Event, PostCopy};
use crate::migration::source::{self, Outgoing, Serving, SourceError};
use crate::migration::transport::{Address, Identity, Listener};
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
    /// Run again after an in-doubt migration.
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
    IncomingEnded(Box<Result<(Vm, Option<PostCopy>), DestinationError>>),
    /// From the incoming migration's thread, in post-copy.
    Fetching(Event),
    /// From the outgoing migration's thread, in post-copy.
    Serving(Serving),
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
    /// What the two sides know each other by.
    pub identity: Option<Identity>,
}

enum State {
    Empty,
    Running(Box<Vm>),
    Migrating(Arc<Controls>),
    Incoming(MigrationId, Arbiter),
    InDoubt(Box<Vm>),
    Ended,
}

/// How others reach the owner.
#[derive(Debug, Clone)]
pub struct ControlHandle {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<VmStatus>,
    progress: watch::Receiver<Option<MigrationProgress>>,
    console: Arc<Console>,
    emulated: Arc<AtomicU64>,
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
        status.emulated_instructions = self.emulated.load(std::sync::atomic::Ordering::Relaxed);
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
    emulated: Arc<AtomicU64>,
    guest_gap: Arc<GuestGap>,
    status: watch::Sender<VmStatus>,
    progress: watch::Sender<Option<MigrationProgress>>,
    state: State,
    spec: Option<VmSpec>,
    /// An incoming migration was committed here.
    came_in: bool,
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
        ..Default::default()
    });
    let (progress, progress_seen) = watch::channel(None);
    let console = Arc::new(Console::new(config.mirror_console));
    let emulated = Arc::new(AtomicU64::new(0));
    let guest_gap = Arc::new(GuestGap::default());
    let handle = ControlHandle {
        commands: commands.clone(),
        status: status_seen,
        progress: progress_seen,
        console: Arc::clone(&console),
        emulated: Arc::clone(&emulated),
        guest_gap: Arc::clone(&guest_gap),
        fetching: SharedFetching::default(),
    };
    let mut control = Control {
        kvm,
        config,
        commands,
        console,
        emulated,
        guest_gap,
        status,
        progress,
        state: State::Empty,
        spec: None,
        came_in: false,
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
            emulated: Arc::clone(&self.emulated),
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
        let vm = build::boot_vm(&self.kvm, &spec, self.hooks())?;
        self.describe_memory(&vm);
        self.config.ran_mark.leave().map_err(ControlError::Mark)?;
        vm.resume();
        self.state = State::Running(Box::new(vm));
        self.spec = Some(spec);
        self.publish(VmState::Running, "");
        Ok(self.status.borrow().clone())
    }

    fn prepare_incoming(&mut self, request: IncomingRequest) -> Result<Address, ControlError> {
        let State::Empty = self.state else {
            return Err(self.wrong_state("one VMM takes one VM, once"));
        };
        let listen_error = |source| ControlError::Listen {
            address: request.listen.clone(),
            source,
        };
        let listener = Listener::bind(&request.listen).map_err(listen_error)?;
        let address = listener.local_address().clone();
        let migration_id = request.prepared.migration_id;
        let spec = request.prepared.spec.clone();
        let arbiter = Arbiter::default();
        let incoming = Incoming {
            prepared: request.prepared,
            commit_timeout: request.commit_timeout,
            ran_mark: self.config.ran_mark.clone(),
            identity: request.identity,
        };
        let (kvm, hooks, commands) = (build::open_kvm()?, self.hooks(), self.commands.clone());
        let for_thread = arbiter.clone();
        spawn("incoming", move || {
            let result = destination::receive(&listener, &kvm, &incoming, &for_thread, hooks);
            let (result, fetching) = match result {
                Ok(Received { vm, fetching }) => {
                    (Ok((vm, fetching.as_ref().map(Fetching::post_copy))), fetching)
                }
                Err(error) => (Err(error), None),
            };
            let _ = commands.send(Command::IncomingEnded(Box::new(result)));
            if let Some(fetching) = fetching {
                fetching.run(&listener, &incoming, |event| {
                    let _ = commands.send(Command::Fetching(event));
                });
            }
        })?;
        self.describe(&spec);
        self.status
            .send_modify(|status| status.incoming_migration_id = migration_id.to_string());
        self.state = State::Incoming(migration_id, arbiter);
        self.spec = Some(spec);
        self.publish(VmState::Incoming, format!("waits for migration {migration_id}"));
        Ok(address)
    }

    fn abort_incoming(&mut self, id: MigrationId) -> Result<bool, ControlError> {
        if let State::Incoming(own, arbiter) = &self.state
            && *own == id
        {
            let committed = arbiter.abort();
            if !committed {
                self.state = State::Ended;
                self.publish(VmState::Failed, "the incoming migration was ended on request");
            }
            return Ok(committed);
        }
        let status = self.status.borrow();
        if status.incoming_migration_id != id.to_string() {
            return Err(ControlError::UnknownMigration(id));
        }
        // It ended already: failed before Commit, or became a VM that ran, and may have failed since.
        Ok(status.state() != VmState::Failed || self.came_in)
    }

    fn incoming_ended(&mut self, result: Result<(Vm, Option<PostCopy>), DestinationError>) {
        match result {
            Ok((vm, fetching)) => {
                *self.fetched() = fetching;
                self.came_in = true;
                self.describe_memory(&vm);
                self.state = State::Running(Box::new(vm));
                let arriving = self.fetched().is_some();
                let message = if arriving { "its memory still arrives" } else { "" };
                self.publish(VmState::Running, message);
                self.take_guest_end();
            }
            Err(error) => {
                if let State::Incoming(..) = self.state {
                    self.state = State::Ended;
                    self.publish(VmState::Failed, format!("incoming migration: {error}"));
                }
            }
        }
    }

    fn start_migration(&mut self, request: Outgoing) -> Result<(), ControlError> {
        let State::Running(_) = self.state else {
            return Err(self.wrong_state("only a running VM migrates"));
        };
        if self.fetched().is_some() {
            return Err(ControlError::WrongState {
                state: "running while its memory still arrives",
                needs: "it can migrate again once all of its memory is here",
            });
        }
        let kvm = build::open_kvm()?;
        let Some(spec) = self.spec.clone() else {
            return Err(self.wrong_state("only a running VM migrates"));
        };
        let controls = Arc::new(Controls::new(request.policy.clone()));
        // The thread first, then the VM: a host that has no thread to give must not cost the guest its life.
        let (hand_over, taken) = mpsc::channel::<Box<Vm>>();
        let (progress, commands, switch) = (
            self.progress.clone(),
            self.commands.clone(),
            Arc::clone(&controls),
        );
        let request_id = request.migration_id;
        let destination = request.destination.clone();
        spawn("migration", move || {
            let Ok(vm) = taken.recv() else { return };
            let tell = |serving| {
                let _ = commands.send(Command::Serving(serving));
            };
            let migrate = || source::migrate(&vm, &spec, &kvm, &request, &switch, progress, &tell);
            let last = catch_unwind(AssertUnwindSafe(migrate)).unwrap_or_else(|_| {
                let fault = "a fault in the VMM's migration thread; see its log";
                let result = if switch.commit_sent() {
                    MigrationResult::InDoubt
                } else {
                    vm.resume();
                    MigrationResult::Failed
                };
                source::broken_off(request.migration_id, result, fault)
            });
            let _ = commands.send(Command::OutgoingEnded(vm, Box::new(last)));
        })?;
        // It has the dirty log to itself.
        self.abandon_sample();
        let State::Running(vm) = std::mem::replace(&mut self.state, State::Migrating(controls)) else {
            return Err(self.wrong_state("only a running VM migrates"));
        };
        self.guest_gap.start_again();
        let id = request_id;
        self.status
            .send_modify(|status| status.outgoing_migration_id = id.to_string());
        self.progress.send_replace(Some(MigrationProgress {
            migration_id: id.to_string(),
            ..Default::default()
        }));
        self.publish(VmState::Migrating, format!("to {destination}"));
        // The thread waits for nothing else.
        let _ = hand_over.send(vm);
        Ok(())
    }

    fn outgoing_ended(&mut self, vm: Box<Vm>, last: MigrationProgress) {
        let report = last.report.clone().unwrap_or_default();
        let mut to_free = None;
        match report.result() {
            MigrationResult::Completed => {
                self.state = State::Ended;
                match report.reason {
                    why if why == SourceError::ServingStopped.to_string() => {
                        self.publish(VmState::Exited, why);
                    }
                    why if why.is_empty() => self.publish(VmState::Migrated, "runs at its destination"),
                    why => self.publish(VmState::Migrated, why),
                }
                to_free = Some(vm);
            }
            MigrationResult::InDoubt => {
                self.state = State::InDoubt(vm);
                self.publish(VmState::InDoubt, report.reason);
            }
            _ => {
                self.state = State::Running(vm);
                self.publish(VmState::Running, format!("migration ended: {}", report.reason));
                self.take_guest_end();
            }
        }
        self.progress.send_replace(Some(last));
        let epoch = self.spec.as_ref().map_or(Epoch(0), |spec| spec.epoch);
        for reply in std::mem::take(&mut self.resumes) {
            self.resume(epoch, reply);
        }
        for reply in std::mem::take(&mut self.stops) {
            self.stop(reply);
        }
        // Last: unmapping gigabytes takes a while, and nobody has to wait for it.
        drop(to_free);
    }

    fn outgoing(&self, id: MigrationId) -> Result<&Controls, ControlError> {
        let same = self.status.borrow().outgoing_migration_id == id.to_string();
        match &self.state {
            State::Migrating(controls) if same => Ok(controls),
            _ => Err(ControlError::UnknownMigration(id)),
        }
    }

    fn cancel_migration(&self, id: MigrationId) -> Result<(), ControlError> {
        if self.outgoing(id)?.cancel() {
            Ok(())
        } else {
            Err(ControlError::TooLate)
        }
    }

    fn set_migration(
        &self,
        id: MigrationId,
        change: &MigrationPolicy,
    ) -> Result<MigrationPolicy, ControlError> {
        Ok(MigrationPolicy::from(&self.outgoing(id)?.change(change)?))
    }

    fn resume(&mut self, asked: Epoch, reply: Reply<VmStatus>) {
        let has = self.spec.as_ref().map_or(Epoch(0), |spec| spec.epoch);
        if asked != has {
            return answer(reply, Err(ControlError::Epoch { asked, has }));
        }
        if let State::Migrating(controls) = &self.state
            && self.status.borrow().state() == VmState::InDoubt
        {
            // Its thread goes on to look for the destination; it gives the VM back first.
            controls.stop_serving();
            self.resumes.push(reply);
            return;
        }
        let resumed = self.resume_in_doubt();
        answer(reply, resumed);
    }

    fn resume_in_doubt(&mut self) -> Result<VmStatus, ControlError> {
        match std::mem::replace(&mut self.state, State::Ended) {
            State::InDoubt(vm) => {
                vm.resume();
                self.state = State::Running(vm);
                self.publish(VmState::Running, "resumed: the destination never committed");
                Ok(self.status.borrow().clone())
            }
            other => {
                self.state = other;
                Err(self.wrong_state("only a VM in doubt is resumed"))
            }
        }
    }

    fn stop(&mut self, reply: Reply<VmStatus>) {
        self.abandon_sample();
        match std::mem::replace(&mut self.state, State::Ended) {
            State::Running(vm) | State::InDoubt(vm) => {
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
                self.state = State::Incoming(id, arbiter);
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
            GuestEnd::Reset => self.end(*vm, VmState::Exited, "the guest reset"),
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
