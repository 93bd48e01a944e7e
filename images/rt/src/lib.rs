//! The memory functions that compiled code calls by name. A guest program has no C library to bring them, so it brings this
//! crate (`use guest_rt as _;`). String instructions: short, and fast on any CPU of the last ten years.
//!
//! A loop written in Rust would not do here: the compiler turns it into a call of the very function it implements.
#![no_std]

use core::arch::asm;
use core::ffi::c_int;

/// Copies `length` bytes; the two areas must not overlap.
///
/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcpy(destination: *mut u8, source: *const u8, length: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the ABI keeps the direction flag clear.
    unsafe {
        asm!("rep movsb", inout("rcx") length => _, inout("rdi") destination => _, inout("rsi") source => _,
            options(nostack, preserves_flags));
    }
    destination
}

/// Copies `length` bytes between areas that may overlap.
///
/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memmove(destination: *mut u8, source: *const u8, length: usize) -> *mut u8 {
    if destination.addr().wrapping_sub(source.addr()) >= length {
        // SAFETY: the destination does not start inside the source, so copying upwards reads each byte before it is written.
        return unsafe { memcpy(destination, source, length) };
    }
    // SAFETY: the destination starts inside the source: length > 0, and copying downwards reads each byte before it is written.
    // The direction flag is cleared again, as the ABI wants it.
    unsafe {
        asm!("std", "rep movsb", "cld",
            inout("rcx") length => _, inout("rdi") destination.add(length - 1) => _, inout("rsi") source.add(length - 1) => _,
            options(nostack));
    }
    destination
}

/// Sets `length` bytes to `value`'s lowest byte.
///
/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memset(destination: *mut u8, value: c_int, length: usize) -> *mut u8 {
    // SAFETY: the caller's promise; the ABI keeps the direction flag clear.
    unsafe {
        asm!("rep stosb", inout("rcx") length => _, inout("rdi") destination => _, in("eax") value,
            options(nostack, preserves_flags));
    }
    destination
}

/// Compares `length` bytes: negative, zero or positive, as the first byte that differs.
///
/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, length: usize) -> c_int {
    for offset in 0..length {
        // SAFETY: the caller's promise: both areas are `length` bytes long.
        let (left, right) = unsafe { (left.add(offset).read(), right.add(offset).read()) };
        if left != right {
            return c_int::from(left) - c_int::from(right);
        }
    }
    0
}

/// Compares `length` bytes: zero if they are equal.
///
/// # Safety
/// As C's `bcmp`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, length: usize) -> c_int {
    // SAFETY: the caller's promise is the same.
    unsafe { memcmp(left, right, length) }
}

/// How many bytes come before the first zero byte.
///
/// # Safety
/// As C's `strlen`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let left: usize;
    // SAFETY: the caller's promise: there is a zero byte, where the scan ends; the ABI keeps the direction flag clear.
    unsafe {
        asm!("repne scasb", inout("rcx") usize::MAX => left, inout("rdi") text => _, in("al") 0u8,
            options(nostack, readonly));
    }
    // The scan counts the zero byte too.
    usize::MAX - left - 1
}
