//! The device's end of a network device: packets with their headers over a device's queues.
//!
//! Transmitted chains are copied once, into slots, the header ending where the frame begins; they are completed when their slots come back.
//! Frames for the driver are copied once into receive chains, over several of them with MRG_RXBUF.

use crate::device::{DeviceBursts, Lent, unmapped};
use crate::error::BurstError;
use crate::header::{Header, MAX_FRAME, Reason};
use crate::incoming::judge_place;
pub(crate) use crate::incoming::{Incoming, judge};
use crate::keep_rest;
use crate::pieces::{Pieces, copy_frame};
use crate::port::{Frames, Rules, Traffic, check_headroom, prepare, write_header};
use virtio_memory::{Burst, HEADROOM, MemoryError, Place, PoolState, RegionTable, Row};
use virtqueue::{Chain, ChainBatch, Completion, DeviceQueue, DeviceRing, Filled};

/// How many buffers ahead of the one that is written the processor is asked for.
const AHEAD: usize = 8;

impl DeviceBursts {
    /// Room for every chain of the queue.
    fn make_port_room<R: DeviceRing>(&mut self, queue: &DeviceQueue<R>) {
        let size = usize::from(queue.size());
        if self.batch.capacity() < size {
            self.batch = queue.batch(size);
        }
    }

    /// Pops transmitted packets into slots, their headers checked and left before the frames. What does not fit any more stays in the ring;
    /// packets that are not believed are completed and counted as dropped: publish afterwards. Tells how many packets are in the burst, which
    /// held none; after [`DeviceBursts::complete`], with the pool's lock held.
    ///
    /// # Errors
    /// `Ring` for a mistake of the driver.
    #[inline]
    pub fn receive<R: DeviceRing>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<usize, BurstError> {
        self.make_port_room(queue);
        // Dropped chains make room for others, but a driver that sends nothing else is not followed for ever.
        let mut left = usize::from(queue.size());
        loop {
            let (popped, dropped) = self.receive_once(queue, state, burst, rules, traffic)?;
            if let Err(error) = queue.check_memory() {
                burst.give_back(state);
                return Err(error.into());
            }
            left = left.saturating_sub(dropped);
            if popped > 0 || dropped == 0 || left == 0 {
                return Ok(popped);
            }
        }
    }

