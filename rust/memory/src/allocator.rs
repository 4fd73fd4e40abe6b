//! First-fit allocation of offsets in a memory: rings, indirect tables, pools. Set-up only; nothing hot allocates.

use crate::error::MemoryError;
use std::collections::BTreeMap;

/// Which bytes of a memory are taken. It holds offsets, not memory.
#[derive(Clone, Debug)]
pub struct Allocator {
    size: usize,
    /// Free gaps, offset to bytes; no two of them touch.
    gaps: BTreeMap<usize, usize>,
    /// Allocated pieces, offset to bytes.
    taken: BTreeMap<usize, usize>,
}

impl Allocator {
    /// All of `size` bytes free.
    pub fn new(size: usize) -> Self {
        let gaps = if size == 0 { BTreeMap::new() } else { BTreeMap::from([(0, size)]) };
        Self { size, gaps, taken: BTreeMap::new() }
    }

    /// Bytes in the largest gap.
    pub fn largest(&self) -> usize {
        self.gaps.values().copied().max().unwrap_or(0)
    }

    /// How many pieces are allocated.
    pub fn allocations(&self) -> usize {
        self.taken.len()
    }

    /// Takes `size` bytes at the lowest offset that is a multiple of `align` and has room; the offset.
    ///
    /// # Errors
    /// `BadSize` for 0 bytes or more than there are, `BadAlignment` if `align` is not a power of two, `OutOfMemory` if no gap will do.
    pub fn allocate(&mut self, size: usize, align: usize) -> Result<usize, MemoryError> {
        if !align.is_power_of_two() {
            return Err(MemoryError::BadAlignment { align: align as u64 });
        }
        if size == 0 || size > self.size {
            let (value, max) = (size as u64, self.size as u64);
            return Err(MemoryError::BadSize { what: "allocation", value, min: 1, max, multiple_of: 1 });
        }
        let fit = self.gaps.iter().find_map(|(&gap, &len)| {
            let offset = gap.checked_next_multiple_of(align)?;
            let skipped = offset - gap;
            (skipped <= len && size <= len - skipped).then_some((gap, len, offset))
        });
        let Some((gap, len, offset)) = fit else {
            return Err(MemoryError::OutOfMemory { requested: size as u64, largest: self.largest() as u64 });
        };
        self.gaps.remove(&gap);
        if offset > gap {
            self.gaps.insert(gap, offset - gap);
        }
        if offset + size < gap + len {
            self.gaps.insert(offset + size, gap + len - (offset + size));
        }
        self.taken.insert(offset, size);
        Ok(offset)
    }

    /// Gives back what [`Allocator::allocate`] returned; its bytes.
    ///
    /// # Errors
    /// `NotAllocated` if no piece starts at this offset.
    pub fn free(&mut self, offset: usize) -> Result<usize, MemoryError> {
        let size = self.taken.remove(&offset).ok_or(MemoryError::NotAllocated { offset: offset as u64 })?;
        let (mut start, mut len) = (offset, size);
        if let Some(after) = self.gaps.remove(&(offset + size)) {
            len += after;
        }
        let before = self.gaps.range(..offset).next_back().map(|(&gap, &bytes)| (gap, bytes));
        if let Some((gap, bytes)) = before.filter(|(gap, bytes)| gap + bytes == offset) {
            (start, len) = (gap, bytes + len);
        }
        self.gaps.insert(start, len);
        Ok(size)
    }
}
