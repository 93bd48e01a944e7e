//! Slows a guest down while it is migrated: its vCPUs are held for a share of each short period, so that it writes memory
//! no faster than the link takes it. How much is needed is a pure function of what was measured.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::vcpu::{Brake, Braking};
use crate::vm::Vm;

/// Largest share of vCPU time that is taken. In the hundredth part of a pass of seconds a guest still writes tens of MiB, so
/// a share of 99 % would leave it ahead of a slow link for ever.
pub const MAX_PERMILLE: u32 = 998;
/// The longest period up to a share of 99 %, and so nearly the longest time that the guest stands still at once; above, it
/// is what a run of [`LEAST_RUN`] makes it.
const LONGEST_PERIOD: Duration = Duration::from_millis(10);
const SHORTEST_PERIOD: Duration = Duration::from_millis(4);
/// What a guest gets at once, where the period allows it: stopping a vCPU costs 0.12 ms.
const RUN_AT_ONCE: Duration = Duration::from_micros(500);
/// A guest that is released for less does nothing but stop again.
const LEAST_RUN: Duration = Duration::from_micros(100);
/// A host that has no CPU for the thread that throttles lets the guest run for too long. It is held for longer then, up to
/// this much.
const LONGEST_MAKING_UP: Duration = Duration::from_millis(50);
/// A pass must be by a third shorter than the one before.
const PASS_RATIO: f64 = 2.0 / 3.0;

/// How long the guest runs, and is then held, in each period.
fn period(permille: u32) -> (Duration, Duration) {
    let run_share = f64::from(1000 - permille.min(MAX_PERMILLE)) / 1000.0;
    let whole = RUN_AT_ONCE
        .div_f64(run_share)
        .clamp(SHORTEST_PERIOD, LONGEST_PERIOD)
        .max(LEAST_RUN.div_f64(run_share));
    let run = whole.mul_f64(run_share);
    (run, whole - run)
}

/// How much longer the guest is held after it `ran` for longer than the `run` of its period.
fn made_up(ran: Duration, run: Duration, hold: Duration) -> Duration {
    let owed = hold.as_secs_f64() / run.as_secs_f64().max(1e-9);
    let longer = ran.saturating_sub(run).as_secs_f64() * owed;
    Duration::from_secs_f64(longer.min(LONGEST_MAKING_UP.as_secs_f64()))
}

#[derive(Debug, Default)]
struct Setting {
    permille: u32,
    quit: bool,
}

#[derive(Debug, Default)]
struct Shared {
    setting: Mutex<Setting>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Setting> {
        self.setting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits so long, or until the setting changes.
    fn wait<'a>(&self, setting: MutexGuard<'a, Setting>, time: Duration) -> MutexGuard<'a, Setting> {
        let (permille, deadline) = (setting.permille, Instant::now() + time);
        let mut setting = setting;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || setting.quit || setting.permille != permille {
                return setting;
            }
            let woken = self.changed.wait_timeout(setting, left);
            setting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Throttles a VM's vCPUs while it exists, at first by nothing. Dropped, by whatever way, it leaves them as their owner
/// wants them. One at a time.
#[derive(Debug)]
pub struct Throttle {
    shared: Arc<Shared>,
    brakes: Arc<Vec<Brake>>,
    before: Duration,
    thread: Option<JoinHandle<()>>,
}

impl Throttle {
    /// A throttle of all vCPUs of `vm`.
    ///
    /// # Errors
    /// When the host has no thread to give.
    pub fn start(vm: &Vm) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let brakes = Arc::new(vm.brakes());
        let (for_thread, its_brakes) = (Arc::clone(&shared), Arc::clone(&brakes));
        let thread = std::thread::Builder::new()
            .name("throttle".into())
            .spawn(move || throttle(&for_thread, &its_brakes))?;
        let before = total(&brakes).taken;
        Ok(Self {
            shared,
            brakes,
            before,
            thread: Some(thread),
        })
    }

    /// Takes this share of vCPU time from now on, at most [`MAX_PERMILLE`].
    pub fn set(&self, permille: u32) {
        self.shared.lock().permille = permille.min(MAX_PERMILLE);
        self.shared.changed.notify_all();
    }

    /// The share that is taken now.
    #[must_use]
    pub fn permille(&self) -> u32 {
        self.shared.lock().permille
    }

    /// vCPU time taken so far, of all vCPUs together.
    #[must_use]
    pub fn taken(&self) -> Duration {
        total(&self.brakes).taken.saturating_sub(self.before)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the throttle's thread panicked");
        }
    }
}

fn total(brakes: &[Brake]) -> Braking {
    let add = |sum: Braking, brake: &Brake| {
        let braking = brake.braking();
        Braking {
            stops: sum.stops + braking.stops,
            taken: sum.taken + braking.taken,
        }
    };
    brakes.iter().fold(Braking::default(), add)
}

/// Releases every vCPU when the thread ends, however it does.
struct Release<'a>(&'a [Brake]);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(Brake::release);
    }
}

fn throttle(shared: &Shared, brakes: &[Brake]) {
    let _release = Release(brakes);
    let mut setting = shared.lock();
    let mut owed = Duration::ZERO;
    while !setting.quit {
        if setting.permille == 0 {
            owed = Duration::ZERO;
            setting = shared
                .changed
                .wait(setting)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let (run, hold) = period(setting.permille);
        drop(setting);
        brakes.iter().for_each(Brake::hold);
        setting = shared.wait(shared.lock(), hold + owed);
        drop(setting);
        let released = Instant::now();
        brakes.iter().for_each(Brake::release);
        setting = shared.lock();
        if !setting.quit {
            setting = shared.wait(setting, run);
        }
        owed = made_up(released.elapsed(), run, hold);
    }
}

/// What was measured in the last pass, and what the pause may take.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Bytes per second that became dirty.
    pub dirty_rate: f64,
    /// Bytes per second that were sent.
    pub link_rate: f64,
    /// Share of vCPU time that was taken meanwhile.
    pub permille: u32,
    /// What the pause may spend on pages: the longest pause less its fixed cost.
    pub budget: Duration,
    /// A pass takes at least so long, however little it sends.
    pub shortest_pass: Duration,
}

/// The smallest share of vCPU time to take so that each pass is at most two thirds of the one before, and what the
/// shortest pass leaves dirty fits the pause. 0 where that is so already; never above [`MAX_PERMILLE`].
///
/// A guest is taken to write in proportion to the time it runs. One that writes the same pages again and again seems to
/// write less than it does; then the next pass finds more to take, as each measurement is scaled by the share in force.
#[must_use]
pub fn needed(measured: &Measured) -> u32 {
    let rate = |rate: f64| if rate.is_finite() { rate.max(0.0) } else { 0.0 };
    let in_force = f64::from(measured.permille.min(MAX_PERMILLE)) / 1000.0;
    let unthrottled = rate(measured.dirty_rate) / (1.0 - in_force);
    let shortest_pass = measured.shortest_pass.as_secs_f64();
    let fits = if shortest_pass > 0.0 {
        measured.budget.as_secs_f64() / shortest_pass
    } else {
        1.0
    };
    let bearable = rate(measured.link_rate) * fits.min(PASS_RATIO);
    if unthrottled <= bearable {
        return 0;
    }
    let permille = (1.0 - bearable / unthrottled) * 1000.0;
    (1..MAX_PERMILLE)
        .find(|share| f64::from(*share) >= permille)
        .unwrap_or(MAX_PERMILLE)
}

#[cfg(test)]
mod tests;
