//! The driver's side: slots that stand in chains, without a copy.

use crate::error::BurstError;
use crate::keep_rest;
use std::ops::Range;
use std::sync::Arc;
use virtio_memory::{BufferPool, Burst, Mapping, Owner, PoolState, Row};
use virtqueue::{Buffer, Direction, DriverQueue, DriverRing, Form, Segment, Used};

/// A token is the slot below, the row's offset above it. This bit marks a chain of several slots, whose rows are in `Held::links`.
pub(crate) const LINKED: u64 = 1 << 63;
pub(crate) const OFFSET_SHIFT: u32 = 32;
/// Ends a list of links.
pub(crate) const LAST: u32 = u32::MAX;

/// A row of a chain of several slots, by its slot.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    pub next: u32,
    pub offset: u32,
    pub length: u32,
}

/// What the queue has of one pool: a number that owns the slots in its chains.
#[derive(Debug)]
pub(crate) struct Held {
    pub pool: Arc<BufferPool>,
    pub owner: Owner,
    pub links: Box<[Link]>,
}

impl Held {
    pub fn new(pool: Arc<BufferPool>) -> Self {
        let owner = pool.lock().new_owner();
        let links = vec![Link::default(); pool.slots() as usize].into();
        Held { pool, owner, links }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // In a forked child the slots are the parent's, and the lock is a copy.
        if self.pool.check_process().is_ok() {
            let mut state = self.pool.lock();
            state.release_all(self.owner);
            state.retire_owner(self.owner);
        }
    }
}

/// Bursts for one driver's queue. All its chains must come from here, for as long as any is outstanding.
#[derive(Debug)]
pub struct DriverBursts {
    /// The memory that the device sees, its first byte at `base`.
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) base: u64,
    /// Entries of an indirect table, 0 without.
    pub(crate) indirect: usize,
    pub(crate) held: Option<Held>,
    pub(crate) rows: Vec<Row>,
    pub(crate) buffers: Vec<Buffer>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) used: Vec<Used>,
    /// Those of `used` that had no room in the burst they were popped for.
    pub(crate) ready: Range<usize>,
    /// How many of `ready` a port's packet in front has.
    pub(crate) merged: usize,
    /// Slots of packets that a port drops, until they are released.
    pub(crate) bad: Vec<u32>,
    /// Room for a packet's bytes.
    pub(crate) scratch: Vec<u8>,
}

impl DriverBursts {
    /// For a queue whose device sees `mapping` at address `base`; chains of several segments take a table if it has as many entries.
    pub fn new(mapping: Arc<Mapping>, base: u64, indirect: usize) -> Self {
        DriverBursts {
            mapping,
            base,
            indirect,
            held: None,
            rows: Vec::new(),
            buffers: Vec::new(),
            segments: Vec::new(),
            used: Vec::new(),
            ready: 0..0,
            merged: 1,
            bad: Vec::new(),
            scratch: Vec::new(),
        }
    }

    /// Chains that were taken from the ring, but are not in a burst yet.
    #[inline]
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Makes sure that the queue's slots are of this burst's pool, and that there is room for its rows. `outstanding` are the ring's chains.
    /// The pool's lock is not held.
    ///
    /// # Errors
    /// `OtherMemory`; `OtherPool` while chains with slots of another one are outstanding.
    #[inline]
    pub fn bind(&mut self, burst: &Burst, outstanding: usize) -> Result<(), BurstError> {
        match &self.held {
            Some(held) if Arc::ptr_eq(&held.pool, burst.pool()) && self.used.len() >= burst.capacity() => Ok(()),
            _ => self.rebind(burst, outstanding),
        }
    }

    #[cold]
    fn rebind(&mut self, burst: &Burst, outstanding: usize) -> Result<(), BurstError> {
        let pool = burst.pool();
        if !Arc::ptr_eq(pool.mapping(), &self.mapping) {
            return Err(BurstError::OtherMemory);
        }
        if !self.held.as_ref().is_some_and(|held| Arc::ptr_eq(&held.pool, pool)) {
            let chains = outstanding + self.ready.len();
            if chains > 0 {
                return Err(BurstError::OtherPool { chains });
            }
            self.held = None;
            self.held = Some(Held::new(pool.clone()));
        }
        let capacity = burst.capacity();
        self.rows.reserve(capacity);
        self.buffers.resize(capacity.max(self.buffers.len()), Buffer::default());
        self.segments.reserve(capacity);
        self.used.resize(capacity.max(self.used.len()), Used::default());
        Ok(())
    }

