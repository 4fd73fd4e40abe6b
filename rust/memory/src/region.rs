//! From guest addresses to mapped memory: the one place where an address that a peer wrote becomes a pointer (device-11).
//!
//! A table is immutable. [`crate::GuestMemory`] swaps whole tables; whoever holds one goes on with it, and keeps its mappings alive.

use crate::dirty::DirtyBitmap;
use crate::error::MemoryError;
use crate::mapping::Mapping;
use crate::raw;
use crate::sigbus;
use crate::span::Span;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};

/// A range of guest addresses over part of a mapping.
#[derive(Clone, Debug)]
pub struct Region {
    address: u64,
    len: u64,
    /// Where `address` is.
    base: NonNull<u8>,
    offset: usize,
    mapping: Arc<Mapping>,
}

// SAFETY: `base` points into `mapping`, which may be used from any thread.
unsafe impl Send for Region {}
// SAFETY: as for Send.
unsafe impl Sync for Region {}

impl Region {
    /// `len` bytes of guest addresses from `address`, which are the mapping's bytes from `offset`.
    ///
    /// # Errors
    /// `BadSize` for a length of 0, `Overflow` if the addresses run over 2^64, `OutOfRange` if the mapping does not have the bytes.
    pub fn new(address: u64, len: u64, mapping: Arc<Mapping>, offset: usize) -> Result<Self, MemoryError> {
        let size = mapping.len() as u64;
        if len == 0 {
            return Err(MemoryError::BadSize { what: "region length", value: 0, min: 1, max: size, multiple_of: 1 });
        }
        if address.checked_add(len - 1).is_none() {
            return Err(MemoryError::Overflow { address, len });
        }
        let bytes = usize::try_from(len).map_err(|_| MemoryError::OutOfRange { offset: offset as u64, len, size })?;
        let base = mapping.at(offset, bytes)?;
        Ok(Self { address, len, base, offset, mapping })
    }

    /// The first guest address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes.
    #[allow(clippy::len_without_is_empty, reason = "a region has at least one byte")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The mapping behind it.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Where in the mapping the region starts, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The last guest address.
    fn last(&self) -> u64 {
        self.address + (self.len - 1)
    }

    /// The place of `len` bytes at `address`, if the first one is in this region and the others follow in it.
    #[inline(always)]
    fn locate(&self, address: u64, len: usize) -> Option<NonNull<u8>> {
        let within = address.wrapping_sub(self.address);
        if within < self.len && len as u64 <= self.len - within {
            // SAFETY: inside the region, which `new` found inside the mapping.
            Some(unsafe { self.base.add(within as usize) })
        } else {
            None
        }
    }
}

/// How far ahead of a copy cache lines are asked for: two lines of most processors.
const PREFETCHED: usize = 128;

/// All regions of a guest, sorted by address.
#[derive(Debug)]
pub struct RegionTable {
    regions: Box<[Region]>,
    /// Where the last search ended: the next address is most often in the same region.
    recent: AtomicUsize,
    dirty: Option<Arc<DirtyBitmap>>,
    /// The poison epoch at which every mapping was last found sound.
    sound: AtomicU64,
}

impl RegionTable {
    /// A table of these regions, in any order; writes through it are marked in `dirty`.
    ///
    /// # Errors
    /// `Overlap` if two of them share an address.
    pub fn new(mut regions: Vec<Region>, dirty: Option<Arc<DirtyBitmap>>) -> Result<Self, MemoryError> {
        regions.sort_by_key(Region::address);
        for pair in regions.windows(2) {
            let [low, high] = pair else { continue };
            if low.last() >= high.address {
                let (address, len) = (high.address, high.len);
                return Err(MemoryError::Overlap { address, len, other_address: low.address, other_len: low.len });
            }
        }
        Ok(Self { regions: regions.into(), recent: AtomicUsize::new(0), dirty, sound: AtomicU64::new(u64::MAX) })
    }

    /// The regions, by ascending address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The bitmap that writes are marked in.
    pub fn dirty(&self) -> Option<&Arc<DirtyBitmap>> {
        self.dirty.as_ref()
    }

    /// Marks bytes that were written by other means than this table's own methods (a used ring's words), after they were written.
    #[inline]
    pub fn mark(&self, address: u64, len: u64) {
        if let Some(dirty) = &self.dirty {
            dirty.mark(address, len);
        }
    }

    /// The region that holds this address.
    fn find(&self, address: u64) -> Option<&Region> {
        let index = self.regions.partition_point(|region| region.address <= address).checked_sub(1)?;
        let region = &self.regions[index];
        if address - region.address >= region.len {
            return None;
        }
        self.recent.store(index, Relaxed);
        Some(region)
    }

