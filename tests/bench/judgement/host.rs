//! The host: processes that spin, what others use, and signals.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

const POLL: Duration = Duration::from_millis(50);
/// How long the use of the CPUs is looked at.
const LOOK: Duration = Duration::from_secs(3);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Has a signal end the row that runs, which then removes what it made.
pub fn end_on_signal() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        println!("interrupted: what was made is removed");
        INTERRUPTED.store(true, Ordering::Relaxed);
    });
    Ok(())
}

/// Whether a signal has come.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Sleeps until then.
///
/// # Errors
/// If a signal comes.
pub fn sleep_until(time: Instant) -> Result<()> {
    while Instant::now() < time {
        if interrupted() {
            bail!("interrupted");
        }
        thread::sleep(POLL.min(time.saturating_duration_since(Instant::now())));
    }
    Ok(())
}

/// Processes that use all the CPU they get, until dropped.
#[derive(Debug)]
pub struct Hogs(Vec<Child>);

impl Hogs {
    /// Starts so many.
    ///
    /// # Errors
    /// If there is no shell.
    pub fn start(count: usize) -> Result<Self> {
        let mut hogs = Self(Vec::new());
        for _ in 0..count {
            let mut command = Command::new("sh");
            command.args(["-c", "while :; do :; done"]).stdin(Stdio::null());
            hogs.0.push(command.spawn().context("sh")?);
        }
        Ok(hogs)
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            if let Err(error) = hog.kill().and_then(|()| hog.wait()) {
                eprintln!("process {} spins on: {error}", hog.id());
            }
        }
    }
}

/// CPUs that are in use now, by whomever.
///
/// # Errors
/// If /proc/stat cannot be read.
pub fn busy_cpus() -> Result<f64> {
    let (busy, all) = cpu_times()?;
    thread::sleep(LOOK);
    let (busy_now, all_now) = cpu_times()?;
    let cpus = thread::available_parallelism()?.get();
    #[expect(clippy::cast_precision_loss, reason = "ticks of a few seconds")]
    let cpus = (busy_now - busy) as f64 / (all_now - all).max(1) as f64 * cpus as f64;
    Ok(cpus)
}

/// Ticks of all CPUs: busy ones, and all.
fn cpu_times() -> Result<(u64, u64)> {
    let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line
        .split_ascii_whitespace()
        .skip(1)
        .take(8) // what guests use is in user time, too
        .map(str::parse)
        .collect::<Result<_, _>>()
        .context("/proc/stat")?;
    let all: u64 = ticks.iter().sum();
    let idle: u64 = ticks.iter().skip(3).take(2).sum();
    Ok((all - idle, all))
}
