//! A vCPU: one thread that runs guest code until it is told to park or the guest ends.
//!
//! The thread holds the vCPU's descriptor only while it runs guest code. Once parked, the owner of the VM may lock the
//! descriptor to save or restore its state.

mod alone;
mod settle;
mod state;
mod unemulated;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use alone::kicked_after;
pub use alone::run_at_most;
pub use settle::settle;
pub use state::{VcpuStateError, forget_tsc, read_tsc, read_tsc_khz, restore, save};
pub use unemulated::explain as explain_internal_error;

use crate::devices::{Devices, PowerRequest};
use crate::memory::Mmap;

/// How long a vCPU runs on that was stopped where KVM does not tell all of its state.
const MOMENT: Duration = Duration::from_micros(50);

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEnd {
    /// ACPI power off.
    PowerOff,
    /// Reset by keyboard controller, ACPI, or triple fault.
    Reset,
    /// Guest or KVM did something that cannot be gone on from.
    Failed(String),
}

/// What vCPU threads share with the rest of the VM.
pub struct VcpuContext {
    /// Port I/O goes here.
    pub devices: Arc<Devices>,
    /// Guest memory, where the instruction before RIP is looked at.
    pub memory: Mmap,
    /// Told once by each vCPU that ends.
    pub ended: Box<dyn Fn(u32, GuestEnd) + Send + Sync>,
}

impl VcpuContext {
    /// A guest that had begun to say why it fails has failed, however it ended then.
    fn with_last_words(&self, end: GuestEnd) -> GuestEnd {
        match end {
            GuestEnd::Failed(_) => end,
            GuestEnd::PowerOff | GuestEnd::Reset => {
                self.devices.unfinished_last_words().map_or(end, GuestEnd::Failed)
            }
        }
    }
}

impl std::fmt::Debug for VcpuContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuContext").finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Park,
    Quit,
}

/// Whether a vCPU may run. The VM's owner says what it wants; a [`Brake`] can only hold back a vCPU that is wanted to
/// run. So neither undoes what the other asked for, in whatever order they ask.
#[derive(Debug)]
struct Gate {
    wanted: Wanted,
    /// A brake holds it.
    braked: bool,
    /// It runs no guest code because a brake holds it, so its owner does not count it as parked.
    held: bool,
    /// It runs no guest code, and its state can be saved.
    parked: bool,
    /// The guest ended on this vCPU; it never runs again.
    ended: bool,
    /// The thread, while it lives.
    thread: Option<libc::pthread_t>,
    braking: Braking,
}

/// What brakes took from a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Braking {
    /// Times a vCPU that was to run was stopped.
    pub stops: u64,
    /// How long, in all.
    pub taken: Duration,
}

#[derive(Debug)]
struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
    fd: Mutex<VcpuFd>,
}

/// A handle on a vCPU and its thread, which starts parked.
#[derive(Debug)]
pub struct Vcpu {
    id: u32,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Why a vCPU thread could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// No thread.
    #[error("cannot start the thread of vCPU {id}: {source}")]
    Thread {
        /// Which vCPU.
        id: u32,
        /// The reason.
        source: std::io::Error,
    },
    /// KVM runs no guest code.
    #[error("KVM_RUN: {0}")]
    Run(kvm_ioctls::Error),
    /// No signal handler.
    #[error("cannot install the signal handler that stops vCPUs: {0}")]
    Signal(vmm_sys_util::errno::Error),
}

thread_local! {
    /// The `kvm_run` page of the vCPU that this thread runs, for the signal handler.
    static CURRENT_RUN: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

/// Makes the next, or the present, KVM_RUN of this thread return: without it a signal that lands between the check of
/// the gate and KVM_RUN would be lost (Documentation/virt/kvm/api.rst, immediate_exit).
extern "C" fn kick_handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    CURRENT_RUN.with(|run| {
        let run = run.get();
        if !run.is_null() {
            // SAFETY: set by this very thread to the kvm_run mapping of a VcpuFd that it keeps alive, and cleared before
            // the thread ends; a one-byte store is what KVM defines for this field from a signal handler.
            unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
        }
    });
}

/// Installs the handler for the kick signal. Once per process, before any vCPU runs.
///
/// # Errors
/// When the host refuses the handler.
pub fn install_kick_handler() -> Result<(), VcpuError> {
    register_signal_handler(SIGRTMIN(), kick_handler).map_err(VcpuError::Signal)
}

