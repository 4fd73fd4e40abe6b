//! The few raw accesses that everything else is made of: copies, and atomic words of a width chosen at run time.
//!
//! A copy out of shared memory may race with a peer that breaks the protocol. The bytes are then whatever the peer left there; the compiler
//! fence keeps the optimizer from reading them a second time in place of the private copy.

use crate::error::MemoryError;
use std::sync::atomic::Ordering::{Acquire, Release, SeqCst};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, compiler_fence};

/// Copies shared memory into private memory.
///
/// # Safety
/// `to.len()` bytes from `from` are mapped.
#[inline]
pub(crate) unsafe fn copy_out(from: *const u8, to: &mut [u8]) {
    // SAFETY: the caller vouches for the source, the slice for the target; `copy` allows them to overlap.
    unsafe { std::ptr::copy(from, to.as_mut_ptr(), to.len()) };
    compiler_fence(SeqCst);
}

/// Copies private memory into shared memory.
///
/// # Safety
/// `from.len()` bytes from `to` are mapped.
#[inline]
pub(crate) unsafe fn copy_in(to: *mut u8, from: &[u8]) {
    // SAFETY: the caller vouches for the target, the slice for the source; `copy` allows them to overlap.
    unsafe { std::ptr::copy(from.as_ptr(), to, from.len()) };
    compiler_fence(SeqCst);
}

/// Copies between two places of shared memory, which may overlap.
///
/// # Safety
/// `len` bytes from `from` and from `to` are mapped.
#[inline]
pub(crate) unsafe fn copy_across(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both; `copy` allows them to overlap.
    unsafe { std::ptr::copy(from, to, len) };
    compiler_fence(SeqCst);
}

/// Asks for a cache line that is about to be written: another core may have it. Nothing happens if the address is nobody's.
#[inline(always)]
pub(crate) fn prefetch_write(at: *const u8) {
    // SAFETY: a hint, which neither faults nor changes anything; processors without it take it for no operation.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) at, options(nostack, preserves_flags, readonly))
    };
    // SAFETY: as above.
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    unsafe {
        std::arch::asm!("prfm pstl1keep, [{}]", in(reg) at, options(nostack, preserves_flags, readonly))
    };
    let _ = at;
}

/// Checks a width, and that a word of this width may stand at this place.
pub(crate) fn check_word(at: *const u8, shown: u64, width: usize) -> Result<(), MemoryError> {
    if !matches!(width, 1 | 2 | 4 | 8) {
        return Err(MemoryError::BadWidth { width });
    }
    if !(at as usize).is_multiple_of(width) {
        return Err(MemoryError::Misaligned { address: shown, align: width as u64 });
    }
    Ok(())
}

/// Checks that a value fits into a word.
pub(crate) fn check_value(width: usize, value: u64) -> Result<(), MemoryError> {
    let max = if width >= 8 { u64::MAX } else { (1 << (8 * width)) - 1 };
    if value > max {
        return Err(MemoryError::BadSize { what: "value", value, min: 0, max, multiple_of: 1 });
    }
    Ok(())
}

/// Loads one little-endian word, with acquire.
///
/// # Safety
/// `width` bytes from `at` are mapped, and `check_word` passed.
pub(crate) unsafe fn load(at: *const u8, width: usize) -> u64 {
    // SAFETY: mapped and aligned by the caller's contract; shared memory is accessed through atomics.
    unsafe {
        match width {
            1 => u64::from((*at.cast::<AtomicU8>()).load(Acquire)),
            2 => u64::from(u16::from_le((*at.cast::<AtomicU16>()).load(Acquire))),
            4 => u64::from(u32::from_le((*at.cast::<AtomicU32>()).load(Acquire))),
            _ => u64::from_le((*at.cast::<AtomicU64>()).load(Acquire)),
        }
    }
}

/// Sets bits of a byte, with release.
///
/// # Safety
/// The byte is mapped.
pub(crate) unsafe fn fetch_or(at: *mut u8, bits: u8) -> u8 {
    // SAFETY: mapped by the caller's contract; shared memory is accessed through atomics.
    unsafe { (*at.cast::<AtomicU8>()).fetch_or(bits, Release) }
}

/// Stores one little-endian word, with release. Bits above the width are ignored.
///
/// # Safety
/// `width` bytes from `at` are mapped, and `check_word` passed.
pub(crate) unsafe fn store(at: *mut u8, width: usize, value: u64) {
    // SAFETY: mapped and aligned by the caller's contract; shared memory is accessed through atomics.
    unsafe {
        match width {
            1 => (*at.cast::<AtomicU8>()).store(value as u8, Release),
            2 => (*at.cast::<AtomicU16>()).store((value as u16).to_le(), Release),
            4 => (*at.cast::<AtomicU32>()).store((value as u32).to_le(), Release),
            _ => (*at.cast::<AtomicU64>()).store(value.to_le(), Release),
        }
    }
}
