//! What was sent last for pages that are sent again and again, so that only the difference has to be.
//!
//! Rule: the cache holds exactly the bytes that were sent last for a page, or nothing. Whoever sends a page past the
//! cache, its zeros included, says so with [`DeltaCache::forget`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::PAGE;

const MAX_BYTES: u64 = 64 << 20;
const GUEST_SHARE: u64 = 16;
const MAX_SHARDS: usize = 16;
/// Neighbouring pages in one shard, and allocated at once: the pages of a batch mostly need one lock.
const GROUP_PAGES: usize = 64;
/// When it is full, only each so-manieth new page gets to push another out. Passes go through memory in order; if each
/// page did, a working set larger than the cache would find nothing in it.
const ADMISSION: u32 = 8;
/// Of the 512 words of a page: with more changed ones the page itself is sent.
const MAX_CHANGED_WORDS: usize = 256;

/// Bounded; empty until used.
#[derive(Debug)]
pub struct DeltaCache {
    shards: Vec<Mutex<Shard>>,
    pages: AtomicUsize,
}

#[derive(Debug, Default)]
struct Shard {
    capacity: usize,
    index: HashMap<u64, usize>,
    slots: Vec<Slot>,
    groups: Vec<Box<[u8]>>,
    free: Vec<usize>,
    hand: usize,
    turned_away: u32,
}

#[derive(Debug)]
struct Slot {
    gpa: u64,
    hit: bool,
}

impl DeltaCache {
    /// Of at most this many bytes; less than a page: none.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        let pages = max_bytes / PAGE;
        let count = (pages / GROUP_PAGES).clamp(usize::from(pages > 0), MAX_SHARDS);
        let shard = || Shard {
            capacity: pages / count,
            ..Shard::default()
        };
        Self {
            shards: (0..count).map(|_| Mutex::new(shard())).collect(),
            pages: AtomicUsize::new(0),
        }
    }

    /// As large as suits a guest of this size: a sixteenth of it, at most 64 MiB.
    #[must_use]
    pub fn for_guest(memory_bytes: u64) -> Self {
        let bytes = (memory_bytes / GUEST_SHARE).min(MAX_BYTES);
        Self::new(usize::try_from(bytes).expect("at most 64 MiB"))
    }

    pub(super) fn is_enabled(&self) -> bool {
        !self.shards.is_empty()
    }

    /// Pages held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.load(Ordering::Relaxed)
    }

    /// Whether it holds none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Most pages it will hold.
    #[must_use]
    pub fn capacity(&self) -> usize {
        (0..self.shards.len())
            .map(|shard| self.lock(shard).capacity)
            .sum()
    }

    /// Memory it has allocated for pages; what it has, it keeps.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let groups = |shard| {
            self.lock(shard)
                .groups
                .iter()
                .map(|group| group.len())
                .sum::<usize>()
        };
        (0..self.shards.len()).map(groups).sum()
    }

    fn shard_of(&self, gpa: u64) -> usize {
        let group = gpa / (GROUP_PAGES * PAGE) as u64;
        let hash = group.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        usize::try_from(hash).expect("32 bits") % self.shards.len()
    }

    fn lock(&self, shard: usize) -> MutexGuard<'_, Shard> {
        self.shards[shard].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These pages from `gpa` on are sent past the cache. Costs nothing while it is empty. No other worker may be sending
    /// the same pages.
    pub fn forget(&self, gpa: u64, pages: u64) {
        let mut page = 0;
        while page < pages && !self.is_empty() {
            let first = gpa + page * PAGE as u64;
            let left_of_group = GROUP_PAGES as u64 - first / PAGE as u64 % GROUP_PAGES as u64;
            let of_group = left_of_group.min(pages - page);
            let mut shard = self.lock(self.shard_of(first));
            let forgotten = (0..of_group)
                .filter(|i| shard.forget(first + i * PAGE as u64))
                .count();
            self.pages.fetch_sub(forgotten, Ordering::Relaxed);
            page += of_group;
        }
    }

    /// Replaces pages that are held by the difference to what is held, where that is small, and holds the new ones.
    /// Answers which were held and which were replaced, bit by bit.
    pub(super) fn exchange(&self, gpas: &[u64], bytes: &mut [u8]) -> (u64, u64) {
        let (mut known, mut delta) = (0, 0);
        if !self.is_enabled() {
            return (known, delta);
        }
        let mut locked: Option<(usize, MutexGuard<'_, Shard>)> = None;
        for (i, (&gpa, page)) in gpas.iter().zip(bytes.chunks_exact_mut(PAGE)).enumerate() {
            let wanted = self.shard_of(gpa);
            if locked.as_ref().is_none_or(|(shard, _)| *shard != wanted) {
                // One at a time: a worker that waits for a shard holds none.
                drop(locked.take());
                locked = Some((wanted, self.lock(wanted)));
            }
            let (_, shard) = locked.as_mut().expect("just locked");
            if let Some(replaced) = shard.exchange(gpa, page) {
                known |= 1 << i;
                delta |= u64::from(replaced) << i;
            } else if shard.insert(gpa, page) {
                self.pages.fetch_add(1, Ordering::Relaxed);
            }
        }
        (known, delta)
    }
}

