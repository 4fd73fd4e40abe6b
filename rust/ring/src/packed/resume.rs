//! A packed ring that another device takes over. What is used overwrites what was available, here or further on, and a device may end in the
//! middle of that: so everything outstanding is written again, from private copies.

use super::{PackedDriver, avail_flags, is_used, rest};
use crate::chain::Segment;
use crate::error::RingError;
use crate::event::Cursor;
use crate::indirect::write_flag;
use crate::ring::{RingState, Takeover};

/// What the descriptors of outstanding chains say: a chain's first by its id, further ones linked (not in order: by ids that nobody else has; in
/// order: by their places, which the ids are).
#[derive(Debug)]
pub(super) struct Kept {
    cells: Box<[Cell]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    address: u64,
    /// Length, the next cell, flags: as a descriptor's second word.
    rest: u64,
}

impl Cell {
    fn next(self) -> u16 {
        (self.rest >> 32) as u16
    }
}

impl Kept {
    pub(super) fn new(size: u16) -> Self {
        Kept { cells: vec![Cell::default(); usize::from(size)].into() }
    }

    #[inline(always)]
    pub(super) fn keep(&mut self, place: u16, address: u64, rest: u64) {
        self.cells[usize::from(place)] = Cell { address, rest };
    }

    /// The cells behind the first of a chain of so many are free; how many that are.
    #[cold]
    pub(super) fn free(&self, head: u16, slots: u16, stack: &mut [u16]) -> usize {
        let mut cell = self.cells[usize::from(head)];
        for place in &mut stack[..usize::from(slots) - 1] {
            *place = cell.next();
            cell = self.cells[usize::from(*place)];
        }
        usize::from(slots) - 1
    }
}

impl PackedDriver {
    /// Keeps one descriptor of a chain at `place`; where the next one's goes. `flags` has NEXT if there is one.
    pub(super) fn keep(&mut self, place: u16, segment: &Segment, flags: u16) -> u16 {
        let next = match flags {
            0 => 0,
            _ if self.features.in_order => Cursor { offset: place, wrap: false }.step(1, self.ring.size).offset,
            _ => self.ids.take(),
        };
        if let Some(kept) = &mut self.kept {
            kept.keep(place, segment.address, rest(segment.len, next, write_flag(segment.direction) | flags));
        }
        next
    }

    /// Both positions are where the next used descriptor goes.
    #[cold]
    pub(super) fn take_over(&mut self, how: Takeover) -> Result<RingState, RingError> {
        let again = how == Takeover::Again;
        if again && self.kept.is_none() {
            return Err(RingError::NotKept);
        }
        let mut used = vec![false; usize::from(self.ring.size)];
        let at = self.pass_used(&mut used)?;
        let mut to = at;
        if again && self.features.in_order {
            // A head's id is its place.
            while to != self.published_end() {
                to = self.write_again(to.offset, to);
            }
        } else if again {
            let published = self.published();
            let left: Vec<u16> = self.ids.oldest_first(published).iter().copied().filter(|id| !used[usize::from(*id)]).collect();
            for id in left {
                to = self.write_again(id, to);
            }
        }
        Ok(RingState { avail: at, used: at })
    }

    /// Where what was published ends.
    fn published_end(&self) -> Cursor {
        self.next.back(self.unpublished, self.ring.size)
    }

    /// The place behind all that was used; those ids are marked.
    fn pass_used(&self, used: &mut [bool]) -> Result<Cursor, RingError> {
        let (published, size) = (self.published(), self.ring.size);
        let mut left = self.ids.chains - published.unpublished;
        let mut at = self.used;
        // In order: what is left of a run that was read already, then of each that was not.
        let mut run = self.run;
        while left > 0 {
            if run == 0 {
                let word = self.ring.word(at.offset);
                if !is_used(word, at.wrap) {
                    break;
                }
                let id = (word >> 32) as u16;
                let out = self.ids.get(id.into()).filter(|e| published.contains(e.position()) && !used[usize::from(id)]);
                let Some(entry) = out else { return Err(self.refused(id)) };
                if !self.features.in_order {
                    used[usize::from(id)] = true;
                    at = at.step(entry.slots(), size);
                    left -= 1;
                    continue;
                }
                run = entry.position().wrapping_sub(published.end.wrapping_sub(left)).wrapping_add(1);
                if run == 0 || run > left {
                    return Err(RingError::InOrderRun { id: id.into(), run, limit: left });
                }
            }
            used[usize::from(at.offset)] = true;
            at = at.step(self.ids.entries[usize::from(at.offset)].slots(), size);
            (run, left) = (run - 1, left - 1);
        }
        Ok(at)
    }

    /// Makes a chain available again, at `to`; where the next one goes.
    fn write_again(&mut self, id: u16, mut to: Cursor) -> Cursor {
        let slots = self.ids.entries[usize::from(id)].slots();
        let (mut place, size) = (id, self.ring.size);
        for _ in 0..slots {
            let Some(cell) = self.kept.as_ref().map(|kept| kept.cells[usize::from(place)]) else { return to };
            let flags = (cell.rest >> 48) as u16 | avail_flags(to.wrap);
            self.ring.set_address(to.offset, cell.address);
            self.ring.publish_word(to.offset, rest(cell.rest as u32, id, flags));
            place = cell.next();
            to = to.step(1, size);
        }
        to
    }
}
