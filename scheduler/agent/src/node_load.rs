//! What the node has, and what of it is in use.
//!
//! With a budget (`shoal up`: several nodes on one host) the VMMs' own use counts, against the budget. Without one
//! the node is the whole host, and all that runs on it counts.

use std::io;
use std::num::NonZero;
use std::time::Instant;

use shoal_proto::node::Pressure;

use crate::facts::{CpuMeter, Usage};
use crate::procfs::{self, CpuTimes, MemoryInfo};

/// What the node lends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capacity {
    pub(crate) cpus: u32,
    pub(crate) memory_bytes: u64,
    /// Use is counted from the VMMs alone.
    budgeted: bool,
}

impl Capacity {
    /// The budget, completed by what the host has.
    pub(crate) fn detect(memory_budget: Option<u64>, cpus: Option<u32>) -> io::Result<Self> {
        let host_cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        let memory_bytes = match memory_budget {
            Some(budget) => budget,
            None => host_memory()?.total,
        };
        Ok(Self {
            cpus: cpus.unwrap_or(u32::try_from(host_cpus).unwrap_or(u32::MAX)),
            memory_bytes,
            budgeted: memory_budget.is_some() || cpus.is_some(),
        })
    }
}

/// Use of the node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NodeLoad {
    pub(crate) memory_available_bytes: u64,
    pub(crate) cpu_use: f64,
    pub(crate) run_queue: f64,
    /// `None` with a budget: the host's pressure is not this node's doing, and not the node's to relieve.
    pub(crate) pressure: Option<Pressure>,
}

/// Samples the node.
#[derive(Debug)]
pub(crate) struct LoadMeter {
    capacity: Capacity,
    host_cpu: CpuMeter,
}

impl LoadMeter {
    pub(crate) fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            host_cpu: CpuMeter::default(),
        }
    }

    /// The node now, given the use of its VMMs at the same time.
    pub(crate) fn sample(&mut self, vms: &[Usage], now: Instant) -> io::Result<NodeLoad> {
        if self.capacity.budgeted {
            Ok(budget_load(self.capacity, vms))
        } else {
            self.host_load(now)
        }
    }

    fn host_load(&mut self, now: Instant) -> io::Result<NodeLoad> {
        let text = procfs::read("/proc/stat")?;
        let cpu = CpuTimes::parse(&text).ok_or_else(|| procfs::malformed("/proc/stat"))?;
        Ok(NodeLoad {
            memory_available_bytes: host_memory()?.available,
            cpu_use: self.host_cpu.sample(cpu.busy_ticks, now).unwrap_or(0.0),
            run_queue: count(cpu.runnable.saturating_sub(1)), // this thread, which is counting
            pressure: Some(Pressure {
                cpu: pressure("cpu"),
                memory: pressure("memory"),
                io: pressure("io"),
            }),
        })
    }
}

fn budget_load(capacity: Capacity, vms: &[Usage]) -> NodeLoad {
    let used = vms
        .iter()
        .fold(0_u64, |sum, vm| sum.saturating_add(vm.resident_bytes));
    NodeLoad {
        memory_available_bytes: capacity.memory_bytes.saturating_sub(used),
        cpu_use: vms.iter().map(|vm| vm.cpu_use).sum(),
        run_queue: count(vms.iter().map(|vm| vm.runnable).sum()),
        pressure: None,
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "threads of one host are far below 2^52"
)]
fn count(threads: u64) -> f64 {
    threads as f64
}

fn host_memory() -> io::Result<MemoryInfo> {
    let text = procfs::read("/proc/meminfo")?;
    MemoryInfo::parse(&text).ok_or_else(|| procfs::malformed("/proc/meminfo"))
}

/// PSI of one resource; 0 where the kernel has none.
fn pressure(resource: &str) -> f64 {
    let text = procfs::read(&format!("/proc/pressure/{resource}")).ok();
    text.and_then(|text| procfs::parse_pressure(&text)).unwrap_or(0.0)
}

/// Whether KVM has no hardware virtualization here. Both hardware modules show parameters in sysfs, also when built in.
pub(crate) fn is_software_kvm() -> bool {
    !["kvm_intel", "kvm_amd"]
        .iter()
        .any(|module| std::path::Path::new("/sys/module").join(module).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn usage(resident_bytes: u64, cpu_use: f64, runnable: u64) -> Usage {
        Usage {
            resident_bytes,
            cpu_use,
            runnable,
        }
    }

    #[test]
    fn a_budget_counts_only_the_vmms() {
        let capacity = Capacity::detect(Some(1024 * MIB), Some(4)).expect("detected");
        assert_eq!((capacity.cpus, capacity.memory_bytes), (4, 1024 * MIB));
        let mut meter = LoadMeter::new(capacity);
        let vms = [usage(300 * MIB, 0.5, 1), usage(100 * MIB, 1.0, 2)];
        let load = meter.sample(&vms, Instant::now()).expect("sampled");
        let expected = NodeLoad {
            memory_available_bytes: 624 * MIB,
            cpu_use: 1.5,
            run_queue: 3.0,
            pressure: None,
        };
        assert_eq!(load, expected);
        let over = meter
            .sample(&[usage(2048 * MIB, 0.0, 0)], Instant::now())
            .expect("sampled");
        assert_eq!(over.memory_available_bytes, 0);
    }

    #[test]
    fn without_a_budget_the_node_is_the_host() {
        let capacity = Capacity::detect(None, None).expect("detected");
        assert!(capacity.cpus > 0 && capacity.memory_bytes > MIB);
        let load = LoadMeter::new(capacity)
            .sample(&[], Instant::now())
            .expect("sampled");
        assert!((1..=capacity.memory_bytes).contains(&load.memory_available_bytes));
        assert!(load.pressure.is_some());
    }
}
