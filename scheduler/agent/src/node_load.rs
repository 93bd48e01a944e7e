//! What the node has, and what of it is in use.
//!
//! With a budget (`--memory`, `--cpus`; `shoal up`: several nodes on one host) the VMMs' own use counts, against what is lent.
//! Without one the node is the whole host, and all that runs on it counts. What is seen of the host is told in either case.

use std::fs;
use std::io;
use std::num::NonZero;
use std::path::Path;
use std::time::{Duration, Instant};

use shoal_estimate::{Estimate, Meter};
use shoal_proto::node::{HostRates, NumaNode, Pressure};

use crate::facts::{CpuMeter, InOutMeter, Usage};
use crate::procfs::host::{self, InOut};
use crate::procfs::{self, CpuTimes, MemoryInfo};

/// What the node lends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Capacity {
    pub(crate) cpus: u32,
    pub(crate) memory_bytes: u64,
    /// Use is counted from the VMMs alone: several nodes may share the host.
    pub(crate) budgeted: bool,
    pub(crate) host_cpus: u32,
}

impl Capacity {
    /// The budget, completed by what the host has.
    pub(crate) fn detect(memory_budget: Option<u64>, cpus: Option<u32>) -> io::Result<Self> {
        let host_cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        let host_cpus = u32::try_from(host_cpus).unwrap_or(u32::MAX);
        let memory_bytes = match memory_budget {
            Some(budget) => budget,
            None => host_memory()?.total,
        };
        Ok(Self {
            cpus: cpus.unwrap_or(host_cpus),
            host_cpus,
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
    /// CPUs of the host that anything but the VMMs of this agent uses, over the last while; none until that has been seen.
    pub(crate) other_cpu: Option<Estimate>,
    /// CPUs that the VMMs use, over the last while.
    pub(crate) vmm_cpu: f64,
    /// Of the host, as are all that follow.
    pub(crate) pressure: Pressure,
    pub(crate) rates: HostRates,
    pub(crate) numa: Vec<NumaNode>,
}

/// Samples the node.
#[derive(Debug)]
pub(crate) struct LoadMeter {
    capacity: Capacity,
    host_cpu: CpuMeter,
    other_cpu: Meter,
    vmm_cpu: Meter,
    sampled: Option<Instant>,
    swap: InOutMeter,
    network: InOutMeter,
}

impl LoadMeter {
    pub(crate) fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            host_cpu: CpuMeter::default(),
            other_cpu: Meter::default(),
            vmm_cpu: Meter::default(),
            sampled: None,
            swap: InOutMeter::default(),
            network: InOutMeter::default(),
        }
    }

    /// The node now, given the use of its VMMs at the same time.
    pub(crate) fn sample(&mut self, vms: &[Usage], now: Instant) -> io::Result<NodeLoad> {
        let text = procfs::read("/proc/stat")?;
        let host = CpuTimes::parse(&text).ok_or_else(|| procfs::malformed("/proc/stat"))?;
        let memory = host_memory()?;
        let vmm_cpu: f64 = vms.iter().map(|vm| vm.cpu_use).sum();
        let host_cpu = self.host_cpu.sample(host.busy_ticks, now);
        if let Some((busy, then)) = host_cpu.zip(self.sampled.replace(now)) {
            let elapsed = now.saturating_duration_since(then);
            self.other_cpu.update((busy - vmm_cpu).max(0.0), elapsed);
            self.vmm_cpu.update(vmm_cpu, elapsed);
        }
        let (memory_available_bytes, cpu_use, runnable) = if self.capacity.budgeted {
            let used = vms
                .iter()
                .fold(0_u64, |sum, vm| sum.saturating_add(vm.resident_bytes));
            let left = self.capacity.memory_bytes.saturating_sub(used);
            let runnable = vms.iter().map(|vm| vm.runnable).sum();
            (left.min(memory.available), vmm_cpu, runnable)
        } else {
            // Less this thread, which is counting.
            let runnable = host.runnable.saturating_sub(1);
            (memory.available, host_cpu.unwrap_or(0.0), runnable)
        };
        Ok(NodeLoad {
            memory_available_bytes,
            cpu_use,
            run_queue: count(runnable),
            other_cpu: (self.other_cpu.age() > Duration::ZERO).then(|| self.other_cpu.value()),
            vmm_cpu: self.vmm_cpu.value().mean,
            pressure: Pressure {
                cpu: pressure("cpu"),
                memory: pressure("memory"),
                io: pressure("io"),
            },
            rates: self.host_rates(now),
            numa: numa_nodes(Path::new("/sys/devices/system/node")),
        })
    }

    fn host_rates(&mut self, now: Instant) -> HostRates {
        let read = |path| procfs::read(path).ok();
        let swap = read("/proc/vmstat").and_then(|text| host::parse_swap(&text));
        let (swap_in, swap_out) = self.swap.sample(swap, now);
        let network = read("/proc/net/dev").map(|text| network(&text));
        let (receive, transmit) = self.network.sample(network, now);
        HostRates {
            swap_in_bytes_per_second: swap_in,
            swap_out_bytes_per_second: swap_out,
            network_receive_bytes_per_second: receive,
            network_transmit_bytes_per_second: transmit,
            ..HostRates::default()
        }
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

/// PSI of one resource; `None` where the kernel has none, or it is turned off.
fn pressure(resource: &str) -> Option<f64> {
    let text = procfs::read(&format!("/proc/pressure/{resource}")).ok();
    text.and_then(|text| procfs::parse_pressure(&text))
}

/// Of all network devices. What goes through a bridge or a tunnel goes through a device as well, and is counted there; a
/// host with none that it calls a device, as in a network namespace, has all but loopback counted.
fn network(text: &str) -> InOut {
    let interfaces = host::parse_networks(text);
    let is_device = |name: &str| Path::new("/sys/class/net").join(name).join("device").exists();
    let sum = |counted: &dyn Fn(&str) -> bool| {
        let counted = interfaces.iter().filter(|(name, _)| counted(name));
        counted.fold(InOut::default(), |sum, (_, bytes)| InOut {
            into: sum.into.wrapping_add(bytes.into),
            out: sum.out.wrapping_add(bytes.out),
        })
    };
    if interfaces.iter().any(|(name, _)| is_device(name)) {
        sum(&is_device)
    } else {
        sum(&|name| name != "lo")
    }
}

/// NUMA nodes with memory, by number; none where the kernel does not know of any.
fn numa_nodes(directory: &Path) -> Vec<NumaNode> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let node = |entry: fs::DirEntry| {
        let id = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
        let read = |file: &str| procfs::read(&entry.path().join(file).to_string_lossy()).ok();
        let (memory_bytes, memory_available_bytes) = host::parse_node_memory(&read("meminfo")?)?;
        Some(NumaNode {
            id,
            cpus: host::count_cpus(&read("cpulist")?)?,
            memory_bytes,
            memory_available_bytes,
        })
    };
    let mut nodes: Vec<_> = entries.flatten().filter_map(node).collect();
    nodes.sort_by_key(|node| node.id);
    nodes
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
            ..Usage::default()
        }
    }

