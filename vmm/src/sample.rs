//! How fast the guest dirties memory, and how much it writes again and again: sampled now and then, and the rarer the more
//! a sample costs. The guest's part of that does not grow with its memory; reading KVM's log does, by a bit for each page.
//!
//! KVM's dirty log is turned on for a short window, and only some blocks of 2 MiB, spread over all of memory, are cleared in
//! it. With `KVM_DIRTY_LOG_INITIALLY_SET` KVM tracks the pages that were cleared and leaves all others alone: the guest
//! takes at most one fault for each of them. What was written of them, times what they stand for, is the dirty rate.
//!
//! The same pages are tracked in several windows. Those written in any of them are a part of the working set; how many more
//! there are that no window saw, is estimated from how many were seen once and how many twice (Chao, *Estimating the
//! population size for capture-recapture data with unequal catchability*, Biometrics 43, 1987). This is the working set of
//! writes, which is what pre-copy has to send again (Clark et al., NSDI 2005); reads leave no trace in KVM's log.

mod pace;
mod pages;

use std::time::Instant;

use shoal_proto::vm::MemorySample;

use crate::dirty::{self, DirtyError};
use crate::memory::{MemoryError, Region};
use crate::spec::PAGE_SIZE;
use crate::vm::Vm;

pub use pace::{Pace, PaceError, stream};
pub use pages::TRACKED_PAGES;

use pages::{Tracked, WINDOWS};

/// Why there is no sample.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// To track some pages KVM would have to protect all.
    #[error("this host's KVM cannot track some pages and leave the others alone (Linux 5.6 can)")]
    NotOffered,
    /// Somebody else samples.
    #[error("memory is being sampled already")]
    UnderWay,
    /// The memory slots.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The log.
    #[error(transparent)]
    Log(#[from] DirtyError),
}

/// Takes samples of one VM.
#[derive(Debug)]
pub struct Sampler {
    tracked: Tracked,
    window: Option<Window>,
    /// Working set of the last pages that were tracked in enough windows, while new ones are not.
    settled: Option<u64>,
    random: u64,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    cost_us: u64,
}

impl Default for Sampler {
    fn default() -> Self {
        let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let nanos = clock.map_or(0, |time| time.subsec_nanos());
        Self {
            tracked: Tracked::default(),
            window: None,
            settled: None,
            random: u64::from(nanos) << 32 | u64::from(std::process::id()),
        }
    }
}

impl Sampler {
    /// Tracks writes from now on.
    ///
    /// # Errors
    /// When KVM cannot, or not without cost to the guest. Then nothing is tracked.
    pub fn begin(&mut self, vm: &Vm) -> Result<(), SampleError> {
        if self.window.is_some() {
            return Err(SampleError::UnderWay);
        }
        if !vm.manual_dirty_protect() || !dirty::tracks_only_cleared_pages(vm.fd()) {
            return Err(SampleError::NotOffered);
        }
        let started = cpu_time_us();
        let regions = vm.memory().regions();
        if self.tracked.windows() == 0 || self.tracked.windows() == WINDOWS {
            self.random = self
                .random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let pages: Vec<u64> = regions.iter().map(Region::pages).collect();
            self.tracked = Tracked::draw(&pages, self.random);
        }
        vm.memory().register(vm.fd(), true)?;
        let since = Instant::now();
        for (region, slot) in regions.iter().zip(0..) {
            let Some((first, mut words)) = self.tracked.bitmap(slot) else {
                continue;
            };
            if let Err(error) = dirty::clear(vm.fd(), region, first, &mut words) {
                log_off(vm);
                return Err(error.into());
            }
        }
        let cost_us = cpu_time_us().saturating_sub(started);
        self.window = Some(Window { since, cost_us });
        Ok(())
    }

    /// What was written since [`Sampler::begin`]; `None` if that was abandoned.
    ///
    /// # Errors
    /// When KVM does not say. Nothing is tracked any more in any case.
    pub fn end(&mut self, vm: &Vm) -> Result<Option<MemorySample>, SampleError> {
        let Some(window) = self.window.take() else {
            return Ok(None);
        };
        let started = cpu_time_us();
        let logs: Result<Vec<_>, _> = vm
            .memory()
            .regions()
            .iter()
            .map(|region| dirty::written_by_vcpus(vm.fd(), region))
            .collect();
        let length = window.since.elapsed();
        log_off(vm);
        let written = self.tracked.add(&logs?);
        let estimate = self.tracked.working_set();
        if self.tracked.windows() >= WINDOWS / 2 {
            self.settled = Some(estimate);
        }
        let bytes = |pages: u64| self.tracked.of_all(pages).saturating_mul(PAGE_SIZE);
        let us = u64::try_from(length.as_micros()).unwrap_or(u64::MAX).max(1);
        let per_second = u128::from(bytes(written)) * 1_000_000 / u128::from(us);
        Ok(Some(MemorySample {
            dirty_rate_bytes_per_second: u64::try_from(per_second).unwrap_or(u64::MAX),
            working_set_bytes: bytes(self.settled.unwrap_or(estimate)),
            windows: self.tracked.windows(),
            tracked_bytes: self.tracked.pages() * PAGE_SIZE,
            window_us: us,
            cost_us: window.cost_us + cpu_time_us().saturating_sub(started),
            interval_ms: 0,
            faults: written,
        }))
    }

    /// Tracks nothing any more, and says nothing of it.
    pub fn abandon(&mut self, vm: &Vm) {
        if self.window.take().is_some() {
            log_off(vm);
        }
    }
}

fn log_off(vm: &Vm) {
    if let Err(error) = vm.memory().register(vm.fd(), false) {
        tracing::warn!(%error, "cannot turn the dirty log off; the guest runs on, a little slower");
    }
}

/// CPU time of this thread.
fn cpu_time_us() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec, which is ours.
    if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) } != 0 {
        return 0;
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000) + u64::try_from(time.tv_nsec).unwrap_or(0) / 1000
}
