//! Dirty-page tracking: KVM's log of vCPU writes merged with the VMM's own writes, as runs of pages.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::memory::{GuestMemory, Region};

mod ioctl {
    #![allow(missing_docs)] // the macro makes an undocumented public function
    use super::{KVMIO, ioctl_iowr_nr, kvm_clear_dirty_log};
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// A failed dirty-log call.
#[derive(Debug, thiserror::Error)]
#[error("{ioctl} for slot {slot}: {source}")]
pub struct DirtyError {
    ioctl: &'static str,
    slot: u32,
    source: vmm_sys_util::errno::Error,
}

/// One bit a page of a region; bit 0 of word 0 is the region's first page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    /// A bitmap of `pages` clean pages.
    #[must_use]
    pub fn clean(pages: u64) -> Self {
        Self {
            words: vec![
                0;
                usize::try_from(pages.div_ceil(64)).expect("guest memory fits a 64-bit address space")
            ],
        }
    }

    /// From words of KVM or vm-memory.
    #[must_use]
    pub fn from_words(words: Vec<u64>) -> Self {
        Self { words }
    }

    /// Marks a run of pages, word by word. Pages past the end are ignored.
    pub fn set_run(&mut self, start: u64, pages: u64) {
        let end = start.saturating_add(pages).min(self.words.len() as u64 * 64);
        let mut page = start;
        while page < end {
            let bits = (64 - page % 64).min(end - page);
            let mask = (u64::MAX >> (64 - bits)) << (page % 64);
            self.words[usize::try_from(page / 64).expect("an index of a word")] |= mask;
            page += bits;
        }
    }

    /// Adds every page of `other`.
    pub fn merge(&mut self, other: &[u64]) {
        for (mine, theirs) in self.words.iter_mut().zip(other) {
            *mine |= theirs;
        }
    }

    /// Takes out every page of `other`.
    pub fn remove(&mut self, other: &[u64]) {
        for (mine, theirs) in self.words.iter_mut().zip(other) {
            *mine &= !theirs;
        }
    }

    /// All words.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Gives the words away.
    #[must_use]
    pub fn into_words(self) -> Vec<u64> {
        self.words
    }

    /// Number of marked pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The words of pages `first..first + pages`; `first` must be a multiple of 64.
    #[must_use]
    pub fn chunk(&self, first: u64, pages: u64) -> &[u64] {
        let start = usize::try_from(first / 64)
            .unwrap_or(usize::MAX)
            .min(self.words.len());
        let end = usize::try_from((first + pages).div_ceil(64))
            .unwrap_or(usize::MAX)
            .min(self.words.len());
        &self.words[start..end]
    }
}

/// Runs of set bits, as (first bit, count), without visiting the bits of clean or full words one by one.
pub fn runs(words: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let bits = words.len() as u64 * 64;
    let mut position = 0u64;
    std::iter::from_fn(move || {
        let start = next_bit(words, position, bits, false);
        if start >= bits {
            return None;
        }
        let end = next_bit(words, start, bits, true);
        position = end;
        Some((start, end - start))
    })
}

/// The first bit at or after `from` that is set (or clear, if `invert`); `bits` if there is none.
fn next_bit(words: &[u64], from: u64, bits: u64, invert: bool) -> u64 {
    let flip = if invert { u64::MAX } else { 0 };
    let mut index = usize::try_from(from / 64).unwrap_or(usize::MAX);
    let mut mask = u64::MAX << (from % 64);
    while let Some(word) = words.get(index) {
        let hit = (word ^ flip) & mask;
        if hit != 0 {
            return index as u64 * 64 + u64::from(hit.trailing_zeros());
        }
        mask = u64::MAX;
        index += 1;
    }
    bits
}

/// KVM's dirty log for one VM, on while this exists.
#[derive(Debug)]
pub struct DirtyLog<'a> {
    vm: &'a VmFd,
    memory: &'a GuestMemory,
    manual_protect: bool,
}

/// Asks KVM to leave write protection to explicit clears, where it can. Call before the first vCPU is created.
///
/// # Errors
/// When KVM has the capability and refuses it all the same.
pub fn enable_manual_protect(kvm: &Kvm, vm: &VmFd) -> Result<bool, kvm_ioctls::Error> {
    let offered = kvm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
    if offered <= 0 {
        return Ok(false);
    }
    let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    let args = u64::from(wanted & offered.unsigned_abs());
    vm.enable_cap(&kvm_enable_cap {
        cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [args, 0, 0, 0],
        ..Default::default()
    })?;
    debug_assert!(kvm.check_extension(Cap::UserMemory));
    Ok(true)
}

