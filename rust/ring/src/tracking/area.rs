//! Where the fields of a region lie, and how they are read and written: as 64-bit words, so that fields that change together do so at once.
//!
//! Every store is a release store: the compiler keeps their order, and a killed process has done a prefix of them.

use crate::error::RingError;
use crate::options::Format;
use std::sync::Arc;
use virtio_memory::{Mapping, Span, U64Array};

/// A field of a region or of an entry, of at most eight bytes and inside one word.
#[derive(Clone, Copy)]
pub(super) struct Field {
    offset: usize,
    bits: u32,
}

impl Field {
    /// `offset` and `bytes` as in the C structures.
    const fn new(offset: usize, bytes: u32) -> Self {
        Field { offset, bits: 8 * bytes }
    }

    const fn shift(self) -> u32 {
        (self.offset % 8 * 8) as u32
    }

    /// Which word it is in.
    pub const fn word(self) -> usize {
        self.offset / 8
    }

    /// Its value in that word.
    pub fn get(self, word: u64) -> u64 {
        word >> self.shift() & u64::MAX >> (64 - self.bits)
    }

    /// A word in which it has this value, and all else is 0.
    pub fn put(self, value: u64) -> u64 {
        (value & u64::MAX >> (64 - self.bits)) << self.shift()
    }
}

/// Version of the layouts; 0 is an area that nobody has initialized.
pub(super) const VERSION: u64 = 1;

// Header, both formats.
pub(super) const FEATURES: Field = Field::new(0, 8);
pub(super) const HEADER_VERSION: Field = Field::new(8, 2);
pub(super) const DESC_NUM: Field = Field::new(10, 2);

/// QueueRegionSplit and DescStateSplit.
pub(super) mod split {
    use super::Field;
    pub const LAST_BATCH_HEAD: Field = Field::new(12, 2);
    pub const USED_IDX: Field = Field::new(14, 2);
    pub const ENTRIES: usize = 16;
    pub const INFLIGHT: Field = Field::new(0, 1);
    pub const NEXT: Field = Field::new(6, 2);
    pub const COUNTER: Field = Field::new(8, 8);
    pub const ENTRY: usize = 16;
}

/// QueueRegionPacked and DescStatePacked.
pub(super) mod packed {
    use super::Field;
    pub const FREE_HEAD: Field = Field::new(12, 2);
    pub const OLD_FREE_HEAD: Field = Field::new(14, 2);
    pub const USED_IDX: Field = Field::new(16, 2);
    pub const OLD_USED_IDX: Field = Field::new(18, 2);
    pub const USED_WRAP_COUNTER: Field = Field::new(20, 1);
    pub const OLD_USED_WRAP_COUNTER: Field = Field::new(21, 1);
    pub const ENTRIES: usize = 32;
    pub const INFLIGHT: Field = Field::new(0, 1);
    pub const NEXT: Field = Field::new(2, 2);
    pub const LAST: Field = Field::new(4, 2);
    pub const NUM: Field = Field::new(6, 2);
    pub const COUNTER: Field = Field::new(8, 8);
    pub const ID: Field = Field::new(16, 2);
    pub const FLAGS: Field = Field::new(18, 2);
    pub const LEN: Field = Field::new(20, 4);
    pub const ADDR: Field = Field::new(24, 8);
    pub const ENTRY: usize = 32;
}

/// Where regions begin: the text does not say, others use this too.
const ALIGNMENT: usize = 64;

/// Bytes of one queue's region.
pub fn region_size(format: Format, size: u16) -> usize {
    let (entries, entry) = match format {
        Format::Split => (split::ENTRIES, split::ENTRY),
        Format::Packed => (packed::ENTRIES, packed::ENTRY),
    };
    (entries + entry * usize::from(size)).next_multiple_of(ALIGNMENT)
}

/// A region's words. Whoever keeps the area may write them too: they are read when a queue is set up, and never again.
#[derive(Debug)]
pub(super) struct Words {
    words: U64Array,
    /// Bytes before the entries, and of an entry.
    entries: usize,
    entry: usize,
    keep: Arc<Mapping>,
}

impl Words {
    pub fn new(span: &Span, format: Format, size: u16) -> Result<Self, RingError> {
        let words = span.u64s(0, region_size(format, size) / 8).map_err(RingError::Area)?;
        let (entries, entry) = match format {
            Format::Split => (split::ENTRIES, split::ENTRY),
            Format::Packed => (packed::ENTRIES, packed::ENTRY),
        };
        Ok(Words { words, entries, entry, keep: span.mapping().clone() })
    }

    pub fn check(&self) -> Result<(), RingError> {
        if self.keep.poisoned() { Err(RingError::InFlightLost) } else { Ok(()) }
    }

    fn place(&self, entry: u16, field: Field) -> usize {
        (self.entries + self.entry * usize::from(entry)) / 8 + field.word()
    }

    /// The header's word with this field.
    pub fn header(&self, field: Field) -> u64 {
        self.words.load_acquire(field.word())
    }

    pub fn set_header(&self, field: Field, word: u64) {
        self.words.store_release(field.word(), word);
    }

    /// An entry's word with this field.
    pub fn load(&self, entry: u16, field: Field) -> u64 {
        self.words.load_acquire(self.place(entry, field))
    }

    pub fn store(&self, entry: u16, field: Field, word: u64) {
        self.words.store_release(self.place(entry, field), word);
    }

    /// Whether there was a predecessor. Refuses what cannot be understood.
    pub fn begun(&self, size: u16) -> Result<bool, RingError> {
        let header = self.header(HEADER_VERSION);
        let version = HEADER_VERSION.get(header);
        if version == 0 {
            return Ok(false);
        }
        let found = [("version", version, VERSION), ("number of entries", DESC_NUM.get(header), size.into())];
        let found = found.into_iter().chain([("features", self.header(FEATURES), 0)]);
        for (what, value, wanted) in found {
            if value != wanted {
                return Err(RingError::InFlightArea { what, value, wanted });
            }
        }
        Ok(true)
    }
}

/// Entries that are in flight, by their counters, and the counter to go on with. One is refused that would run out.
pub(super) fn in_order(mut found: Vec<(u64, u16)>) -> Result<(Vec<u16>, u64), RingError> {
    found.sort_unstable();
    let next = match found.last() {
        Some(&(counter, _)) if counter > u64::MAX / 2 => return Err(RingError::InFlightCounter { counter }),
        Some(&(counter, _)) => counter + 1,
        None => 0,
    };
    Ok((found.into_iter().map(|(_, entry)| entry).collect(), next))
}
