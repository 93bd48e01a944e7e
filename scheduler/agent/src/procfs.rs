//! Reading `/proc`: parsing is pure, so that it can be tested; see proc(5) and the kernel's accounting/psi document.

pub(crate) mod host;

use std::io;

/// Clock ticks a second in `/proc/PID/stat`; fixed at 100 in the user interface of Linux on x86-64 (`USER_HZ`).
pub(crate) const TICKS_PER_SECOND: u64 = 100;
/// Bytes in a page of `/proc/PID/statm`, on x86-64.
pub(crate) const PAGE_SIZE: u64 = 4096;

/// The fields of `/proc/PID/stat` that are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ProcessStat {
    /// One letter: R, S, D, Z, …
    pub(crate) state: char,
    /// User and system time of all threads, in ticks.
    pub(crate) cpu_ticks: u64,
    /// How many threads the process has.
    pub(crate) threads: u64,
    /// When it started, in ticks since the host's boot. With the pid it names one process for ever.
    pub(crate) start_ticks: u64,
}

impl ProcessStat {
    /// The name may hold spaces and parentheses, so fields are counted from its last closing one.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let user: u64 = fields.nth(10)?.parse().ok()?; // field 14
        let system: u64 = fields.next()?.parse().ok()?; // field 15
        let threads = fields.nth(4)?.parse().ok()?; // field 20
        let start_ticks = fields.nth(1)?.parse().ok()?; // field 22
        Some(Self {
            state,
            cpu_ticks: user.saturating_add(system),
            threads,
            start_ticks,
        })
    }

    /// Whether the process still runs. A zombie has ended, once no other thread is left: one that is killed may show its
    /// first thread as a zombie while others still run, and hold its files and sockets.
    pub(crate) fn is_running(self) -> bool {
        !self.thread_has_ended() || self.threads > 1
    }

    /// The same of the one thread that the state is about.
    fn thread_has_ended(self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// The name in `/proc/PID/stat`, or in that of a thread.
pub(crate) fn thread_name(stat: &str) -> Option<&str> {
    let (start, end) = (stat.find('(')?, stat.rfind(')')?);
    stat.get(start + 1..end)
}

/// How long a thread has run, and was ready to run and did not, from `/proc/PID/task/TID/schedstat`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct RunTimes {
    pub(crate) ran_ns: u64,
    pub(crate) waited_ns: u64,
}

impl RunTimes {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split_ascii_whitespace();
        Some(Self {
            ran_ns: fields.next()?.parse().ok()?,
            waited_ns: fields.next()?.parse().ok()?,
        })
    }

    /// What has come to it since.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            ran_ns: self.ran_ns.saturating_sub(before.ran_ns),
            waited_ns: self.waited_ns.saturating_sub(before.waited_ns),
        }
    }
}

/// Bytes read from storage and written to it, from `/proc/PID/io`.
pub(crate) fn parse_storage(text: &str) -> Option<host::InOut> {
    let field = |name: &str| -> Option<u64> {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        rest.trim().parse().ok()
    };
    Some(host::InOut {
        into: field("read_bytes:")?,
        out: field("write_bytes:")?,
    })
}

/// Resident bytes from `/proc/PID/statm`.
pub(crate) fn parse_resident(text: &str) -> Option<u64> {
    let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(PAGE_SIZE)
}

/// Resident bytes of a process by kind, from `/proc/PID/status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ResidentParts {
    /// Anonymous memory and files.
    pub(crate) own: u64,
    /// Shared memory, memory files included.
    pub(crate) shared: u64,
}

impl ResidentParts {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Some(Self {
            own: meminfo_field(text, "RssAnon:")?.checked_add(meminfo_field(text, "RssFile:")?)?,
            shared: meminfo_field(text, "RssShmem:")?,
        })
    }
}

/// Memory of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryInfo {
    /// `MemTotal` in bytes.
    pub(crate) total: u64,
    /// `MemAvailable` in bytes.
    pub(crate) available: u64,
}

impl MemoryInfo {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        Some(Self {
            total: meminfo_field(text, "MemTotal:")?,
            available: meminfo_field(text, "MemAvailable:")?,
        })
    }
}

fn meminfo_field(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = rest.split_ascii_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

/// CPU time and run queue of the host, from `/proc/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CpuTimes {
    /// Ticks in which some CPU did work (not idle, not waiting for I/O).
    pub(crate) busy_ticks: u64,
    /// Threads that run or could.
    pub(crate) runnable: u64,
}

impl CpuTimes {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let total = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let mut ticks = [0_u64; 8]; // user nice system idle iowait irq softirq steal; guest time is within user
        for (slot, field) in ticks.iter_mut().zip(total.split_ascii_whitespace()) {
            *slot = field.parse().ok()?;
        }
        let [user, nice, system, _idle, _iowait, irq, softirq, steal] = ticks;
        let busy_ticks = [user, nice, system, irq, softirq, steal]
            .into_iter()
            .fold(0, u64::saturating_add);
        let runnable = text
            .lines()
            .find_map(|line| line.strip_prefix("procs_running "))?
            .trim()
            .parse()
            .ok()?;
        Some(Self { busy_ticks, runnable })
    }
}

/// The ten-second average of the "some" line of a `/proc/pressure` file, in percent.
pub(crate) fn parse_pressure(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let average: f64 = some
        .split_ascii_whitespace()
        .find_map(|field| field.strip_prefix("avg10="))?
        .parse()
        .ok()?;
    (0.0..=100.0).contains(&average).then_some(average)
}

