//! The driver's end of a network device: packets with their headers over a driver's queues.
//!
//! A header ends where the frame begins. So a chain starts one header before the first row's bytes, and a receive buffer one header before
//! the headroom's end. Every call wants the pool's lock held, after [`DriverBursts::bind_pool`].

use crate::driver::{DriverBursts, Held, LAST, LINKED, Link, OFFSET_SHIFT, check_packets, links};
use crate::error::BurstError;
use crate::header::{Header, MAX_FRAME};
use crate::keep_rest;
use crate::port::{Rules, Traffic, check_headroom, prepare};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use virtio_memory::{BufferPool, Burst, Column, HEADROOM, Mapping, MemoryError, PoolState, Row};
use virtqueue::{Buffer, Direction, DriverQueue, DriverRing, Form, RingError, Segment, Used};

/// A slot's token.
pub(crate) fn token(slot: u32, offset: usize) -> u64 {
    u64::from(slot) | (offset as u64) << OFFSET_SHIFT
}

/// Puts a header that claims nothing before the frame at `at`.
#[inline(always)]
fn zero_header(mapping: &Mapping, at: usize, header: usize) -> Result<(), MemoryError> {
    match header {
        Header::SIZE => mapping.write(at - Header::SIZE, &[0; Header::SIZE]),
        _ => mapping.write(at - header, &[0; HEADROOM][..header]),
    }
}

impl DriverBursts {
    /// Makes sure that the queue's slots are of this pool, and that there is room for bursts of `capacity` rows. The pool's lock is not held.
    ///
    /// # Errors
    /// `OtherMemory`; `OtherPool` while chains with slots of another one are outstanding.
    #[inline]
    pub fn bind_pool<R: DriverRing>(&mut self, queue: &DriverQueue<R>, pool: &Arc<BufferPool>, capacity: usize) -> Result<(), BurstError> {
        let most = capacity.max(queue.size().into());
        match &self.held {
            Some(held) if Arc::ptr_eq(&held.pool, pool) && self.buffers.len() >= most => Ok(()),
            _ => self.rebind_pool(queue, pool, most),
        }
    }

    #[cold]
    fn rebind_pool<R: DriverRing>(&mut self, queue: &DriverQueue<R>, pool: &Arc<BufferPool>, most: usize) -> Result<(), BurstError> {
        if !Arc::ptr_eq(pool.mapping(), &self.mapping) {
            return Err(BurstError::OtherMemory);
        }
        if !self.held.as_ref().is_some_and(|held| Arc::ptr_eq(&held.pool, pool)) {
            let chains = usize::from(queue.outstanding()) + self.ready.len();
            if chains > 0 {
                return Err(BurstError::OtherPool { chains });
            }
            self.held = None;
            self.held = Some(Held::new(pool.clone()));
        }
        self.rows.reserve(most);
        self.buffers.resize(most.max(self.buffers.len()), Buffer::default());
        self.segments.reserve(most);
        self.used.resize(most.max(self.used.len()), Used::default());
        self.bad.reserve(most);
        Ok(())
    }

    /// Takes used chains back and frees their slots: for a transmit queue. Tells how many.
    ///
    /// # Errors
    /// `Ring` for a mistake of the device.
    #[inline]
    pub fn reclaim<R: DriverRing>(&mut self, queue: &mut DriverQueue<R>, state: &mut PoolState) -> Result<usize, BurstError> {
        let Some(held) = &self.held else { return Ok(0) };
        for used in &self.used[std::mem::replace(&mut self.ready, 0..0)] {
            release(held, state, used)?;
        }
        let count = queue.pop_used_batch(&mut self.used)?;
        for used in &self.used[..count] {
            release(held, state, used)?;
        }
        Ok(count)
    }