    /// Adds as many of the burst's packets as fit, each a chain; their slots are the queue's from then on. The others move to the burst's
    /// front. Nobody sees them before `publish`. Tells how many chains; after [`DriverBursts::bind`], with the pool's lock held.
    ///
    /// # Errors
    /// `Row`, `TooManyRows`; nothing is added then.
    #[inline]
    pub fn add<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        direction: Direction,
    ) -> Result<usize, BurstError> {
        self.add_as(queue, state, burst, direction, None)
    }

    /// As [`DriverBursts::add`]; `all` stands for every row's length, if it is given, and is then written to the rows that stay.
    ///
    /// # Errors
    /// As [`DriverBursts::add`].
    #[inline]
    pub fn add_as<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        direction: Direction,
        all: Option<u32>,
    ) -> Result<usize, BurstError> {
        let Some(held) = &mut self.held else { return Ok(0) };
        if queue.free() == 0 {
            // Nothing will fit: the rows are checked, and stay.
            let mut packets = burst.count();
            if !burst.check_short(state, all) {
                burst.validate_as(state, &mut self.rows, all)?;
                check_packets(&self.rows, queue.size())?;
                packets = self.rows.iter().filter(|row| !row.more).count();
            }
            if let Some(length) = all {
                burst.set_lengths(length);
            }
            burst.set_unsent(packets as u32);
            return Ok(0);
        }
        let base = self.base + held.pool.offset() as u64;
        let slot_size = held.pool.slot_size() as u64;
        let (buffers, mut written) = (&mut self.buffers[..], 0);
        let (passed, rows) = burst.pass_short(state, held.owner, all, |row| {
            buffers[written] = Buffer {
                token: u64::from(row.slot) | u64::from(row.offset) << OFFSET_SHIFT,
                address: base + u64::from(row.slot) * slot_size + u64::from(row.offset),
                len: row.length,
                direction,
            };
            written += 1;
        });
        let buffers = &buffers[..passed];
        let mut take_back =
            |buffers: &[Buffer]| buffers.iter().try_for_each(|one| state.transfer(one.token as u32, held.owner, burst.owner()));
        if passed < rows {
            take_back(buffers)?;
            burst.validate_as(state, &mut self.rows, all)?;
            return self.add_linked(queue, state, burst, direction);
        }
        let added = match queue.add_batch(buffers) {
            Ok(added) => added,
            Err(error) => {
                take_back(buffers)?;
                return Err(error.into());
            }
        };
        if added == passed {
            burst.forget(added);
            keep_rest(burst, &[]);
            return Ok(added);
        }
        let rest = &buffers[added..];
        take_back(rest)?;
        self.rows.clear();
        self.rows.extend(rest.iter().map(|one| {
            let (slot, offset) = (one.token as u32, (one.token >> OFFSET_SHIFT) as u32);
            Row { slot, offset, length: one.len, more: false }
        }));
        keep_rest(burst, &self.rows);
        Ok(added)
    }

    /// As `add`, where packets may have several rows.
    #[inline(never)]
    fn add_linked<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
        direction: Direction,
    ) -> Result<usize, BurstError> {
        let Some(held) = &mut self.held else { return Ok(0) };
        check_packets(&self.rows, queue.size())?;
        let (mut first, mut added) = (0, 0);
        for packet in self.rows.chunk_by(|row, _| row.more) {
            if queue.broken().is_some() {
                break;
            }
            self.segments.clear();
            self.segments.extend(packet.iter().map(|row| Segment {
                address: self.base + held.pool.slot_offset(row.slot) as u64 + u64::from(row.offset),
                len: row.length,
                direction,
            }));
            let head = packet[0];
            let single = packet.len() == 1;
            let token = if single { u64::from(head.slot) | u64::from(head.offset) << OFFSET_SHIFT } else { u64::from(head.slot) | LINKED };
            let form = if !single && packet.len() <= self.indirect { Form::Indirect } else { Form::Direct };
            match queue.add(token, &self.segments, form) {
                Ok(()) => {}
                Err(virtqueue::RingError::Full { .. }) => break,
                Err(error) => return Err(error.into()),
            }
            for (index, row) in packet.iter().enumerate() {
                let next = packet.get(index + 1).map_or(LAST, |row| row.slot);
                held.links[row.slot as usize] = Link { next, offset: row.offset, length: row.length };
                state.transfer(row.slot, burst.owner(), held.owner)?;
            }
            first += packet.len();
            added += 1;
        }
        keep_rest(burst, &self.rows[first..]);
        Ok(added)
    }

    /// Gives back what the burst holds, then fills it with the slots of used chains: a row's length is what the device wrote there. A chain
    /// of more slots than the burst has rows goes back to the pool, counted as a drop. Tells how many chains; after [`DriverBursts::bind`],
    /// with the pool's lock held.
    ///
    /// # Errors
    /// `Ring` for a mistake of the device; the burst is empty then.
    #[inline]
    pub fn pop_used<R: DriverRing>(
        &mut self,
        queue: &mut DriverQueue<R>,
        state: &mut PoolState,
        burst: &Burst,
    ) -> Result<usize, BurstError> {
        burst.give_back(state);
        let Some(held) = &self.held else { return Ok(0) };
        let capacity = burst.capacity();
        if self.ready.is_empty() {
            self.ready = 0..queue.pop_used_batch(&mut self.used[..capacity])?;
        }
        let ready = &self.used[self.ready.clone()];
        if ready.iter().all(|used| used.token & LINKED == 0) {
            let rows = ready.iter().map(|used| {
                let (slot, offset) = (used.token as u32, (used.token >> OFFSET_SHIFT) as u32);
                Row { slot, offset, length: used.len, more: false }
            });
            let chains = burst.adopt_rows(state, held.owner, rows)?;
            self.ready.start += chains;
            return Ok(chains);
        }
        let (mut row, mut chains) = (0, 0);
        for used in ready {
            if used.token & LINKED != 0 {
                let rows = links(held, used).count();
                if rows > capacity {
                    links(held, used).try_for_each(|(slot, _)| state.release(slot, held.owner))?;
                    state.add_drops(1);
                    self.ready.start += 1;
                    continue;
                }
                if rows > capacity - row {
                    break;
                }
                let mut left = used.len;
                for (slot, link) in links(held, used) {
                    burst.adopt(state, slot, held.owner)?;
                    let length = left.min(link.length);
                    left -= length;
                    burst.set_row(row, Row { slot, offset: link.offset, length, more: link.next != LAST });
                    row += 1;
                }
            } else {
                if row == capacity {
                    break;
                }
                let (slot, offset) = (used.token as u32, (used.token >> OFFSET_SHIFT) as u32);
                burst.adopt(state, slot, held.owner)?;
                burst.set_row(row, Row { slot, offset, length: used.len, more: false });
                row += 1;
            }
            self.ready.start += 1;
            chains += 1;
        }
        burst.set_count(row)?;
        Ok(chains)
    }

    /// Every slot that the queue has goes back to the pool: the device was reset. The pool's lock is not held.
    pub fn reset(&mut self) {
        self.held = None;
        self.ready = 0..0;
    }
}

/// Refuses a packet that never fits.
pub(crate) fn check_packets(rows: &[Row], size: u16) -> Result<(), BurstError> {
    let mut end = 0;
    for packet in rows.chunk_by(|row, _| row.more) {
        end += packet.len();
        if packet.len() > usize::from(size) {
            return Err(BurstError::TooManyRows { row: end - 1, rows: packet.len(), size });
        }
    }
    Ok(())
}

/// The rows of a chain of several slots.
pub(crate) fn links<'a>(held: &'a Held, used: &Used) -> impl Iterator<Item = (u32, Link)> + 'a {
    let mut next = used.token as u32;
    std::iter::from_fn(move || {
        let link = *held.links.get(next as usize)?;
        Some((std::mem::replace(&mut next, link.next), link))
    })
}