/// `/proc/PID/stat`; an error if there is no such process.
pub(crate) fn process_stat(pid: u32) -> io::Result<ProcessStat> {
    let text = read(&format!("/proc/{pid}/stat"))?;
    ProcessStat::parse(&text).ok_or_else(|| malformed("/proc/PID/stat"))
}

/// Whether every thread of a process is stopped by a signal, or has ended.
pub(crate) fn is_stopped(pid: u32) -> io::Result<bool> {
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = thread?.path().join("stat");
        let state = read(&stat.to_string_lossy())
            .ok()
            .as_deref()
            .and_then(ProcessStat::parse);
        // One that has just gone has no state.
        if state.is_some_and(|stat| !stat.thread_has_ended() && !matches!(stat.state, 'T' | 't')) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// A file of `/proc` as text; thread names may hold any bytes.
pub(crate) fn read(path: &str) -> io::Result<String> {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

pub(crate) fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("{what} has an unexpected form"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_is_parsed_whatever_the_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 250 50 13 14 20 0 5 0 98765 1 2";
        for name in ["shoal-vmm", "a b", "x) R 9 (", ""] {
            let stat = ProcessStat::parse(&format!("42 ({name}) {tail}")).expect("parsed");
            assert_eq!(
                stat,
                ProcessStat {
                    state: 'S',
                    cpu_ticks: 300,
                    threads: 5,
                    start_ticks: 98765
                }
            );
        }
        for bad in [
            "",
            "42 (x",
            "42 (x)",
            "42 (x) S 1",
            "42 (x) S 1 2 3 4 5 6 7 8 9 10 -1 50 1 1 1 1 1 1 1",
        ] {
            assert_eq!(ProcessStat::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_process_has_ended_when_its_last_thread_has() {
        let stat = |state, threads| ProcessStat {
            state,
            cpu_ticks: 0,
            threads,
            start_ticks: 1,
        };
        assert!(stat('S', 1).is_running() && stat('Z', 2).is_running());
        assert!(!stat('Z', 1).is_running() && !stat('X', 0).is_running());
    }

    #[test]
    fn threads_have_names_and_wait_to_run() {
        assert_eq!(thread_name("42 (vcpu0) S 1"), Some("vcpu0"));
        assert_eq!(thread_name("42 (a) b)) S 1"), Some("a) b)"));
        for bad in ["", "42", "42 )vcpu0( S", "42 (vcpu0"] {
            assert_eq!(thread_name(bad), None, "{bad}");
        }
        let times = RunTimes {
            ran_ns: 546_584,
            waited_ns: 513_312,
        };
        assert_eq!(RunTimes::parse("546584 513312 2\n"), Some(times));
        assert_eq!(RunTimes::parse("546584"), None);
        assert_eq!(RunTimes::parse("1 -5 2"), None);
    }

    #[test]
    fn storage_is_what_the_block_layer_did() {
        let text = "rchar: 6976\nwchar: 1\nsyscr: 10\nread_bytes: 4096\nwrite_bytes: 8192\n";
        let bytes = host::InOut {
            into: 4096,
            out: 8192,
        };
        assert_eq!(parse_storage(text), Some(bytes));
        assert_eq!(parse_storage("read_bytes: 1\n"), None);
        assert_eq!(parse_storage("read_bytes: 1\nwrite_bytes: many\n"), None);
    }

    #[test]
    fn own_process_runs() {
        let stat = process_stat(std::process::id()).expect("own stat");
        assert!(stat.is_running() && stat.start_ticks > 0);
    }

    #[test]
    fn resident_memory_is_the_second_field() {
        assert_eq!(parse_resident("765 426 398 5 0 123 0\n"), Some(426 * 4096));
        assert_eq!(parse_resident("765"), None);
        assert_eq!(parse_resident(&format!("1 {}", u64::MAX)), None);
    }

    #[test]
    fn resident_memory_has_parts() {
        let text = "Name:\tx\nVmRSS:\t 100 kB\nRssAnon:\t 10 kB\nRssFile:\t 20 kB\nRssShmem:\t 70 kB\n";
        let parts = ResidentParts {
            own: 30 << 10,
            shared: 70 << 10,
        };
        assert_eq!(ResidentParts::parse(text), Some(parts));
        assert_eq!(ResidentParts::parse("RssAnon: 10 kB\n"), None);
    }

    #[test]
    fn host_memory_and_cpu_are_parsed() {
        let memory = MemoryInfo::parse("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   400 kB\n");
        assert_eq!(
            memory,
            Some(MemoryInfo {
                total: 1_024_000,
                available: 409_600
            })
        );
        assert_eq!(MemoryInfo::parse("MemTotal: x kB"), None);
        let cpu = CpuTimes::parse("cpu  10 1 5 1000 7 1 2 3 4 0\ncpu0 1 1 1 1\nprocs_running 3\n");
        assert_eq!(
            cpu,
            Some(CpuTimes {
                busy_ticks: 22,
                runnable: 3
            })
        );
        assert_eq!(CpuTimes::parse("cpu0 1 2\n"), None);
    }

    #[test]
    fn pressure_is_the_ten_second_average() {
        let text = "some avg10=0.72 avg60=0.28 avg300=0.24 total=5557130\nfull avg10=0.62 avg60=0.25\n";
        assert_eq!(parse_pressure(text), Some(0.72));
        for bad in [
            "some avg10=nan",
            "some avg10=-1",
            "some avg10=101",
            "some avg10=inf",
            "full avg10=1",
        ] {
            assert_eq!(parse_pressure(bad), None, "{bad}");
        }
        assert_eq!(parse_pressure(""), None);
    }
}
