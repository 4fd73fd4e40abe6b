//! The device's end of a network device: packets with their headers over a device's queues.
//!
//! Transmitted chains are copied once, into slots, the header ending where the frame begins; they are completed when their slots come back.
//! Frames for the driver are copied once into receive chains, over several of them with MRG_RXBUF.

use crate::device::{DeviceBursts, Lent, unmapped};
use crate::error::BurstError;
use crate::header::{Header, MAX_FRAME, Reason};
use crate::keep_rest;
use crate::port::{Frames, Rules, Traffic, check_headroom, prepare, write_header};
use virtio_memory::{Burst, HEADROOM, MemoryError, PoolState, RegionTable, Row};
use virtqueue::{Chain, ChainBatch, Completion, DeviceQueue, DeviceRing, Segment};

/// A transmitted chain that is believed.
pub(crate) struct Incoming {
    pub header: Header,
    /// Bytes of the frame.
    pub length: usize,
}

/// Looks at a transmitted chain: its header is copied, then judged; all of its memory is there (device-11, device-13, device-14).
#[inline(always)]
pub(crate) fn judge(
    memory: &RegionTable,
    segments: &[Segment],
    chain: &Chain,
    rules: &Rules,
) -> Result<Result<Incoming, Reason>, MemoryError> {
    if chain.readable as usize <= rules.header {
        return Ok(Err(Reason::Short));
    }
    let length = chain.readable as usize - rules.header;
    if length > MAX_FRAME {
        return Ok(Err(Reason::Long));
    }
    let mut bytes = [0; Header::SIZE];
    match segments {
        [first, ..] if first.len as usize >= Header::SIZE => memory.read(first.address, &mut bytes)?,
        _ => {
            let mut at = 0;
            Pieces::new(segments.iter()).each(Header::SIZE, |address, len| {
                memory.read(address, &mut bytes[at..at + len])?;
                at += len;
                Ok(())
            })?;
        }
    }
    for segment in segments {
        memory.check(segment.address, segment.len.into())?;
    }
    Ok(rules.incoming.incoming(Header::parse(&bytes), length as u64).map(|header| Incoming { header, length }))
}

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
            let (mut fault, mut bytes, before) = (None, 0, frames.len());
            for (chain, segments) in self.batch.iter() {
                let segments = if chain.writable == 0 { segments } else { self.batch.readable(chain) };
                match judge(queue.memory(), segments, chain, rules) {
                    Ok(Ok(Incoming { length, .. })) => {
                        let copied = frames.push(length, |to| copy_frame(queue.memory(), segments, rules.header, to));
                        if let Err(error) = copied {
                            fault = Some(error);
                            break;
                        }
                        bytes += length as u64;
                    }
                    Ok(Err(reason)) => traffic.drop(reason),
                    Err(error) => {
                        fault = Some(error);
                        break;
                    }
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
        self.make_port_room(queue);
        let mut rows = std::mem::take(&mut self.rows);
        let mut scratch = std::mem::take(&mut self.scratch);
        let checked = burst.validate(state, &mut rows).map_err(BurstError::from).and_then(|_| check_headroom(&rows, rules.header));
        let result = checked.and_then(|()| {
            let pool = burst.pool();
            let packets = rows.chunk_by(|row, _| row.more).map(|packet| {
                let bytes: u64 = packet.iter().map(|row| u64::from(row.length)).sum();
                (packet, bytes)
            });
            let count = rows.iter().filter(|row| !row.more).count();
            let prepare = |packet: &&[Row]| prepare(pool, packet, rules, &mut scratch);
            let (sent, done, fault) = self.push(queue, packets, count, rules, traffic, prepare, |packet, memory, target| {
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
            let used: usize = rows.chunk_by(|row, _| row.more).take(done).map(<[Row]>::len).sum();
            for row in &rows[..used] {
                state.release(row.slot, burst.owner())?;
            }
            keep_rest(burst, &rows[used..]);
            fault.map_or(Ok(sent), Err)
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
        let (sent, done, fault) = self.push(queue, frames, count, rules, traffic, plain, |frame, memory, target| {
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
    /// dropped, and what stopped it. `prepare` gives a packet's header, `write` copies its bytes behind that.
    #[allow(clippy::too_many_arguments, reason = "one loop for two kinds of packets")]
    #[inline(always)]
    fn push<R: DeviceRing, P>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        packets: impl Iterator<Item = (P, u64)>,
        count: usize,
        rules: &Rules,
        traffic: &mut Traffic,
        mut prepare: impl FnMut(&P) -> Result<Result<Header, Reason>, MemoryError>,
        mut write: impl FnMut(&P, &RegionTable, &mut Pieces<'_>) -> Result<(), MemoryError>,
    ) -> (usize, usize, Option<BurstError>) {
        let (mut sent, mut done, mut everything) = (0, 0, false);
        let mut packets = packets.peekable();
        // A round pops what the packets seem to need, and hands back what they did not; the last one popped all that there was.
        loop {
            let guess = match packets.peek() {
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
            self.completions.clear();
            let (mut next, mut stop) = (0, None);
            while let Some((packet, bytes)) = packets.peek() {
                let header = match prepare(packet) {
                    Ok(Ok(header)) => header,
                    Ok(Err(reason)) => {
                        traffic.drop(reason);
                        done += 1;
                        packets.next();
                        continue;
                    }
                    Err(error) => {
                        stop = Some(error);
                        break;
                    }
                };
                let total = bytes + rules.header as u64;
                let Some(chains) = chains_for(&self.batch, next, total, rules) else { break };
                let all = &self.batch.chains()[next..next + chains];
                if chains == 0 || (all[0].writable as usize) < rules.header {
                    traffic.drop(Reason::Long);
                    done += 1;
                    packets.next();
                    continue;
                }
                let header = Header { num_buffers: chains as u16, ..header };
                let result = place(queue.memory(), &self.batch, all, total, rules, &header, |memory, target| write(packet, memory, target));
                if let Err(error) = result {
                    stop = Some(error);
                    break;
                }
                let mut left = total;
                for chain in all {
                    let len = left.min(chain.writable.into());
                    left -= len;
                    self.completions.push(Completion { head: chain.head, serial: chain.serial, len: len as u32 });
                }
                self.buffer_size = all[0].writable;
                traffic.count(1, *bytes);
                next += chains;
                done += 1;
                sent += 1;
                packets.next();
            }
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

/// Writes a header and a packet into the writable bytes of chains, which have room for both, while they are still ours (device-16).
#[inline(always)]
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

/// Copies what is behind the header; there is as much as `to` wants.
#[inline(always)]
fn copy_frame(memory: &RegionTable, segments: &[Segment], header: usize, to: &mut [u8]) -> Result<(), MemoryError> {
    let mut source = Pieces::new(segments.iter());
    source.each(header, |_, _| Ok(()))?;
    let mut at = 0;
    source.each(to.len(), |address, len| {
        memory.read(address, &mut to[at..at + len])?;
        at += len;
        Ok(())
    })
}

/// A place in the bytes of segments: those given, or the writable ones of chains that follow each other.
struct Pieces<'a> {
    segments: std::slice::Iter<'a, Segment>,
    chains: Option<(&'a ChainBatch, std::slice::Iter<'a, Chain>)>,
    address: u64,
    left: usize,
}

impl<'a> Pieces<'a> {
    fn new(segments: std::slice::Iter<'a, Segment>) -> Self {
        Pieces { segments, chains: None, address: 0, left: 0 }
    }

    fn over(batch: &'a ChainBatch, chains: &'a [Chain]) -> Self {
        Pieces { segments: [].iter(), chains: Some((batch, chains.iter())), address: 0, left: 0 }
    }

    fn next(&mut self) -> Option<&'a Segment> {
        loop {
            if let Some(segment) = self.segments.next() {
                return Some(segment);
            }
            let (batch, chains) = self.chains.as_mut()?;
            self.segments = batch.writable(chains.next()?).iter();
        }
    }

    /// Calls `step` with each piece of the next `len` bytes, which are there.
    #[inline(always)]
    fn each(&mut self, mut len: usize, mut step: impl FnMut(u64, usize) -> Result<(), MemoryError>) -> Result<(), MemoryError> {
        while len > 0 {
            if self.left == 0 {
                let Some(segment) = self.next() else { return Ok(()) };
                (self.address, self.left) = (segment.address, segment.len as usize);
            }
            let count = len.min(self.left);
            step(self.address, count)?;
            self.address = self.address.wrapping_add(count as u64);
            self.left -= count;
            len -= count;
        }
        Ok(())
    }
}
