//! What /proc says of a process: its CPU time and its memory.

use std::fs;

use anyhow::{Context as _, Result, ensure};

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
    let stat = read(pid, "stat")?;
    Ok(CpuTime {
        all: cpu_ticks(&stat)? / ticks_per_second(),
        vcpus: vcpu_time(pid)?,
    })
}

/// CPU time of the vCPU threads of a process, in seconds; 0 if there are none.
///
/// # Errors
/// If the process is gone.
pub fn vcpu_time(pid: u32) -> Result<f64> {
    let mut sum = 0.0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let directory = task?.path();
        // A thread may end while it is looked at.
        let name = fs::read_to_string(directory.join("comm")).unwrap_or_default();
        // Named by Shoal, and by QEMU with `-name debug-threads=on`.
        if name.starts_with("vcpu") || (name.starts_with("CPU ") && name.trim_end().ends_with("/KVM")) {
            let schedule = fs::read_to_string(directory.join("schedstat")).unwrap_or_default();
            let nanoseconds = schedule
                .split(' ')
                .next()
                .and_then(|word| word.parse::<f64>().ok());
            sum += nanoseconds.unwrap_or(0.0) / 1e9;
        }
    }
    Ok(sum)
}

/// Resident memory of a process beyond that of guest RAM, in bytes.
///
/// # Errors
/// If the process is gone, or the mapping of guest RAM cannot be told.
pub fn memory_beyond_guest(pid: u32, guest_bytes: u64) -> Result<f64> {
    let maps = mappings(&read(pid, "smaps")?);
    let ram: Vec<_> = maps
        .iter()
        .filter(|map| map.size >= guest_bytes && map.resident > 0)
        .collect();
    ensure!(
        ram.len() == 1,
        "process {pid} has {} resident mappings of {guest_bytes} bytes or more instead of one",
        ram.len()
    );
    let all: u64 = maps.iter().map(|map| map.resident).sum();
    Ok((all - ram[0].resident) as f64)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Mapping {
    size: u64,
    resident: u64,
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut found: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(key) = words.next() else { continue };
        if key.contains('-') {
            found.push(Mapping::default());
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

/// User and system time from a line of /proc/PID/stat (proc(5), fields 14 and 15).
fn cpu_ticks(stat: &str) -> Result<f64> {
    // The name may hold anything, parentheses too.
    let rest = stat.rsplit_once(')').context("no name in /proc/PID/stat")?.1;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let field = |index: usize| -> Result<f64> {
        Ok(fields
            .get(index)
            .context("too few fields in /proc/PID/stat")?
            .parse()?)
    };
    Ok(field(11)? + field(12)?)
}

fn ticks_per_second() -> f64 {
    rustix::param::clock_ticks_per_second() as f64
}

fn read(pid: u32, file: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "12 (a ) (b) S 1 12 12 0 -1 4194304 400 0 0 0 70 30 0 0 20 0 1 0 99 0 0";
        assert!((cpu_ticks(stat).expect("a stat line") - 100.0).abs() < 1e-9);
        assert!(cpu_ticks("12 (short) S 1").is_err());
    }

    #[test]
    fn mappings_have_size_and_residence() {
        let text = "55d0-55d8 r-xp 00000000 fe:00 12 /a b\nSize:  8 kB\nKernelPageSize: 4 kB\nRss:  4 kB\nVmFlags: rd ex\n\
                    7f00-7f80 rw-p 00000000 00:00 0\nSize: 1048576 kB\nRss: 65536 kB\nVmFlags: rd wr hg\n";
        assert_eq!(
            mappings(text),
            [
                Mapping {
                    size: 8 << 10,
                    resident: 4 << 10
                },
                Mapping {
                    size: 1 << 30,
                    resident: 64 << 20
                }
            ]
        );
    }

    #[test]
    fn this_process_can_be_read() {
        let own = cpu_time(std::process::id()).expect("own CPU time");
        assert!(own.all >= 0.0 && own.vcpus.abs() < 1e-9);
    }
}