impl Vcpu {
    /// Starts the thread, parked.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn spawn(id: u32, fd: VcpuFd, context: Arc<VcpuContext>) -> Result<Self, VcpuError> {
        let gate = Gate {
            wanted: Wanted::Park,
            braked: false,
            held: false,
            parked: false,
            ended: false,
            thread: None,
            braking: Braking::default(),
        };
        let shared = Arc::new(Shared {
            gate: Mutex::new(gate),
            changed: Condvar::new(),
            fd: Mutex::new(fd),
        });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || thread_main(id, &for_thread, &context))
            .map_err(|source| VcpuError::Thread { id, source })?;
        Ok(Self {
            id,
            shared,
            thread: Some(thread),
        })
    }

    /// Lets the thread run guest code.
    pub fn run(&self) {
        self.want(Wanted::Run);
    }

    /// Asks the thread to park; [`Vcpu::wait_parked`] tells when it has.
    pub fn request_park(&self) {
        self.want(Wanted::Park);
        self.shared.kick();
    }

    /// Returns once the thread runs no guest code, or has been told to run again meanwhile.
    pub fn wait_parked(&self) {
        let mut gate = lock(&self.shared.gate);
        while !gate.parked && gate.wanted != Wanted::Run {
            gate = self
                .shared
                .changed
                .wait(gate)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The descriptor of a parked vCPU.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        lock(&self.shared.fd)
    }

    /// The same, at once: none if the vCPU runs, or is held by a brake where its state cannot be saved.
    pub fn fd_if_parked(&self) -> Option<MutexGuard<'_, VcpuFd>> {
        if !lock(&self.shared.gate).parked {
            return None;
        }
        match self.shared.fd.try_lock() {
            Ok(fd) => Some(fd),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Its number, which is also its local APIC id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// What holds this vCPU back for a while. One at a time.
    #[must_use]
    pub fn brake(&self) -> Brake {
        Brake {
            shared: Arc::clone(&self.shared),
            holds: AtomicBool::new(false),
        }
    }

    fn want(&self, wanted: Wanted) {
        let mut gate = lock(&self.shared.gate);
        if wanted == Wanted::Run {
            if gate.ended {
                return;
            }
            gate.parked = false;
        }
        gate.wanted = wanted;
        self.shared.changed.notify_all();
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.want(Wanted::Quit);
        self.shared.kick();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(vcpu = self.id, "vCPU thread panicked");
        }
    }
}

impl Shared {
    fn kick(&self) {
        let gate = lock(&self.gate);
        if let Some(thread) = gate.thread {
            // SAFETY: the thread takes its id back under this lock before it ends, so it lives; the signal's handler was
            // installed before any vCPU ran.
            let failed = unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
            if failed != 0 {
                tracing::warn!(error = failed, "cannot kick a vCPU");
            }
        }
    }
}

/// Holds one vCPU back, at the latest until dropped. Outlives its vCPU without harm.
#[derive(Debug)]
pub struct Brake {
    shared: Arc<Shared>,
    holds: AtomicBool,
}

impl Brake {
    /// Stops the vCPU soon, if it is to run; it stays stopped, whatever its owner wants, until released.
    pub fn hold(&self) {
        self.holds.store(true, Ordering::SeqCst);
        lock(&self.shared.gate).braked = true;
        self.shared.kick();
    }

    /// Lets it go on, if its owner wants it to.
    pub fn release(&self) {
        self.holds.store(false, Ordering::SeqCst);
        let mut gate = lock(&self.shared.gate);
        if gate.braked {
            gate.braked = false;
            self.shared.changed.notify_all();
        }
    }

    /// What was taken from this vCPU since it was made. Time counts when it is over.
    #[must_use]
    pub fn braking(&self) -> Braking {
        lock(&self.shared.gate).braking
    }
}

