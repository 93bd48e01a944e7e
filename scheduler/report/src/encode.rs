//! The agent's end.

use std::collections::{BTreeMap, HashMap, HashSet};

use shoal_proto::node::agent_report::Report as Message;
use shoal_proto::node::{
    Heartbeat, HeartbeatDelta, HostRates, NumaNode, Pressure, VmAlive, VmDelta, VmFacts, VmRates,
};

use crate::thresholds::Thresholds;

/// Reports from one whole one to the next.
pub const WHOLE_EVERY: u32 = 60;

/// What the scheduler has been told in this stream. One for each stream.
#[derive(Debug)]
pub struct Encoder {
    thresholds: Thresholds,
    /// Deltas that may come before the next whole report; `None`: it is the next.
    deltas_left: Option<u32>,
    /// The same after the first whole report, which all agents send when a scheduler starts.
    first_deltas: u32,
    sequence: u64,
    /// Without VMs.
    sent: Heartbeat,
    vms: BTreeMap<u32, VmFacts>,
    /// By id and epoch.
    handles: HashMap<(String, u64), u32>,
    last_handle: u32,
}

impl Encoder {
    /// Nothing has been told. `phase` is different for each agent, so that not all of them send their second whole report,
    /// and those after it, at the same time.
    #[must_use]
    pub fn new(thresholds: Thresholds, phase: u32) -> Self {
        Self {
            thresholds,
            deltas_left: None,
            first_deltas: phase % WHOLE_EVERY,
            sequence: 0,
            sent: Heartbeat::default(),
            vms: BTreeMap::new(),
            handles: HashMap::new(),
            last_handle: 0,
        }
    }

    /// The next report is whole.
    pub fn want_whole(&mut self) {
        self.deltas_left = None;
    }

    /// The next message for what is so now. Sequence and handles are set here.
    pub fn encode(&mut self, now: Heartbeat) -> Message {
        self.sequence += 1;
        match self.deltas_left {
            Some(left) if left > 0 => {
                self.deltas_left = Some(left - 1);
                Message::Delta(self.delta(now))
            }
            _ => {
                let first = self.sequence == 1;
                self.deltas_left = Some(if first { self.first_deltas } else { WHOLE_EVERY - 1 });
                Message::Heartbeat(self.whole(now))
            }
        }
    }

    fn whole(&mut self, now: Heartbeat) -> Heartbeat {
        let mut whole = Heartbeat {
            sequence: self.sequence,
            ..now
        };
        self.vms.clear();
        self.handles.clear();
        self.last_handle = 0;
        for vm in &mut whole.vms {
            vm.handle = self.name(vm);
            self.vms.insert(vm.handle, vm.clone());
        }
        self.sent = Heartbeat {
            vms: Vec::new(),
            ..whole.clone()
        };
        whole
    }

    fn delta(&mut self, now: Heartbeat) -> HeartbeatDelta {
        let limits = self.thresholds;
        let sent = &mut self.sent;
        let mut delta = HeartbeatDelta {
            sequence: self.sequence,
            ..HeartbeatDelta::default()
        };
        if limits
            .memory
            .passed_by_count(sent.memory_available_bytes, now.memory_available_bytes)
        {
            sent.memory_available_bytes = now.memory_available_bytes;
            delta.memory_available_bytes = Some(now.memory_available_bytes);
        }
        if limits.cpu.passed(sent.cpu_use, now.cpu_use) {
            sent.cpu_use = now.cpu_use;
            delta.cpu_use = Some(now.cpu_use);
        }
        if limits.run_queue.passed(sent.run_queue, now.run_queue) {
            sent.run_queue = now.run_queue;
            delta.run_queue = Some(now.run_queue);
        }
        if pressure_changed(limits, sent.pressure, now.pressure) {
            sent.pressure = now.pressure;
            delta.pressure = Some(now.pressure.unwrap_or_default());
        }
        let rates = host_rates(&now);
        if host_rates_changed(limits, &host_rates(sent), &rates) {
            set_host_rates(sent, &rates);
            delta.rates = Some(rates);
        }
        if numa_changed(limits, &sent.numa, &now.numa) {
            sent.numa.clone_from(&now.numa);
            delta.numa = now.numa;
        }
        self.add_vms(&mut delta, now.vms);
        delta
    }

