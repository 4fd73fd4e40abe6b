//! The device's usual packets: one row each, no claims, into one buffer each. They go from slot to buffer with no list between.

use crate::device::DeviceBursts;
use crate::header::Header;
use crate::keep_rest;
use crate::port::{Rules, Traffic, read_header};
use virtio_memory::{Burst, PoolState, RegionTable, Row};
use virtqueue::{DeviceQueue, DeviceRing, Fill, Filled};

struct Packets<'a> {
    burst: &'a Burst,
    state: &'a mut PoolState,
    /// Those that are not sent yet.
    rows: std::slice::Iter<'a, Row>,
    rules: &'a Rules,
    bytes: u64,
    /// Of the buffer that was filled last.
    buffer_size: u32,
}

impl Fill for Packets<'_> {
    #[inline(always)]
    fn soon(&mut self, memory: &RegionTable, address: u64, len: u32) {
        // Packets that follow each other are most often about as long.
        let bytes = self.rows.as_slice().first().map_or(0, |row| row.length);
        memory.prefetch_write(address, len.min(bytes + Header::SIZE as u32) as usize);
    }

    #[inline(always)]
    fn fill(&mut self, memory: &RegionTable, address: u64, len: u32) -> Option<u32> {
        let (row, pool) = (*self.rows.as_slice().first()?, self.burst.pool());
        let total = row.length + Header::SIZE as u32;
        if total > len || read_header(pool, &row, self.rules).ok()? != Header::default() {
            return None;
        }
        let place = memory.place(address, len as usize)?; // all of it has to be mapped, though not all is written
        place.write(0, &Header::default().with_num_buffers(1).bytes()).ok()?;
        let at = pool.slot_offset(row.slot) + row.offset as usize;
        place.copy_in(Header::SIZE, row.length as usize, pool.mapping(), at).ok()?;
        self.state.release(row.slot, self.burst.owner()).ok()?;
        self.rows.next();
        self.bytes += u64::from(row.length);
        self.buffer_size = len;
        Some(total)
    }
}

impl DeviceBursts {
    /// Sends packets from the burst's first row on until one is not of the usual kind, or its buffer is not; all other rows move to the
    /// burst's front. Tells how many, and why no more.
    #[inline(always)]
    pub(crate) fn send_usual<R: DeviceRing>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> (usize, Filled) {
        if rules.header != Header::SIZE || !burst.read_short(state, &mut self.rows, Header::SIZE) {
            return (0, Filled::Other);
        }
        let mut packets = Packets { burst, state, rows: self.rows.iter(), rules, bytes: 0, buffer_size: self.buffer_size };
        let (sent, why) = queue.fill_batch(self.rows.len(), &mut packets);
        let left = packets.rows.as_slice();
        if sent > 0 {
            keep_rest(burst, left);
        } else {
            burst.set_unsent(left.len() as u32);
        }
        if left.is_empty() {
            burst.forget(sent);
        }
        self.buffer_size = packets.buffer_size;
        traffic.count(sent as u64, packets.bytes);
        (sent, why)
    }
}
