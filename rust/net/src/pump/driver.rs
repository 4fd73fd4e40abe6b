//! The driver's end.

use super::{BURST, BURST_BYTES, EAGAIN, EFAULT, MAX_HEADER, PumpCounters, Step, Written, behind, written};
use crate::driver::{DriverBursts, LINKED, OFFSET_SHIFT};
use crate::error::BurstError;
use crate::header::{Header, MAX_FRAME, Reason};
use crate::port::Rules;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use virtio_memory::{BufferPool, HEADROOM, IoVecs, MemoryError, RegionTable};
use virtqueue::{Buffer, Direction, DriverQueue, DriverRing, RingError, Used};

/// The memory behind a slot was taken away while the kernel used it (device-24).
#[cold]
fn memory_lost<R: DriverRing>(queue: &mut DriverQueue<R>, address: u64, len: u64) -> BurstError {
    let error = RingError::MemoryLost { address, len };
    queue.break_with(error.clone());
    error.into()
}

/// Frames of the TAP to the transmit queue, each in one slot, which is long enough for the longest.
#[derive(Debug)]
pub struct DriverTransmit {
    rules: Rules,
    pool: Arc<BufferPool>,
    buffers: Vec<Buffer>,
    vecs: IoVecs,
    /// What it has done.
    pub counters: PumpCounters,
}

impl DriverTransmit {
    /// With slots of this pool; `rules` are the driver's.
    ///
    /// # Errors
    /// None that a caller or a peer can cause.
    pub fn new(pool: Arc<BufferPool>, rules: Rules) -> Result<Self, MemoryError> {
        Ok(Self { rules, pool, buffers: Vec::with_capacity(BURST), vecs: IoVecs::new(8)?, counters: PumpCounters::default() })
    }

    /// Moves one burst, and frees the slots of used chains first; publish afterwards. Without a slot or a descriptor the TAP is not read. A
    /// frame longer than a slot is dropped. `table` is the memory as the device sees it.
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
        let mut state = self.pool.lock();
        let reclaimed = bursts.reclaim(queue, &mut state)?;
        let Some(held) = &bursts.held else { return Ok(Step::default()) };
        let (owner, header) = (held.owner, self.rules.header);
        let (mut slots, mut taken) = ([0; BURST], 0);
        while taken < BURST.min(queue.free().into()) {
            let Some(slot) = state.take(owner) else { break };
            slots[taken] = slot;
            taken += 1;
        }
        drop(state);
        self.buffers.clear();
        let payload = (self.pool.slot_size() - HEADROOM) as u32;
        let (mut bytes, mut used, mut moved, mut result) = (0, 0, reclaimed, Ok(()));
        while used < taken && bytes < BURST_BYTES && moved < reclaimed + BURST {
            let slot = slots[used];
            let at = self.pool.slot_offset(slot) + HEADROOM;
            let address = bursts.base + at as u64;
            let (mut head, mut tail) = ([0; MAX_HEADER], [0; 1]);
            let read = match table.readv_around(tap, &mut head[..header], [(address, payload)], &mut tail, &mut self.vecs) {
                Ok(read) => read,
                Err(MemoryError::Os { errno: EAGAIN, .. }) => break,
                Err(MemoryError::Os { errno: EFAULT, .. }) => {
                    result = Err(memory_lost(queue, address, payload.into()));
                    break;
                }
                Err(error) => {
                    result = Err(error.into());
                    break;
                }
            };
            moved += 1;
            let length = read.saturating_sub(header);
            let mut known = [0; Header::SIZE];
            known.copy_from_slice(&head[..Header::SIZE]);
            let outgoing = match self.rules.outgoing.outgoing(Header::parse(&known), length as u64) {
                _ if length > payload as usize => Err(Reason::Long),
                _ if length == 0 => Err(Reason::Short),
                // The TAP was told to complete checksums that the device does not take.
                Ok((_, true)) => Err(Reason::Checksum),
                Ok((outgoing, false)) => Ok(outgoing),
                Err(reason) => Err(reason),
            };
            let outgoing = match outgoing {
                Ok(outgoing) => outgoing,
                Err(reason) => {
                    self.counters.traffic.drop(reason);
                    continue;
                }
            };
            head = [0; MAX_HEADER];
            head[..Header::SIZE].copy_from_slice(&outgoing.bytes());
            table.write(address - header as u64, &head[..header])?;
            self.buffers.push(Buffer {
                token: u64::from(slot) | (HEADROOM as u64) << OFFSET_SHIFT,
                address: address - header as u64,
                len: (length + header) as u32,
                direction: Direction::Readable,
            });
            self.counters.traffic.count(1, length as u64);
            bytes += length;
            used += 1;
        }
        let added = queue.add_batch(&self.buffers)?;
        if added < taken {
            let mut state = self.pool.lock();
            slots[added..taken].iter().try_for_each(|slot| state.release(*slot, owner))?;
        }
        result.map(|()| Step { moved, starved: taken == 0 })
    }
}

