//! Device registers: each access has exactly the width that was asked for, and happens exactly once.

use crate::error::MemoryError;
use crate::span::Span;
use std::ptr::NonNull;

/// A block of registers, little-endian, in a span of device memory.
///
/// A field is to be accessed at its own width, a 64-bit one as two 32-bit halves (4.1.3.1); the 64-bit forms are for devices that say
/// otherwise.
#[derive(Clone, Debug)]
pub struct Registers {
    span: Span,
}

macro_rules! width {
    ($read:ident, $write:ident, $int:ty) => {
        /// Reads one register at this offset (bytes).
        ///
        /// # Errors
        /// `OutOfRange`, `Misaligned`; nothing is read then.
        #[inline]
        pub fn $read(&self, offset: usize) -> Result<$int, MemoryError> {
            let at = self.at(offset, size_of::<$int>())?.cast::<$int>();
            // SAFETY: mapped and aligned, both just checked; the span holds the mapping.
            Ok(<$int>::from_le(unsafe { at.as_ptr().read_volatile() }))
        }

        /// Writes one register at this offset (bytes).
        ///
        /// # Errors
        /// `OutOfRange`, `Misaligned`; nothing is written then.
        #[inline]
        pub fn $write(&self, offset: usize, value: $int) -> Result<(), MemoryError> {
            let at = self.at(offset, size_of::<$int>())?.cast::<$int>();
            // SAFETY: mapped and aligned, both just checked; the span holds the mapping.
            unsafe { at.as_ptr().write_volatile(value.to_le()) };
            Ok(())
        }
    };
}

impl Registers {
    /// The registers in this span.
    pub fn new(span: Span) -> Self {
        Self { span }
    }

    /// Bytes in the block.
    pub fn len(&self) -> usize {
        self.span.len()
    }

    /// Whether the block is empty.
    pub fn is_empty(&self) -> bool {
        self.span.is_empty()
    }

    #[inline]
    fn at(&self, offset: usize, width: usize) -> Result<NonNull<u8>, MemoryError> {
        let at = self.span.at(offset, width)?;
        if (at.as_ptr() as usize).is_multiple_of(width) {
            Ok(at)
        } else {
            Err(MemoryError::Misaligned { address: offset as u64, align: width as u64 })
        }
    }

    width!(read8, write8, u8);
    width!(read16, write16, u16);
    width!(read32, write32, u32);
    width!(read64, write64, u64);
}
