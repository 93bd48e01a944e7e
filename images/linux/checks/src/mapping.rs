//! Memory that a check has mapped, and may use in ways that Rust's references do not allow.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc::c_void;
use nix::sys::mman::{self, MapFlags, MmapAdvise, ProtFlags};

/// Memory that was mapped, unmapped with this.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<c_void>,
    length: usize,
}

impl Mapping {
    /// Memory of its own, readable and writable.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn private(length: usize) -> nix::Result<Self> {
        Self::new(length, rw(), MapFlags::MAP_PRIVATE)
    }

    /// Memory that children share, readable and writable.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn shared(length: usize) -> nix::Result<Self> {
        Self::new(length, rw(), MapFlags::MAP_SHARED)
    }

    /// Memory that is no file.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn new(length: usize, protection: ProtFlags, flags: MapFlags) -> nix::Result<Self> {
        Self::at(0, length, protection, flags)
    }

    /// Memory that is no file, at an address.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn at(address: usize, length: usize, protection: ProtFlags, flags: MapFlags) -> nix::Result<Self> {
        let size = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
        // SAFETY: nothing of the program's own lies where a check asks for MAP_FIXED.
        let start = unsafe { mman::mmap_anonymous(NonZeroUsize::new(address), size, protection, flags) }?;
        Ok(Self { start, length })
    }

    /// A part of a file.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn of_file(
        file: impl AsFd,
        length: usize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> nix::Result<Self> {
        Self::of_file_at(file, length, protection, flags, 0)
    }

    /// A part of a file that begins at an offset.
    ///
    /// # Errors
    /// mmap(2)'s.
    pub fn of_file_at(
        file: impl AsFd,
        length: usize,
        protection: ProtFlags,
        flags: MapFlags,
        offset: i64,
    ) -> nix::Result<Self> {
        let size = NonZeroUsize::new(length).ok_or(Errno::EINVAL)?;
        // SAFETY: at an address of the kernel's choice.
        let start = unsafe { mman::mmap(None, size, protection, flags, file, offset) }?;
        Ok(Self { start, length })
    }

    /// Its first byte.
    #[must_use]
    pub fn address(&self) -> usize {
        self.start.as_ptr().expose_provenance()
    }

    /// Its size in bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// A pointer to where something lies in it.
    ///
    /// # Panics
    /// If that is not within it, or not aligned.
    #[must_use]
    pub fn pointer<T>(&self, offset: usize) -> *mut T {
        assert!(
            offset + size_of::<T>() <= self.length && offset.is_multiple_of(align_of::<T>()),
            "{offset} of {}",
            self.length
        );
        self.start.as_ptr().cast::<u8>().wrapping_add(offset).cast()
    }

    /// A word. Faults if the page cannot be read.
    #[must_use]
    pub fn get(&self, offset: usize) -> u64 {
        // SAFETY: within the mapping and aligned; any bytes are a number.
        unsafe { self.pointer::<u64>(offset).read_volatile() }
    }

    /// Sets a word. Faults if the page cannot be written.
    pub fn set(&self, offset: usize, value: u64) {
        // SAFETY: within the mapping and aligned; nobody has a reference to it.
        unsafe { self.pointer::<u64>(offset).write_volatile(value) }
    }

    /// Something atomic in it.
    ///
    /// # Panics
    /// If it is not within.
    #[must_use]
    pub fn atomic<T: Atomic>(&self, offset: usize) -> &T {
        // SAFETY: within the mapping and aligned, any bytes are one, and it is used as an atomic only.
        unsafe { &*self.pointer::<T>(offset) }
    }

    /// Copies bytes into it.
    ///
    /// # Panics
    /// If they are too many.
    pub fn put(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.length, "{offset} of {}", self.length);
        // SAFETY: within the mapping; nobody has a reference to it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer(offset), bytes.len()) }
    }

    /// Copies bytes out of it.
    ///
    /// # Panics
    /// If there are not so many.
    #[must_use]
    pub fn bytes(&self, offset: usize, length: usize) -> Vec<u8> {
        assert!(offset + length <= self.length, "{offset} of {}", self.length);
        let mut bytes = vec![0; length];
        // SAFETY: within the mapping; nobody writes it meanwhile but as the check means it to.
        unsafe { std::ptr::copy_nonoverlapping(self.pointer(offset), bytes.as_mut_ptr(), length) }
        bytes
    }

    /// mprotect(2) of a part.
    ///
    /// # Errors
    /// Its own.
    pub fn protect(&self, offset: usize, length: usize, protection: ProtFlags) -> nix::Result<()> {
        // SAFETY: within the mapping; that it may fault afterwards is what the check is about.
        unsafe { mman::mprotect(self.part(offset, length), length, protection) }
    }

    /// madvise(2) of a part.
    ///
    /// # Errors
    /// Its own.
    pub fn advise(&self, offset: usize, length: usize, advice: MmapAdvise) -> nix::Result<()> {
        // SAFETY: within the mapping; nobody has a reference to it.
        unsafe { mman::madvise(self.part(offset, length), length, advice) }
    }

    /// munmap(2) of a part, which stays part of this.
    ///
    /// # Errors
    /// Its own.
    pub fn punch(&self, offset: usize, length: usize) -> nix::Result<()> {
        // SAFETY: within the mapping; that it faults afterwards is what the check is about.
        unsafe { mman::munmap(self.part(offset, length), length) }
    }

    /// mremap(2) to another size, where it likes or at an address.
    ///
    /// # Errors
    /// Its own.
    pub fn resize(self, length: usize, to: Option<usize>) -> nix::Result<Self> {
        let flags = match to {
            Some(_) => mman::MRemapFlags::MREMAP_MAYMOVE | mman::MRemapFlags::MREMAP_FIXED,
            None => mman::MRemapFlags::MREMAP_MAYMOVE,
        };
        let to = to.and_then(|address| NonNull::new(std::ptr::with_exposed_provenance_mut(address)));
        // SAFETY: all of the mapping, which is given up; nothing else lies where the check wants it.
        let start = unsafe { mman::mremap(self.start, self.length, length, flags, to) }?;
        std::mem::forget(self);
        Ok(Self { start, length })
    }

    fn part(&self, offset: usize, length: usize) -> NonNull<c_void> {
        assert!(offset + length <= self.length, "{offset} of {}", self.length);
        // SAFETY: within the mapping.
        unsafe { self.start.byte_add(offset) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by mmap, and nobody uses it any more.
        let _ = unsafe { mman::munmap(self.start, self.length) };
    }
}

/// What [`Mapping::atomic`] can give.
///
/// # Safety
/// Only for atomics: all bytes valid, changed through shared references.
pub unsafe trait Atomic {}
// SAFETY: one.
unsafe impl Atomic for std::sync::atomic::AtomicU32 {}
// SAFETY: one.
unsafe impl Atomic for std::sync::atomic::AtomicU64 {}

/// Readable and writable.
#[must_use]
pub fn rw() -> ProtFlags {
    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
}
