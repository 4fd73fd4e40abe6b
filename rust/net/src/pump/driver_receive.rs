//! Received packets to the TAP.

use super::{ALL_PIECES, BURST, BURST_BYTES, MAX_HEADER, PumpCounters, Step, Written, behind, driver_memory_lost, written};
use crate::driver::{DriverBursts, Held, LINKED, OFFSET_SHIFT, links};
use crate::driver_port::release;
use crate::driver_receive::ReceiveBuffers;
use crate::error::BurstError;
use crate::header::{Header, MAX_FRAME, Reason};
use crate::port::Rules;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use virtio_memory::{BufferPool, HEADROOM, IoVecs, MemoryError, RegionTable};
use virtqueue::{Buffer, Direction, DriverQueue, DriverRing, Form, RingError, Segment, Used};

/// Received packets to the TAP; their buffers are posted again.
#[derive(Debug)]
pub struct DriverReceive {
    rules: Rules,
    pool: Arc<BufferPool>,
    used: Vec<Used>,
    ready: Range<usize>,
    /// What a queue without buffers is given.
    first: ReceiveBuffers,
    /// To be posted again: buffers of one slot, and the tokens of those of several.
    buffers: Vec<Buffer>,
    linked: Vec<Used>,
    segments: Vec<Segment>,
    /// Where the packet in front lies.
    pieces: Vec<(u64, u32)>,
    vecs: IoVecs,
    /// What it has done.
    pub counters: PumpCounters,
}

impl DriverReceive {
    /// With slots of this pool; `rules` are the driver's. If it is to post the first buffers, each is of one slot with MRG_RXBUF, and holds
    /// the longest frame without (5.1.6.3.1); half of the pool's slots are left.
    ///
    /// # Errors
    /// `BadSize` if such a buffer takes more slots than the queue has entries, or that half.
    pub fn new<R: DriverRing>(queue: &DriverQueue<R>, pool: Arc<BufferPool>, rules: Rules) -> Result<Self, MemoryError> {
        let size = usize::from(queue.size());
        let slots = if rules.mergeable { 1 } else { rules.longest_incoming().div_ceil(pool.slot_size() - HEADROOM) };
        let half = (pool.slots() as usize / 2).max(1);
        if slots > size.min(half) {
            let (value, max) = (slots as u64, size.min(half) as u64);
            return Err(MemoryError::BadSize { what: "slots of a receive buffer", value, min: 1, max, multiple_of: 1 });
        }
        Ok(Self {
            rules,
            pool,
            used: vec![Used::default(); size],
            ready: 0..0,
            first: ReceiveBuffers { slots, count: size.min(half / slots) },
            buffers: Vec::with_capacity(size),
            linked: Vec::with_capacity(size),
            segments: Vec::with_capacity(slots),
            pieces: Vec::with_capacity(ALL_PIECES),
            vecs: IoVecs::new(ALL_PIECES)?,
            counters: PumpCounters::default(),
        })
    }