    /// The place of `len` bytes at `address`, if they are in one region.
    #[inline]
    fn locate(&self, address: u64, len: usize) -> Option<NonNull<u8>> {
        let recent = self.regions.get(self.recent.load(Relaxed))?;
        match recent.locate(address, len) {
            None if self.regions.len() > 1 => self.find(address)?.locate(address, len),
            found => found,
        }
    }

    /// Checks that every byte of the span is mapped, in one region or in several that follow each other. No bytes are always there.
    ///
    /// # Errors
    /// `Overflow` if the span runs over 2^64, `Unmapped` if a byte of it is in no region.
    #[inline]
    pub fn check(&self, address: u64, len: u64) -> Result<(), MemoryError> {
        match usize::try_from(len) {
            Ok(bytes) if self.locate(address, bytes).is_some() => Ok(()),
            _ => self.check_pieces(address, len),
        }
    }

    #[cold]
    fn check_pieces(&self, address: u64, len: u64) -> Result<(), MemoryError> {
        if len == 0 {
            return Ok(());
        }
        let last = address.checked_add(len - 1).ok_or(MemoryError::Overflow { address, len })?;
        let mut next = address;
        loop {
            let region = self.find(next).ok_or(MemoryError::Unmapped { address, len })?;
            if region.last() >= last {
                return Ok(());
            }
            next = region.last() + 1;
        }
    }

    /// Calls `each` with every piece of the span in order: its place, where it starts in the span, its length. Checks all of it first.
    #[inline]
    pub(crate) fn pieces(
        &self,
        address: u64,
        len: usize,
        mut each: impl FnMut(NonNull<u8>, usize, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        match self.locate(address, len) {
            Some(at) => each(at, 0, len),
            None => self.several_pieces(address, len, &mut each),
        }
    }

    #[cold]
    fn several_pieces(
        &self,
        address: u64,
        len: usize,
        each: &mut dyn FnMut(NonNull<u8>, usize, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        self.check_pieces(address, len as u64)?;
        let unmapped = || MemoryError::Unmapped { address, len: len as u64 };
        let mut done = 0;
        while done < len {
            let next = address + done as u64;
            let region = self.find(next).ok_or_else(unmapped)?;
            let count = (len - done).min(usize::try_from(region.last() - next).unwrap_or(usize::MAX).saturating_add(1));
            each(region.locate(next, count).ok_or_else(unmapped)?, done, count)?;
            done += count;
        }
        Ok(())
    }

    /// Copies guest memory out.
    ///
    /// # Errors
    /// `Unmapped`, `Overflow`; nothing is copied then.
    #[inline]
    pub fn read(&self, address: u64, to: &mut [u8]) -> Result<(), MemoryError> {
        self.pieces(address, to.len(), |from, start, count| {
            // SAFETY: `pieces` vouches for count mapped bytes; they stay mapped while the table lives.
            unsafe { raw::copy_out(from.as_ptr(), &mut to[start..start + count]) };
            Ok(())
        })
    }

    /// Copies into guest memory, and marks it dirty.
    ///
    /// # Errors
    /// `Unmapped`, `Overflow`; nothing is copied then.
    #[inline]
    pub fn write(&self, address: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.pieces(address, from.len(), |to, start, count| {
            // SAFETY: `pieces` vouches for count mapped bytes; they stay mapped while the table lives.
            unsafe { raw::copy_in(to.as_ptr(), &from[start..start + count]) };
            Ok(())
        })?;
        self.mark(address, from.len() as u64);
        Ok(())
    }

    /// `len` bytes in one region, found once for several copies; `None` if they are not all in one.
    #[inline(always)]
    pub fn place(&self, address: u64, len: usize) -> Option<Place<'_>> {
        self.locate(address, len).map(|start| Place { table: self, address, start, len })
    }

    /// Asks the processor for the cache lines of the first and the last of some bytes that are about to be written, which another core may
    /// have; of many bytes, those up to [`PREFETCHED`]: longer copies run ahead by themselves. What is not mapped in one piece is left alone.
    #[inline(always)]
    pub fn prefetch_write(&self, address: u64, len: usize) {
        let len = len.min(PREFETCHED);
        if let Some(start) = self.locate(address, len) {
            raw::prefetch_write(start.as_ptr());
            raw::prefetch_write(start.as_ptr().wrapping_add(len.saturating_sub(1)));
        }
    }

    /// Bytes in one piece, which keep their mapping alive.
    ///
    /// # Errors
    /// `Unmapped`, `Overflow`; `Straddles` if they are mapped in more than one piece.
    pub fn span(&self, address: u64, len: u64) -> Result<Span, MemoryError> {
        self.check(address, len)?;
        let region = self.find(address).ok_or(MemoryError::Unmapped { address, len })?;
        let bytes = usize::try_from(len).map_err(|_| MemoryError::Unmapped { address, len })?;
        let base = region.locate(address, bytes).ok_or(MemoryError::Straddles { address, len })?;
        Ok(Span::new(base, bytes, region.mapping.clone()))
    }

    /// One atomic acquire load of a little-endian word of 1, 2, 4 or 8 bytes.
    ///
    /// # Errors
    /// As [`RegionTable::span`]; `BadWidth`, `Misaligned`.
    pub fn load(&self, address: u64, width: usize) -> Result<u64, MemoryError> {
        let at = self.word(address, width)?;
        // SAFETY: `word` found it mapped and aligned.
        Ok(unsafe { raw::load(at.as_ptr(), width) })
    }

    /// One atomic release store of a little-endian word of 1, 2, 4 or 8 bytes, marked dirty.
    ///
    /// # Errors
    /// As [`RegionTable::span`]; `BadWidth`, `Misaligned`; `BadSize` if the value does not fit.
    pub fn store(&self, address: u64, width: usize, value: u64) -> Result<(), MemoryError> {
        let at = self.word(address, width)?;
        raw::check_value(width, value)?;
        // SAFETY: `word` found it mapped and aligned.
        unsafe { raw::store(at.as_ptr(), width, value) };
        self.mark(address, width as u64);
        Ok(())
    }

    fn word(&self, address: u64, width: usize) -> Result<NonNull<u8>, MemoryError> {
        let span = self.span(address, width as u64)?;
        let at = span.at(0, width)?;
        raw::check_word(at.as_ptr(), address, width)?;
        Ok(at)
    }

    /// The first region whose file was truncated under it, as (address, bytes); one load when nothing happened. Bursts ask this, and break
    /// their queue (device-24).
    #[inline]
    pub fn poisoned(&self) -> Option<(u64, u64)> {
        if sigbus::epoch() == self.sound.load(Relaxed) { None } else { self.find_poisoned() }
    }

    #[cold]
    fn find_poisoned(&self) -> Option<(u64, u64)> {
        let epoch = sigbus::epoch();
        let found = self.regions.iter().find(|region| region.mapping.poisoned());
        if found.is_none() {
            self.sound.store(epoch, Relaxed);
        }
        found.map(|region| (region.address, region.len))
    }
}

/// Bytes of guest memory in one piece, found by [`RegionTable::place`].
#[derive(Debug)]
pub struct Place<'a> {
    table: &'a RegionTable,
    address: u64,
    /// `len` bytes from here are mapped as long as the table lives.
    start: NonNull<u8>,
    len: usize,
}

