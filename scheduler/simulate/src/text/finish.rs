//! What is true of a text as a whole.

use std::sync::Arc;

use shoal_plan::text::Scenario as Cluster;
use shoal_plan::{NodeName, VmView};

use super::{Draft, MOST_NODES, MOST_VMS};
use crate::model::{NodeSpec, Scenario, Segment, VmSpec};
use crate::policy::PolicyKind;
use crate::power::PowerModel;
use crate::trace::cut;
use crate::workload::Workload;

impl Draft {
    pub fn finish(mut self, cluster: Cluster) -> Result<Scenario, String> {
        let scenario = &mut self.scenario;
        scenario.policy = cluster.policy;
        for view in &cluster.snapshot.nodes {
            scenario.nodes.push(NodeSpec {
                name: view.name.clone(),
                cpus: view.cpus.max(1),
                speed: view.speed.clamp(0.01, 100.0),
                memory: view.memory.0.max(1 << 20),
                power: PowerModel::default(),
            });
        }
        if scenario.nodes.is_empty() {
            return Err("there is no node".to_owned());
        }
        if scenario.nodes.len() > MOST_NODES {
            return Err(format!("more than {MOST_NODES} nodes"));
        }
        let given = &cluster.snapshot.vms;
        if !given.is_empty() {
            self.vms += given.len();
            scenario
                .workloads
                .push(Workload::Given(given.iter().map(given_vm).collect()));
        }
        if self.vms == 0 {
            return Err("there is no workload, trace or vm".to_owned());
        }
        if self.vms > MOST_VMS {
            return Err(format!("more than {MOST_VMS} VMs"));
        }
        for node in scenario.workloads.iter().filter_map(starts_on) {
            if scenario.nodes.iter().all(|other| other.name != node) {
                return Err(format!(
                    "workload: node: '{}' is not in the text",
                    cut(node.as_str())
                ));
            }
        }
        let mut names: Vec<String> = crate::engine::vm_specs(scenario, scenario.seed)
            .into_iter()
            .map(|vm| vm.name)
            .collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("VM '{}' is there twice", cut(&twice[0])));
        }
        if scenario.policies.is_empty() {
            scenario.policies = PolicyKind::default_for(scenario.mode);
        }
        Ok(self.scenario)
    }
}

fn starts_on(workload: &Workload) -> Option<NodeName> {
    match workload {
        Workload::HeavyTail(shape)
        | Workload::Diurnal(shape)
        | Workload::Leak(shape)
        | Workload::Herd(shape)
        | Workload::Steady(shape)
        | Workload::Trace { shape, .. } => shape.node.clone(),
        Workload::Given(_) => None,
    }
}

/// A VM of a cluster text goes on as it was seen there.
fn given_vm(view: &VmView) -> VmSpec {
    let declared = view.declared.0 as f64;
    let initial = view.resident.map_or(declared / 2.0, |resident| resident.0 as f64);
    let cpu = view.cpu.map_or(0.0, |cpu| cpu.mean).min(f64::from(view.cpus));
    let segment = Segment {
        at: 0.0,
        cpu,
        growth: view.growth.0 as f64,
        resident: None,
    };
    VmSpec {
        name: view.id.as_str().to_owned(),
        arrival: 0.0,
        node: Some(view.node.clone()),
        cpus: view.cpus.max(1),
        peak: f64::from(view.cpus),
        declared,
        initial: initial.min(declared),
        work: None,
        lifetime: None,
        // What it dirties is for the CPU that it uses.
        dirty: view.dirty_rate.map_or(0.0, |rate| rate.0 as f64 / cpu.max(0.01)),
        working_set: initial / 4.0,
        priority: view.priority.min(9),
        preemptible: view.preemptible,
        boots: false,
        segments: Arc::from([segment]),
    }
}
