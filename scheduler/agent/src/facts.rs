//! What one VMM process uses: resident memory, CPU, and threads that want to run.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use shoal_estimate::{Estimate, Meter, WINDOW};

use crate::procfs::host::InOut;
use crate::procfs::{self, RunTimes, TICKS_PER_SECOND};

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
    /// CPUs that its vCPUs would use if they never had to wait, over the last while; none until that has been seen for long enough.
    pub(crate) cpu_demand: Option<Estimate>,
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
    vcpus: VcpuMeter,
    demand: Meter,
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
        let delay =
            (!threads.vcpus.is_empty()).then(|| threads.vcpus.values().map(|times| times.waited_ns).sum());
        let fallback = cpu_use.filter(|_| threads.vcpus.is_empty());
        if let Some((cpus, elapsed)) = self.vcpus.sample(threads.vcpus, fallback, now) {
            self.demand.update(cpus, elapsed);
        }
        let storage = procfs::read(&format!("/proc/{pid}/io"))
            .ok()
            .and_then(|text| procfs::parse_storage(&text));
        let (read_rate, write_rate) = self.storage.sample(storage, now);
        self.latest = Usage {
            resident_bytes: resident_bytes(pid),
            cpu_use: cpu_use.unwrap_or(0.0),
            runnable: threads.runnable,
            cpu_steal: self.run_delay.sample(delay, now).map(|ns| ns / 1e9),
            cpu_demand: (self.demand.age() >= WINDOW).then(|| self.demand.value()),
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

/// Turns the times of vCPU threads into CPUs that they would use if they never had to wait.
///
/// A guest that computes for a while, rests, and computes again is slowed down by others only while it computes. Of a vCPU that ran
/// for `r`, waited for `w` and rested for the remaining `i`, the same guest alone would run for `r` of each `r + i`. One that is
/// never at rest wants a whole CPU, however little it gets.
#[derive(Debug, Default)]
struct VcpuMeter {
    last: Option<(HashMap<u64, RunTimes>, Instant)>,
}

/// Of a vCPU that waited all of the time but for this part nobody knows what it would do without waiting: it counts as busy.
const LEAST_UNHINDERED: f64 = 0.02;

impl VcpuMeter {
    /// CPUs wanted since the sample before, and how long that is; none for the first. Where the kernel does not tell how long threads
    /// waited, `fallback` is what they used.
    fn sample(
        &mut self,
        vcpus: HashMap<u64, RunTimes>,
        fallback: Option<f64>,
        now: Instant,
    ) -> Option<(f64, Duration)> {
        let (before, then) = self.last.replace((vcpus, now))?;
        let elapsed = now.saturating_duration_since(then);
        if let Some(used) = fallback {
            return Some((used, elapsed));
        }
        let (vcpus, _) = self.last.as_ref()?;
        let wanted = vcpus.iter().filter_map(|(thread, times)| {
            let old = before.get(thread)?;
            Some(wanted(times.since(*old), elapsed))
        });
        Some((wanted.sum(), elapsed))
    }
}

/// Part of a CPU that one vCPU wants.
fn wanted(times: RunTimes, elapsed: Duration) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "nanoseconds of one interval are far below 2^52"
    )]
    let seconds = |ns: u64| ns as f64 / 1e9;
    let elapsed = elapsed.as_secs_f64();
    let unhindered = elapsed - seconds(times.waited_ns);
    if unhindered < LEAST_UNHINDERED * elapsed {
        return 1.0;
    }
    (seconds(times.ran_ns) / unhindered).clamp(0.0, 1.0)
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
    /// Of each vCPU, by its thread; none if the kernel does not say.
    vcpus: HashMap<u64, RunTimes>,
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
            let times = read("schedstat").ok().and_then(|text| RunTimes::parse(&text));
            let thread = entry.file_name().to_str().and_then(|name| name.parse().ok());
            threads.vcpus.extend(thread.zip(times));
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
    fn what_a_vcpu_wants_does_not_depend_on_what_it_gets() {
        let times = |ran_ms: u64, waited_ms: u64| RunTimes {
            ran_ns: ran_ms * 1_000_000,
            waited_ns: waited_ms * 1_000_000,
        };
        let second = Duration::from_secs(1);
        for (ran, waited, cpus) in [
            (1000, 0, 1.0),
            (500, 500, 1.0),
            (10, 990, 1.0),
            (0, 1200, 1.0), // of an interval before
            (0, 0, 0.0),
            (500, 0, 0.5),
            // Half as fast: 2 s of each 3 s are spent on what took 1 s of 2 s.
            (333, 333, 0.499),
        ] {
            let wanted = wanted(times(ran, waited), second);
            assert!((wanted - cpus).abs() < 1e-3, "{ran} {waited}: {wanted}");
        }
        let mut meter = VcpuMeter::default();
        let start = Instant::now();
        let of = |threads: &[(u64, RunTimes)]| threads.iter().copied().collect::<HashMap<_, _>>();
        assert_eq!(
            meter.sample(of(&[(1, times(100, 0)), (2, times(0, 0))]), None, start),
            None
        );
        let (cpus, elapsed) = meter
            .sample(
                of(&[(1, times(600, 500)), (3, times(900, 0))]),
                None,
                start + second,
            )
            .expect("two samples");
        assert_eq!(
            (cpus, elapsed),
            (1.0, second),
            "thread 3 has only begun, 2 has ended"
        );
        let fallback = meter.sample(HashMap::new(), Some(0.7), start + 2 * second);
        assert_eq!(fallback, Some((0.7, second)));
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
        assert_eq!(!seen.vcpus.is_empty(), schedstat);
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