impl Drop for Brake {
    fn drop(&mut self) {
        if self.holds.load(Ordering::SeqCst) {
            self.release();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Marks this thread as the runner of `fd` for the signal handler, as long as it lives.
struct CurrentRun;

impl CurrentRun {
    fn new(fd: &mut VcpuFd) -> Self {
        let run: *mut kvm_run = fd.get_kvm_run();
        CURRENT_RUN.with(|current| current.set(run));
        Self
    }
}

impl Drop for CurrentRun {
    fn drop(&mut self) {
        CURRENT_RUN.with(|current| current.set(std::ptr::null_mut()));
    }
}

/// Tells the gate which thread to kick, as long as it lives.
struct Runner<'a>(&'a Shared);

impl<'a> Runner<'a> {
    fn new(shared: &'a Shared) -> Self {
        // SAFETY: without preconditions.
        lock(&shared.gate).thread = Some(unsafe { libc::pthread_self() });
        Self(shared)
    }
}

impl Drop for Runner<'_> {
    fn drop(&mut self) {
        lock(&self.0.gate).thread = None;
    }
}

/// What a vCPU's thread is to do next.
enum Go {
    /// Run guest code. `was_paused` before; a brake is no pause.
    Run { was_paused: bool },
    /// Come to where its state can be saved.
    Settle,
}

/// Waits until there is something to do; `None` when the thread is to end. A vCPU parks only if it is `settled`.
fn wait_for_go(shared: &Shared, settled: bool) -> Option<Go> {
    let mut was_paused = false;
    let mut gate = lock(&shared.gate);
    let mut held_since: Option<Instant> = None;
    loop {
        if let Some(since) = held_since.take() {
            gate.braking.taken += since.elapsed();
        }
        match gate.wanted {
            Wanted::Run if !gate.braked => {
                gate.held = false;
                return Some(Go::Run { was_paused });
            }
            Wanted::Quit => return None,
            Wanted::Run => {
                if !gate.held {
                    gate.braking.stops += 1;
                    gate.held = true;
                }
                held_since = Some(Instant::now());
            }
            Wanted::Park if !settled => return Some(Go::Settle),
            Wanted::Park => {
                was_paused = true;
                gate.parked = true;
                shared.changed.notify_all();
            }
        }
        gate = shared.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
    }
}

fn thread_main(id: u32, shared: &Shared, context: &VcpuContext) {
    let _current = CurrentRun::new(&mut lock(&shared.fd));
    let _runner = Runner::new(shared);
    let mut settled = true;
    while let Some(go) = wait_for_go(shared, settled) {
        if let Go::Run { was_paused: true } = go {
            tell_guest_it_was_paused(&lock(&shared.fd));
        }
        // A fault of this VMM must not leave the owner waiting for a thread that never parks.
        let end = catch_unwind(AssertUnwindSafe(|| {
            let mut fd = lock(&shared.fd);
            let end = match go {
                Go::Run { .. } => run_until_kicked(&mut fd, context),
                Go::Settle => run_until_settled(&mut fd, context),
            };
            Some(context.with_last_words(end?))
        }))
        .unwrap_or_else(|_| {
            Some(GuestEnd::Failed(
                "a fault in the VMM's vCPU thread; see its log".into(),
            ))
        });
        settled = end.is_some() || matches!(go, Go::Settle);
        if let Some(end) = end {
            let mut gate = lock(&shared.gate);
            gate.ended = true;
            if gate.wanted == Wanted::Run {
                gate.wanted = Wanted::Park;
            }
            drop(gate);
            (context.ended)(id, end);
        }
    }
}

/// So that its watchdogs do not take the pause for a lockup (KVM_KVMCLOCK_CTRL).
fn tell_guest_it_was_paused(fd: &VcpuFd) {
    if let Err(error) = fd.kvmclock_ctrl() {
        tracing::trace!(%error, "the guest does not use KVM's clock");
    }
}

/// Runs guest code that was stopped to where its state can be saved (`None`), or to the guest's end.
fn run_until_settled(fd: &mut VcpuFd, context: &VcpuContext) -> Option<GuestEnd> {
    let settled = settle(fd, &context.memory, |fd| {
        kicked_after(MOMENT, || run_until_kicked(fd, context))
    });
    settled.unwrap_or_else(|error| {
        tracing::warn!(%error, "a vCPU is stopped where it was");
        None
    })
}

/// Runs guest code until a kick (`None`) or the guest's end. Pending port I/O is complete on return from a kick: KVM
/// completes it on entry, before it looks at `immediate_exit`.
fn run_until_kicked(fd: &mut VcpuFd, context: &VcpuContext) -> Option<GuestEnd> {
    loop {
        let exit = match fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                fd.set_kvm_immediate_exit(0);
                return None;
            }
            Err(error) => return Some(GuestEnd::Failed(format!("KVM_RUN: {error}"))),
        };
        match exit {
            VcpuExit::IoOut(port, data) => {
                if let Some(request) = context.devices.port_write(port, data) {
                    return Some(match request {
                        PowerRequest::Off => GuestEnd::PowerOff,
                        PowerRequest::Reset => GuestEnd::Reset,
                        PowerRequest::Failed(why) => GuestEnd::Failed(why),
                    });
                }
            }
            VcpuExit::IoIn(port, data) => context.devices.port_read(port, data),
            VcpuExit::MmioRead(_, data) => data.fill(0xff),
            VcpuExit::MmioWrite(..) | VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            VcpuExit::Shutdown => return Some(GuestEnd::Reset),
            VcpuExit::Hlt => return Some(GuestEnd::PowerOff),
            VcpuExit::SystemEvent(event, _) => return Some(system_event(event)),
            VcpuExit::InternalError => return Some(GuestEnd::Failed(explain_internal_error(fd))),
            VcpuExit::FailEntry(reason, _) => {
                return Some(GuestEnd::Failed(format!(
                    "KVM could not enter the guest: hardware reason {reason:#x}"
                )));
            }
            other => return Some(GuestEnd::Failed(format!("unexpected exit {other:?}"))),
        }
    }
}

fn system_event(event: u32) -> GuestEnd {
    match event {
        kvm_bindings::KVM_SYSTEM_EVENT_SHUTDOWN => GuestEnd::PowerOff,
        kvm_bindings::KVM_SYSTEM_EVENT_RESET => GuestEnd::Reset,
        other => GuestEnd::Failed(format!("KVM system event {other}")),
    }
}
