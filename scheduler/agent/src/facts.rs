//! What one VMM process uses: resident memory, CPU, and threads that want to run.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Instant;

use crate::procfs::host::InOut;
use crate::procfs::{self, TICKS_PER_SECOND};

/// What the VMM calls the threads that run guest code: `vcpu0`, `vcpu1`, …
const VCPU_THREAD: &str = "vcpu";

/// What /proc calls the memory file of a guest, by the name that the VMM gives it.
const GUEST_MEMORY_FILE: &str = "/memfd:shoal-guest-memory";

/// Use of one VMM, as last sampled.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Usage {
    /// Resident bytes, guest memory included.
    pub(crate) resident_bytes: u64,
    /// CPUs in use, over the last interval.
    pub(crate) cpu_use: f64,
    /// Threads in state R.
    pub(crate) runnable: u64,
    /// CPUs that its vCPUs waited for while others had them, over the last interval.
    pub(crate) cpu_steal: Option<f64>,
    /// Bytes per second from storage, over the last interval.
    pub(crate) read_rate: Option<u64>,
    /// Bytes per second to storage, over the last interval.
    pub(crate) write_rate: Option<u64>,
}

/// Samples one process.
#[derive(Debug, Default)]
pub(crate) struct UsageMeter {
    cpu: CpuMeter,
    run_delay: RateMeter,
    storage: InOutMeter,
    latest: Usage,
}

impl UsageMeter {
    pub(crate) fn latest(&self) -> Usage {
        self.latest
    }

    /// Reads the process now. A process that has ended uses nothing.
    pub(crate) fn sample(&mut self, pid: u32, now: Instant) -> Usage {
        let cpu_use = procfs::process_stat(pid)
            .ok()
            .filter(|stat| stat.is_running())
            .and_then(|stat| self.cpu.sample(stat.cpu_ticks, now));
        let threads = threads(pid);
        let delay = threads.run_delay_ns;
        let storage = procfs::read(&format!("/proc/{pid}/io"))
            .ok()
            .and_then(|text| procfs::parse_storage(&text));
        let (read_rate, write_rate) = self.storage.sample(storage, now);
        self.latest = Usage {
            resident_bytes: resident_bytes(pid),
            cpu_use: cpu_use.unwrap_or(0.0),
            runnable: threads.runnable,
            cpu_steal: self.run_delay.sample(delay, now).map(|ns| ns / 1e9),
            read_rate,
            write_rate,
        };
        self.latest
    }
}

/// Turns a counter of CPU ticks into CPUs in use.
#[derive(Debug, Default)]
pub(crate) struct CpuMeter {
    last: Option<(u64, Instant)>,
}

impl CpuMeter {
    /// CPUs in use since the sample before; `None` for the first.
    pub(crate) fn sample(&mut self, ticks: u64, now: Instant) -> Option<f64> {
        let before = self.last.replace((ticks, now));
        let (old_ticks, old_time) = before?;
        let seconds = now.saturating_duration_since(old_time).as_secs_f64();
        #[expect(
            clippy::cast_precision_loss,
            reason = "ticks of one interval are far below 2^52"
        )]
        let used = ticks.saturating_sub(old_ticks) as f64 / TICKS_PER_SECOND as f64;
        (seconds > 0.0).then(|| used / seconds)
    }
}

/// Turns a counter into what it counts a second.
#[derive(Debug, Default)]
pub(crate) struct RateMeter {
    last: Option<(u64, Instant)>,
}

impl RateMeter {
    /// Per second since the sample before; `None` for the first, and while the counter cannot be read.
    #[expect(
        clippy::cast_precision_loss,
        reason = "what is counted in one interval is far below 2^52"
    )]
    pub(crate) fn sample(&mut self, count: Option<u64>, now: Instant) -> Option<f64> {
        let before = std::mem::replace(&mut self.last, count.map(|count| (count, now)));
        let ((old, then), count) = before.zip(count)?;
        let seconds = now.saturating_duration_since(then).as_secs_f64();
        (seconds > 0.0).then(|| count.saturating_sub(old) as f64 / seconds)
    }
}

/// The same for two counters of bytes.
#[derive(Debug, Default)]
pub(crate) struct InOutMeter {
    into: RateMeter,
    out: RateMeter,
}

impl InOutMeter {
    /// Bytes per second in and out.
    pub(crate) fn sample(&mut self, counters: Option<InOut>, now: Instant) -> (Option<u64>, Option<u64>) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "not negative, and float casts saturate"
        )]
        let whole = |rate: f64| rate as u64;
        let into = self.into.sample(counters.map(|counters| counters.into), now);
        let out = self.out.sample(counters.map(|counters| counters.out), now);
        (into.map(whole), out.map(whole))
    }
}

