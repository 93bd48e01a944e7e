//! How migration threads share CPUs with vCPUs. The figures behind it: docs/decisions/006-gentle-copying.md.

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
        let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
        let runnable = std::fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|text| parse_runnable(&text));
        Self(niceness(runnable.unwrap_or(0), cpus))
    }

    /// From now on the calling thread gives way to vCPUs. It cannot take that back. Where the host refuses, nothing changes.
    pub fn apply(self) {
        if self.0 == GENTLE_ON_A_BUSY_HOST {
            return;
        }
        // SAFETY: takes no memory. On Linux "process 0" is the calling thread, and niceness that of a thread.
        let failed = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, self.0) } != 0;
        if failed {
            // A thread that is nicer already may not go back.
            tracing::debug!(error = %std::io::Error::last_os_error(), "migration thread keeps its priority");
        }
    }
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
