//! Filling buffers of the packed ring.

use super::{BOTH, PackedDevice, avail_flags};
use crate::fill::{Found, ROOM, fill_all};
use crate::ring::{Fill, Filled};
use crate::spec::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use virtio_memory::RegionTable;

const KINDS: u64 = ((DESC_F_NEXT | DESC_F_INDIRECT | DESC_F_WRITE) as u64) << 48;
const WRITE: u64 = (DESC_F_WRITE as u64) << 48;

impl PackedDevice {
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
            let free = usize::from(self.ring.size) - self.flights.slots as usize;
            let (popped, why) = self.look(&mut found[..ROOM.min(most - all).min(free)]);
            let done = fill_all(&mut found[..popped], memory, filler);
            let (desc, mut tail) = (self.ring.desc.cells(), self.tail());
            for buffer in &found[..done] {
                tail.element(&desc, tail.used, buffer.id, buffer.len);
                tail.advance(1);
            }
            self.set_tail(tail);
            self.next = self.next.step(done as u16, self.ring.size);
            self.flights.passed(done, self.flights.newest);
            all += done;
            match why {
                _ if done < popped => return (all, Filled::Other),
                Some(why) => return (all, why),
                None if done == 0 => return (all, Filled::Other), // every slot is taken
                None => {}
            }
        }
        (all, Filled::All)
    }

    /// Buffers from the next descriptor on; how many, and what came behind them if there was room for more.
    #[inline(always)]
    fn look(&self, found: &mut [Found]) -> (usize, Option<Filled>) {
        let (desc, size) = (self.ring.desc.cells(), self.ring.size);
        let (mut offset, mut wrap) = (self.next.offset, self.next.wrap);
        let mut expected = u64::from(avail_flags(wrap)) << 48 | WRITE;
        for (popped, buffer) in found.iter_mut().enumerate() {
            let word = desc.load_acquire(2 * usize::from(offset) + 1);
            let len = word as u32;
            if word & (BOTH | KINDS) != expected || len == 0 {
                return (popped, Some(if word & BOTH == expected & BOTH { Filled::Other } else { Filled::Empty }));
            }
            *buffer = Found { address: desc.load(2 * usize::from(offset)), len, id: (word >> 32) as u16 };
            offset += 1;
            if offset == size {
                (offset, wrap) = (0, !wrap);
                expected = u64::from(avail_flags(wrap)) << 48 | WRITE;
            }
        }
        (found.len(), None)
    }
}
