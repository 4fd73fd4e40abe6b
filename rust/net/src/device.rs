//! The device's side: one copy between guest memory and pool slots, and chains that are completed when their slots come back.

use crate::error::BurstError;
use crate::keep_rest;
use std::sync::Arc;
use virtio_memory::{BufferPool, Burst, HEADROOM, Lender, MemoryError, PoolState, RegionTable, Row};
use virtqueue::{Chain, ChainBatch, Completion, DeviceQueue, DeviceRing, RingError, Segment};

/// A chain whose bytes stand in slots, by its head.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lent {
    pub serial: u32,
    /// Slots that did not come back yet.
    pub slots: u32,
}

/// What the queue has of one pool: a number under which it hears of its slots' return.
#[derive(Debug)]
pub(crate) struct Held {
    pub pool: Arc<BufferPool>,
    pub lender: Lender,
    /// The head of the chain that a slot stands for.
    pub chain_of: Box<[u16]>,
}

impl Held {
    fn new(pool: Arc<BufferPool>) -> Result<Self, MemoryError> {
        let lender = pool.lock().register_lender()?;
        let chain_of = vec![0; pool.slots() as usize].into();
        Ok(Held { pool, lender, chain_of })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // In a forked child the slots are the parent's, and the lock is a copy.
        if self.pool.check_process().is_ok() {
            self.pool.lock().unregister_lender(self.lender);
        }
    }
}

/// Bursts for one device's queue.
#[derive(Debug)]
pub struct DeviceBursts {
    pub(crate) held: Option<Held>,
    pub(crate) lent: Box<[Lent]>,
    /// How many chains are lent.
    pub(crate) chains: usize,
    pub(crate) batch: ChainBatch,
    pub(crate) completions: Vec<Completion>,
    pub(crate) rows: Vec<Row>,
    /// Room for a packet's bytes.
    pub(crate) scratch: Vec<u8>,
    /// Writable bytes of the receive buffer that was filled last: what the next ones are taken to have.
    pub(crate) buffer_size: u32,
}

impl DeviceBursts {
    /// For this queue.
    pub fn new<R: DeviceRing>(queue: &DeviceQueue<R>) -> Self {
        let size = usize::from(queue.size());
        DeviceBursts {
            held: None,
            lent: vec![Lent::default(); size].into(),
            chains: 0,
            batch: queue.batch(1),
            completions: Vec::with_capacity(size),
            rows: Vec::new(),
            scratch: Vec::new(),
            buffer_size: 0,
        }
    }

    /// How many chains wait for their slots to come back; they cannot be handed back to the ring.
    #[inline]
    pub fn lent(&self) -> usize {
        self.chains
    }

    /// Makes sure that slots lent are of this burst's pool, and that there is room for its rows. The pool's lock is not held.
    ///
    /// # Errors
    /// `OtherPool` while chains in slots of another one are in flight; `Memory` if the pool has too many queues.
    #[inline]
    pub fn bind<R: DeviceRing>(&mut self, queue: &DeviceQueue<R>, burst: &Burst) -> Result<(), BurstError> {
        match &self.held {
            Some(held) if Arc::ptr_eq(&held.pool, burst.pool()) && self.batch.capacity() >= burst.capacity() => Ok(()),
            _ => self.rebind(queue, burst),
        }
    }

    #[cold]
    fn rebind<R: DeviceRing>(&mut self, queue: &DeviceQueue<R>, burst: &Burst) -> Result<(), BurstError> {
        if !self.held.as_ref().is_some_and(|held| Arc::ptr_eq(&held.pool, burst.pool())) {
            if self.chains > 0 {
                return Err(BurstError::OtherPool { chains: self.chains });
            }
            self.held = None;
            self.held = Some(Held::new(burst.pool().clone())?);
        }
        self.make_room(queue, burst);
        Ok(())
    }

    fn make_room<R: DeviceRing>(&mut self, queue: &DeviceQueue<R>, burst: &Burst) {
        let capacity = burst.capacity();
        if self.batch.capacity() < capacity {
            self.batch = queue.batch(capacity);
            self.rows.reserve(capacity);
        }
    }

