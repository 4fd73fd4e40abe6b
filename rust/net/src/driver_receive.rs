//! The driver's end of a network device, receiving: buffers for the device, and packets out of what it used of them.

use crate::driver::{DriverBursts, Held, LAST, LINKED, Link, links};
use crate::driver_port::{release, token};
use crate::error::BurstError;
use crate::header::{MAX_FRAME, Reason};
use crate::port::{Frames, Rules, Traffic, read_header, write_header};
use virtio_memory::{BufferPool, Burst, HEADROOM, MemoryError, PoolState, Row};
use virtqueue::{Buffer, Direction, DriverQueue, DriverRing, Form, RingError, Segment, Used};

/// Which receive buffers a driver keeps with the device.
#[derive(Clone, Copy, Debug)]
pub struct ReceiveBuffers {
    /// Slots of one buffer.
    pub slots: usize,
    /// How many buffers, at most.
    pub count: usize,
}

/// What a chain's used length leaves for a slot.
fn split_off(left: &mut u32, most: u32) -> u32 {
    let length = (*left).min(most);
    *left -= length;
    length
}

impl DriverBursts {
    /// Gives the device empty receive buffers, as many as it is to have and as the pool can give. Nobody sees them before `publish`. Tells
    /// how many.
    ///
    /// # Errors
    /// None that a caller or a peer can cause.
    #[inline]
    pub fn refill<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        rules: &Rules,
        buffers: ReceiveBuffers,
    ) -> Result<usize, BurstError> {
        let Some(held) = &mut self.held else { return Ok(0) };
        let out = usize::from(queue.outstanding()) + self.ready.len();
        let missing = buffers.count.saturating_sub(out);
        if missing == 0 || queue.broken().is_some() {
            return Ok(0);
        }
        let start = HEADROOM - rules.header;
        let length = (held.pool.slot_size() - start) as u32;
        if buffers.slots == 1 {
            let mut written = 0;
            for place in self.buffers.iter_mut().take(missing.min(queue.free().into())) {
                let Some(slot) = state.take(held.owner) else { break };
                let address = self.base + (held.pool.slot_offset(slot) + start) as u64;
                *place = Buffer { token: token(slot, start), address, len: length, direction: Direction::Writable };
                written += 1;
            }
            let added = queue.add_batch(&self.buffers[..written])?;
            self.buffers[added..written].iter().try_for_each(|one| state.release(one.token as u32, held.owner))?;
            return Ok(added);
        }
        let form = if buffers.slots <= self.indirect { Form::Indirect } else { Form::Direct };
        for filled in 0..missing {
            if state.available() < buffers.slots {
                return Ok(filled);
            }
            self.segments.clear();
            let (mut first, mut last) = (LAST, LAST);
            for _ in 0..buffers.slots {
                let Some(slot) = state.take(held.owner) else { break };
                let address = self.base + (held.pool.slot_offset(slot) + start) as u64;
                self.segments.push(Segment::writable(address, length));
                held.links[slot as usize] = Link { next: LAST, offset: start as u32, length };
                if last == LAST {
                    first = slot;
                } else {
                    held.links[last as usize].next = slot;
                }
                last = slot;
            }
            if let Err(error) = queue.add(u64::from(first) | LINKED, &self.segments, form) {
                release(held, state, &Used { token: u64::from(first) | LINKED, len: 0 })?;
                return if matches!(error, RingError::Full { .. }) { Ok(filled) } else { Err(error.into()) };
            }
        }
        Ok(missing)
    }

    /// Gives back what the burst holds, and fills it with received packets, their headers checked and left before the frames. A packet that
    /// does not fit any more waits for the next call. Packets that are not believed are dropped. Tells how many; refill afterwards.
    ///
    /// # Errors
    /// `Ring` for a mistake of the device.
    #[inline]
    pub fn receive<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<usize, BurstError> {
        burst.give_back(state);
        let Some(held) = &self.held else { return Ok(0) };
        let capacity = burst.capacity();
        if self.ready.is_empty() {
            self.ready = 0..queue.pop_used_batch(&mut self.used[..capacity])?;
        }
        self.bad.clear();
        let (mut consumed, mut bytes, mut fault) = (0, 0, None);
        let (ready, bad) = (&self.used[self.ready.clone()], &mut self.bad);
        let rows = std::iter::from_fn(|| {
            loop {
                let used = ready.get(consumed)?;
                match simple(&held.pool, used, rules) {
                    Ok(Simple::Packet(row)) => {
                        consumed += 1;
                        bytes += u64::from(row.length);
                        return Some(row);
                    }
                    Ok(Simple::Bad(reason)) => {
                        consumed += 1;
                        traffic.drop(reason);
                        bad.push(used.token as u32);
                    }
                    Ok(Simple::No) => return None,
                    Err(error) => {
                        fault = Some(error);
                        return None;
                    }
                }
            }
        });
        let mut row = burst.adopt_rows(state, held.owner, rows)?;
        self.ready.start += consumed;
        traffic.count(row as u64, bytes);
        let mut packets = row;
        if let Some(fault) = fault {
            return Err(fault.into());
        }
        for slot in &self.bad {
            state.release(*slot, held.owner)?;
        }
        // What has several buffers or slots, and whatever comes behind it.
        while row < capacity && self.receive_one(queue, rules, traffic)? {
            let Some(held) = &self.held else { break };
            if self.rows.is_empty() || self.rows.len() > capacity {
                if !self.rows.is_empty() {
                    traffic.drop(Reason::Long);
                }
            } else if self.rows.len() > capacity - row {
                // It stays where it is; nothing but its header was touched.
                break;
            } else {
                packets += 1;
                traffic.count(1, self.rows.iter().map(|row| u64::from(row.length)).sum());
                for each in &self.rows {
                    burst.adopt(state, each.slot, held.owner)?;
                    burst.set_row(row, *each);
                    row += 1;
                }
            }
            self.consume(state)?;
        }
        burst.set_count(row)?;
        Ok(packets)
    }

    /// Copies received packets, at most `limit`, and frees their slots. Tells how many; refill afterwards.
    ///
    /// # Errors
    /// `Ring` for a mistake of the device.
    #[inline]
    pub fn receive_frames<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        frames: &mut Frames,
        limit: usize,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<usize, BurstError> {
        frames.clear();
        while frames.len() < limit {
            if self.ready.is_empty() {
                let most = (limit - frames.len()).min(self.used.len());
                let count = queue.pop_used_batch(&mut self.used[..most])?;
                if count == 0 {
                    break;
                }
                self.ready = 0..count;
            }
            let Some(held) = &self.held else { break };
            let used = self.used[self.ready.start];
            match simple(&held.pool, &used, rules)? {
                Simple::Packet(row) => {
                    let at = held.pool.slot_offset(row.slot) + row.offset as usize;
                    frames.push(row.length as usize, |to| held.pool.mapping().read(at, to))?;
                    traffic.count(1, row.length.into());
                    state.release(row.slot, held.owner)?;
                    self.ready.start += 1;
                }
                Simple::Bad(reason) => {
                    traffic.drop(reason);
                    state.release(used.token as u32, held.owner)?;
                    self.ready.start += 1;
                }
                Simple::No => {
                    if !self.receive_one(queue, rules, traffic)? {
                        break;
                    }
                    let Some(held) = &self.held else { break };
                    let length: usize = self.rows.iter().map(|row| row.length as usize).sum();
                    if length > MAX_FRAME {
                        traffic.drop(Reason::Long);
                    } else if length > 0 {
                        let rows = &self.rows;
                        frames.push(length, |mut to| {
                            for row in rows {
                                let (piece, rest) = to.split_at_mut(row.length as usize);
                                held.pool.mapping().read(held.pool.slot_offset(row.slot) + row.offset as usize, piece)?;
                                to = rest;
                            }
                            Ok(())
                        })?;
                        traffic.count(1, length as u64);
                    }
                    self.consume(state)?;
                }
            }
        }
        Ok(frames.len())
    }

    /// Looks at the next packet, whatever it is made of: leaves its rows in `rows`, none if it is to be dropped (and counts that), and its
    /// chains in front of `ready`, as many as `merged`. False: there is nothing more.
    fn receive_one<R: DriverRing>(&mut self, queue: &mut DriverQueue<R>, rules: &Rules, traffic: &mut Traffic) -> Result<bool, BurstError> {
        self.rows.clear();
        self.merged = 1;
        if self.ready.is_empty() {
            self.ready = 0..queue.pop_used_batch(&mut self.used)?;
        }
        let Some(held) = &self.held else { return Ok(false) };
        let Some(first) = self.used[self.ready.clone()].first().copied() else { return Ok(false) };
        let start = (HEADROOM - rules.header) as u32;
        let head = Row { slot: first.token as u32, offset: HEADROOM as u32, length: 0, more: false };
        if first.len as usize <= rules.header {
            traffic.drop(Reason::Short);
            return Ok(true);
        }
        let header = read_header(&held.pool, &head, rules)?;
        if rules.mergeable {
            let buffers = usize::from(header.num_buffers());
            if buffers == 0 || buffers > self.ready.len() + usize::from(queue.outstanding()) {
                traffic.drop(Reason::NumBuffers);
                return Ok(true);
            }
            while self.ready.len() < buffers {
                self.used.copy_within(self.ready.clone(), 0);
                self.ready = 0..self.ready.len();
                let more = queue.pop_used_batch(&mut self.used[self.ready.end..])?;
                if more == 0 {
                    self.merged = self.ready.len();
                    traffic.drop(Reason::Missing);
                    return Ok(true);
                }
                self.ready.end += more;
            }
            self.merged = buffers;
        }
        let Some(held) = &self.held else { return Ok(false) };
        let single = Link { next: LAST, offset: start, length: (held.pool.slot_size() - start as usize) as u32 };
        for used in &self.used[self.ready.start..][..self.merged] {
            let mut left = used.len;
            if left == 0 {
                self.rows.clear();
                traffic.drop(Reason::Short);
                return Ok(true);
            }
            if used.token & LINKED == 0 {
                self.rows.push(Row { slot: used.token as u32, offset: start, length: left, more: true });
                continue;
            }
            for (slot, link) in links(held, used) {
                let length = split_off(&mut left, link.length.min(single.length));
                if length > 0 {
                    self.rows.push(Row { slot, offset: link.offset, length, more: true });
                }
            }
        }
        // The first row holds more than the header, since a chain's slots are filled one after the other.
        if let Some(row) = self.rows.first_mut() {
            if row.length as usize <= rules.header {
                self.rows.clear();
                traffic.drop(Reason::Short);
                return Ok(true);
            }
            row.offset += rules.header as u32;
            row.length -= rules.header as u32;
        }
        if let Some(row) = self.rows.last_mut() {
            row.more = false;
        }
        match rules.incoming.incoming(header, self.rows.iter().map(|row| u64::from(row.length)).sum()) {
            Ok(known) => write_header(&held.pool, &head, rules, &known.with_num_buffers(header.num_buffers()))?,
            Err(reason) => {
                self.rows.clear();
                traffic.drop(reason);
            }
        }
        Ok(true)
    }

    /// The packet in front of `ready` is done: what of its slots went nowhere is free again.
    fn consume(&mut self, state: &mut PoolState) -> Result<(), BurstError> {
        let Some(held) = &self.held else { return Ok(()) };
        for used in &self.used[self.ready.start..][..self.merged] {
            if used.token & LINKED == 0 {
                free(held, state, used.token as u32)?;
            } else {
                links(held, used).try_for_each(|(slot, _)| free(held, state, slot))?;
            }
        }
        self.ready.start += self.merged;
        Ok(())
    }
}