    fn add_vms(&mut self, delta: &mut HeartbeatDelta, now: Vec<VmFacts>) {
        let mut here = HashSet::with_capacity(now.len());
        for mut vm in now {
            match self.handles.get(&key(&vm)) {
                Some(&handle) => {
                    here.insert(handle);
                    let changed = self
                        .vms
                        .get_mut(&handle)
                        .and_then(|sent| vm_delta(self.thresholds, sent, vm));
                    delta.vms.extend(changed);
                }
                None => {
                    vm.handle = self.name(&vm);
                    here.insert(vm.handle);
                    self.vms.insert(vm.handle, vm.clone());
                    delta.new_vms.push(vm);
                }
            }
        }
        delta.gone = self
            .vms
            .keys()
            .copied()
            .filter(|handle| !here.contains(handle))
            .collect();
        self.vms.retain(|handle, _| here.contains(handle));
        if !delta.gone.is_empty() {
            self.handles.retain(|_, handle| here.contains(handle));
        }
    }

    fn name(&mut self, vm: &VmFacts) -> u32 {
        self.last_handle += 1;
        self.handles.insert(key(vm), self.last_handle);
        self.last_handle
    }
}

fn key(vm: &VmFacts) -> (String, u64) {
    vm.status
        .as_ref()
        .map(|status| (status.vm_id.clone(), status.epoch))
        .unwrap_or_default()
}

fn pressure_changed(limits: Thresholds, sent: Option<Pressure>, now: Option<Pressure>) -> bool {
    let (sent, now) = (sent.unwrap_or_default(), now.unwrap_or_default());
    let changed = |sent, now| limits.pressure.passed_by_share(sent, now);
    changed(sent.cpu, now.cpu) || changed(sent.memory, now.memory) || changed(sent.io, now.io)
}

fn host_rates(of: &Heartbeat) -> HostRates {
    HostRates {
        swap_in_bytes_per_second: of.swap_in_bytes_per_second,
        swap_out_bytes_per_second: of.swap_out_bytes_per_second,
        network_receive_bytes_per_second: of.network_receive_bytes_per_second,
        network_transmit_bytes_per_second: of.network_transmit_bytes_per_second,
        other_cpu: of.other_cpu,
        other_cpu_error: of.other_cpu_error,
        vmm_cpu: of.vmm_cpu,
    }
}

pub(crate) fn set_host_rates(of: &mut Heartbeat, rates: &HostRates) {
    of.swap_in_bytes_per_second = rates.swap_in_bytes_per_second;
    of.swap_out_bytes_per_second = rates.swap_out_bytes_per_second;
    of.network_receive_bytes_per_second = rates.network_receive_bytes_per_second;
    of.network_transmit_bytes_per_second = rates.network_transmit_bytes_per_second;
    of.other_cpu = rates.other_cpu;
    of.other_cpu_error = rates.other_cpu_error;
    of.vmm_cpu = rates.vmm_cpu;
}

fn host_rates_changed(limits: Thresholds, sent: &HostRates, now: &HostRates) -> bool {
    let changed = |sent, now| limits.rate.passed_by_rate(sent, now);
    let cpus = |sent, now| limits.cpu.passed_by_share(sent, now);
    cpus(sent.other_cpu, now.other_cpu)
        || cpus(sent.other_cpu_error, now.other_cpu_error)
        || cpus(sent.vmm_cpu, now.vmm_cpu)
        || changed(sent.swap_in_bytes_per_second, now.swap_in_bytes_per_second)
        || changed(sent.swap_out_bytes_per_second, now.swap_out_bytes_per_second)
        || changed(
            sent.network_receive_bytes_per_second,
            now.network_receive_bytes_per_second,
        )
        || changed(
            sent.network_transmit_bytes_per_second,
            now.network_transmit_bytes_per_second,
        )
}

