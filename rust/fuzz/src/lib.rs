//! What the fuzz targets share: the rings of the ring crate's tests, the bytes that decide what happens, and a second opinion on chains.
#![forbid(unsafe_code)]

#[path = "../../ring/tests/common/mod.rs"]
pub mod common;
pub mod reference;

use common::Rig;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use virtqueue::{Chain, ChainBatch, Direction, Format, RingFeatures, Segment};

/// Whether a fault is planted in the targets' own reckoning.
pub const PLANTED: bool = cfg!(feature = "planted");

/// An input, taken from the front; zeros behind its end.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    /// Whether anything is left.
    pub fn more(&self) -> bool {
        !self.0.is_empty()
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// Yes or no.
    pub fn flag(&mut self) -> bool {
        self.u8() & 1 != 0
    }

    /// Either format.
    pub fn format(&mut self) -> Format {
        if self.flag() { Format::Packed } else { Format::Split }
    }

    /// Either direction.
    pub fn direction(&mut self) -> Direction {
        if self.flag() { Direction::Writable } else { Direction::Readable }
    }

    /// A number below `limit` (at most 256).
    pub fn below(&mut self, limit: usize) -> usize {
        usize::from(self.u8()) % limit
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    /// A changed word: some other number, or the old one with a bit flipped or one step away.
    pub fn change(&mut self, old: u64) -> u64 {
        match self.u8() % 8 {
            0 => self.u64(),
            1 => self.u16().into(),
            2 => self.u8().into(),
            3 => old.wrapping_add(1),
            4 => old.wrapping_sub(1),
            5 => old.wrapping_add(u64::from(self.u8())),
            6 => old ^ u64::from(self.u8()) << 56,
            _ => old ^ 1 << (self.u8() % 64),
        }
    }

    /// Features of a ring.
    pub fn features(&mut self) -> RingFeatures {
        let bits = self.u8();
        RingFeatures { event_idx: bits & 1 != 0, indirect: bits & 2 != 0, in_order: bits & 4 != 0 }
    }

    /// A small size of this format.
    pub fn size(&mut self, format: Format) -> u16 {
        let sizes: &[u16] = if format == Format::Split { &[1, 2, 4, 8, 16] } else { &[1, 2, 4, 8, 16, 3, 5, 7, 13] };
        sizes[self.below(sizes.len())]
    }
}

/// Whether it is packed, its size, its features, its device's limit.
type Key = (bool, u16, u8, u16);

thread_local! {
    static RIGS: RefCell<HashMap<Key, Rc<Rig>>> = RefCell::default();
}

/// A zeroed ring whose device takes chains of up to `limit` descriptors. Mapping memory takes longer than most inputs, so rings are used
/// again.
pub fn rig(format: Format, size: u16, features: RingFeatures, limit: u16) -> Rc<Rig> {
    let bits = u8::from(features.event_idx) | u8::from(features.indirect) << 1 | u8::from(features.in_order) << 2;
    let key = (format == Format::Packed, size, bits, limit);
    let make = || Rc::new(Rig::new(format, size, features).with_chain_limit(limit.into()));
    let rig = RIGS.with_borrow_mut(|rigs| rigs.entry(key).or_insert_with(make).clone());
    rig.mapping.zero(0, rig.mapping.len()).expect("all of it");
    rig
}

/// What holds for every chain that a device pops, whatever the driver did.
pub fn check_chain(batch: &ChainBatch, chain: &Chain, limit: u16) {
    let segments = batch.segments(chain);
    assert!(segments.len() <= usize::from(limit), "{} segments, limit {limit}", segments.len());
    assert!(segments.iter().all(|s| s.len > 0), "a segment of no bytes");
    let sum = |which: &[Segment]| which.iter().map(|s| u64::from(s.len)).sum::<u64>();
    let (readable, writable) = (batch.readable(chain), batch.writable(chain));
    assert!(readable.iter().all(|s| s.direction == Direction::Readable) && writable.iter().all(|s| s.direction == Direction::Writable));
    assert_eq!((sum(readable), sum(writable)), (chain.readable.into(), chain.writable.into()));
    assert!(sum(segments) <= u32::MAX.into());
}
