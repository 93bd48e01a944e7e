//! What nodes and VMs were like when they last reported. What is not known has no series.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::nodes::Liveness;
use crate::record::Phase;
use crate::scheduler::Scheduler;

use super::{Word, bytes};

type Float = Gauge<f64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfNode {
    node: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfResource {
    node: String,
    resource: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfLiveness {
    liveness: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OfVm {
    vm: String,
    node: String,
}

/// Gauges that are set when someone asks.
#[derive(Debug, Default)]
pub(super) struct ObservedMetrics {
    nodes: Family<OfLiveness, Gauge>,
    cpu_use: Family<OfNode, Float>,
    run_queue: Family<OfNode, Float>,
    memory_available: Family<OfNode, Float>,
    pressure: Family<OfResource, Float>,
    dirty_rate: Family<OfVm, Float>,
    working_set: Family<OfVm, Float>,
    steal: Family<OfVm, Float>,
}

impl ObservedMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        let nodes = "Nodes by whether they report: live, suspect after 5 s of silence, lost after 30";
        registry.register("nodes", nodes, self.nodes.clone());
        for (name, help, family) in [
            ("node_cpu_use", "CPUs in use", &self.cpu_use),
            ("node_run_queue", "Threads that run or could", &self.run_queue),
            (
                "node_memory_available_bytes",
                "Free part of what the node lends",
                &self.memory_available,
            ),
        ] {
            registry.register(name, help, family.clone());
        }
        let pressure = "Time in which some task waited for the resource, over ten seconds (PSI)";
        registry.register("node_pressure_percent", pressure, self.pressure.clone());
        for (name, help, family) in [
            (
                "vm_dirty_rate_bytes_per_second",
                "Memory that the VM writes, smoothed",
                &self.dirty_rate,
            ),
            (
                "vm_working_set_bytes",
                "Memory that the VM writes again and again, smoothed",
                &self.working_set,
            ),
            ("vm_cpu_steal", "CPUs that the VM waited for", &self.steal),
        ] {
            registry.register(name, help, family.clone());
        }
    }

    pub(super) fn set(&self, scheduler: &Scheduler) {
        self.set_nodes(scheduler);
        self.set_vms(scheduler);
    }

    fn set_nodes(&self, scheduler: &Scheduler) {
        self.cpu_use.clear();
        self.run_queue.clear();
        self.memory_available.clear();
        self.pressure.clear();
        let mut counts = [
            (Liveness::Live, "live", 0),
            (Liveness::Suspect, "suspect", 0),
            (Liveness::Lost, "lost", 0),
        ];
        for entry in scheduler.nodes.list() {
            let liveness = entry.liveness();
            for (of, _, count) in &mut counts {
                *count += i64::from(*of == liveness);
            }
            if liveness != Liveness::Live || !entry.has_reported() {
                continue;
            }
            let (figures, node) = (entry.figures(), entry.record().name.to_string());
            let of = OfNode { node: node.clone() };
            self.cpu_use.get_or_create(&of).set(figures.cpu_use);
            self.run_queue.get_or_create(&of).set(figures.run_queue);
            let available = bytes(figures.memory_available_bytes);
            self.memory_available.get_or_create(&of).set(available);
            let pressure = figures.pressure.unwrap_or_default();
            let resources = [
                ("cpu", pressure.cpu),
                ("memory", pressure.memory),
                ("io", pressure.io),
            ];
            for (resource, percent) in resources {
                let Some(percent) = percent else { continue };
                let of = OfResource {
                    node: node.clone(),
                    resource: Word(resource),
                };
                self.pressure.get_or_create(&of).set(percent);
            }
        }
        for (_, liveness, count) in counts {
            let of = OfLiveness {
                liveness: Word(liveness),
            };
            self.nodes.get_or_create(&of).set(count);
        }
    }

    fn set_vms(&self, scheduler: &Scheduler) {
        self.dirty_rate.clear();
        self.working_set.clear();
        self.steal.clear();
        for entry in scheduler.vms.list() {
            let record = entry.record();
            let node = scheduler
                .nodes
                .get(&record.node)
                .filter(|node| node.is_reachable());
            let seen = node.and_then(|node| node.observed_vm(record.id, record.epoch));
            let Some(seen) = seen.filter(|_| record.phase == Phase::Running) else {
                continue;
            };
            let of = OfVm {
                vm: record.name.to_string(),
                node: record.node.to_string(),
            };
            if let Some(rate) = seen.dirty_rate {
                self.dirty_rate.get_or_create(&of).set(bytes(rate.value()));
            }
            if let Some(set) = seen.working_set {
                self.working_set.get_or_create(&of).set(bytes(set.value()));
            }
            if let Some(steal) = seen.facts.cpu_steal {
                self.steal.get_or_create(&of).set(steal);
            }
        }
    }
}