    /// Moves one burst, and posts the buffers again; a queue that holds none is given some first. Publish afterwards. `table` is the memory as the device sees it.
    ///
    /// # Errors
    /// `Ring` for a mistake of the device; `OtherMemory`, `OtherPool`; `Memory` with the kernel's answer if the TAP is gone.
    pub fn step<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        bursts: &mut DriverBursts,
        table: &RegionTable,
        tap: BorrowedFd<'_>,
    ) -> Result<Step, BurstError> {
        bursts.bind_pool(queue, &self.pool, 0)?;
        if queue.outstanding() == 0 && bursts.ready() == 0 {
            bursts.refill(queue, &mut self.pool.lock(), &self.rules, self.first)?;
        }
        self.buffers.clear();
        self.linked.clear();
        let (mut bytes, mut moved, mut result) = (0, 0, Ok(()));
        while moved < BURST && bytes < BURST_BYTES {
            if self.more(queue, bursts, 1)? == 0 {
                break;
            }
            match self.packet(queue, bursts, table, tap) {
                Ok(length) => bytes += length,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            moved += 1;
        }
        // What is left belongs to the queue's user again: a pump keeps nothing between two steps.
        let left = self.ready.len();
        bursts.used.resize(left.max(bursts.used.len()), Used::default());
        bursts.used[..left].copy_from_slice(&self.used[self.ready.clone()]);
        (bursts.ready, self.ready) = (0..left, 0..0);
        queue.add_batch(&self.buffers)?;
        if let (false, Some(held)) = (self.linked.is_empty(), &bursts.held) {
            self.post_linked(queue, held, bursts.base, bursts.indirect)?;
        }
        // Nobody tells when another queue gives slots back.
        let soon = queue.outstanding() == 0;
        result.map(|()| Step { moved, starved: true, soon })
    }

    /// Posts buffers of several slots again.
    fn post_linked<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        held: &Held,
        base: u64,
        indirect: usize,
    ) -> Result<(), BurstError> {
        for used in &self.linked {
            self.segments.clear();
            self.segments.extend(links(held, used).map(|(slot, link)| {
                let address = base + held.pool.slot_offset(slot) as u64 + u64::from(link.offset);
                Segment::writable(address, link.length)
            }));
            let form = if self.segments.len() <= indirect { Form::Indirect } else { Form::Direct };
            match queue.add(used.token, &self.segments, form) {
                Ok(()) => {}
                Err(RingError::Full { .. }) => release(held, &mut self.pool.lock(), used)?,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Makes sure that so many used buffers are known, if there are as many; how many there are. What a port had taken already comes first.
    fn more<R: DriverRing>(&mut self, queue: &mut DriverQueue<R>, bursts: &mut DriverBursts, wanted: usize) -> Result<usize, BurstError> {
        if self.ready.len() < wanted {
            self.used.copy_within(self.ready.clone(), 0);
            self.ready = 0..self.ready.len();
            let theirs = std::mem::replace(&mut bursts.ready, 0..0);
            let end = self.ready.end + theirs.len();
            if self.used.len() < end {
                self.used.resize(end, Used::default());
            }
            self.used[self.ready.end..end].copy_from_slice(&bursts.used[theirs]);
            self.ready.end = end + queue.pop_used_batch(&mut self.used[end..])?;
        }
        Ok(self.ready.len())
    }

    /// The packet in front; the bytes of its frame, 0 if it was dropped. Its buffers are to be posted again.
    fn packet<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        bursts: &mut DriverBursts,
        table: &RegionTable,
        tap: BorrowedFd<'_>,
    ) -> Result<usize, BurstError> {
        let header = self.rules.header;
        let first = self.used[self.ready.start];
        let mut bytes = [0; Header::SIZE];
        let (mut count, mut found) = (1, Ok(()));
        self.pieces.clear();
        self.gather(bursts, &first);
        match self.pieces.first() {
            Some((address, len)) if *len as usize >= header && first.len as usize > header => table.read(*address, &mut bytes)?,
            _ => found = Err(Reason::Short),
        }
        if found.is_ok() && self.rules.mergeable {
            // driver-11: they are all there, or the packet is dropped with those that are.
            let wanted = usize::from(Header::parse(&bytes).num_buffers());
            let most = usize::from(queue.outstanding()) + self.ready.len() + bursts.ready();
            if !(1..=most).contains(&wanted) {
                found = Err(Reason::NumBuffers);
            } else {
                count = wanted.min(self.more(queue, bursts, wanted)?);
                found = if count < wanted { Err(Reason::Missing) } else { Ok(()) };
            }
        }
        for index in 1..count {
            let part = self.used[self.ready.start + index];
            found = if part.len == 0 { found.and(Err(Reason::Short)) } else { found };
            self.gather(bursts, &part);
        }
        let parts = &self.used[self.ready.start..self.ready.start + count];
        let length = parts.iter().map(|part| u64::from(part.len)).sum::<u64>().saturating_sub(header as u64);
        let believed = match found {
            Ok(()) if length > MAX_FRAME as u64 => Err(Reason::Long),
            Ok(()) => self.rules.incoming.incoming(Header::parse(&bytes), length),
            Err(reason) => Err(reason),
        };
        let mut moved = 0;
        let outcome = believed.map(|believed| {
            let mut head = [0; MAX_HEADER];
            head[..Header::SIZE].copy_from_slice(&believed.with_num_buffers(0).bytes());
            let frame = behind(self.pieces.iter().copied(), header);
            written(table.writev_after(tap, &head[..header], frame, &mut self.vecs))
        });
        match outcome {
            Err(reason) | Ok(Ok(Err(reason))) => self.counters.traffic.drop(reason),
            Ok(Ok(Ok(Written::Taken))) => {
                self.counters.traffic.count(1, length);
                moved = length as usize;
            }
            Ok(Ok(Ok(Written::Refused))) => self.counters.refused += 1,
            Ok(Ok(Ok(Written::Lost))) => {
                let (address, _) = self.pieces.first().copied().unwrap_or_default();
                return Err(driver_memory_lost(queue, address, length));
            }
            Ok(Err(error)) => return Err(error),
        }
        for part in parts {
            if part.token & LINKED != 0 {
                self.linked.push(*part);
            } else {
                let (address, len) = self.place(bursts.base, part);
                self.buffers.push(Buffer { token: part.token, address, len, direction: Direction::Writable });
            }
        }
        self.ready.start += count;
        Ok(moved)
    }

    /// Where a buffer of one slot lies, and its bytes.
    fn place(&self, base: u64, used: &Used) -> (u64, u32) {
        let (slot, offset) = (used.token as u32, (used.token >> OFFSET_SHIFT) as u32);
        (base + self.pool.slot_offset(slot) as u64 + u64::from(offset), self.pool.slot_size() as u32 - offset)
    }

    /// Adds where the written bytes of a buffer lie.
    fn gather(&mut self, bursts: &DriverBursts, used: &Used) {
        match &bursts.held {
            Some(held) if used.token & LINKED != 0 => {
                let mut left = used.len;
                for (slot, link) in links(held, used) {
                    let len = left.min(link.length);
                    left -= len;
                    let address = bursts.base + self.pool.slot_offset(slot) as u64 + u64::from(link.offset);
                    self.pieces.push((address, len));
                }
            }
            _ => {
                let (address, _) = self.place(bursts.base, used);
                self.pieces.push((address, used.len));
            }
        }
    }
}
