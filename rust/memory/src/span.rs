//! Bytes in one piece that keep their mapping alive: what rings take their word arrays from.

use crate::error::MemoryError;
use crate::mapping::Mapping;
use crate::raw;
use std::ptr::NonNull;
use std::sync::Arc;

#[cfg(not(loom))]
use crate::word::{U16Array, U32Array, U64Array};

/// A piece of a mapping.
#[derive(Clone, Debug)]
pub struct Span {
    base: NonNull<u8>,
    len: usize,
    keep: Arc<Mapping>,
}

// SAFETY: the memory is accessed by atomics, volatile accesses and raw copies only, and `keep` holds it mapped.
unsafe impl Send for Span {}
// SAFETY: as for Send.
unsafe impl Sync for Span {}

#[cfg(not(loom))]
macro_rules! words {
    ($name:ident, $array:ident, $width:literal, $doc:literal) => {
        #[doc = $doc]
        ///
        /// # Errors
        /// `OutOfRange` if they are not inside the span; `Misaligned` if the first one's place in memory does not suit them.
        pub fn $name(&self, offset: usize, count: usize) -> Result<$array, MemoryError> {
            let base = self.at(offset, count.saturating_mul($width))?;
            raw::check_word(base.as_ptr(), offset as u64, $width)?;
            // SAFETY: aligned, and inside the span, both just checked; the array holds the mapping.
            Ok(unsafe { $array::new(base, count, self.keep.clone()) })
        }
    };
}

impl Span {
    /// The caller vouches that `len` bytes from `base` are inside `keep`.
    pub(crate) fn new(base: NonNull<u8>, len: usize, keep: Arc<Mapping>) -> Self {
        Self { base, len, keep }
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The mapping that the bytes are in.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.keep
    }

    #[inline]
    pub(crate) fn at(&self, offset: usize, len: usize) -> Result<NonNull<u8>, MemoryError> {
        if offset > self.len || len > self.len - offset {
            return Err(MemoryError::OutOfRange { offset: offset as u64, len: len as u64, size: self.len as u64 });
        }
        // SAFETY: offset is inside the span, or one past its end with len 0.
        Ok(unsafe { self.base.add(offset) })
    }

    /// Copies bytes out.
    ///
    /// # Errors
    /// `OutOfRange`; nothing is copied.
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.at(offset, to.len())?;
        // SAFETY: `at` checked the piece, and `keep` holds it mapped.
        unsafe { raw::copy_out(from.as_ptr(), to) };
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    /// `OutOfRange`; nothing is copied.
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), MemoryError> {
        let to = self.at(offset, from.len())?;
        // SAFETY: `at` checked the piece, and `keep` holds it mapped.
        unsafe { raw::copy_in(to.as_ptr(), from) };
        Ok(())
    }

    #[cfg(not(loom))]
    words!(u16s, U16Array, 2, "`count` words of 16 bits from `offset` (bytes).");
    #[cfg(not(loom))]
    words!(u32s, U32Array, 4, "`count` words of 32 bits from `offset` (bytes).");
    #[cfg(not(loom))]
    words!(u64s, U64Array, 8, "`count` words of 64 bits from `offset` (bytes).");
}
