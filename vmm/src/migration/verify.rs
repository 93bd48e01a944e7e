//! Digests of guest memory, to compare both ends of a migration while the VM is paused.
//!
//! They find damage, not malice: the peer at the other end is authenticated, and the checksum (XXH3-64 of a page,
//! mixed with its place and a seed) is not a cryptographic one. A page that holds zeros counts the same whether the host
//! has backed it or not, and one that was never backed is not touched.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use shoal_proto::vm::Verify;
use twox_hash::XxHash3_64;
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryError};

use super::pages::is_zero;
use crate::dirty;
use crate::memory::{GuestMemory, MemoryError, Region, ram_ranges};
use crate::spec::{MAX_MEMORY, PAGE_SIZE};

/// What one checksum of a digest covers: 2 MiB.
const BLOCK_PAGES: u64 = 512;
/// What a thread takes at once: 32 blocks, 64 MiB.
const TASK_BLOCKS: usize = 32;
const TASK_PAGES: u64 = TASK_BLOCKS as u64 * BLOCK_PAGES;
/// Read at once: small enough to stay in a CPU's cache.
const READ_PAGES: u64 = 16;
const PAGE: usize = 4096;
const SAMPLED_ONE_IN: u64 = 64;
const HEAD: usize = 24;

/// Why memory could not be digested.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// What is backed cannot be told.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Guest memory cannot be read.
    #[error("guest memory: {0}")]
    Read(#[from] GuestMemoryError),
    /// No way to verify.
    #[error("verify: {0:?} digests nothing; ask for sampled or full")]
    Mode(Verify),
    /// A digest from elsewhere.
    #[error("digest of memory: {0}")]
    Malformed(&'static str),
}

/// A checksum of each block of guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryDigest {
    memory_bytes: u64,
    seed: u64,
    mode: Verify,
    blocks: Vec<u64>,
}

/// A block of guest memory: its place among all blocks, and its first page.
fn blocks_of(memory_bytes: u64) -> u64 {
    ram_ranges(memory_bytes)
        .iter()
        .map(|(_, len)| (len / PAGE_SIZE).div_ceil(BLOCK_PAGES))
        .sum()
}

/// A mix of all bits (the finalizer of SplitMix64).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Digests guest memory with so many threads: every page, or one in 64 that `seed` selects. Nothing may write to it
/// meanwhile, or the digest is of no state that ever was.
///
/// # Errors
/// When memory cannot be read, or `mode` is neither sampled nor full.
pub fn digest(
    memory: &GuestMemory,
    mode: Verify,
    seed: u64,
    threads: usize,
) -> Result<MemoryDigest, VerifyError> {
    if !matches!(mode, Verify::Sampled | Verify::Full) {
        return Err(VerifyError::Mode(mode));
    }
    let tasks = tasks(&memory.regions());
    let next = AtomicUsize::new(0);
    let all = usize::try_from(blocks_of(memory.len())).expect("blocks of guest memory");
    let blocks = Mutex::new(vec![0; all]);
    let worker = || -> Result<(), VerifyError> {
        let pagemap = GuestMemory::open_pagemap()?;
        let mut page_buffer = vec![0; PAGE * usize::try_from(READ_PAGES).expect("a few")];
        while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            let backed = memory.backed_pages(&pagemap, task.region.slot, task.first, task.pages)?;
            let mut sums = [0; TASK_BLOCKS];
            digest_task(memory, task, &backed, (mode, seed), &mut page_buffer, &mut sums)?;
            let count = usize::try_from(task.pages.div_ceil(BLOCK_PAGES)).expect("at most TASK_BLOCKS");
            let mut blocks = blocks.lock().unwrap_or_else(PoisonError::into_inner);
            blocks[task.block..task.block + count].copy_from_slice(&sums[..count]);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let more: Vec<_> = (1..threads.min(tasks.len()))
            .map(|_| scope.spawn(worker))
            .collect();
        let first = worker();
        more.into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .fold(first, Result::and)
    })?;
    Ok(MemoryDigest {
        memory_bytes: memory.len(),
        seed,
        mode,
        blocks: blocks.into_inner().unwrap_or_else(PoisonError::into_inner),
    })
}