    /// Gives back what the burst holds, and completes every chain of this queue all of whose slots came back, from wherever: used length 0.
    /// Nobody sees it before `publish`. Tells how many chains; after [`DeviceBursts::bind`], with the pool's lock held.
    ///
    /// # Errors
    /// None that a caller or a peer can cause.
    #[inline]
    pub fn complete<R: DeviceRing>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
    ) -> Result<usize, BurstError> {
        burst.give_back(state);
        let Some(held) = &self.held else { return Ok(0) };
        self.completions.clear();
        for slot in state.drain_returned(held.lender) {
            let head = held.chain_of[slot as usize];
            let lent = &mut self.lent[usize::from(head)];
            lent.slots -= 1;
            if lent.slots == 0 {
                self.completions.push(Completion { head, serial: lent.serial, len: 0 });
            }
        }
        self.chains -= self.completions.len();
        match queue.complete_batch(&self.completions[..]) {
            Err(RingError::NotInFlight { .. }) => {
                // Somebody completed one of them under another name: the others are not lost for that.
                self.completions.retain(|completion| queue.check(completion).is_ok());
                queue.complete_batch(&self.completions[..])?;
            }
            result => result?,
        }
        Ok(if queue.broken().is_none() { self.completions.len() } else { 0 })
    }

    /// Pops chains and copies their readable bytes into slots, after the headroom, in as many rows as it takes. What does not fit any more
    /// stays in the ring. A chain that has no bytes, or more than a burst or the pool holds, is completed and counted as dropped: publish
    /// afterwards. Tells how many chains are in the burst; after [`DeviceBursts::complete`], with the pool's lock held.
    ///
    /// # Errors
    /// `Ring` for a mistake of the driver.
    #[inline]
    pub fn pop<R: DeviceRing>(&mut self, queue: &mut DeviceQueue<R>, state: &mut PoolState, burst: &Burst) -> Result<usize, BurstError> {
        // Dropped chains make room for others, but a driver that sends nothing else is not followed for ever.
        let mut left = usize::from(queue.size());
        loop {
            let (popped, dropped) = self.pop_once(queue, state, burst)?;
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

    /// How many chains are in the burst, and how many were dropped.
    #[inline]
    fn pop_once<R: DeviceRing>(
        &mut self,
        queue: &mut DeviceQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
    ) -> Result<(usize, usize), BurstError> {
        let Some(held) = &mut self.held else { return Ok((0, 0)) };
        self.batch.clear_for(burst.capacity().min(state.available()));
        let popped = queue.pop_batch(&mut self.batch)?;
        self.completions.clear();
        let payload = held.pool.slot_size() - HEADROOM;
        if self.batch.iter().all(|(chain, segments)| segments.len() == 1 && chain.writable == 0 && chain.readable as usize <= payload) {
            return Ok((self.pop_short(queue, state, burst)?, 0));
        }
        let most_rows = burst.capacity().min(held.pool.slots() as usize);
        let (mut row, mut taken, mut fault) = (0, 0, None);
        for chain in self.batch.chains() {
            let bytes = chain.readable as usize;
            let rows = bytes.div_ceil(payload);
            if rows == 0 || rows > most_rows {
                self.completions.push(Completion { head: chain.head, serial: chain.serial, len: 0 });
                taken += 1;
                continue;
            }
            if rows > burst.capacity() - row || rows > state.available() {
                break;
            }
            let lend = |slot| held.chain_of[slot as usize] = chain.head;
            if let Err(error) = copy_out(queue.memory(), &self.batch, chain, held.lender, state, burst, row, lend) {
                fault = Some(error);
                break;
            }
            self.lent[usize::from(chain.head)] = Lent { serial: chain.serial, slots: rows as u32 };
            row += rows;
            taken += 1;
        }
        burst.set_count(row)?;
        if let (Some(error), 0) = (&fault, taken) {
            return Err(unmapped(queue, error.clone()));
        }
        let dropped = self.completions.len();
        self.chains += taken - dropped;
        if taken < popped {
            queue.rewind_from(&mut self.batch, taken)?;
        }
        if dropped > 0 && queue.memory().poisoned().is_none() {
            queue.count_dropped(dropped as u64);
            queue.complete_batch(&self.completions[..])?;
        }
        Ok((taken - dropped, dropped))
    }

    /// As `pop`, where each chain is one segment that fits in a slot: the batch is not larger than the burst and the free slots.
    #[inline(always)]
    fn pop_short<R: DeviceRing>(&mut self, queue: &mut DeviceQueue<R>, state: &mut PoolState, burst: &Burst) -> Result<usize, BurstError> {
        let Some(Held { pool, lender, chain_of }) = &mut self.held else { return Ok(0) };
        let (pool, lent, chain_of) = (&**pool, &mut self.lent[..], &mut chain_of[..]);
        let (memory, mut chains) = (queue.memory(), self.batch.iter());
        let popped = self.batch.chains().len();
        let (taken, result) = burst.take_lent(state, *lender, popped, |_, slot| {
            let Some((chain, [segment])) = chains.next() else { return Err(MemoryError::Closed) };
            memory.copy_out(segment.address, segment.len as usize, pool.mapping(), pool.slot_offset(slot) + HEADROOM)?;
            chain_of[slot as usize] = chain.head;
            lent[usize::from(chain.head)] = Lent { serial: chain.serial, slots: 1 };
            Ok(Row { slot, offset: HEADROOM as u32, length: segment.len, more: false })
        });
        drop(chains);
        self.chains += taken;
        match result {
            Err(error) if taken == 0 => return Err(unmapped(queue, error)),
            _ if taken < popped => queue.rewind_from(&mut self.batch, taken)?,
            _ => {}
        }
        Ok(taken)
    }

    /// Copies the burst's packets into the writable bytes of chains, one each, and completes these; the slots of what was sent are free
    /// again, the other packets move to the burst's front. A packet that is longer than its chain is dropped and counted, here and in the
    /// pool, and the chain completed with length 0: a driver that posts too little must not stop the queue. Nobody sees it before `publish`.
    /// Tells how many packets were copied; with the pool's lock held.
    ///
    /// # Errors
    /// `Row`: nothing is done then. `Ring` for a mistake of the driver.
    #[inline]
    pub fn fill<R: DeviceRing>(&mut self, queue: &mut DeviceQueue<R>, state: &mut PoolState, burst: &Burst) -> Result<usize, BurstError> {
        self.make_room(queue, burst);
        burst.validate(state, &mut self.rows)?;
        let packets = self.rows.iter().filter(|row| !row.more).count();
        self.batch.clear_for(packets);
        let popped = queue.pop_batch(&mut self.batch)?;
        self.completions.clear();
        let (mut done, mut dropped, mut fault) = (0, 0, None);
        for (rows, chain) in self.rows.chunk_by(|row, _| row.more).zip(self.batch.chains()) {
            let bytes: u64 = rows.iter().map(|row| u64::from(row.length)).sum();
            let fits = bytes <= u64::from(chain.writable);
            if fits && let Err(error) = copy_in(queue.memory(), self.batch.writable(chain), burst.pool(), rows) {
                fault = Some(error);
                break;
            }
            if queue.memory().poisoned().is_some() {
                break; // the bytes went nowhere
            }
            for row in rows {
                state.release(row.slot, burst.owner())?;
            }
            let len = if fits { bytes as u32 } else { 0 };
            self.completions.push(Completion { head: chain.head, serial: chain.serial, len });
            dropped += u64::from(!fits);
            done += rows.len();
        }
        state.add_drops(dropped);
        if let Err(error) = queue.check_memory() {
            keep_rest(burst, &self.rows[done..]);
            return Err(error.into());
        }
        let taken = self.completions.len();
        if let (Some(error), 0) = (&fault, taken) {
            return Err(unmapped(queue, error.clone()));
        }
        if taken < popped {
            queue.rewind_from(&mut self.batch, taken)?;
        }
        queue.complete_batch(&self.completions[..])?;
        queue.count_dropped(dropped);
        keep_rest(burst, &self.rows[done..]);
        Ok(taken - dropped as usize)
    }

    /// Completes every chain that is lent, with used length 0, although its slots did not come back: the queue moves elsewhere, and they are
    /// copies. Nobody sees it before `publish`. The pool's lock is not held.
    ///
    /// # Errors
    /// None that a caller or a peer can cause.
    pub fn settle<R: DeviceRing>(&mut self, queue: &mut DeviceQueue<R>) -> Result<(), BurstError> {
        self.completions.clear();
        if self.chains > 0 {
            for (head, lent) in self.lent.iter_mut().enumerate().filter(|(_, lent)| lent.slots > 0) {
                lent.slots = 0;
                self.completions.push(Completion { head: head as u16, serial: lent.serial, len: 0 });
            }
        }
        self.completions.retain(|completion| queue.check(completion).is_ok());
        self.completions.sort_unstable_by_key(|completion| completion.serial);
        self.reset();
        Ok(queue.complete_batch(&self.completions[..])?)
    }

    /// Forgets all chains: the device was reset. Slots that are still lent come back without telling. The pool's lock is not held.
    pub fn reset(&mut self) {
        self.held = None;
        self.chains = 0;
    }
}

/// A buffer that the driver put outside its memory breaks the queue.
#[cold]
pub(crate) fn unmapped<R: DeviceRing>(queue: &mut DeviceQueue<R>, error: MemoryError) -> BurstError {
    let error = RingError::BufferUnmapped(error);
    queue.break_with(error.clone());
    error.into()
}

/// Copies one chain's readable bytes into new slots of the burst, from `row` on. There are enough slots and rows.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "one step of one loop")]
fn copy_out(
    memory: &RegionTable,
    batch: &ChainBatch,
    chain: &Chain,
    lender: Lender,
    state: &mut PoolState,
    burst: &Burst,
    row: usize,
    mut lend: impl FnMut(u32),
) -> Result<(), MemoryError> {
    let segments = batch.readable(chain);
    for segment in segments {
        memory.check(segment.address, segment.len.into())?;
    }
    let pool = burst.pool();
    let payload = pool.slot_size() - HEADROOM;
    let (mut left, mut row) = (chain.readable as usize, row);
    let mut source = Cursor::new(segments);
    while left > 0 {
        let length = left.min(payload);
        left -= length;
        let Some(slot) = burst.take(state) else { return Ok(()) };
        let mut at = pool.slot_offset(slot) + HEADROOM;
        source.each(length, |address, len| {
            memory.copy_out(address, len, pool.mapping(), at)?;
            at += len;
            Ok(())
        })?;
        state.lend(slot, burst.owner(), lender)?;
        lend(slot);
        burst.set_row(row, Row { slot, offset: HEADROOM as u32, length: length as u32, more: left > 0 });
        row += 1;
    }
    Ok(())
}

/// Copies one packet into a chain's writable bytes; there are enough.
#[inline(always)]
fn copy_in(memory: &RegionTable, segments: &[Segment], pool: &BufferPool, rows: &[Row]) -> Result<(), MemoryError> {
    let mut left: u64 = rows.iter().map(|row| u64::from(row.length)).sum();
    for segment in segments {
        if left == 0 {
            break;
        }
        memory.check(segment.address, segment.len.into())?;
        left = left.saturating_sub(segment.len.into());
    }
    let mut target = Cursor::new(segments);
    for row in rows {
        let mut at = pool.slot_offset(row.slot) + row.offset as usize;
        target.each(row.length as usize, |address, len| {
            memory.copy_in(address, len, pool.mapping(), at)?;
            at += len;
            Ok(())
        })?;
    }
    Ok(())
}

/// A place in a chain's bytes.
struct Cursor<'a> {
    segments: std::slice::Iter<'a, Segment>,
    address: u64,
    left: usize,
}

impl<'a> Cursor<'a> {
    fn new(segments: &'a [Segment]) -> Self {
        Cursor { segments: segments.iter(), address: 0, left: 0 }
    }

    /// Calls `step` with each piece of the next `len` bytes, which are there.
    #[inline(always)]
    fn each(&mut self, mut len: usize, mut step: impl FnMut(u64, usize) -> Result<(), MemoryError>) -> Result<(), MemoryError> {
        while len > 0 {
            if self.left == 0 {
                let Some(segment) = self.segments.next() else { return Ok(()) };
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
