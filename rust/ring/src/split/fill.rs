//! Filling buffers of the split ring.

use super::SplitDevice;
use super::device::element;
use crate::fill::{Found, ROOM, fill_all};
use crate::ring::{Fill, Filled};
use crate::spec::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use virtio_memory::RegionTable;

impl SplitDevice {
    /// As of [`crate::DeviceRing::fill_batch`].
    #[inline(always)]
    pub(super) fn fill<F: Fill>(&mut self, memory: &RegionTable, most: usize, filler: &mut F) -> (usize, Filled) {
        if self.features.in_order {
            if self.flights.chains > 0 {
                return (0, Filled::Other);
            }
            self.close_run();
        }
        let (mut all, mut found) = (0, [Found::default(); ROOM]);
        while all < most {
            let wanted = ROOM.min(most - all);
            let Ok(ready) = self.ready(wanted) else { return (all, Filled::Other) };
            let free = usize::from(self.ring.size) - self.flights.slots as usize;
            let there = wanted.min(ready.into());
            let popped = self.look(&mut found[..there.min(free)]);
            let done = fill_all(&mut found[..popped], memory, filler);
            // Counted on past 16 bits: the ring's cells mask what they are given.
            let (elements, used) = (self.ring.elements.cells(), usize::from(self.used));
            for (buffer, position) in found[..done].iter().zip(used..) {
                element(&elements, position, buffer.id, buffer.len);
            }
            self.used = self.used.wrapping_add(done as u16);
            self.next = self.next.wrapping_add(done as u16);
            self.flights.passed(done, usize::from(self.next & (self.ring.size - 1)));
            all += done;
            if done < there {
                return (all, Filled::Other);
            }
            if there < wanted {
                return (all, Filled::Empty);
            }
        }
        (all, Filled::All)
    }

    /// Buffers from the next position on; how many.
    #[inline(always)]
    fn look(&self, found: &mut [Found]) -> usize {
        let (heads, desc, next) = (self.ring.heads.cells(), self.ring.desc.cells(), usize::from(self.next));
        let entries = &self.flights.entries[..];
        for (popped, buffer) in found.iter_mut().enumerate() {
            let head = heads.load(next + popped);
            if entries.get(usize::from(head)).is_none_or(|flight| flight.serial() != 0) {
                return popped;
            }
            let [address, rest] = desc.load_pair(head.into());
            let (len, flags) = (rest as u32, (rest >> 32) as u16);
            if flags & (DESC_F_NEXT | DESC_F_INDIRECT | DESC_F_WRITE) != DESC_F_WRITE || len == 0 {
                return popped;
            }
            *buffer = Found { address, len, id: head };
        }
        found.len()
    }
}
