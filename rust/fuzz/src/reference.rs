//! A second opinion on what a device must pop: the same rules, written down again as plainly as they can be, over bytes read from memory.

use crate::PLANTED;
use crate::common::Rig;
use std::collections::HashSet;
use virtqueue::{Direction, Format, Segment};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The driver broke a rule.
#[derive(Debug)]
pub struct Broken;

/// All chains that are available on a fresh ring, in order, and whether a broken rule ends them.
pub fn chains(rig: &Rig, limit: u16) -> (Vec<Vec<Segment>>, bool) {
    let mut walker = Walker { rig, limit: limit.into(), seen: 0, segments: Vec::new() };
    let mut chains = Vec::new();
    let mut in_flight = (HashSet::new(), 0);
    for position in 0.. {
        match walker.chain(position, in_flight.1) {
            Ok(None) => break,
            Ok(Some((head, slots))) => {
                in_flight.1 += slots;
                let fresh = in_flight.0.insert(head);
                if in_flight.1 > rig.size.into() || !fresh {
                    return (chains, true);
                }
                chains.push(std::mem::take(&mut walker.segments));
            }
            Err(Broken) => return (chains, true),
        }
    }
    (chains, false)
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

struct Walker<'a> {
    rig: &'a Rig,
    limit: usize,
    seen: usize,
    segments: Vec<Segment>,
}

impl Walker<'_> {
    /// The descriptor at this address, as this format lays it out.
    fn descriptor(&self, address: u64) -> Result<Descriptor, Broken> {
        let mut raw = [0; 16];
        self.rig.memory.table().read(address, &mut raw).map_err(|_| Broken)?;
        let half = |at: usize| u16::from_le_bytes([raw[at], raw[at + 1]]);
        let (flags, next) = if self.rig.format == Format::Split { (half(12), half(14)) } else { (half(14), half(12)) };
        let len = u32::from_le_bytes([raw[8], raw[9], raw[10], raw[11]]);
        Ok(Descriptor { address: u64::from_le_bytes(std::array::from_fn(|k| raw[k])), len, flags, next })
    }

    fn word(&self, address: u64) -> u16 {
        self.rig.memory.table().load(address, 2).expect("inside the ring") as u16
    }

    /// The chain at this position, if one is available there: its name and its slots. `used` slots come before it.
    fn chain(&mut self, position: u16, used: usize) -> Result<Option<(u16, usize)>, Broken> {
        self.seen = 0;
        self.segments.clear();
        match self.rig.format {
            Format::Split => self.split(position),
            Format::Packed => Ok(self.packed(used)?.map(|slots| (position, slots))),
        }
    }

    fn split(&mut self, position: u16) -> Result<Option<(u16, usize)>, Broken> {
        let (size, driver) = (self.rig.size, self.rig.areas.driver);
        let idx = self.word(driver + 2);
        if idx > size {
            return Err(Broken);
        }
        if position == idx {
            return Ok(None);
        }
        let head = self.word(driver + 4 + 2 * u64::from(position));
        let (mut index, mut slots) = (head, 0);
        loop {
            if index >= size || slots == usize::from(size) {
                return Err(Broken);
            }
            slots += 1;
            let d = self.descriptor(self.rig.areas.descriptor + 16 * u64::from(index))?;
            if d.flags & INDIRECT != 0 {
                if d.flags & NEXT != 0 {
                    return Err(Broken);
                }
                self.table(&d)?;
                return Ok(Some((head, slots)));
            }
            self.segment(&d)?;
            if d.flags & NEXT == 0 {
                return Ok(Some((head, slots)));
            }
            index = d.next;
        }
    }

    fn packed(&mut self, used: usize) -> Result<Option<usize>, Broken> {
        let size = usize::from(self.rig.size);
        let at = |number: usize| self.rig.areas.descriptor + 16 * (number % size) as u64;
        let first = self.descriptor(at(used))?;
        let wrap = (used / size).is_multiple_of(2);
        if (first.flags >> 7 & 1 == 1) != wrap || (first.flags >> 15 == 1) == wrap {
            return Ok(None);
        }
        let mut slots = 0;
        loop {
            if slots == size {
                return Err(Broken);
            }
            let d = self.descriptor(at(used + slots))?;
            slots += 1;
            if d.flags & INDIRECT != 0 {
                if slots > 1 || d.flags & NEXT != 0 {
                    return Err(Broken);
                }
                self.table(&d)?;
                return Ok(Some(slots));
            }
            self.segment(&d)?;
            if d.flags & NEXT == 0 {
                return Ok(Some(slots));
            }
        }
    }

    fn table(&mut self, table: &Descriptor) -> Result<(), Broken> {
        let entries = table.len / 16;
        let room = self.limit - self.seen;
        if !self.rig.features.indirect || table.len == 0 || !table.len.is_multiple_of(16) || entries as usize > room {
            return Err(Broken);
        }
        self.rig.memory.table().check(table.address, table.len.into()).map_err(|_| Broken)?;
        let before = self.segments.len();
        let mut index = 0;
        loop {
            let d = self.descriptor(table.address + 16 * u64::from(index))?;
            index += 1;
            if self.rig.format == Format::Split {
                if d.flags & INDIRECT != 0 {
                    return Err(Broken);
                }
                self.segment(&d)?;
                if d.flags & NEXT == 0 {
                    break;
                }
                if u32::from(d.next) >= entries {
                    return Err(Broken);
                }
                index = d.next;
            } else {
                self.segment(&d)?;
                if u32::from(index) == entries {
                    break;
                }
            }
        }
        if PLANTED && self.segments.len() == before + 2 && self.segments[before].len == self.segments[before + 1].len {
            // The fault: a table of two segments of one length is taken for one segment.
            self.segments.pop();
        }
        Ok(())
    }

    fn segment(&mut self, d: &Descriptor) -> Result<(), Broken> {
        self.seen += 1;
        let direction = if d.flags & WRITE == 0 { Direction::Readable } else { Direction::Writable };
        let total = self.segments.iter().map(|s| u64::from(s.len)).sum::<u64>() + u64::from(d.len);
        let after_writable = self.writing() && direction == Direction::Readable;
        if self.seen > self.limit || after_writable || total > u32::MAX.into() {
            return Err(Broken);
        }
        self.segments.push(Segment { address: d.address, len: d.len, direction });
        Ok(())
    }

    fn writing(&self) -> bool {
        self.segments.iter().any(|s| s.direction == Direction::Writable)
    }
}

/// Segments without those of no bytes, which a device skips.
pub fn without_empty(segments: &[Segment]) -> Vec<Segment> {
    segments.iter().copied().filter(|s| s.len > 0).collect()
}