/// Bytes of host memory that a VMM uses; 0 if it has ended. Of a guest's memory file all counts, also what another
/// process touched: after a hand-over within the host the VMM has mapped little of what it owns.
pub(crate) fn resident_bytes(pid: u32) -> u64 {
    let proc = Path::new("/proc").join(pid.to_string());
    let read = |file: &str| procfs::read(&proc.join(file).to_string_lossy());
    let Some(file_bytes) = guest_memory_file(&proc) else {
        return read("statm")
            .ok()
            .and_then(|text| procfs::parse_resident(&text))
            .unwrap_or(0);
    };
    read("status")
        .ok()
        .and_then(|text| procfs::ResidentParts::parse(&text))
        .map_or(0, |parts| parts.own.saturating_add(parts.shared.max(file_bytes)))
}

/// Bytes that the memory file of a VMM's guest has, if it has one.
fn guest_memory_file(proc: &Path) -> Option<u64> {
    const BLOCK: u64 = 512;
    let is_guest_memory = |fd: &fs::DirEntry| {
        fs::read_link(fd.path()).is_ok_and(|target| target.to_string_lossy().contains(GUEST_MEMORY_FILE))
    };
    let fd = fs::read_dir(proc.join("fd"))
        .ok()?
        .flatten()
        .find(is_guest_memory)?;
    Some(fs::metadata(fd.path()).ok()?.blocks().saturating_mul(BLOCK))
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Threads {
    runnable: u64,
    /// Of all vCPUs together; `None` if the kernel does not say.
    run_delay_ns: Option<u64>,
}

fn threads(pid: u32) -> Threads {
    let mut threads = Threads::default();
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return threads;
    };
    for entry in entries.flatten() {
        let read = |file: &str| procfs::read(&entry.path().join(file).to_string_lossy());
        let Ok(text) = read("stat") else { continue };
        let runs = procfs::ProcessStat::parse(&text).is_some_and(|stat| stat.state == 'R');
        threads.runnable += u64::from(runs);
        if procfs::thread_name(&text).is_some_and(|name| name.starts_with(VCPU_THREAD)) {
            let delay = read("schedstat")
                .ok()
                .and_then(|text| procfs::parse_run_delay(&text));
            if let Some(delay) = delay {
                *threads.run_delay_ns.get_or_insert(0) += delay;
            }
        }
    }
    threads
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn cpu_use_is_ticks_over_time() {
        let mut meter = CpuMeter::default();
        let start = Instant::now();
        assert_eq!(meter.sample(1000, start), None);
        assert_eq!(meter.sample(1150, start + Duration::from_secs(1)), Some(1.5));
        assert_eq!(
            meter.sample(1150, start + Duration::from_secs(1)),
            None,
            "no time has passed"
        );
        assert_eq!(
            meter.sample(1100, start + Duration::from_secs(2)),
            Some(0.0),
            "never negative"
        );
    }

    #[test]
    fn rates_are_of_counters_that_can_be_read() {
        let mut meter = RateMeter::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(meter.sample(Some(10), at(0)), None);
        assert_eq!(meter.sample(Some(30), at(2)), Some(10.0));
        assert_eq!(meter.sample(Some(20), at(3)), Some(0.0), "never negative");
        assert_eq!(meter.sample(None, at(4)), None);
        assert_eq!(meter.sample(Some(20), at(5)), None, "nothing to compare with");
        let counters = |into, out| Some(InOut { into, out });
        let mut meter = InOutMeter::default();
        assert_eq!(meter.sample(counters(0, u64::MAX), at(0)), (None, None));
        assert_eq!(meter.sample(counters(5, 0), at(1)), (Some(5), Some(0)));
    }

    #[test]
    fn a_vcpu_thread_is_known_by_its_name() {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let (name, named) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("vcpu7".to_owned());
        let thread = thread.spawn(move || {
            name.send(()).expect("heard");
            stopped.recv()
        });
        let thread = thread.expect("a thread");
        named.recv().expect("named");
        let seen = threads(std::process::id());
        assert!(seen.runnable > 0);
        let schedstat = std::path::Path::new("/proc/self/schedstat").exists();
        assert_eq!(seen.run_delay_ns.is_some(), schedstat);
        drop(stop);
        thread.join().expect("no panic").expect_err("no more senders");
    }

    #[test]
    fn a_memory_file_counts_whoever_touched_it() {
        use std::io::Write as _;
        const BYTES: u64 = 48 << 20;
        let before = resident_bytes(std::process::id());
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let fd = rustix::fs::memfd_create("shoal-guest-memory", flags).expect("memfd");
        let mut file = fs::File::from(fd);
        for _ in 0..BYTES >> 20 {
            file.write_all(&[1; 1 << 20]).expect("memory");
        }
        assert!(resident_bytes(std::process::id()) >= before.min(1 << 20) + BYTES);
    }

    #[test]
    fn own_process_has_memory_and_a_stranger_has_none() {
        let usage = UsageMeter::default().sample(std::process::id(), Instant::now());
        assert!(usage.resident_bytes > 0 && usage.runnable > 0);
        assert_eq!(
            UsageMeter::default().sample(u32::MAX, Instant::now()),
            Usage::default()
        );
    }
}
