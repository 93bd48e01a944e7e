//! What one simulated node and its VMs use, from second to second.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures of a simulation, far below 2^52 and not negative"
)]

use std::collections::BTreeMap;

use shoal_proto::VmId;
use shoal_proto::node::{Heartbeat, NumaNode, Pressure, VmFacts};
use shoal_proto::vm::{VmState, VmStatus};

pub(super) const CPUS: u32 = 16;
pub(super) const MEMORY: u64 = 64 << 30;
/// Of the node's memory its VMs use together.
const USUAL_SHARE: f64 = 0.5;
/// Above the threshold of the default policy.
const OVERLOADED_SHARE: f64 = 0.96;

/// A VM.
#[derive(Debug, Clone)]
pub(super) struct Vm {
    status: VmStatus,
    ran: bool,
    resident: f64,
    cpu: f64,
    dirty: f64,
}

/// A node.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) vm_memory: u64,
    /// Its VMs use nearly all of its memory.
    pub(super) overloaded: bool,
    /// The next report does not leave it.
    pub(super) lose_next: bool,
    /// By id and epoch.
    vms: BTreeMap<(String, u64), Vm>,
    /// VMs it began with: what each uses is a part of the node by this.
    usual_vms: f64,
    random: u64,
}

impl Node {
    pub(super) fn new(number: usize, vms: usize) -> Self {
        let usual = u32::try_from(vms.max(1)).unwrap_or(u32::MAX);
        let mut node = Self {
            name: format!("node{number}"),
            vm_memory: MEMORY / u64::from(usual),
            overloaded: false,
            lose_next: false,
            vms: BTreeMap::new(),
            usual_vms: f64::from(usual),
            random: (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15),
        };
        for _ in 0..vms {
            let id = VmId::new().to_string();
            node.insert(&id, 1, VmState::Running);
        }
        node
    }

    pub(super) fn insert(&mut self, id: &str, epoch: u64, state: VmState) {
        let status = VmStatus {
            vm_id: id.to_owned(),
            name: format!("vm-{id}"),
            epoch,
            state: state.into(),
            memory_bytes: self.vm_memory,
            cpus: 1,
            ..VmStatus::default()
        };
        let vm = Vm {
            status,
            ran: state == VmState::Running,
            resident: self.usual_resident(),
            cpu: 0.2 + 0.5 * self.part(),
            dirty: 20e6 * self.part(),
        };
        self.vms.insert((id.to_owned(), epoch), vm);
    }

    pub(super) fn remove(&mut self, id: &str, epoch: u64) {
        self.vms.remove(&(id.to_owned(), epoch));
    }

    /// The VM has left by this migration.
    pub(super) fn set_migrated(&mut self, id: &str, epoch: u64, migration: &str) {
        if let Some(vm) = self.vms.get_mut(&(id.to_owned(), epoch)) {
            vm.status.state = VmState::Migrated.into();
            migration.clone_into(&mut vm.status.outgoing_migration_id);
        }
    }

    pub(super) fn facts(&self, id: &str, epoch: u64) -> Option<VmFacts> {
        self.vms.get(&(id.to_owned(), epoch)).map(facts)
    }

    pub(super) fn running(&self) -> impl Iterator<Item = String> + '_ {
        let running = |vm: &&Vm| vm.status.state() == VmState::Running;
        self.vms
            .values()
            .filter(running)
            .map(|vm| vm.status.vm_id.clone())
    }

    /// A second passes. One VM in five does something else than before; the others use what they did, nearly.
    pub(super) fn step(&mut self) -> Heartbeat {
        let usual = self.usual_resident();
        let overloaded = MEMORY as f64 * OVERLOADED_SHARE / self.usual_vms;
        let (mut used, mut cpu) = (0.0, 0.0);
        let mut vms = std::mem::take(&mut self.vms);
        for vm in vms.values_mut() {
            let changes = self.part() < 0.2;
            let size = if changes { 0.2 } else { 0.01 };
            vm.cpu = (vm.cpu + size * (self.part() - 0.5)).clamp(0.0, 1.0);
            if changes {
                vm.dirty = (vm.dirty * (0.5 + self.part())).clamp(1e5, 50e6);
                vm.resident += 16e6 * (self.part() - 0.5);
            }
            if self.overloaded {
                vm.resident = overloaded;
            } else if vm.resident > 1.1 * usual {
                vm.resident = usual;
            }
            used += vm.resident;
            cpu += vm.cpu;
        }
        self.vms = vms;
        let network = (1e8 * self.part()) as u64;
        Heartbeat {
            memory_available_bytes: MEMORY.saturating_sub(used as u64),
            cpu_use: cpu,
            run_queue: cpu.ceil(),
            pressure: Some(Pressure {
                cpu: Some(self.part()),
                memory: Some(0.0),
                io: Some(0.0),
            }),
            vms: self.vms.values().map(facts).collect(),
            sequence: 0,
            swap_in_bytes_per_second: Some(0),
            swap_out_bytes_per_second: Some(0),
            network_receive_bytes_per_second: Some(network),
            network_transmit_bytes_per_second: Some(network / 2),
            numa: vec![NumaNode {
                id: 0,
                cpus: CPUS,
                memory_bytes: MEMORY,
                memory_available_bytes: MEMORY.saturating_sub(used as u64),
            }],
            other_cpu: Some(0.1),
            other_cpu_error: Some(0.05),
            vmm_cpu: Some(cpu),
        }
    }

    fn usual_resident(&self) -> f64 {
        MEMORY as f64 * USUAL_SHARE / self.usual_vms
    }

    /// From 0 to 1.
    fn part(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let high = u32::try_from(self.random >> 32).unwrap_or(0);
        f64::from(high) / f64::from(u32::MAX)
    }
}

fn facts(vm: &Vm) -> VmFacts {
    VmFacts {
        status: Some(vm.status.clone()),
        vmm_alive: true,
        resident_bytes: vm.resident as u64,
        cpu_use: vm.cpu,
        ran_here: vm.ran,
        cpu_steal: Some(0.0),
        dirty_rate_bytes_per_second: Some(vm.dirty as u64),
        working_set_bytes: Some(vm.dirty as u64 * 5),
        read_bytes_per_second: Some(0),
        write_bytes_per_second: Some(0),
        handle: 0,
        cpu_demand: Some(vm.cpu),
        cpu_demand_error: Some(vm.cpu / 20.0),
    }
}
