//! Indirect tables (2.7.5.3, 2.8.7): written by the driver side into memory reserved at set-up, read by the device side into private memory.

use crate::chain::{Direction, Segment, Walk};
use crate::error::RingError;
use crate::spec::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESCRIPTOR_SIZE};
use virtio_memory::{RegionTable, U64Array};

/// The driver's tables: one for each ring descriptor.
#[derive(Debug)]
pub struct IndirectTables {
    words: U64Array,
    address: u64,
    entries: u16,
}

impl IndirectTables {
    /// `words` holds `entries` descriptors for each ring descriptor; the device sees the first at `address`.
    pub fn new(words: U64Array, address: u64, entries: u16) -> Self {
        IndirectTables { words, address, entries }
    }

    /// How many words a ring of `size` needs.
    pub fn words(size: u16, entries: u16) -> usize {
        usize::from(size) * usize::from(entries) * 2
    }

    /// Descriptors in one table.
    pub(crate) fn entries(&self) -> usize {
        usize::from(self.entries)
    }

    /// Writes the table of ring descriptor `head`; gives its address and bytes. `rest` makes the second word from position and segment.
    #[inline]
    pub(crate) fn write(&self, head: u16, segments: &[Segment], rest: impl Fn(usize, &Segment) -> u64) -> (u64, u32) {
        let first = usize::from(head) * self.entries();
        for (i, segment) in segments.iter().enumerate() {
            self.words.store(2 * (first + i), segment.address);
            self.words.store(2 * (first + i) + 1, rest(i, segment));
        }
        (self.address + first as u64 * DESCRIPTOR_SIZE, segments.len() as u32 * DESCRIPTOR_SIZE as u32)
    }
}

/// The device's private copy of one table.
#[derive(Debug)]
pub(crate) struct TableCopy(Box<[u8]>);

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl TableCopy {
    pub(crate) fn new(limit: u16) -> Self {
        TableCopy(vec![0; usize::from(limit) * DESCRIPTOR_SIZE as usize].into())
    }

    /// Copies the table; its length is bounded before it is narrowed. Its address needs no alignment.
    fn fetch(&mut self, memory: &RegionTable, address: u64, len: u32, room: u16) -> Result<u16, RingError> {
        if len == 0 || !u64::from(len).is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(RingError::IndirectLength { len });
        }
        let entries = len / DESCRIPTOR_SIZE as u32;
        if entries > u32::from(room) {
            return Err(RingError::IndirectTooLong { entries, limit: room });
        }
        memory.read(address, &mut self.0[..len as usize]).map_err(RingError::IndirectUnmapped)?;
        Ok(entries as u16)
    }

    fn at(&self, index: u16) -> Descriptor {
        let raw = &self.0[usize::from(index) * 16..][..16];
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|k| raw[at + k]));
        let rest = word(8);
        Descriptor { address: word(0), len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    /// A split table: followed by `next` from entry 0 (2.7.5.3).
    pub(crate) fn walk_split(&mut self, memory: &RegionTable, address: u64, len: u32, walk: &mut Walk) -> Result<(), RingError> {
        let entries = self.fetch(memory, address, len, walk.room())?;
        let mut index = 0;
        loop {
            let d = self.at(index);
            if d.flags & DESC_F_INDIRECT != 0 {
                return Err(RingError::IndirectNested);
            }
            walk.descriptor(d.address, d.len, direction(d.flags))?;
            if d.flags & DESC_F_NEXT == 0 {
                return Ok(());
            }
            if d.next >= entries {
                return Err(RingError::NextOutOfRange { next: d.next, limit: u32::from(entries) });
            }
            index = d.next;
        }
    }

    /// A packed table: every entry in order, only WRITE counts (2.8.7). There the flags are the upper half's upper half.
    pub(crate) fn walk_packed(&mut self, memory: &RegionTable, address: u64, len: u32, walk: &mut Walk) -> Result<(), RingError> {
        let entries = self.fetch(memory, address, len, walk.room())?;
        for index in 0..entries {
            let d = self.at(index);
            walk.descriptor(d.address, d.len, direction(d.next))?;
        }
        Ok(())
    }
}

/// A descriptor's direction from its flags.
#[inline(always)]
pub(crate) fn direction(flags: u16) -> Direction {
    if flags & DESC_F_WRITE == 0 { Direction::Readable } else { Direction::Writable }
}

/// A direction's descriptor flag.
#[inline(always)]
pub(crate) fn write_flag(direction: Direction) -> u16 {
    (direction as u16) * DESC_F_WRITE
}
