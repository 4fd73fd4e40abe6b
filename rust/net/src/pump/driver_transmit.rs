//! Frames of the TAP to the transmit queue.

use super::{ALL_PIECES, BURST, BURST_BYTES, EAGAIN, EFAULT, MAX_HEADER, PumpCounters, Step, driver_memory_lost, gone};
use crate::driver::{DriverBursts, LAST, LINKED, Link};
use crate::driver_port::token;
use crate::error::BurstError;
use crate::header::{Header, Reason};
use crate::port::Rules;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use virtio_memory::{BufferPool, HEADROOM, IoVecs, MemoryError, RegionTable};
use virtqueue::{Buffer, Direction, DriverQueue, DriverRing, Form, Segment};

/// Frames of the TAP to the transmit queue: a short one takes a slot, a longer one several, in one chain.
#[derive(Debug)]
pub struct DriverTransmit {
    rules: Rules,
    pool: Arc<BufferPool>,
    /// Slots of the longest frame.
    most: usize,
    /// Free slots that a step took; empty between two steps.
    slots: Vec<u32>,
    buffers: Vec<Buffer>,
    segments: Vec<Segment>,
    vecs: IoVecs,
    /// What it has done.
    pub counters: PumpCounters,
}

impl DriverTransmit {
    /// With slots of this pool; `rules` are the driver's. A frame that takes more slots than `longest` bytes do is dropped.
    ///
    /// # Errors
    /// `BadSize` if these slots are more than the queue has entries, or the pool slots.
    pub fn new<R: DriverRing>(queue: &DriverQueue<R>, pool: Arc<BufferPool>, rules: Rules, longest: usize) -> Result<Self, MemoryError> {
        let most = longest.div_ceil(pool.slot_size() - HEADROOM).max(1);
        let limit = usize::from(queue.size()).min(pool.slots() as usize).min(ALL_PIECES - 2);
        if most > limit {
            let (value, max) = (most as u64, limit as u64);
            return Err(MemoryError::BadSize { what: "slots of the longest frame", value, min: 1, max, multiple_of: 1 });
        }
        let slots = Vec::with_capacity(BURST + most);
        let (buffers, segments) = (Vec::with_capacity(BURST), Vec::with_capacity(most));
        Ok(Self { rules, pool, most, slots, buffers, segments, vecs: IoVecs::new(most + 2)?, counters: PumpCounters::default() })
    }

    /// Moves one burst, and frees the slots of used chains first; publish afterwards. The TAP is not read unless there are slots and
    /// descriptors for the longest frame. `table` is the memory as the device sees it.
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
        let Some(owner) = bursts.held.as_ref().map(|held| held.owner) else { return Ok(Step::default()) };
        self.slots.clear();
        while self.slots.len() < BURST + self.most - 1 {
            let Some(slot) = state.take(owner) else { break };
            self.slots.push(slot);
        }
        drop(state);
        self.buffers.clear();
        let (mut next, mut bytes, mut frames) = (0, 0, 0);
        let mut step = Step::default();
        let mut result = Ok(());
        while frames < BURST && bytes < BURST_BYTES {
            let descriptors = if self.most <= bursts.indirect { 1 } else { self.most };
            if usize::from(queue.free()) < self.buffers.len() + descriptors {
                step.starved = true;
                break;
            }
            if self.slots.len() < next + self.most {
                // Nobody tells when another queue gives slots back.
                step = Step { starved: true, soon: queue.outstanding() == 0 && self.buffers.is_empty(), ..step };
                break;
            }
            match self.frame(queue, bursts, table, tap, next) {
                Ok(None) => break,
                Ok(Some((length, used))) => {
                    bytes += length;
                    next += used;
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            frames += 1;
        }
        step.moved = reclaimed + frames;
        let added = queue.add_batch(&self.buffers)?;
        if next < self.slots.len() || added < self.buffers.len() {
            let mut state = self.pool.lock();
            self.slots[next..].iter().try_for_each(|slot| state.release(*slot, owner))?;
            self.buffers[added..].iter().try_for_each(|one| state.release(one.token as u32, owner))?;
        }
        result.map(|()| step)
    }

    /// One frame into the slots from this one on: its bytes and its slots, both 0 if it was dropped; `None` if there is none.
    fn frame<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        bursts: &mut DriverBursts,
        table: &RegionTable,
        tap: BorrowedFd<'_>,
        next: usize,
    ) -> Result<Option<(usize, usize)>, BurstError> {
        let header = self.rules.header;
        let payload = self.pool.slot_size() - HEADROOM;
        let (base, pool) = (bursts.base + HEADROOM as u64, &self.pool);
        let place = |slot: u32| base + pool.slot_offset(slot) as u64;
        let slots = &self.slots[next..next + self.most];
        let (mut head, mut tail) = ([0; MAX_HEADER], [0; 1]);
        let pieces = slots.iter().map(|slot| (place(*slot), payload as u32));
        let read = match table.readv_around(tap, &mut head[..header], pieces, &mut tail, &mut self.vecs) {
            Ok(0) => return Err(gone()),
            Ok(read) => read,
            Err(MemoryError::Os { errno: EAGAIN, .. }) => return Ok(None),
            Err(MemoryError::Os { errno: EFAULT, .. }) => return Err(driver_memory_lost(queue, place(slots[0]), payload as u64)),
            Err(error) => return Err(error.into()),
        };
        let length = read.saturating_sub(header);
        let mut known = [0; Header::SIZE];
        known.copy_from_slice(&head[..Header::SIZE]);
        let outgoing = match self.rules.outgoing.outgoing(Header::parse(&known), length as u64) {
            _ if length > payload * slots.len() => Err(Reason::Long),
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
                return Ok(Some((0, 0)));
            }
        };
        head = [0; MAX_HEADER];
        head[..Header::SIZE].copy_from_slice(&outgoing.bytes());
        let address = place(slots[0]) - header as u64;
        table.write(address, &head[..header])?;
        let rows = length.div_ceil(payload);
        if rows == 1 {
            let (token, len) = (token(slots[0], HEADROOM), (length + header) as u32);
            self.buffers.push(Buffer { token, address, len, direction: Direction::Readable });
        } else {
            // Those before it go first.
            queue.add_batch(&self.buffers)?;
            self.buffers.clear();
            let Some(held) = &mut bursts.held else { return Ok(None) };
            self.segments.clear();
            let mut left = length;
            for (index, slot) in slots[..rows].iter().enumerate() {
                let length = left.min(payload);
                left -= length;
                let before = if index == 0 { header } else { 0 };
                self.segments.push(Segment::readable(place(*slot) - before as u64, (length + before) as u32));
                let next = if index + 1 < rows { slots[index + 1] } else { LAST };
                held.links[*slot as usize] = Link { next, offset: HEADROOM as u32, length: length as u32 };
            }
            let form = if rows <= bursts.indirect { Form::Indirect } else { Form::Direct };
            queue.add(u64::from(slots[0]) | LINKED, &self.segments, form)?;
        }
        self.counters.traffic.count(1, length as u64);
        Ok(Some((length, rows)))
    }
}
