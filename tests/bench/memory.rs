//! Anonymous memory in huge pages, as guest RAM is.
//!
//! A machine that is a guest itself may give the memory that it has free back to its host (free page reporting), and gets
//! it back page by page when it is touched again: tens of times slower than anything that is measured here, and the same
//! whatever VMM touches it. So before a migration as much memory as the destination needs is touched, and it is set free
//! right before the migration begins.

use std::fs;

use anyhow::{Context as _, Result};
use memmap2::{Advice, MmapMut};

const HUGE_PAGE: usize = 2 << 20;

/// Memory that nobody has touched. Where there are no huge pages, it has small ones.
///
/// # Errors
/// If there is not enough.
pub fn fresh(bytes: usize) -> Result<MmapMut> {
    let memory = MmapMut::map_anon(bytes + HUGE_PAGE).with_context(|| format!("cannot map {bytes} bytes"))?;
    drop(memory.advise(Advice::HugePage)); // only advice
    Ok(memory)
}

/// Memory for a destination: free and warm once this is dropped.
#[derive(Debug)]
pub struct Warm {
    _memory: MmapMut,
}

impl Warm {
    /// Touches a little more than a guest of so many bytes has.
    ///
    /// # Errors
    /// If there is not enough.
    pub fn up(guest: u64) -> Result<Self> {
        let mut memory = fresh(usize::try_from(guest + guest / 8)?)?;
        memory.fill(1);
        Ok(Self { _memory: memory })
    }
}

/// Memory that the machine could give away now.
///
/// # Errors
/// If /proc/meminfo does not say.
pub fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_ascii_whitespace().next());
    Ok(kib.context("no MemAvailable in /proc/meminfo")?.parse::<u64>()? << 10)
}
