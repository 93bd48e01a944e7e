//! Anonymous memory in huge pages, as guest RAM is.
//!
//! A machine that is a guest itself may give the memory that it has free back to its host (free page reporting), and gets
//! it back page by page when it is touched again: tens of times slower than anything that is measured here, and the same
//! whatever VMM touches it. So before a migration as much memory as the destination needs is touched, and it is set free
//! right before the migration begins.

use anyhow::{Context as _, Result};
use memmap2::{Advice, MmapMut};

use crate::case::MEMORY;

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
    /// Touches a little more than a guest has; `None` if that is not wanted.
    ///
    /// # Errors
    /// If there is not enough.
    pub fn up(wanted: bool) -> Result<Option<Self>> {
        if !wanted {
            return Ok(None);
        }
        let mut memory = fresh(usize::try_from(MEMORY + MEMORY / 8)?)?;
        memory.fill(1);
        Ok(Some(Self { _memory: memory }))
    }
}