/// Gives a slot back unless a burst has it now.
fn free(held: &Held, state: &mut PoolState, slot: u32) -> Result<(), MemoryError> {
    if state.owner(slot) == Some(held.owner) { state.release(slot, held.owner) } else { Ok(()) }
}

/// What a used chain is.
enum Simple {
    /// A whole packet in one slot.
    Packet(Row),
    /// That, but not believed.
    Bad(Reason),
    /// Something with more parts.
    No,
}

/// Looks at a used receive buffer, and puts the checked header back before the frame.
#[inline(always)]
fn simple(pool: &BufferPool, used: &Used, rules: &Rules) -> Result<Simple, MemoryError> {
    if used.token & LINKED != 0 {
        return Ok(Simple::No);
    }
    if used.len as usize <= rules.header {
        return Ok(Simple::Bad(Reason::Short));
    }
    let row = Row { slot: used.token as u32, offset: HEADROOM as u32, length: used.len - rules.header as u32, more: false };
    let header = read_header(pool, &row, rules)?;
    if rules.mergeable && header.num_buffers() != 1 {
        return Ok(Simple::No);
    }
    match rules.incoming.incoming(header, row.length.into()) {
        Ok(known) if known == header => Ok(Simple::Packet(row)),
        Ok(known) => write_header(pool, &row, rules, &known).map(|()| Simple::Packet(row)),
        Err(reason) => Ok(Simple::Bad(reason)),
    }
}