impl<'a> DirtyLog<'a> {
    /// Turns the log on. Every page counts as dirty until its first clear.
    ///
    /// # Errors
    /// When KVM refuses the memory slots.
    pub fn start(
        vm: &'a VmFd,
        memory: &'a GuestMemory,
        manual_protect: bool,
    ) -> Result<Self, crate::memory::MemoryError> {
        for region in memory.regions() {
            let _ = memory.take_vmm_dirty(region.slot);
        }
        memory.register(vm, true)?;
        Ok(Self {
            vm,
            memory,
            manual_protect,
        })
    }

    /// Pages of `region` written since they were last cleared (vCPUs), or since the last call (VMM).
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn get(&self, region: &Region) -> Result<Bitmap, DirtyError> {
        let mut words = written_by_vcpus(self.vm, region)?;
        self.memory.merge_vmm_dirty(region.slot, &mut words);
        Ok(Bitmap::from_words(words))
    }

    /// Re-arms tracking for the set pages of `words`, which starts at page `first` (a multiple of 64) of the region.
    /// To be called before those pages are read. Without manual protection [`DirtyLog::get`] has done it already.
    ///
    /// # Errors
    /// When the ioctl fails.
    pub fn clear(&self, region: &Region, first: u64, words: &mut [u64]) -> Result<(), DirtyError> {
        if !self.manual_protect {
            return Ok(());
        }
        clear(self.vm, region, first, words)
    }
}

/// Re-arms tracking for the set pages of `words`, which starts at page `first` (a multiple of 64) of the region, in a log
/// that is on and that KVM protects by explicit clears only.
///
/// # Errors
/// When the ioctl fails.
pub(crate) fn clear(vm: &VmFd, region: &Region, first: u64, words: &mut [u64]) -> Result<(), DirtyError> {
    let pages = (words.len() as u64 * 64).min(region.pages() - first);
    let request = kvm_clear_dirty_log {
        slot: region.slot,
        num_pages: u32::try_from(pages).expect("chunks are far below 2^32 pages"),
        first_page: first,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_mut_ptr().cast(),
        },
    };
    // SAFETY: the request points at words.len() * 64 >= num_pages bits that live across the call; KVM only reads them.
    let result = unsafe { ioctl_with_ref(vm, ioctl::KVM_CLEAR_DIRTY_LOG(), &request) };
    if result < 0 {
        let source = vmm_sys_util::errno::Error::last();
        return Err(DirtyError {
            ioctl: "KVM_CLEAR_DIRTY_LOG",
            slot: region.slot,
            source,
        });
    }
    Ok(())
}

/// Whether KVM leaves all pages alone when the log is turned on, and tracks those that are cleared. Otherwise to turn it on
/// costs the guest a fault for every page that it writes.
#[must_use]
pub(crate) fn tracks_only_cleared_pages(vm: &VmFd) -> bool {
    let offered = vm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
    offered > 0 && offered.unsigned_abs() & KVM_DIRTY_LOG_INITIALLY_SET != 0
}

/// Pages of `region` that vCPUs have written since they were last cleared. The VMM's own writes are left for a migration.
///
/// # Errors
/// When the ioctl fails.
pub(crate) fn written_by_vcpus(vm: &VmFd, region: &Region) -> Result<Vec<u64>, DirtyError> {
    let bytes = usize::try_from(region.len).expect("guest memory fits a 64-bit address space");
    vm.get_dirty_log(region.slot, bytes).map_err(|source| DirtyError {
        ioctl: "KVM_GET_DIRTY_LOG",
        slot: region.slot,
        source,
    })
}

impl Drop for DirtyLog<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.memory.register(self.vm, false) {
            tracing::warn!(%error, "cannot turn the dirty log off; the guest runs on, a little slower");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive_runs(words: &[u64]) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = vec![];
        for bit in 0..words.len() as u64 * 64 {
            if words[usize::try_from(bit / 64).expect("small")] >> (bit % 64) & 1 == 0 {
                continue;
            }
            match runs.last_mut() {
                Some((start, count)) if *start + *count == bit => *count += 1,
                _ => runs.push((bit, 1)),
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn runs_are_those_of_the_naive_walk(words in proptest::collection::vec(
            prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>()], 0..40)) {
            prop_assert_eq!(runs(&words).collect::<Vec<_>>(), naive_runs(&words));
        }

        #[test]
        fn a_set_run_comes_back_as_one_run(start in 0u64..1000, pages in 1u64..1000) {
            let mut bitmap = Bitmap::clean(2048);
            bitmap.set_run(start, pages);
            prop_assert_eq!(bitmap.count(), pages);
            prop_assert_eq!(runs(bitmap.chunk(0, 2048)).collect::<Vec<_>>(), vec![(start, pages)]);
        }
    }

    #[test]
    fn a_sparse_bitmap_of_512_gib_gives_its_runs() {
        let mut bitmap = Bitmap::clean((512 << 30) / 4096);
        for page in (0..(512u64 << 30) / 4096).step_by(1 << 20) {
            bitmap.set_run(page, 3);
        }
        assert_eq!(runs(bitmap.chunk(0, u64::MAX / 2)).count(), 128);
    }
}
