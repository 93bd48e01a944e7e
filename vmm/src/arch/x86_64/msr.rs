//! Model-specific registers that are part of a vCPU's state.

use std::collections::HashMap;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Error, Kvm, VcpuFd};
use shoal_cpuid::{Table, needed_msrs, optional_msrs};

/// IA32_TIME_STAMP_COUNTER.
pub const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: armed against the TSC, so it is restored after it.
pub const TSC_DEADLINE: u32 = 0x6e0;
const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;
const MCG_CAP: u32 = 0x179;
const MCG_CAP_BANKS: u64 = 0xff;
/// CTL, STATUS, ADDR and MISC of bank 0; those of the next follow.
const MC0_CTL: u32 = 0x400;
const MSRS_PER_BANK: u32 = 4;
/// As many banks as lie below the next MSRs, those of VMX.
const MAX_BANKS: u32 = 32;
/// KVM takes and gives at most this many MSRs a call (KVM_MAX_MSR_ENTRIES).
const PER_CALL: usize = 256;

/// MSRs that KVM has and does not list: variable, fixed and default MTRRs, and machine check banks.
fn unlisted(vcpu: &VcpuFd) -> Result<Vec<u32>, Error> {
    let banks = read(vcpu, &[MCG_CAP])?
        .first()
        .map_or(0, |cap| cap.data & MCG_CAP_BANKS);
    let banks = u32::try_from(banks).unwrap_or(0).min(MAX_BANKS);
    Ok((0x200..=0x20f)
        .chain([0x250, 0x258, 0x259])
        .chain(0x268..=0x26f)
        .chain([MTRR_DEF_TYPE])
        .chain(MC0_CTL..MC0_CTL + MSRS_PER_BANK * banks)
        .collect())
}

/// Every MSR that this host's KVM can save and restore, in the order of [`in_order`]. `vcpu` has the CPUID of this host.
///
/// # Errors
/// When KVM gives no list, or no MSR.
pub fn saved_indices(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, Error> {
    let mut indices = kvm.get_msr_index_list()?.as_slice().to_vec();
    let more = unlisted(vcpu)?.into_iter().filter(|msr| !indices.contains(msr));
    indices.extend(more.collect::<Vec<_>>());
    // KVM lists some that it cannot read with any CPUID.
    let mut readable: Vec<u32> = read(vcpu, &indices)?.iter().map(|entry| entry.index).collect();
    readable.sort_by_key(|&index| in_order(index));
    Ok(readable)
}

/// By this key MSRs are restored: the TSC first, its deadline last.
#[must_use]
pub fn in_order(index: u32) -> u8 {
    match index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    }
}

/// MSRs with their values. Those that KVM cannot read (listed, but not for this guest's CPUID) are left out.
///
/// # Errors
/// When KVM reads none at all.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let mut msrs = entries(rest.iter().take(PER_CALL).map(|&index| (index, 0)));
        let asked = msrs.as_slice().len();
        let count = vcpu.get_msrs(&mut msrs)?;
        found.extend_from_slice(&msrs.as_slice()[..count]);
        // KVM stops at the first it cannot read.
        rest = &rest[count + usize::from(count < asked)..];
    }
    Ok(found)
}

/// Sets MSRs in this order, and gives the first that KVM refuses.
///
/// # Errors
/// When KVM sets none at all.
pub fn write(
    vcpu: &VcpuFd,
    msrs: impl IntoIterator<Item = (u32, u64)>,
) -> Result<Option<kvm_msr_entry>, Error> {
    let mut msrs = msrs.into_iter().peekable();
    while msrs.peek().is_some() {
        let some = entries(msrs.by_ref().take(PER_CALL));
        let count = vcpu.set_msrs(&some)?;
        if let Some(refused) = some.as_slice().get(count) {
            return Ok(Some(*refused));
        }
    }
    Ok(None)
}

fn entries(msrs: impl Iterator<Item = (u32, u64)>) -> Msrs {
    let entry = |(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&msrs.map(entry).collect::<Vec<_>>()).expect("at most PER_CALL entries")
}

/// The MSRs of one vCPU that are saved: those that its guest has, and of all others those that it has changed.
#[derive(Debug)]
pub struct GuestMsrs {
    indices: Vec<u32>,
    /// What the others are as long as nobody changes them.
    reset: HashMap<u32, u64>,
}

impl GuestMsrs {
    /// Those of a vCPU that has this CPUID and has never run, where KVM saves `saved`.
    ///
    /// # Errors
    /// When KVM cannot read them.
    pub fn new(vcpu: &VcpuFd, cpu: &Table, saved: &[u32]) -> Result<Self, Error> {
        let others = read(vcpu, &optional_msrs(cpu, saved))?;
        let reset: HashMap<u32, u64> = others.iter().map(|entry| (entry.index, entry.data)).collect();
        let mut indices = needed_msrs(cpu, saved);
        indices.extend(others.iter().map(|entry| entry.index));
        indices.sort_by_key(|&index| in_order(index));
        Ok(Self { indices, reset })
    }

    /// Their values now.
    ///
    /// # Errors
    /// When KVM cannot read them.
    pub fn read(&self, vcpu: &VcpuFd) -> Result<Vec<kvm_msr_entry>, Error> {
        let mut msrs = read(vcpu, &self.indices)?;
        msrs.retain(|entry| self.reset.get(&entry.index) != Some(&entry.data));
        Ok(msrs)
    }
}

/// MSRs that boot firmware would have set on every CPU.
#[must_use]
pub fn boot_entries() -> [(u32, u64); 2] {
    [
        (MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
}
