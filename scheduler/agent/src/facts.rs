//! What one VMM process uses: resident memory, CPU, and threads that want to run.

use std::fs;
use std::time::Instant;

use crate::procfs::{self, TICKS_PER_SECOND};

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

/// Resident bytes of a process; 0 if it has ended.
pub(crate) fn resident_bytes(pid: u32) -> u64 {
    procfs::read(&format!("/proc/{pid}/statm"))
        .ok()
        .and_then(|text| procfs::parse_resident(&text))
        .unwrap_or(0)
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
    fn own_process_has_memory_and_a_stranger_has_none() {
        let usage = UsageMeter::default().sample(std::process::id(), Instant::now());
        assert!(usage.resident_bytes > 0 && usage.runnable > 0);
        assert_eq!(
            UsageMeter::default().sample(u32::MAX, Instant::now()),
            Usage::default()
        );
    }
}