    /// Reclaims, then fills the burst with free slots whose headers are zero. Tells how many.
    ///
    /// # Errors
    /// As [`DriverBursts::reclaim`].
    pub fn take<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        rules: &Rules,
    ) -> Result<usize, BurstError> {
        burst.give_back(state);
        self.reclaim(queue, state)?;
        fill_clean(state, burst, rules)
    }

    /// Sends as many of the burst's packets as fit, each with the header that stands before its first row, made fit for the device; packets
    /// whose header cannot be are dropped. The others move to the burst's front. Nobody sees them before `publish`. Tells how many were sent.
    ///
    /// # Errors
    /// `Row`, `TooManyRows`, `NoHeadroom`; nothing is sent then. `Ring` for a mistake of the device.
    #[inline]
    pub fn send<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<usize, BurstError> {
        self.reclaim(queue, state)?;
        let Some(held) = &self.held else { return Ok(0) };
        if queue.free() == 0 || queue.broken().is_some() {
            burst.validate(state, &mut self.rows)?;
            check_packets(&self.rows, queue.size())?;
            check_headroom(&self.rows, rules.header)?;
            burst.set_unsent(self.rows.iter().filter(|row| !row.more).count() as u32);
            return Ok(0);
        }
        let (pool, owner, header) = (&*held.pool, held.owner, rules.header as u32);
        let (base, slot_size) = (self.base + pool.offset() as u64, pool.slot_size() as u64);
        let (buffers, mut written) = (&mut self.buffers[..], 0);
        let (mut no_room, mut fault, mut bytes) = (false, None, 0);
        let mut drops = *traffic;
        let (bad, scratch) = (&mut self.bad, &mut self.scratch);
        bad.clear();
        let (passed, rows) = burst.pass_short(state, owner, None, |row| {
            let fits = row.offset >= header;
            no_room |= !fits;
            if fits {
                match prepare(pool, &[row], rules, scratch) {
                    Ok(Ok(_)) => {}
                    Ok(Err(reason)) => {
                        drops.drop(reason);
                        bad.push(row.slot);
                        return;
                    }
                    Err(error) => fault = Some(error),
                }
            }
            bytes += u64::from(row.length);
            buffers[written] = Buffer {
                token: u64::from(row.slot) | u64::from(row.offset) << OFFSET_SHIFT,
                address: (base + u64::from(row.slot) * slot_size + u64::from(row.offset)).wrapping_sub(header.into()),
                len: row.length + header,
                direction: Direction::Readable,
            };
            written += 1;
        });
        let mut added = Ok(0);
        let refused = passed < rows || no_room || fault.is_some();
        if !refused {
            added = queue.add_batch(&self.buffers[..written]);
        }
        if refused || added.is_err() {
            for slot in self.buffers[..written].iter().map(|one| one.token as u32).chain(self.bad.iter().copied()) {
                state.transfer(slot, owner, burst.owner())?;
            }
            added?;
            if let Some(fault) = fault {
                return Err(fault.into());
            }
            burst.validate(state, &mut self.rows)?;
            return self.send_rows(queue, state, burst, rules, traffic);
        }
        let added = added?;
        *traffic = drops;
        for slot in &self.bad {
            state.release(*slot, owner)?;
        }
        if added == rows {
            burst.forget(added);
            keep_rest(burst, &[]);
        } else {
            self.rows.clear();
            for one in &self.buffers[added..written] {
                let (slot, offset) = (one.token as u32, (one.token >> OFFSET_SHIFT) as u32);
                state.transfer(slot, owner, burst.owner())?;
                self.rows.push(Row { slot, offset, length: one.len - header, more: false });
                bytes -= u64::from(one.len - header);
            }
            keep_rest(burst, &self.rows);
        }
        traffic.count(added as u64, bytes);
        Ok(added)
    }

    /// As `send`, where packets may have several rows; the rows were read.
    #[inline(never)]
    fn send_rows<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<usize, BurstError> {
        let Some(held) = &mut self.held else { return Ok(0) };
        check_packets(&self.rows, queue.size())?;
        check_headroom(&self.rows, rules.header)?;
        let (mut done, mut sent) = (0, 0);
        for packet in self.rows.chunk_by(|row, _| row.more) {
            match prepare(&held.pool, packet, rules, &mut self.scratch)? {
                Ok(_) => {}
                Err(reason) => {
                    traffic.drop(reason);
                    packet.iter().try_for_each(|row| state.release(row.slot, burst.owner()))?;
                    done += packet.len();
                    continue;
                }
            }
            self.segments.clear();
            self.segments.extend(packet.iter().enumerate().map(|(index, row)| {
                let header = if index == 0 { rules.header as u32 } else { 0 };
                let address = self.base + held.pool.slot_offset(row.slot) as u64 + u64::from(row.offset - header);
                Segment::readable(address, row.length + header)
            }));
            let single = packet.len() == 1;
            let head = packet[0];
            let token = if single { token(head.slot, head.offset as usize) } else { u64::from(head.slot) | LINKED };
            let form = if !single && packet.len() <= self.indirect { Form::Indirect } else { Form::Direct };
            match queue.add(token, &self.segments, form) {
                Ok(()) => {}
                Err(RingError::Full { .. } | RingError::Broken) => break,
                Err(error) => return Err(error.into()),
            }
            for (index, row) in packet.iter().enumerate() {
                let next = packet.get(index + 1).map_or(LAST, |row| row.slot);
                held.links[row.slot as usize] = Link { next, offset: row.offset, length: row.length };
                state.transfer(row.slot, burst.owner(), held.owner)?;
            }
            traffic.count(1, packet.iter().map(|row| u64::from(row.length)).sum());
            done += packet.len();
            sent += 1;
        }
        keep_rest(burst, &self.rows[done..]);
        Ok(sent)
    }

    /// Refuses frames that never fit.
    ///
    /// # Errors
    /// `BadFrame`.
    pub fn check_frames<'a, R: DriverRing>(
        queue: &DriverQueue<R>,
        pool: &BufferPool,
        frames: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), BurstError> {
        let rows = usize::from(queue.size()).min(pool.slots() as usize);
        let max = MAX_FRAME.min(rows * (pool.slot_size() - HEADROOM));
        for (frame, bytes) in frames.enumerate() {
            if bytes.is_empty() || bytes.len() > max {
                return Err(BurstError::BadFrame { frame, bytes: bytes.len(), max });
            }
        }
        Ok(())
    }

    /// Copies frames into slots and sends them, with headers that claim nothing, until the ring or the pool is full. Nobody sees them before
    /// `publish`. Tells how many; after [`DriverBursts::check_frames`].
    ///
    /// # Errors
    /// `Ring` for a mistake of the device.
    #[inline]
    pub fn send_frames<'a, R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        mut frames: impl Iterator<Item = &'a [u8]>,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<usize, BurstError> {
        self.reclaim(queue, state)?;
        let Some(held) = &self.held else { return Ok(0) };
        let (pool, owner, header) = (held.pool.clone(), held.owner, rules.header);
        let payload = pool.slot_size() - HEADROOM;
        let mut sent = 0;
        loop {
            // Frames of one slot, many at a time; then a longer one, if there is one.
            let free = usize::from(queue.free()).min(self.buffers.len());
            let (mapping, base) = (&**pool.mapping(), self.base);
            let (mut written, mut bytes, mut long) = (0, 0, None);
            for buffer in &mut self.buffers[..free] {
                let Some(frame) = frames.next() else { break };
                if frame.len() > payload {
                    long = Some(frame);
                    break;
                }
                let Some(slot) = state.take(owner) else { break };
                let at = pool.slot_offset(slot) + HEADROOM;
                zero_header(mapping, at, header)?;
                mapping.write(at, frame)?;
                *buffer = Buffer {
                    token: token(slot, HEADROOM),
                    address: base + (at - header) as u64,
                    len: (frame.len() + header) as u32,
                    direction: Direction::Readable,
                };
                bytes += frame.len() as u64;
                written += 1;
            }
            let added = queue.add_batch(&self.buffers[..written])?;
            for one in &self.buffers[added..written] {
                state.release(one.token as u32, owner)?;
                bytes -= u64::from(one.len) - header as u64;
            }
            traffic.count(added as u64, bytes);
            sent += added;
            match long {
                Some(frame) if added == written && self.send_long(queue, state, frame, rules)? => {
                    traffic.count(1, frame.len() as u64);
                    sent += 1;
                }
                _ => return Ok(sent),
            }
        }
    }

    /// One frame of several slots; whether it fitted.
    #[cold]
    fn send_long<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        frame: &[u8],
        rules: &Rules,
    ) -> Result<bool, BurstError> {
        let Some(held) = &mut self.held else { return Ok(false) };
        let payload = held.pool.slot_size() - HEADROOM;
        self.bad.clear();
        self.segments.clear();
        for (index, piece) in frame.chunks(payload).enumerate() {
            let Some(slot) = state.take(held.owner) else { break };
            self.bad.push(slot);
            let header = if index == 0 { rules.header } else { 0 };
            let at = held.pool.slot_offset(slot) + HEADROOM;
            held.pool.mapping().write(at - header, &[0; HEADROOM][..header])?;
            held.pool.mapping().write(at, piece)?;
            self.segments.push(Segment::readable(self.base + (at - header) as u64, (piece.len() + header) as u32));
        }
        let complete = self.bad.len() == frame.len().div_ceil(payload);
        let form = if self.bad.len() <= self.indirect { Form::Indirect } else { Form::Direct };
        let result = match complete {
            true => queue.add(u64::from(self.bad[0]) | LINKED, &self.segments, form),
            false => Err(RingError::Full { needed: frame.len().div_ceil(payload), free: self.bad.len() }),
        };
        if let Err(error) = result {
            self.bad.iter().try_for_each(|slot| state.release(*slot, held.owner))?;
            return if matches!(error, RingError::Full { .. } | RingError::Broken) { Ok(false) } else { Err(error.into()) };
        }
        for (index, slot) in self.bad.iter().enumerate() {
            let next = self.bad.get(index + 1).copied().unwrap_or(LAST);
            held.links[*slot as usize] = Link { next, offset: HEADROOM as u32, length: payload as u32 };
        }
        Ok(true)
    }
}

/// Gives all slots of a used chain back.
#[inline(always)]
pub(crate) fn release(held: &Held, state: &mut PoolState, used: &Used) -> Result<(), MemoryError> {
    if used.token & LINKED == 0 {
        return state.release(used.token as u32, held.owner);
    }
    links(held, used).try_for_each(|(slot, _)| state.release(slot, held.owner))
}

/// Gives back what a burst holds, and fills it with free slots whose headers are zero; how many.
///
/// # Errors
/// `Memory` if somebody else wrote the burst's columns meanwhile.
pub fn fill_clean(state: &mut PoolState, burst: &Burst, rules: &Rules) -> Result<usize, BurstError> {
    let count = burst.fill(state);
    let (pool, mapping) = (&**burst.pool(), &**burst.pool().mapping());
    for slot in &burst.column(Column::Slots)[..count] {
        zero_header(mapping, pool.slot_offset(slot.load(Relaxed) as u32) + HEADROOM, rules.header)?;
    }
    Ok(count)
}
