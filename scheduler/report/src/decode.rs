//! The scheduler's end.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use shoal_proto::node::{Heartbeat, HeartbeatDelta, VmDelta, VmFacts};

use crate::encode::{set_host_rates, set_vm_rates};

/// A node has no more VMs than this.
pub const MOST_VMS: usize = 65_536;

/// A node as it last reported.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// All but the VMs.
    pub node: Heartbeat,
    /// By handle. One that has not changed is still the same.
    pub vms: BTreeMap<u32, Arc<VmFacts>>,
}

impl From<Heartbeat> for Report {
    /// Of two VMs with one handle the last is kept. An agent that sends no deltas gives none: then they are numbered.
    fn from(whole: Heartbeat) -> Self {
        let numbered = whole.sequence == 0;
        let mut node = whole;
        let vms = std::mem::take(&mut node.vms);
        let by_handle = |(vm, number): (VmFacts, u32)| {
            let handle = if numbered { number } else { vm.handle };
            (handle, Arc::new(vm))
        };
        let vms = vms.into_iter().take(MOST_VMS).zip(1..).map(by_handle);
        Self {
            vms: vms.collect(),
            node,
        }
    }
}

/// Why a delta cannot be applied: a whole report is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Gap {
    /// Nothing to apply it to.
    #[error("no whole report has come")]
    NothingBefore,
    /// One is missing, or came twice.
    #[error("report {got} came after report {last}")]
    Sequence {
        /// Of the last report.
        last: u64,
        /// Of this one.
        got: u64,
    },
    /// It changes or ends a VM that is not known.
    #[error("VM {0} is not known")]
    Unknown(u32),
    /// A new VM has the handle of another.
    #[error("VM {0} is known already")]
    Known(u32),
    /// More than a node can have.
    #[error("more than {MOST_VMS} VMs")]
    TooMany,
}

/// What an agent has told in this stream. One for each stream.
#[derive(Debug, Default)]
pub struct Decoder {
    report: Option<Report>,
}

impl Decoder {
    /// Takes a whole report.
    pub fn whole(&mut self, whole: Heartbeat) -> &Report {
        self.report.insert(Report::from(whole))
    }

    /// Takes a delta, and answers what is so now.
    ///
    /// # Errors
    /// If it does not follow what came before. Then no delta is taken until a whole report has come.
    pub fn delta(&mut self, delta: HeartbeatDelta) -> Result<&Report, Gap> {
        let mut report = self.report.take().ok_or(Gap::NothingBefore)?;
        apply(&mut report, delta)?;
        Ok(self.report.insert(report))
    }
}

fn apply(report: &mut Report, delta: HeartbeatDelta) -> Result<(), Gap> {
    let node = &mut report.node;
    let (last, got) = (node.sequence, delta.sequence);
    if last == 0 || Some(got) != last.checked_add(1) {
        return Err(Gap::Sequence { last, got });
    }
    node.sequence = got;
    if let Some(bytes) = delta.memory_available_bytes {
        node.memory_available_bytes = bytes;
    }
    if let Some(cpus) = delta.cpu_use {
        node.cpu_use = cpus;
    }
    if let Some(threads) = delta.run_queue {
        node.run_queue = threads;
    }
    if delta.pressure.is_some() {
        node.pressure = delta.pressure;
    }
    if let Some(rates) = &delta.rates {
        set_host_rates(node, rates);
    }
    if !delta.numa.is_empty() {
        node.numa = delta.numa;
    }
    for handle in delta.gone {
        report.vms.remove(&handle).ok_or(Gap::Unknown(handle))?;
    }
    for vm in delta.vms {
        let known = report.vms.get_mut(&vm.handle).ok_or(Gap::Unknown(vm.handle))?;
        apply_to_vm(Arc::make_mut(known), vm);
    }
    for vm in delta.new_vms {
        if report.vms.len() >= MOST_VMS {
            return Err(Gap::TooMany);
        }
        match report.vms.entry(vm.handle) {
            Entry::Vacant(entry) => entry.insert(Arc::new(vm)),
            Entry::Occupied(_) => return Err(Gap::Known(vm.handle)),
        };
    }
    Ok(())
}

fn apply_to_vm(vm: &mut VmFacts, delta: VmDelta) {
    if let Some(bytes) = delta.resident_bytes {
        vm.resident_bytes = bytes;
    }
    if let Some(cpus) = delta.cpu_use {
        vm.cpu_use = cpus;
    }
    if let Some(rates) = &delta.rates {
        set_vm_rates(vm, rates);
    }
    if let Some(alive) = delta.alive {
        vm.status = alive.status;
        vm.vmm_alive = alive.vmm_alive;
        vm.ran_here = alive.ran_here;
    }
}
