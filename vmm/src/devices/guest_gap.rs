//! What the guest itself says of the time it missed: the only honest measure of what a migration costs it.

use std::sync::atomic::{AtomicU64, Ordering};

/// No guest has said anything yet.
const UNKNOWN: u64 = u64::MAX;

/// The longest time in which the guest saw no time pass, since its latest migration began.
#[derive(Debug)]
pub struct GuestGap(AtomicU64);

impl Default for GuestGap {
    fn default() -> Self {
        Self(AtomicU64::new(UNKNOWN))
    }
}

impl GuestGap {
    /// The guest wrote `data` to the port: microseconds, if it is four bytes.
    pub fn write(&self, data: &[u8]) {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let said = u64::from(u32::from_le_bytes(bytes));
        let longest = |known| Some(if known == UNKNOWN { said } else { said.max(known) });
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, longest); // never refused
    }

    /// Microseconds, if the guest says any.
    #[must_use]
    pub fn longest_us(&self) -> Option<u32> {
        u32::try_from(self.0.load(Ordering::Relaxed)).ok()
    }

    /// A migration begins: what was before is not its doing.
    pub fn start_again(&self) {
        let forget = |known| (known != UNKNOWN).then_some(0);
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, forget); // unknown stays unknown
    }

    /// What came with the VM.
    pub fn restore(&self, longest_us: Option<u32>) {
        self.0
            .store(longest_us.map_or(UNKNOWN, u64::from), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_since_the_migration_began_is_kept_and_moves_with_the_vm() {
        let gap = GuestGap::default();
        gap.start_again();
        assert_eq!(gap.longest_us(), None);
        for said in [7u32, 5000, 30] {
            gap.write(&said.to_le_bytes());
        }
        assert_eq!(gap.longest_us(), Some(5000));
        gap.start_again();
        gap.write(&40u32.to_le_bytes());
        let moved = GuestGap::default();
        moved.restore(gap.longest_us());
        assert_eq!(moved.longest_us(), Some(40));
    }

    #[test]
    fn writes_of_another_width_mean_nothing() {
        let gap = GuestGap::default();
        for data in [&[][..], &[1], &[1, 2], &[0; 8]] {
            gap.write(data);
        }
        assert_eq!(gap.longest_us(), None);
        gap.write(&[0xff; 4]);
        assert_eq!(gap.longest_us(), Some(u32::MAX));
    }
}
