//! How migration threads share CPUs with vCPUs. The figures behind it: docs/decisions/006-gentle-copying.md.

use std::time::{Duration, Instant};

/// Where vCPUs and migration threads about fit the CPUs: the vCPU gets its CPU at once when it wants one.
const GENTLE: i32 = 10;
/// Where more threads want to run than there are CPUs gentleness would leave the migration next to nothing, on just the
/// hosts that most need to get rid of a VM.
const GENTLE_ON_A_BUSY_HOST: i32 = 0;

/// How gentle the threads of a migration are that copy, compress or send guest memory. Decided once for all of them: each
/// would count the others as threads that want to run.
#[derive(Debug, Clone, Copy)]
pub struct Gentleness(i32);

impl Gentleness {
    /// By what the host has to do now, the calling thread not counted.
    #[must_use]
    pub fn of_host() -> Self {
        Self(niceness(runnable().unwrap_or(0), cpus()))
    }

    /// From now on the calling thread gives way to vCPUs. It cannot take that back. Where the host refuses, nothing changes.
    pub fn apply(self) {
        // SAFETY: takes no memory. On Linux "process 0" is the calling thread, and niceness that of a thread.
        let now = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        if now >= self.0 {
            return;
        }
        // SAFETY: as above.
        let failed = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, self.0) } != 0;
        if failed {
            tracing::debug!(error = %std::io::Error::last_os_error(), "migration thread keeps its priority");
        }
    }
}

/// CPUs of the host that have nothing to do now, the calling thread's own among them; at least one.
#[must_use]
pub fn idle_cpus() -> usize {
    usize::try_from(idle(runnable().unwrap_or(1), cpus())).unwrap_or(1)
}

fn idle(runnable: u64, cpus: u64) -> u64 {
    cpus.saturating_sub(runnable.saturating_sub(1)).max(1)
}

fn cpus() -> u64 {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64)
}

/// Threads of the host that run or want to, the calling one among them.
fn runnable() -> Option<u64> {
    parse_runnable(&std::fs::read_to_string("/proc/loadavg").ok()?)
}

/// How a thread spent some time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    /// It had a CPU.
    pub worked: Duration,
    /// It waited for something, a CPU at the end of that included.
    pub waited: Duration,
    /// It waited for nothing but a CPU.
    pub lost: Duration,
}

/// Measures the calling thread.
#[derive(Debug)]
pub struct Stopwatch {
    began: Instant,
    cpu: Duration,
    waits: i64,
}

impl Stopwatch {
    /// From now on.
    #[must_use]
    pub fn start() -> Self {
        Self {
            began: Instant::now(),
            cpu: thread_cpu_time(),
            waits: thread_waits(),
        }
    }

    /// Until now. To be called by the thread that started it.
    #[must_use]
    pub fn stop(self) -> Spent {
        let passed = self.began.elapsed();
        let worked = thread_cpu_time().saturating_sub(self.cpu).min(passed);
        let rest = passed - worked;
        let (waited, lost) = if thread_waits() == self.waits {
            (Duration::ZERO, rest)
        } else {
            (rest, Duration::ZERO)
        };
        Spent { worked, waited, lost }
    }
}

fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec, which is there.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) } != 0;
    if failed {
        return Duration::ZERO;
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// How often the thread gave its CPU away to wait for something.
fn thread_waits() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel writes one rusage, which is there; all its bytes zero are one, too, if it does not.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    usage.ru_nvcsw
}

fn niceness(runnable: u64, cpus: u64) -> i32 {
    // One of them is the thread that asks.
    if runnable > cpus + 1 {
        GENTLE_ON_A_BUSY_HOST
    } else {
        GENTLE
    }
}

/// Threads that run or want to, from `/proc/loadavg` (proc(5)): the fourth field, before its slash.
fn parse_runnable(loadavg: &str) -> Option<u64> {
    let field = loadavg.split_ascii_whitespace().nth(3)?;
    field.split_once('/')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowded_host_is_less_gentle() {
        assert_eq!(parse_runnable("2.60 2.96 2.11 5/242 1234\n"), Some(5));
        assert_eq!(parse_runnable("2.60 2.96"), None);
        assert_eq!(niceness(3, 2), GENTLE);
        assert_eq!(niceness(4, 2), GENTLE_ON_A_BUSY_HOST);
    }

    #[test]
    fn a_guest_that_runs_leaves_one_cpu_of_two() {
        assert_eq!(idle(1, 2), 2);
        assert_eq!(idle(2, 2), 1);
        assert_eq!(idle(40, 8), 1);
        assert_eq!(idle(0, 8), 8);
    }

    #[test]
    fn waiting_is_told_from_work() {
        let stopwatch = Stopwatch::start();
        std::thread::sleep(Duration::from_millis(5));
        let waited = stopwatch.stop();
        assert!(
            waited.waited >= Duration::from_millis(4) && waited.lost.is_zero(),
            "{waited:?}"
        );

        let stopwatch = Stopwatch::start();
        let until = Instant::now() + Duration::from_millis(5);
        while Instant::now() < until {}
        let worked = stopwatch.stop();
        assert!(worked.worked > worked.waited, "{worked:?}");
    }

    #[test]
    fn only_the_thread_that_asks_becomes_gentle() {
        // SAFETY: takes no memory.
        let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = nice();
        let inside = std::thread::spawn(move || {
            Gentleness(GENTLE).apply();
            Gentleness(GENTLE).apply();
            nice()
        });
        let inside = inside.join().expect("no panic");
        assert_eq!(inside, GENTLE.max(before));
        assert_eq!(nice(), before);
    }
}