/// The nodes themselves do not change while a host runs; were they all to vanish, that would be in the next whole report.
fn numa_changed(limits: Thresholds, sent: &[NumaNode], now: &[NumaNode]) -> bool {
    if now.is_empty() {
        return false;
    }
    let same = |(sent, now): (&NumaNode, &NumaNode)| {
        (sent.id, sent.cpus, sent.memory_bytes) == (now.id, now.cpus, now.memory_bytes)
            && !limits
                .numa
                .passed_by_count(sent.memory_available_bytes, now.memory_available_bytes)
    };
    sent.len() != now.len() || !sent.iter().zip(now).all(same)
}

fn vm_rates(of: &VmFacts) -> VmRates {
    VmRates {
        cpu_steal: of.cpu_steal,
        dirty_rate_bytes_per_second: of.dirty_rate_bytes_per_second,
        working_set_bytes: of.working_set_bytes,
        read_bytes_per_second: of.read_bytes_per_second,
        write_bytes_per_second: of.write_bytes_per_second,
        cpu_demand: of.cpu_demand,
        cpu_demand_error: of.cpu_demand_error,
    }
}

pub(crate) fn set_vm_rates(of: &mut VmFacts, rates: &VmRates) {
    of.cpu_steal = rates.cpu_steal;
    of.dirty_rate_bytes_per_second = rates.dirty_rate_bytes_per_second;
    of.working_set_bytes = rates.working_set_bytes;
    of.read_bytes_per_second = rates.read_bytes_per_second;
    of.write_bytes_per_second = rates.write_bytes_per_second;
    of.cpu_demand = rates.cpu_demand;
    of.cpu_demand_error = rates.cpu_demand_error;
}

fn vm_rates_changed(limits: Thresholds, sent: &VmRates, now: &VmRates) -> bool {
    limits.cpu.passed_by_share(sent.cpu_steal, now.cpu_steal)
        || limits.cpu.passed_by_share(sent.cpu_demand, now.cpu_demand)
        || limits
            .cpu
            .passed_by_share(sent.cpu_demand_error, now.cpu_demand_error)
        || limits
            .dirty_rate
            .passed_by_rate(sent.dirty_rate_bytes_per_second, now.dirty_rate_bytes_per_second)
        || limits
            .working_set
            .passed_by_rate(sent.working_set_bytes, now.working_set_bytes)
        || limits
            .rate
            .passed_by_rate(sent.read_bytes_per_second, now.read_bytes_per_second)
        || limits
            .rate
            .passed_by_rate(sent.write_bytes_per_second, now.write_bytes_per_second)
}

/// What is to be sent of a VM, if anything; `sent` becomes what the scheduler knows then.
fn vm_delta(limits: Thresholds, sent: &mut VmFacts, now: VmFacts) -> Option<VmDelta> {
    let mut delta = VmDelta {
        handle: sent.handle,
        ..VmDelta::default()
    };
    if limits
        .memory
        .passed_by_count(sent.resident_bytes, now.resident_bytes)
    {
        sent.resident_bytes = now.resident_bytes;
        delta.resident_bytes = Some(now.resident_bytes);
    }
    if limits.cpu.passed(sent.cpu_use, now.cpu_use) {
        sent.cpu_use = now.cpu_use;
        delta.cpu_use = Some(now.cpu_use);
    }
    let rates = vm_rates(&now);
    if vm_rates_changed(limits, &vm_rates(sent), &rates) {
        set_vm_rates(sent, &rates);
        delta.rates = Some(rates);
    }
    let alive = |vm: &VmFacts| (vm.vmm_alive, vm.ran_here);
    if sent.status != now.status || alive(sent) != alive(&now) {
        sent.status.clone_from(&now.status);
        (sent.vmm_alive, sent.ran_here) = alive(&now);
        delta.alive = Some(VmAlive {
            status: now.status,
            vmm_alive: now.vmm_alive,
            ran_here: now.ran_here,
        });
    }
    let nothing = VmDelta {
        handle: delta.handle,
        ..VmDelta::default()
    };
    (delta != nothing).then_some(delta)
}