impl Place<'_> {
    /// Where `len` bytes from `offset` are.
    #[inline(always)]
    fn at(&self, offset: usize, len: usize) -> Result<*mut u8, MemoryError> {
        if offset > self.len || len > self.len - offset {
            return Err(MemoryError::OutOfRange { offset: offset as u64, len: len as u64, size: self.len as u64 });
        }
        // SAFETY: inside the place, or one past its end with len 0.
        Ok(unsafe { self.start.add(offset) }.as_ptr())
    }

    /// Copies guest memory out, from the place's byte `offset` on.
    ///
    /// # Errors
    /// `OutOfRange`; nothing is copied then.
    #[inline(always)]
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.at(offset, to.len())?;
        // SAFETY: `at` vouches for the source.
        unsafe { raw::copy_out(from, to) };
        Ok(())
    }

    /// Copies into guest memory from the place's byte `offset` on, and marks it dirty.
    ///
    /// # Errors
    /// `OutOfRange`; nothing is copied then.
    #[inline(always)]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), MemoryError> {
        let to = self.at(offset, from.len())?;
        // SAFETY: `at` vouches for the target.
        unsafe { raw::copy_in(to, from) };
        self.table.mark(self.address + offset as u64, from.len() as u64);
        Ok(())
    }

    /// Copies `len` bytes of `from`, from its byte `at` on (a pool slot), to the place's byte `offset`, and marks them dirty.
    ///
    /// # Errors
    /// `OutOfRange`; nothing is copied then.
    #[inline(always)]
    pub fn copy_in(&self, offset: usize, len: usize, from: &Mapping, at: usize) -> Result<(), MemoryError> {
        let to = self.at(offset, len)?;
        let source = from.at(at, len)?;
        // SAFETY: `at` of either vouches for len bytes.
        unsafe { raw::copy_across(source.as_ptr(), to, len) };
        self.table.mark(self.address + offset as u64, len as u64);
        Ok(())
    }
}
