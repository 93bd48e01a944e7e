//! Model-specific registers that are part of a vCPU's state.

use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::Kvm;

/// IA32_TIME_STAMP_COUNTER.
pub const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: armed against the TSC, so it is restored after it.
pub const TSC_DEADLINE: u32 = 0x6e0;
const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRdefType.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// Every MSR that KVM saves and restores on this host, the TSC first and its deadline last.
///
/// # Errors
/// When KVM gives no list.
pub fn saved_indices(kvm: &Kvm) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let mut indices = kvm.get_msr_index_list()?.as_slice().to_vec();
    indices.sort_by_key(|&index| match index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(indices)
}

/// MSRs that boot firmware would have set.
#[must_use]
pub fn boot_entries() -> Vec<kvm_msr_entry> {
    [
        (MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
    .into_iter()
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    })
    .collect()
}
