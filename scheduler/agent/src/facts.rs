//! What one VMM process uses: resident memory, CPU, and threads that want to run.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Instant;

use crate::procfs::{self, TICKS_PER_SECOND};

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
}

/// Samples one process.
#[derive(Debug, Default)]
pub(crate) struct UsageMeter {
    cpu: CpuMeter,
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
        self.latest = Usage {
            resident_bytes: resident_bytes(pid),
            cpu_use: cpu_use.unwrap_or(0.0),
            runnable: runnable_threads(pid),
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

fn runnable_threads(pid: u32) -> u64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return 0;
    };
    let runs = |thread: fs::DirEntry| {
        let text = fs::read(thread.path().join("stat")).ok()?;
        procfs::ProcessStat::parse(&String::from_utf8_lossy(&text)).filter(|stat| stat.state == 'R')
    };
    threads.flatten().filter_map(runs).map(|_| 1).sum()
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
