//! CPUs that anything but VMs uses on a node, where several nodes may share a host (`shoal up`, or agents with `--cpus`).
//!
//! Each agent tells what all but its own VMMs use of its host. What the VMMs of the other nodes there use is no other load, so it is
//! taken off. The rest is spread over the host's nodes by the CPUs that they lend, all with the same part of their CPUs: it is
//! no reason to move a VM between them. So is pressure on the host's memory: all of its nodes are under the most that one of them has
//! told, or small differences in time between their reports would send VMs from one to the other.

use std::collections::HashMap;
use std::sync::Arc;

use shoal_plan::Estimate;

use crate::nodes::{HostCpu, NodeEntry};

/// What nodes of one host share.
#[derive(Debug, Clone, Copy)]
struct Shared {
    /// What is used of one CPU that is lent.
    of_a_cpu: Estimate,
    /// Percent.
    memory_pressure: f64,
}

/// By host.
#[derive(Debug, Default)]
pub struct OtherLoads(HashMap<Arc<str>, Shared>);

impl OtherLoads {
    /// Of all nodes.
    pub fn of(nodes: &[Arc<NodeEntry>]) -> Self {
        let mut hosts: HashMap<Arc<str>, Vec<HostCpu>> = HashMap::new();
        let reporting = nodes.iter().filter(|node| node.is_reachable());
        for told in reporting.filter_map(|node| node.host_cpu()) {
            if let Some(host) = told.host.clone() {
                hosts.entry(host).or_default().push(told);
            }
        }
        Self(
            hosts
                .into_iter()
                .map(|(host, nodes)| (host, shared(&nodes)))
                .collect(),
        )
    }

    /// CPUs of a node that are used by anything but VMs, and the pressure on its memory, percent.
    pub fn on(&self, node: &NodeEntry) -> (Estimate, f64) {
        let Some(told) = node.host_cpu() else {
            return (
                Estimate::default(),
                node.observed().0.pressure.memory.unwrap_or(0.0),
            );
        };
        let of_host = told.host.as_ref().and_then(|host| self.0.get(host)).copied();
        let of_host = of_host.unwrap_or_else(|| shared(std::slice::from_ref(&told)));
        (
            of_host.of_a_cpu.times(f64::from(told.lends)),
            of_host.memory_pressure,
        )
    }
}

fn shared(nodes: &[HostCpu]) -> Shared {
    let pressures = nodes.iter().map(|node| node.memory_pressure);
    Shared {
        of_a_cpu: part(nodes),
        memory_pressure: pressures.fold(0.0, f64::max),
    }
}

/// What all nodes of one host say of one CPU that is lent there.
fn part(nodes: &[HostCpu]) -> Estimate {
    let all_vmms: f64 = nodes.iter().map(|node| node.vmms).sum();
    let count = nodes.len().max(1) as f64;
    let other = |node: &HostCpu| (node.other.mean - (all_vmms - node.vmms)).max(0.0);
    let used = Estimate {
        mean: nodes.iter().map(other).sum::<f64>() / count,
        error: nodes.iter().map(|node| node.other.error).fold(0.0, f64::max),
    };
    let lent: u32 = nodes.iter().map(|node| node.lends).fold(0, u32::saturating_add);
    let has = nodes.iter().map(|node| node.host_cpus).max().unwrap_or(0);
    used.times(1.0 / f64::from(lent.max(has).max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(lends: u32, other: f64, vmms: f64) -> HostCpu {
        HostCpu {
            host: Some(Arc::from("boot")),
            host_cpus: 8,
            lends,
            other: Estimate {
                mean: other,
                error: 0.2,
            },
            vmms,
            memory_pressure: vmms,
        }
    }

    #[test]
    fn of_a_host_with_one_node_all_other_load_counts() {
        let all = part(&[told(8, 2.0, 3.0)]).times(8.0);
        assert_eq!((all.mean, all.error), (2.0, 0.2));
        assert_eq!(part(&[told(2, 4.0, 0.0)]).times(2.0).mean, 1.0);
    }

    #[test]
    fn nodes_of_one_host_do_not_count_each_other() {
        // 6 CPUs in use: 1 + 2 by VMs, 3 by others. The third node has no VMs.
        let nodes = [told(2, 5.0, 1.0), told(2, 4.0, 2.0), told(2, 6.0, 0.0)];
        assert!((part(&nodes).mean - 3.0 / 8.0).abs() < 1e-12);
        assert_eq!(
            shared(&nodes).memory_pressure,
            2.0,
            "the most that one of them tells"
        );
        // More is lent than there is.
        let nodes = [told(8, 3.0, 0.0), told(8, 3.0, 0.0)];
        assert!((part(&nodes).mean - 3.0 / 16.0).abs() < 1e-12);
        assert_eq!(shared(&nodes).memory_pressure, 0.0);
        // Figures of different moments.
        assert_eq!(part(&[told(2, 0.5, 1.0), told(2, 0.5, 1.0)]).mean, 0.0);
    }
}
