//! What the node has, and what of it is in use.
//!
//! With a budget (`shoal up`: several nodes on one host) the VMMs' own use counts, against the budget. Without one
//! the node is the whole host, and all that runs on it counts.

use std::fs;
use std::io;
use std::num::NonZero;
use std::path::Path;
use std::time::Instant;

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
    /// Nothing with a budget, for the same reason.
    pub(crate) rates: HostRates,
    /// Nothing with a budget.
    pub(crate) numa: Vec<NumaNode>,
}

/// Samples the node.
#[derive(Debug)]
pub(crate) struct LoadMeter {
    capacity: Capacity,
    host_cpu: CpuMeter,
    swap: InOutMeter,
    network: InOutMeter,
}

impl LoadMeter {
    pub(crate) fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            host_cpu: CpuMeter::default(),
            swap: InOutMeter::default(),
            network: InOutMeter::default(),
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
        }
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
        rates: HostRates::default(),
        numa: Vec::new(),
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
            rates: HostRates::default(),
            numa: Vec::new(),
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
        let mut meter = LoadMeter::new(capacity);
        let start = Instant::now();
        meter.sample(&[], start).expect("sampled");
        let load = meter
            .sample(&[], start + std::time::Duration::from_secs(1))
            .expect("sampled");
        assert!((1..=capacity.memory_bytes).contains(&load.memory_available_bytes));
        assert!(load.rates.network_receive_bytes_per_second.is_some());
        // A kernel without PSI does not say that there is no pressure.
        let pressure = load.pressure.expect("of the host");
        assert_eq!(
            pressure.memory.is_some(),
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
