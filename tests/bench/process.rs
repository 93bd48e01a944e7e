//! What /proc says of a process: its CPU time and its memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

/// Guests have at least 1 GiB, in at most two pieces of which the smaller has 1 GiB; nothing else in a VMM is that large.
const SMALLEST_RAM: u64 = 1 << 30;
const WATCH_INTERVAL: Duration = Duration::from_millis(4);

/// CPU time used so far, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuTime {
    /// By all threads, also those that have ended.
    pub all: f64,
    /// By the vCPU threads that live.
    pub vcpus: f64,
}

/// CPU time of a process so far.
///
/// # Errors
/// If it is gone.
pub fn cpu_time(pid: u32) -> Result<CpuTime> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid.try_into()?))
        .and_then(clock_gettime)
        .with_context(|| format!("no CPU time of process {pid}"))?;
    Ok(CpuTime {
        all: Duration::from(clock).as_secs_f64(),
        vcpus: vcpu_time(pid)?,
    })
}

/// CPU time of the vCPU threads of a process, in seconds; 0 if there are none.
///
/// # Errors
/// If the process is gone.
pub fn vcpu_time(pid: u32) -> Result<f64> {
    Ok(vcpu_threads(pid)?
        .iter()
        .filter_map(|thread| thread_time(thread))
        .sum())
}

fn vcpu_threads(pid: u32) -> Result<Vec<PathBuf>> {
    let mut threads = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let directory = task?.path();
        // A thread may end while it is looked at.
        let name = fs::read_to_string(directory.join("comm")).unwrap_or_default();
        // Named by Shoal and Cloud Hypervisor, and by QEMU with `-name debug-threads=on`.
        if name.starts_with("vcpu") || (name.starts_with("CPU ") && name.trim_end().ends_with("/KVM")) {
            threads.push(directory);
        }
    }
    Ok(threads)
}

/// `None` once it has ended.
fn thread_time(thread: &Path) -> Option<f64> {
    let schedule = fs::read_to_string(thread.join("schedstat")).ok()?;
    let nanoseconds: f64 = schedule.split(' ').next()?.parse().ok()?;
    Some(nanoseconds / 1e9)
}

/// Notes the CPU time of vCPU threads that may end before one can ask.
#[derive(Debug)]
pub struct VcpuWatch {
    over: mpsc::Sender<()>,
    thread: thread::JoinHandle<f64>,
}

impl VcpuWatch {
    /// Looks at the threads that the process has now, every few milliseconds.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn start(pid: u32) -> Result<Self> {
        let threads = vcpu_threads(pid)?;
        let (over, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            let mut latest = vec![0.0f64; threads.len()];
            while told.recv_timeout(WATCH_INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
                for (thread, latest) in threads.iter().zip(&mut latest) {
                    *latest = thread_time(thread).unwrap_or(*latest);
                }
            }
            latest.iter().sum()
        });
        Ok(Self { over, thread })
    }

    /// What they had used when they were last seen, in seconds.
    pub fn end(self) -> f64 {
        drop(self.over);
        self.thread.join().unwrap_or(f64::NAN)
    }
}

/// Resident memory of a process beyond that of guest RAM, in bytes.
///
/// # Errors
/// If the process is gone, or has no mapping that can be guest RAM.
pub fn memory_beyond_guest(pid: u32) -> Result<f64> {
    let maps = mappings(&read(pid, "smaps")?);
    let resident = |wanted: &dyn Fn(&Mapping) -> bool| {
        maps.iter()
            .filter(|map| wanted(map))
            .map(|map| map.resident)
            .sum::<u64>()
    };
    // A memory file says by its name what it is; anonymous guest RAM is told by its size.
    let ram = resident(&|map| map.guest_memory_file || map.size >= SMALLEST_RAM);
    ensure!(ram > 0, "process {pid} has no guest RAM");
    Ok((resident(&|_| true) - ram) as f64)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Mapping {
    size: u64,
    resident: u64,
    guest_memory_file: bool,
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(key) = words.next() else { continue };
        if key.contains('-') {
            found.push(Mapping {
                guest_memory_file: line.contains("/memfd:shoal-guest-memory"),
                ..Mapping::default()
            });
            continue;
        }
        let (Some(last), Some(kib)) = (
            found.last_mut(),
            words.next().and_then(|word| word.parse::<u64>().ok()),
        ) else {
            continue;
        };
        match key {
            "Size:" => last.size = kib << 10,
            "Rss:" => last.resident = kib << 10,
            _ => {}
        }
    }
    found
}

fn read(pid: u32, file: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_have_size_and_residence() {
        let text = "55d0-55d8 r-xp 00000000 fe:00 12 /a b\nSize:  8 kB\nKernelPageSize: 4 kB\nRss:  4 kB\nVmFlags: rd ex\n\
                    7f00-7f80 rw-p 00000000 00:00 0\nSize: 1048576 kB\nRss: 65536 kB\nVmFlags: rd wr hg\n\
                    7f80-7f90 rw-s 00000000 00:01 7  /memfd:shoal-guest-memory (deleted)\nSize: 64 kB\nRss: 4 kB\n";
        assert_eq!(
            mappings(text),
            [
                Mapping {
                    size: 8 << 10,
                    resident: 4 << 10,
                    guest_memory_file: false,
                },
                Mapping {
                    size: 1 << 30,
                    resident: 64 << 20,
                    guest_memory_file: false,
                },
                Mapping {
                    size: 64 << 10,
                    resident: 4 << 10,
                    guest_memory_file: true,
                }
            ]
        );
    }

    #[test]
    fn this_process_can_be_read() {
        let own = cpu_time(std::process::id()).expect("own CPU time");
        assert!(own.all > 0.0 && own.vcpus.abs() < 1e-9);
        assert!(memory_beyond_guest(std::process::id()).is_err());
    }
}