/// A stretch of one region, and the place of its first block.
struct Task {
    region: Region,
    first: u64,
    pages: u64,
    block: usize,
}

fn tasks(regions: &[Region]) -> Vec<Task> {
    let mut tasks = vec![];
    let mut block = 0;
    for region in regions {
        let mut first = 0;
        while first < region.pages() {
            let pages = TASK_PAGES.min(region.pages() - first);
            tasks.push(Task {
                region: *region,
                first,
                pages,
                block,
            });
            block += usize::try_from(pages.div_ceil(BLOCK_PAGES)).expect("at most TASK_BLOCKS");
            first += pages;
        }
    }
    tasks
}

fn digest_task(
    memory: &GuestMemory,
    task: &Task,
    backed: &[u64],
    (mode, seed): (Verify, u64),
    buffer: &mut [u8],
    sums: &mut [u64],
) -> Result<(), VerifyError> {
    let start = task.region.start.raw_value() / PAGE_SIZE + task.first;
    let at_once = if mode == Verify::Sampled { 1 } else { READ_PAGES };
    for (run, pages) in dirty::runs(backed) {
        let end = (run + pages).min(task.pages);
        let mut page = run;
        while page < end {
            let count = at_once.min(end - page);
            let first = page;
            page += count;
            let place = mix((start + first) ^ mix(seed));
            if mode == Verify::Sampled && !place.is_multiple_of(SAMPLED_ONE_IN) {
                continue;
            }
            let bytes = &mut buffer[..PAGE * usize::try_from(count).expect("at most READ_PAGES")];
            let address = GuestAddress((start + first) * PAGE_SIZE);
            memory.mmap().read_slice(bytes, address)?;
            for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE)) {
                if !is_zero(bytes) {
                    let place = mix((start + page) ^ mix(seed));
                    let sum = XxHash3_64::oneshot(bytes);
                    let block = usize::try_from(page / BLOCK_PAGES).expect("below TASK_BLOCKS");
                    sums[block] = sums[block].wrapping_add(mix(sum ^ place));
                }
            }
        }
    }
    Ok(())
}

impl MemoryDigest {
    /// 128 bits for all of memory.
    #[must_use]
    pub fn total(&self) -> u128 {
        let fold = |salt: u64| {
            (0u64..)
                .zip(&self.blocks)
                .fold(mix(self.seed ^ salt), |sum, (place, block)| {
                    mix(sum ^ block.wrapping_add(mix(place ^ salt)))
                })
        };
        u128::from(fold(1)) << 64 | u128::from(fold(2))
    }

