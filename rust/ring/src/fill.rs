//! Buffers that are filled and given back at once: the steps that both formats share. No table knows of them, since none stays in flight.

use crate::ring::Fill;
use virtio_memory::RegionTable;

/// How many buffers are looked at, and the processor is asked for, before the first of them is filled: the more, the better they overlap.
pub(crate) const ROOM: usize = 64;

/// A buffer of one writable descriptor: what the used ring calls it, and where it is. Once it is filled, `len` says how far.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    pub address: u64,
    pub len: u32,
    pub id: u16,
}

/// Fills buffers until the filler leaves one alone; how many.
#[inline(always)]
pub(crate) fn fill_all<F: Fill>(found: &mut [Found], memory: &RegionTable, filler: &mut F) -> usize {
    for soon in &*found {
        filler.soon(memory, soon.address, soon.len);
    }
    for (done, buffer) in found.iter_mut().enumerate() {
        let Some(len) = filler.fill(memory, buffer.address, buffer.len) else { return done };
        buffer.len = buffer.len.min(len);
    }
    found.len()
}