    #[test]
    fn a_budget_limits_what_is_lent_and_the_host_is_seen_all_the_same() {
        let capacity = Capacity::detect(Some(64 * MIB), Some(4)).expect("detected");
        assert_eq!((capacity.cpus, capacity.memory_bytes), (4, 64 * MIB));
        let mut meter = LoadMeter::new(capacity);
        let vms = [usage(30 * MIB, 0.5, 1), usage(10 * MIB, 1.0, 2)];
        let start = Instant::now();
        let load = meter.sample(&vms, start).expect("sampled");
        assert_eq!(
            (load.memory_available_bytes, load.cpu_use, load.run_queue),
            (24 * MIB, 1.5, 3.0)
        );
        assert_eq!(load.other_cpu, None, "one sample says nothing yet");
        let over = meter
            .sample(&[usage(2048 * MIB, 0.0, 0)], start + Duration::from_secs(1))
            .expect("sampled");
        assert_eq!(over.memory_available_bytes, 0);
        assert!(over.other_cpu.is_some());
        sees_the_host(&over);
    }

    #[test]
    fn no_more_is_free_of_a_budget_than_of_the_host() {
        let capacity = Capacity::detect(Some(u64::MAX), None).expect("detected");
        let load = LoadMeter::new(capacity)
            .sample(&[], Instant::now())
            .expect("sampled");
        assert!(load.memory_available_bytes <= host_memory().expect("read").total);
    }

    #[test]
    fn without_a_budget_the_node_is_the_host() {
        let capacity = Capacity::detect(None, None).expect("detected");
        assert!(capacity.cpus > 0 && capacity.memory_bytes > MIB);
        assert_eq!(capacity.cpus, capacity.host_cpus);
        let mut meter = LoadMeter::new(capacity);
        let start = Instant::now();
        meter.sample(&[], start).expect("sampled");
        let load = meter
            .sample(&[], start + Duration::from_secs(1))
            .expect("sampled");
        assert!((1..=capacity.memory_bytes).contains(&load.memory_available_bytes));
        sees_the_host(&load);
    }

    fn sees_the_host(load: &NodeLoad) {
        assert!(load.rates.network_receive_bytes_per_second.is_some());
        // A kernel without PSI does not say that there is no pressure.
        assert_eq!(
            load.pressure.memory.is_some(),
            Path::new("/proc/pressure/memory").exists()
        );
    }

    #[test]
    fn numa_nodes_are_those_that_make_sense() {
        let directory = tempfile::tempdir().expect("a directory");
        let add = |name: &str, meminfo: &str, cpus: &str| {
            let node = directory.path().join(name);
            fs::create_dir(&node).expect("made");
            fs::write(node.join("meminfo"), meminfo).expect("written");
            fs::write(node.join("cpulist"), cpus).expect("written");
        };
        let meminfo = "Node 1 MemTotal: 8 kB\nNode 1 MemFree: 4 kB\nNode 1 Active(file): 1 kB\n\
                       Node 1 Inactive(file): 1 kB\n";
        add("node1", meminfo, "4-7\n");
        add("node0", meminfo, "0-3\n");
        add("node2", "nonsense", "0-3\n");
        add("node3", meminfo, "nonsense");
        add("nodeX", meminfo, "0");
        add("power", meminfo, "0");
        let node = |id| NumaNode {
            id,
            cpus: 4,
            memory_bytes: 8 << 10,
            memory_available_bytes: 6 << 10,
        };
        assert_eq!(numa_nodes(directory.path()), [node(0), node(1)]);
        assert_eq!(numa_nodes(&directory.path().join("missing")), []);
    }
}