    /// How many packets are in the burst, and how many were dropped.
    fn receive_once<R: DeviceRing>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<(usize, usize), BurstError> {
        let Some(held) = &mut self.held else { return Ok((0, 0)) };
        self.batch.clear_for(burst.capacity().min(state.available()));
        let popped = queue.pop_batch(&mut self.batch)?;
        self.completions.clear();
        let (pool, lender) = (held.pool.clone(), held.lender);
        let payload = pool.slot_size() - HEADROOM;
        let most_rows = burst.capacity().min(pool.slots() as usize);
        let (memory, batch) = (queue.memory(), &self.batch);
        let (lent, chain_of, completions) = (&mut self.lent, &mut held.chain_of, &mut self.completions);
        let (mut next, mut bytes) = (0, 0);
        let mut drop = |chain: &Chain, reason| {
            traffic.drop(reason);
            completions.push(Completion { head: chain.head, serial: chain.serial, len: 0 });
        };
        // Packets of one slot, until there is another one.
        let (mut row, result) = burst.take_lent(state, lender, popped, |_, slot| {
            loop {
                let Some(chain) = batch.chains().get(next) else { return Err(MemoryError::Closed) };
                let segments = batch.readable(chain);
                match judge(memory, segments, chain, rules)? {
                    Ok(Incoming { length, .. }) if length > payload => return Err(MemoryError::Closed),
                    Ok(Incoming { header, length }) => {
                        let mut at = pool.slot_offset(slot) + HEADROOM;
                        let row = Row { slot, offset: HEADROOM as u32, length: length as u32, more: false };
                        write_header(&pool, &row, rules, &header)?;
                        let mut source = Pieces::new(segments.iter());
                        source.each(rules.header, |_, _| Ok(()))?;
                        source.each(length, |address, len| {
                            memory.copy_out(address, len, pool.mapping(), at)?;
                            at += len;
                            Ok(())
                        })?;
                        chain_of[slot as usize] = chain.head;
                        lent[usize::from(chain.head)] = Lent { serial: chain.serial, slots: 1 };
                        next += 1;
                        bytes += length as u64;
                        return Ok(row);
                    }
                    Err(reason) => {
                        drop(chain, reason);
                        next += 1;
                    }
                }
            }
        });
        let mut packets = row;
        let mut fault = result.err().filter(|error| *error != MemoryError::Closed);
        while fault.is_none()
            && let Some(chain) = batch.chains().get(next)
        {
            let segments = batch.readable(chain);
            let Incoming { header, length } = match judge(memory, segments, chain, rules) {
                Ok(Ok(incoming)) => incoming,
                Ok(Err(reason)) => {
                    drop(chain, reason);
                    next += 1;
                    continue;
                }
                Err(error) => {
                    fault = Some(error);
                    break;
                }
            };
            let rows = length.div_ceil(payload);
            if rows > most_rows {
                drop(chain, Reason::Long);
                next += 1;
                continue;
            }
            if rows > burst.capacity() - row || rows > state.available() {
                break;
            }
            let mut source = Pieces::new(segments.iter());
            source.each(rules.header, |_, _| Ok(()))?;
            let mut left = length;
            for index in 0..rows {
                let Some(slot) = burst.take(state) else { break };
                let part = left.min(payload);
                left -= part;
                let place = Row { slot, offset: HEADROOM as u32, length: part as u32, more: left > 0 };
                if index == 0 {
                    write_header(&pool, &place, rules, &header)?;
                }
                let mut at = pool.slot_offset(slot) + HEADROOM;
                source.each(part, |address, len| {
                    memory.copy_out(address, len, pool.mapping(), at)?;
                    at += len;
                    Ok(())
                })?;
                state.lend(slot, burst.owner(), lender)?;
                chain_of[slot as usize] = chain.head;
                burst.set_row(row, place);
                row += 1;
            }
            lent[usize::from(chain.head)] = Lent { serial: chain.serial, slots: rows as u32 };
            next += 1;
            packets += 1;
            bytes += length as u64;
        }
        burst.set_count(row)?;
        if let (Some(error), 0) = (&fault, next) {
            return Err(unmapped(queue, error.clone()));
        }
        traffic.count(packets as u64, bytes);
        let dropped = self.completions.len();
        self.chains += packets;
        if next < popped {
            queue.rewind_from(&mut self.batch, next)?;
        }
        self.finish_dropped(queue)?;
        Ok((packets, dropped))
    }

    /// Completes what stands in `completions`, dropped packets, unless the memory was lost meanwhile.
    fn finish_dropped<R: DeviceRing>(&mut self, queue: &mut DeviceQueue<R>) -> Result<(), BurstError> {
        if !self.completions.is_empty() && queue.memory().poisoned().is_none() {
            queue.count_dropped(self.completions.len() as u64);
            queue.complete_batch(&self.completions[..])?;
        }
        Ok(())
    }

    /// Copies transmitted packets, at most `limit`, and completes their chains: publish afterwards. Tells how many.
    ///
    /// # Errors
    /// `Ring` for a mistake of the driver.
    #[inline]
    pub fn receive_frames<R: DeviceRing>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        frames: &mut Frames,
        limit: usize,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<usize, BurstError> {
        frames.clear();
        self.make_port_room(queue);
        // Each round looks at other chains, or is the last one; no more in all than the ring has.
        let mut left = usize::from(queue.size());
        while frames.len() < limit && left > 0 {
            self.batch.clear_for((limit - frames.len()).min(left));
            let popped = queue.pop_batch(&mut self.batch)?;
            if popped == 0 {
                break;
            }
            left -= popped.min(left);
            self.completions.clear();
            let (mut fault, mut bytes, before, memory) = (None, 0, frames.len(), queue.memory());
            for (chain, segments) in self.batch.iter() {
                let segments = if chain.writable == 0 { segments } else { self.batch.readable(chain) };
                // Most frames are in one segment, and that in one region.
                let place = match segments {
                    [segment] => memory.place(segment.address, segment.len as usize),
                    _ => None,
                };
                let judged = match &place {
                    Some(place) => judge_place(place, chain, rules),
                    None => judge(memory, segments, chain, rules),
                };
                let copied = match judged {
                    Ok(Ok(Incoming { length, .. })) => {
                        let copied = frames.push(length, |to| match &place {
                            Some(place) => place.read(rules.header, to),
                            None => copy_frame(memory, segments, rules.header, to),
                        });
                        copied.inspect(|()| bytes += length as u64)
                    }
                    Ok(Err(reason)) => {
                        traffic.drop(reason);
                        Ok(())
                    }
                    Err(error) => Err(error),
                };
                if let Err(error) = copied {
                    fault = Some(error);
                    break;
                }
                self.completions.push(Completion { head: chain.head, serial: chain.serial, len: 0 });
            }
            if let Err(error) = queue.check_memory() {
                frames.clear();
                return Err(error.into());
            }
            if let (Some(error), true, 0) = (&fault, self.completions.is_empty(), before) {
                return Err(unmapped(queue, error.clone()));
            }
            traffic.count((frames.len() - before) as u64, bytes);
            if self.completions.len() < popped {
                queue.rewind_from(&mut self.batch, self.completions.len())?;
            }
            queue.complete_batch(&self.completions[..])?;
            if fault.is_some() {
                break;
            }
        }
        Ok(frames.len())
    }