impl Shard {
    fn page(&mut self, slot: usize) -> &mut [u8] {
        let start = slot % GROUP_PAGES * PAGE;
        &mut self.groups[slot / GROUP_PAGES][start..start + PAGE]
    }

    fn forget(&mut self, gpa: u64) -> bool {
        let Some(slot) = self.index.remove(&gpa) else {
            return false;
        };
        self.free.push(slot);
        true
    }

    fn exchange(&mut self, gpa: u64, page: &mut [u8]) -> Option<bool> {
        let slot = *self.index.get(&gpa)?;
        self.slots[slot].hit = true;
        let held = self.page(slot);
        let changed = words(held)
            .zip(words(page))
            .filter(|(old, new)| old != new)
            .count();
        if changed > MAX_CHANGED_WORDS {
            held.copy_from_slice(page);
            return Some(false);
        }
        for (old, new) in held.iter_mut().zip(page) {
            let fresh = *new;
            *new ^= *old;
            *old = fresh;
        }
        Some(true)
    }

    /// Whether there is one page more than before.
    fn insert(&mut self, gpa: u64, page: &[u8]) -> bool {
        let Some((slot, more)) = self.slot_for_new() else {
            return false;
        };
        self.slots[slot] = Slot { gpa, hit: false };
        self.index.insert(gpa, slot);
        self.page(slot).copy_from_slice(page);
        more
    }

    fn slot_for_new(&mut self) -> Option<(usize, bool)> {
        if let Some(slot) = self.free.pop() {
            return Some((slot, true));
        }
        if self.slots.len() < self.capacity {
            let slot = self.slots.len();
            if slot.is_multiple_of(GROUP_PAGES) {
                let pages = (self.capacity - slot).min(GROUP_PAGES);
                self.groups.push(vec![0; pages * PAGE].into_boxed_slice());
                self.index.reserve(pages);
                self.slots.reserve(pages);
            }
            self.slots.push(Slot { gpa: 0, hit: false });
            return Some((slot, true));
        }
        self.turned_away += 1;
        if self.turned_away < ADMISSION || self.slots.is_empty() {
            return None;
        }
        self.turned_away = 0;
        let slot = self.hand;
        self.hand = (self.hand + 1) % self.slots.len();
        if std::mem::take(&mut self.slots[slot].hit) {
            return None;
        }
        let gpa = self.slots[slot].gpa;
        self.index.remove(&gpa);
        Some((slot, false))
    }
}

fn words(page: &[u8]) -> impl Iterator<Item = [u8; 8]> {
    page.as_chunks::<8>().0.iter().copied()
}

/// Turns the page that was sent before into the new one. Both of the same length.
pub fn apply_delta(target: &mut [u8], difference: &[u8]) {
    for (byte, changed) in target.iter_mut().zip(difference) {
        *byte ^= changed;
    }
}