/// Received packets to the TAP; their buffers are posted again.
#[derive(Debug)]
pub struct DriverReceive {
    rules: Rules,
    pool: Arc<BufferPool>,
    used: Vec<Used>,
    ready: Range<usize>,
    buffers: Vec<Buffer>,
    vecs: IoVecs,
    /// What it has done.
    pub counters: PumpCounters,
}

impl DriverReceive {
    /// With slots of this pool; `rules` are the driver's.
    ///
    /// # Errors
    /// None that a caller or a peer can cause.
    pub fn new<R: DriverRing>(queue: &DriverQueue<R>, pool: Arc<BufferPool>, rules: Rules) -> Result<Self, MemoryError> {
        let size = usize::from(queue.size());
        Ok(Self {
            rules,
            pool,
            used: vec![Used::default(); size],
            ready: 0..0,
            buffers: Vec::with_capacity(size),
            vecs: IoVecs::new(1024)?,
            counters: PumpCounters::default(),
        })
    }

    /// Moves one burst, and posts the buffers again; a queue that holds none is given some first. Publish afterwards. Buffers are one slot
    /// each. `table` is the memory as the device sees it.
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
            let buffers = crate::ReceiveBuffers { slots: 1, count: queue.size().into() };
            bursts.refill(queue, &mut self.pool.lock(), &self.rules, buffers)?;
        }
        self.buffers.clear();
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
        result.map(|()| Step { moved, starved: true })
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
        let (base, header, slot_size) = (bursts.base + self.pool.offset() as u64, self.rules.header, self.pool.slot_size() as u64);
        let place = move |used: &Used| {
            let (slot, offset) = (used.token & 0xffff_ffff, used.token >> OFFSET_SHIFT);
            (base + slot * slot_size + offset, (slot_size - offset) as u32)
        };
        let first = self.used[self.ready.start];
        let mut bytes = [0; Header::SIZE];
        let (mut count, mut found) = (1, Ok(()));
        if first.token & LINKED != 0 {
            found = Err(Reason::Long);
        } else if (first.len as usize) <= header {
            found = Err(Reason::Short);
        } else {
            table.read(place(&first).0, &mut bytes)?;
            if self.rules.mergeable {
                // driver-11: they are all there, or the packet is dropped with those that are.
                let wanted = usize::from(Header::parse(&bytes).num_buffers);
                let most = usize::from(queue.outstanding()) + self.ready.len() + bursts.ready();
                if !(1..=most).contains(&wanted) {
                    found = Err(Reason::NumBuffers);
                } else {
                    count = wanted.min(self.more(queue, bursts, wanted)?);
                    found = if count < wanted { Err(Reason::Missing) } else { Ok(()) };
                }
            }
        }
        let parts = &self.used[self.ready.start..self.ready.start + count];
        let length = parts.iter().map(|part| u64::from(part.len)).sum::<u64>().saturating_sub(header as u64);
        let believed = match found {
            Ok(()) if length > MAX_FRAME as u64 => Err(Reason::Long),
            Ok(()) if parts.iter().any(|part| part.len == 0 || part.token & LINKED != 0) => Err(Reason::Short),
            Ok(()) => self.rules.incoming.incoming(Header::parse(&bytes), length),
            Err(reason) => Err(reason),
        };
        let mut moved = 0;
        let outcome = believed.map(|believed| {
            let mut head = [0; MAX_HEADER];
            head[..Header::SIZE].copy_from_slice(&Header { num_buffers: 0, ..believed }.bytes());
            let segments = parts.iter().map(|part| (place(part).0, part.len));
            written(table.writev_after(tap, &head[..header], behind(segments, header), &mut self.vecs))
        });
        match outcome {
            Err(reason) | Ok(Ok(Err(reason))) => self.counters.traffic.drop(reason),
            Ok(Ok(Ok(Written::Taken))) => {
                self.counters.traffic.count(1, length);
                moved = length as usize;
            }
            Ok(Ok(Ok(Written::Refused))) => self.counters.refused += 1,
            Ok(Ok(Ok(Written::Lost))) => return Err(memory_lost(queue, place(&first).0, length)),
            Ok(Err(error)) => return Err(error),
        }
        for part in parts.iter().filter(|part| part.token & LINKED == 0) {
            let (address, len) = place(part);
            self.buffers.push(Buffer { token: part.token, address, len, direction: Direction::Writable });
        }
        self.ready.start += count;
        Ok(moved)
    }
}