    /// Copies the burst's packets into receive chains, each behind the header that stands before its first row, made fit for the driver, and
    /// completes these; the slots of what was sent are free again. Packets whose header cannot be, or that are longer than the driver's
    /// buffer, are dropped. The others move to the burst's front. Nobody sees it before `publish`. Tells how many were sent; with the pool's
    /// lock held.
    ///
    /// # Errors
    /// `Row`, `NoHeadroom`: nothing is done then. `Ring` for a mistake of the driver.
    pub fn send<R: DeviceRing>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<usize, BurstError> {
        let (usual, why) = self.send_usual(queue, state, burst, rules, traffic);
        queue.check_memory()?;
        if why != Filled::Other {
            return Ok(usual);
        }
        self.make_port_room(queue);
        let mut rows = std::mem::take(&mut self.rows);
        let mut scratch = std::mem::take(&mut self.scratch);
        let checked = burst.validate(state, &mut rows).map_err(BurstError::from).and_then(|_| check_headroom(&rows, rules.header));
        let result = checked.and_then(|()| {
            let pool = burst.pool();
            let count = rows.iter().filter(|row| !row.more).count();
            let prepare = |packet: &&[Row]| prepare(pool, packet, rules, &mut scratch);
            let short = |packet: &&[Row], place: &Place<'_>| {
                let mut to = rules.header;
                packet.iter().try_for_each(|row| {
                    place.copy_in(to, row.length as usize, pool.mapping(), pool.slot_offset(row.slot) + row.offset as usize)?;
                    to += row.length as usize;
                    Ok(())
                })
            };
            let (sent, done, fault) = self.push(queue, packets(&rows), count, rules, traffic, prepare, short, |packet, memory, target| {
                for row in *packet {
                    let mut at = pool.slot_offset(row.slot) + row.offset as usize;
                    target.each(row.length as usize, |address, len| {
                        memory.copy_in(address, len, pool.mapping(), at)?;
                        at += len;
                        Ok(())
                    })?;
                }
                Ok(())
            });
            let used = if count == rows.len() { done } else { packets(&rows).take(done).map(|(packet, _)| packet.len()).sum() };
            for row in &rows[..used] {
                state.release(row.slot, burst.owner())?;
            }
            keep_rest(burst, &rows[used..]);
            fault.map_or(Ok(usual + sent), Err)
        });
        (self.rows, self.scratch) = (rows, scratch);
        result
    }

    /// Copies frames into receive chains behind headers that claim nothing, until there are no more chains. Frames longer than the driver's
    /// buffers are dropped. Nobody sees it before `publish`. Tells how many frames are done with, and how many of those were sent.
    ///
    /// # Errors
    /// `Ring` for a mistake of the driver.
    #[inline]
    pub fn send_frames<'a, R: DeviceRing>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        frames: impl ExactSizeIterator<Item = &'a [u8]>,
        rules: &Rules,
        traffic: &mut Traffic,
    ) -> Result<(usize, usize), BurstError> {
        self.make_port_room(queue);
        let count = frames.len();
        let frames = frames.map(|frame| (frame, frame.len() as u64));
        let plain = |_: &&[u8]| Ok(Ok(Header::default()));
        let short = |frame: &&[u8], place: &Place<'_>| place.write(rules.header, frame);
        let (sent, done, fault) = self.push(queue, frames, count, rules, traffic, plain, short, |frame, memory, target| {
            let mut rest = *frame;
            target.each(frame.len(), |address, len| {
                let (piece, behind) = rest.split_at(len);
                rest = behind;
                memory.write(address, piece)
            })
        });
        fault.map_or(Ok((done, sent)), Err)
    }

    /// Refuses frames that never fit.
    ///
    /// # Errors
    /// `BadFrame`.
    pub fn check_frames<'a>(frames: impl Iterator<Item = &'a [u8]>) -> Result<(), BurstError> {
        for (frame, bytes) in frames.enumerate() {
            if bytes.is_empty() || bytes.len() > MAX_FRAME {
                return Err(BurstError::BadFrame { frame, bytes: bytes.len(), max: MAX_FRAME });
            }
        }
        Ok(())
    }

    /// Moves packets (what they are, their bytes) into receive chains, and completes these: how many were sent, how many were sent or
    /// dropped, and what stopped it. `prepare` gives a packet's header; `short` (into one place) and `write` copy its bytes behind that.
    #[allow(clippy::too_many_arguments, reason = "one loop for two kinds of packets")]
    #[inline(always)]
    fn push<R: DeviceRing, P>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        mut packets: impl Iterator<Item = (P, u64)>,
        count: usize,
        rules: &Rules,
        traffic: &mut Traffic,
        mut prepare: impl FnMut(&P) -> Result<Result<Header, Reason>, MemoryError>,
        mut short: impl FnMut(&P, &Place<'_>) -> Result<(), MemoryError>,
        mut write: impl FnMut(&P, &RegionTable, &mut Pieces<'_>) -> Result<(), MemoryError>,
    ) -> (usize, usize, Option<BurstError>) {
        let (mut sent, mut done, mut everything) = (0, 0, false);
        let mut current = packets.next();
        // A round pops what the packets seem to need, and hands back what they did not; the last one popped all that there was.
        loop {
            let guess = match &current {
                None => return (sent, done, None),
                Some((_, bytes)) if rules.mergeable && self.buffer_size > 0 => {
                    let each = (bytes + rules.header as u64).div_ceil(self.buffer_size.into()) as usize;
                    each.saturating_mul(count - done)
                }
                Some(_) => count - done,
            };
            self.batch.clear_for(if everything { usize::MAX } else { guess });
            let popped = match queue.pop_batch(&mut self.batch) {
                Ok(popped) => popped,
                Err(error) => return (sent, done, Some(error.into())),
            };
            let before = done;
            let (batch, completions, memory) = (&self.batch, &mut self.completions, queue.memory());
            let all = batch.chains();
            completions.clear();
            let (mut next, mut stop, mut all_bytes, before_sent) = (0, None, 0, sent);
            // The driver's core read these buffers last: their cache lines are asked for before the stores wait for them one by one.
            let warm = |index: usize, bytes: u64| {
                if let Some(segment) = all.get(index).and_then(|chain| batch.segments(chain).first()) {
                    memory.prefetch_write(segment.address, (bytes as usize).saturating_add(rules.header).min(segment.len as usize));
                }
            };
            if let Some((_, bytes)) = &current {
                (0..AHEAD).for_each(|index| warm(index, *bytes));
            }
            while let Some((packet, bytes)) = &current {
                warm(next + AHEAD, *bytes);
                let header = match prepare(packet) {
                    Ok(Ok(header)) => header,
                    Ok(Err(reason)) => {
                        traffic.drop(reason);
                        done += 1;
                        current = packets.next();
                        continue;
                    }
                    Err(error) => {
                        stop = Some(error);
                        break;
                    }
                };
                let total = bytes + rules.header as u64;
                // Most packets go into one chain of one segment in one region: all of it is there before the first byte moves.
                if let Some(chain) = all.get(next)
                    && u64::from(chain.writable) >= total
                    && let [segment] = batch.segments(chain)
                    && let Some(place) = memory.place(segment.address, segment.len as usize)
                {
                    let header = header.with_num_buffers(1);
                    if let Err(error) = put_header(&place, rules, &header).and_then(|()| short(packet, &place)) {
                        stop = Some(error);
                        break;
                    }
                    completions.push(Completion { head: chain.head, serial: chain.serial, len: total as u32 });
                    self.buffer_size = chain.writable;
                    all_bytes += bytes;
                    next += 1;
                    done += 1;
                    sent += 1;
                    current = packets.next();
                    continue;
                }
                let Some(chains) = chains_for(batch, next, total, rules) else { break };
                let all = &all[next..next + chains];
                if chains == 0 || (all[0].writable as usize) < rules.header {
                    traffic.drop(Reason::Long);
                    done += 1;
                    current = packets.next();
                    continue;
                }
                let header = header.with_num_buffers(chains as u16);
                let result = place(memory, batch, all, total, rules, &header, |memory, target| write(packet, memory, target));
                if let Err(error) = result {
                    stop = Some(error);
                    break;
                }
                let mut left = total;
                for chain in all {
                    let len = left.min(chain.writable.into());
                    left -= len;
                    completions.push(Completion { head: chain.head, serial: chain.serial, len: len as u32 });
                }
                self.buffer_size = all[0].writable;
                all_bytes += bytes;
                next += chains;
                done += 1;
                sent += 1;
                current = packets.next();
            }
            traffic.count((sent - before_sent) as u64, all_bytes);
            if let Err(error) = queue.check_memory() {
                return (sent, done, Some(error.into()));
            }
            if let (Some(error), 0) = (&stop, next) {
                return (sent, done, Some(unmapped(queue, error.clone())));
            }
            let finished = if next < popped { queue.rewind_from(&mut self.batch, next) } else { Ok(()) };
            if let Err(error) = finished.and_then(|()| queue.complete_batch(&self.completions[..])) {
                return (sent, done, Some(error.into()));
            }
            // A buffer that is not mapped is met first by the next call.
            if stop.is_some() || popped == 0 || (everything && done == before) {
                return (sent, done, None);
            }
            everything = done == before;
        }
    }
}