    /// Where the first block of 2 MiB begins that differs. Digests of another size, seed or mode differ from the start.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<GuestAddress> {
        let asked = |digest: &Self| (digest.memory_bytes, digest.seed, digest.mode);
        if asked(self) != asked(other) {
            return Some(GuestAddress(0));
        }
        let mut block = (0u64..)
            .zip(self.blocks.iter().zip(&other.blocks))
            .find_map(|(block, (mine, theirs))| (mine != theirs).then_some(block))?;
        for (start, len) in ram_ranges(self.memory_bytes) {
            let blocks = (len / PAGE_SIZE).div_ceil(BLOCK_PAGES);
            if block < blocks {
                return Some(start.unchecked_add(block * BLOCK_PAGES * PAGE_SIZE));
            }
            block -= blocks;
        }
        Some(GuestAddress(0))
    }

    /// As bytes: memory u64, seed u64, mode u32, zero u32, then one u64 a block; little-endian.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.blocks.len() * 8);
        bytes.extend_from_slice(&self.memory_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.seed.to_le_bytes());
        bytes.extend_from_slice(&i32::from(self.mode).to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        for block in &self.blocks {
            bytes.extend_from_slice(&block.to_le_bytes());
        }
        bytes
    }

    /// Length of the encoded digest of so much memory; nothing else is accepted.
    #[must_use]
    pub fn encoded_len(memory_bytes: u64) -> usize {
        let blocks = blocks_of(memory_bytes.min(MAX_MEMORY));
        HEAD + usize::try_from(blocks).expect("at most 2^21 blocks") * 8
    }

    /// What [`MemoryDigest::encode`] gave, for a guest of `memory_bytes`.
    ///
    /// # Errors
    /// When it is not one, or of another size.
    pub fn decode(bytes: &[u8], memory_bytes: u64) -> Result<Self, VerifyError> {
        if bytes.len() != Self::encoded_len(memory_bytes) {
            return Err(VerifyError::Malformed(
                "its length is not that of the guest's memory",
            ));
        }
        let (head, blocks) = bytes.split_at(HEAD);
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
        let mode = i32::from_le_bytes(head[16..20].try_into().expect("4 bytes"));
        let mode = Verify::try_from(mode).map_err(|_| VerifyError::Malformed("its mode is unknown"))?;
        if word(0) != memory_bytes || !matches!(mode, Verify::Sampled | Verify::Full) || head[20..] != [0; 4]
        {
            return Err(VerifyError::Malformed("it is of another guest or mode"));
        }
        Ok(Self {
            memory_bytes,
            seed: word(8),
            mode,
            blocks: blocks
                .chunks_exact(8)
                .map(|block| u64::from_le_bytes(block.try_into().expect("8 bytes")))
                .collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use proptest::prelude::*;

    const BYTES: u64 = (3 << 30) + (9 << 20) + 4096;
    const HIGH: u64 = 4 << 30;

    /// The same contents everywhere, but other pages backed.
    fn memory(backing: Backing, zeros_backed: bool) -> GuestMemory {
        let memory = GuestMemory::with_backing(BYTES, backing).expect("map");
        if zeros_backed {
            for at in [10 << 20, 700 << 20, HIGH + (7 << 20)] {
                memory.mmap().write_obj(0u64, GuestAddress(at)).expect("inside");
            }
        }
        let places = (0..3000).map(|n| n * 4096 * 13).chain([HIGH, HIGH + (9 << 20)]);
        for (value, at) in (1u64..).zip(places) {
            memory
                .mmap()
                .write_obj(value, GuestAddress(at + 64))
                .expect("inside");
        }
        memory
    }

    #[test]
    fn equal_memory_has_equal_digests_however_it_is_backed() {
        for mode in [Verify::Full, Verify::Sampled] {
            let first = digest(&memory(Backing::Anonymous, false), mode, 5, 1).expect("digest");
            for (backing, zeros_backed, threads) in [
                (Backing::Anonymous, true, 3),
                (Backing::Shared, false, 2),
                (Backing::Shared, true, 100),
            ] {
                let other = digest(&memory(backing, zeros_backed), mode, 5, threads).expect("digest");
                assert_eq!(first.first_difference(&other), None);
                assert_eq!((first.total(), &first), (other.total(), &other));
            }
            assert!(first.blocks.iter().any(|block| *block != 0));
        }
    }

    #[test]
    fn one_bit_anywhere_is_found_and_named() {
        let memory = memory(Backing::Anonymous, false);
        let before = digest(&memory, Verify::Full, 1, 2).expect("digest");
        for at in [
            0,
            4095,
            (2 << 20) - 1,
            1 << 30,
            (3 << 30) - 1,
            HIGH,
            HIGH + (9 << 20) + 4095,
        ] {
            let address = GuestAddress(at);
            let byte: u8 = memory.mmap().read_obj(address).expect("inside");
            memory.mmap().write_obj(byte ^ 1, address).expect("inside");
            let after = digest(&memory, Verify::Full, 1, 2).expect("digest");
            memory.mmap().write_obj(byte, address).expect("inside");
            let block = at / (2 << 20) * (2 << 20);
            assert_eq!(before.first_difference(&after), Some(GuestAddress(block)));
            assert_ne!(before.total(), after.total());
        }
        assert_eq!(digest(&memory, Verify::Full, 1, 2).expect("digest"), before);
    }

    #[test]
    fn pages_that_change_places_are_found() {
        let write = |pages: [u8; 2]| {
            let memory = GuestMemory::new(2 << 20).expect("map");
            for (at, value) in [0, 4096].into_iter().zip(pages) {
                memory.mmap().write_obj(value, GuestAddress(at)).expect("inside");
            }
            digest(&memory, Verify::Full, 1, 1).expect("digest")
        };
        assert_ne!(write([1, 2]), write([2, 1]));
        assert_ne!(write([1, 0]), write([0, 1]));
        assert_ne!(write([1, 1]), write([0, 0]));
    }

    #[test]
    fn samples_are_one_page_in_64_and_other_ones_for_another_seed() {
        const PAGES: u64 = 16384;
        let digest_with = |changed: u64, seed| {
            let memory = GuestMemory::new(PAGES * PAGE_SIZE).expect("map");
            for page in 0..PAGES {
                let value = if page == changed { 2u8 } else { 1 };
                memory
                    .mmap()
                    .write_obj(value, GuestAddress(page * PAGE_SIZE))
                    .expect("inside");
            }
            digest(&memory, Verify::Sampled, seed, 2).expect("digest")
        };
        let same = PAGES;
        let sampled_by =
            |seed| (0..PAGES).filter(move |page| mix(page ^ mix(seed)).is_multiple_of(SAMPLED_ONE_IN));
        for seed in [1, 2] {
            let count = sampled_by(seed).count();
            assert!((PAGES / 128..PAGES / 32).contains(&(count as u64)), "{count}");
            let seen = sampled_by(seed).nth(3).expect("a page");
            let unseen = (0..PAGES)
                .find(|page| sampled_by(seed).all(|sampled| sampled != *page))
                .expect("a page");
            let before = digest_with(same, seed);
            assert!(before.first_difference(&digest_with(seen, seed)).is_some());
            assert_eq!(before.first_difference(&digest_with(unseen, seed)), None);
        }
        assert_ne!(
            sampled_by(1).collect::<Vec<_>>(),
            sampled_by(2).collect::<Vec<_>>()
        );
    }

    #[test]
    fn digests_of_different_questions_differ() {
        let memory = GuestMemory::new(4 << 20).expect("map");
        let one = digest(&memory, Verify::Full, 1, 1).expect("digest");
        let two = digest(&memory, Verify::Full, 2, 1).expect("digest");
        assert!(one.first_difference(&two).is_some());
        for mode in [Verify::Off, Verify::Unspecified] {
            assert!(digest(&memory, mode, 1, 1).is_err());
        }
    }

    #[test]
    fn what_is_encoded_is_decoded_and_nothing_else_is() {
        let memory = memory(Backing::Anonymous, false);
        let digest = digest(&memory, Verify::Full, 77, 1).expect("digest");
        let bytes = digest.encode();
        assert_eq!(bytes.len(), MemoryDigest::encoded_len(BYTES));
        assert_eq!(MemoryDigest::decode(&bytes, BYTES).expect("decoded"), digest);
        assert!(MemoryDigest::decode(&bytes, BYTES + 4096).is_err());
        assert!(MemoryDigest::decode(&bytes[1..], BYTES).is_err());
        assert!(MemoryDigest::decode(&[], u64::MAX).is_err());
        for (at, value) in [(0, 0xff), (16, 9), (16, 1), (20, 1)] {
            let mut wrong = bytes.clone();
            wrong[at] = value;
            assert!(MemoryDigest::decode(&wrong, BYTES).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100), memory: u64) {
            let _ = MemoryDigest::decode(&bytes, memory);
            let _ = MemoryDigest::decode(&bytes, 2 << 20);
        }
    }
}