/// The packets in checked rows, and their bytes; most are one row.
#[inline(always)]
fn packets(mut rows: &[Row]) -> impl Iterator<Item = (&[Row], u64)> {
    std::iter::from_fn(move || {
        let first = rows.first()?;
        let (mut len, mut bytes) = (1, u64::from(first.length));
        if first.more {
            while let (true, Some(row)) = (rows[len - 1].more, rows.get(len)) {
                bytes += u64::from(row.length);
                len += 1;
            }
        }
        let (packet, rest) = rows.split_at(len);
        rows = rest;
        Some((packet, bytes))
    })
}

/// How many chains from `next` on a packet takes; 0 if it is longer than the one that it may have, `None` if there are not enough.
#[inline(always)]
fn chains_for(batch: &ChainBatch, next: usize, total: u64, rules: &Rules) -> Option<usize> {
    let chains = batch.chains().get(next..)?;
    let first = chains.first()?;
    if u64::from(first.writable) >= total {
        return Some(1);
    }
    if !rules.mergeable {
        return Some(0);
    }
    let mut room = 0;
    chains
        .iter()
        .position(|chain| {
            room += u64::from(chain.writable);
            room >= total
        })
        .map(|last| last + 1)
}

/// Writes a header to a place's start; there is room for it.
#[inline(always)]
fn put_header(place: &Place<'_>, rules: &Rules, header: &Header) -> Result<(), MemoryError> {
    place.write(0, &header.bytes())?;
    if rules.header > Header::SIZE {
        place.write(Header::SIZE, &[0; HEADROOM][..rules.header - Header::SIZE])?;
    }
    Ok(())
}

/// Writes a header and a packet into the writable bytes of chains, which have room for both, while they are still ours (device-16).
#[inline(never)]
fn place(
    memory: &RegionTable,
    batch: &ChainBatch,
    chains: &[Chain],
    total: u64,
    rules: &Rules,
    header: &Header,
    write: impl FnOnce(&RegionTable, &mut Pieces<'_>) -> Result<(), MemoryError>,
) -> Result<(), MemoryError> {
    let mut bytes = [0; HEADROOM];
    bytes[..Header::SIZE].copy_from_slice(&header.bytes());
    let (mut target, mut left) = (Pieces::over(batch, chains), total);
    // All of it is there before the first byte moves.
    while left > 0 {
        let Some(segment) = target.next() else { break };
        memory.check(segment.address, segment.len.into())?;
        left = left.saturating_sub(segment.len.into());
    }
    let (mut target, mut at) = (Pieces::over(batch, chains), 0);
    target.each(rules.header, |address, len| {
        memory.write(address, &bytes[at..at + len])?;
        at += len;
        Ok(())
    })?;
    write(memory, &mut target)
}
