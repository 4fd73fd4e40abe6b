//! Equal buffers in one mapping, and who owns each of them.
//!
//! The pool owns every slot; a burst or a queue has one on loan, by its owner number. A device's queue that hands a received chain up in
//! slots is their **lender**: when such a slot comes back, the lender is told, and completes the chain. All of it stands under one lock,
//! taken once per burst; every step is of constant time and allocates nothing.

use crate::error::MemoryError;
use crate::fork::{BoundToProcess, ForkedProcess};
use crate::mapping::Mapping;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Bytes before the frame in every slot: a header ends where the frame begins.
pub const HEADROOM: usize = 64;

/// Slots start at multiples of this, and are multiples of it long: a cache line.
const SLOT_ALIGN: usize = 64;
const MIN_SLOT: usize = 128;
const MAX_SLOT: usize = 1 << 17;
const MAX_SLOTS: u32 = 1 << 20;

/// A burst's or a queue's number in its pool; 0 stands for the pool itself: the slot is free.
pub type Owner = u32;
/// The number of a queue that wants to know when the slots it lent come back; 0 stands for nobody.
pub type Lender = u16;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slot {
    pub(crate) owner: Owner,
    /// The last validation that met this slot.
    pub(crate) stamp: u32,
    lender: Lender,
}

/// What the pool's lock protects.
#[derive(Debug)]
pub struct PoolState {
    slots: Box<[Slot]>,
    /// Used as a stack: the slot that was used last is the warmest. It never holds more than all slots, so it never grows.
    free: Vec<u32>,
    /// By lender - 1: the slots that came back, room for all of them; `None` for a number that is not in use.
    returned: Vec<Option<Vec<u32>>>,
    stamp: u32,
    next_owner: Owner,
    retired: Vec<Owner>,
    drops: u64,
}

impl PoolState {
    fn new(slots: u32) -> Self {
        Self {
            slots: vec![Slot::default(); slots as usize].into(),
            free: (0..slots).rev().collect(),
            returned: Vec::new(),
            stamp: 0,
            next_owner: 1,
            retired: Vec::new(),
            drops: 0,
        }
    }

    /// How many slots are free.
    #[inline]
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// How many packets were dropped because nobody took what was left of a burst.
    pub fn drops(&self) -> u64 {
        self.drops
    }

    /// Counts dropped packets.
    #[inline]
    pub fn add_drops(&mut self, packets: u64) {
        self.drops += packets;
    }

    /// A number for a burst or a queue, until [`PoolState::retire_owner`].
    pub fn new_owner(&mut self) -> Owner {
        self.retired.pop().unwrap_or_else(|| {
            let owner = self.next_owner;
            self.next_owner += 1;
            owner
        })
    }

    /// Ends the use of a number that owns no slot any more; it may be given out again.
    pub fn retire_owner(&mut self, owner: Owner) {
        self.retired.push(owner);
    }

    /// The owner of a slot, 0 if it is free; `None` if the pool has no such slot.
    #[inline]
    pub fn owner(&self, slot: u32) -> Option<Owner> {
        self.slots.get(slot as usize).map(|slot| slot.owner)
    }

    /// A slot that `from` owns.
    #[inline]
    fn owned(&mut self, slot: u32, from: Owner) -> Result<&mut Slot, MemoryError> {
        let slots = self.slots.len() as u32;
        match self.slots.get_mut(slot as usize) {
            Some(entry) if entry.owner == from && from != 0 => Ok(entry),
            Some(entry) => Err(MemoryError::NotOwned { slot, owner: entry.owner, claimed: from }),
            None => Err(MemoryError::BadSlot { slot: slot.into(), slots }),
        }
    }

    /// A free slot for `owner`, if there is one. A burst takes by [`crate::Burst::take`], which remembers it.
    #[inline]
    pub fn take(&mut self, owner: Owner) -> Option<u32> {
        let slot = self.free.pop()?;
        self.slots[slot as usize].owner = owner;
        Some(slot)
    }

    /// The free slot that the next take gives.
    #[inline]
    pub(crate) fn next_free(&self) -> Option<u32> {
        self.free.last().copied()
    }

    /// Takes that slot, lent by `lender`.
    #[inline]
    pub(crate) fn take_lent(&mut self, owner: Owner, lender: Lender) {
        if let Some(slot) = self.free.pop() {
            let entry = &mut self.slots[slot as usize];
            entry.owner = owner;
            entry.lender = lender;
        }
    }

    /// Passes a slot on. To a burst, use [`crate::Burst::adopt`], which remembers it.
    ///
    /// # Errors
    /// `BadSlot`, `NotOwned`.
    #[inline]
    pub fn transfer(&mut self, slot: u32, from: Owner, to: Owner) -> Result<(), MemoryError> {
        self.owned(slot, from)?.owner = to;
        Ok(())
    }

    /// Says who is to be told when a slot comes back.
    ///
    /// # Errors
    /// `BadSlot`, `NotOwned`.
    #[inline]
    pub fn lend(&mut self, slot: u32, owner: Owner, lender: Lender) -> Result<(), MemoryError> {
        self.owned(slot, owner)?.lender = lender;
        Ok(())
    }

    /// Makes a slot free, and tells its lender.
    ///
    /// # Errors
    /// `BadSlot`, `NotOwned` (a free slot is owned by 0).
    #[inline]
    pub fn release(&mut self, slot: u32, from: Owner) -> Result<(), MemoryError> {
        let entry = self.owned(slot, from)?;
        entry.owner = 0;
        let lender = std::mem::take(&mut entry.lender);
        if lender != 0
            && let Some(Some(returned)) = self.returned.get_mut(usize::from(lender) - 1)
        {
            returned.push(slot);
        }
        self.free.push(slot);
        Ok(())
    }

    /// Makes those of the listed slots free that `owner` has, as [`PoolState::release`] does; how many.
    #[inline]
    pub(crate) fn release_listed(&mut self, listed: &[AtomicU32], owner: Owner) -> usize {
        let (slots, free) = (&mut self.slots[..], &mut self.free);
        let before = free.len();
        for slot in listed {
            let slot = slot.load(Relaxed);
            // Those that were passed on have another owner now.
            let Some(entry) = slots.get_mut(slot as usize).filter(|entry| entry.owner == owner) else { continue };
            entry.owner = 0;
            if entry.lender != 0
                && let Some(Some(returned)) = self.returned.get_mut(usize::from(std::mem::take(&mut entry.lender)) - 1)
            {
                returned.push(slot);
            }
            free.push(slot);
        }
        free.len() - before
    }

    /// The free slots, the next to be given last, and all entries.
    #[inline]
    pub(crate) fn parts(&mut self) -> (&mut Vec<u32>, &mut [Slot]) {
        (&mut self.free, &mut self.slots)
    }

    /// Makes every slot of `owner` free; how many. Looks at all slots of the pool: for the end of a queue, not for a burst.
    pub fn release_all(&mut self, owner: Owner) -> usize {
        let mut released = 0;
        for slot in 0..self.slots.len() as u32 {
            released += usize::from(self.release(slot, owner).is_ok());
        }
        released
    }

    /// A number for a queue that lends slots, until [`PoolState::unregister_lender`].
    ///
    /// # Errors
    /// `BadSize` beyond 65535 lenders.
    pub fn register_lender(&mut self) -> Result<Lender, MemoryError> {
        let room = Vec::with_capacity(self.slots.len());
        let unused = self.returned.iter().position(Option::is_none).unwrap_or(self.returned.len());
        let (value, max) = (unused as u64 + 1, u64::from(Lender::MAX));
        let number = Lender::try_from(unused + 1).map_err(|_| MemoryError::BadSize {
            what: "number of lenders",
            value,
            min: 1,
            max,
            multiple_of: 1,
        })?;
        if unused == self.returned.len() {
            self.returned.push(None);
        }
        self.returned[unused] = Some(room);
        Ok(number)
    }

    /// Ends a lender: slots that it lent come back without telling anybody.
    pub fn unregister_lender(&mut self, lender: Lender) {
        if let Some(returned) = usize::from(lender).checked_sub(1).and_then(|index| self.returned.get_mut(index)) {
            *returned = None;
            self.slots.iter_mut().filter(|slot| slot.lender == lender).for_each(|slot| slot.lender = 0);
        }
    }

    /// One of the slots that came back to this lender, each once. A lender empties this list before it lends slots again, under the same
    /// lock: else a slot could be meant twice.
    #[inline]
    pub fn next_returned(&mut self, lender: Lender) -> Option<u32> {
        self.returned_to(lender)?.pop()
    }

    /// All slots that came back to this lender, as [`PoolState::next_returned`] tells them, the first to come back first.
    #[inline]
    pub fn drain_returned(&mut self, lender: Lender) -> impl Iterator<Item = u32> {
        self.returned_to(lender).map(|returned| returned.drain(..)).into_iter().flatten()
    }

    #[inline]
    fn returned_to(&mut self, lender: Lender) -> Option<&mut Vec<u32>> {
        self.returned.get_mut(usize::from(lender).checked_sub(1)?)?.as_mut()
    }

    /// Begins a validation: slots met before count as not met.
    #[inline]
    pub(crate) fn begin(&mut self) -> u32 {
        self.stamp = self.stamp.wrapping_add(1);
        if self.stamp == 0 {
            self.slots.iter_mut().for_each(|slot| slot.stamp = 0);
            self.stamp = 1;
        }
        self.stamp
    }

    /// The owner of a slot that exists, and whether this validation met it before.
    #[inline]
    pub(crate) fn meet(&mut self, slot: usize) -> Option<(Owner, bool)> {
        let entry = self.slots.get_mut(slot)?;
        let again = std::mem::replace(&mut entry.stamp, self.stamp) == self.stamp;
        Some((entry.owner, again))
    }
}

/// `slots` equal buffers in one mapping of our own.
#[derive(Debug)]
pub struct BufferPool {
    mapping: Arc<Mapping>,
    offset: usize,
    slot_size: usize,
    slots: u32,
    process: BoundToProcess,
    state: Mutex<PoolState>,
}

impl BufferPool {
    /// A pool over the mapping's bytes from `offset`: `slots` times `slot_size` bytes.
    ///
    /// # Errors
    /// `BadSize` unless the slot size is a multiple of 64 in 128 to 131072 and slots are 1 to 2^20; `Misaligned` if the offset is not a
    /// multiple of 64; `OutOfRange` if the mapping ends before; `Foreign` for memory that a peer passed, since views point into slots.
    pub fn new(mapping: Arc<Mapping>, offset: usize, slots: u32, slot_size: usize) -> Result<Self, MemoryError> {
        let bad = |what, value, min, max, multiple_of| Err(MemoryError::BadSize { what, value, min, max, multiple_of });
        if !(MIN_SLOT..=MAX_SLOT).contains(&slot_size) || !slot_size.is_multiple_of(SLOT_ALIGN) {
            return bad("slot size", slot_size as u64, MIN_SLOT as u64, MAX_SLOT as u64, SLOT_ALIGN as u64);
        }
        if !(1..=MAX_SLOTS).contains(&slots) {
            return bad("number of slots", slots.into(), 1, MAX_SLOTS.into(), 1);
        }
        if !offset.is_multiple_of(SLOT_ALIGN) {
            return Err(MemoryError::Misaligned { address: offset as u64, align: SLOT_ALIGN as u64 });
        }
        if mapping.foreign() {
            return Err(MemoryError::Foreign);
        }
        mapping.at(offset, slots as usize * slot_size)?;
        let state = Mutex::new(PoolState::new(slots));
        Ok(Self { mapping, offset, slot_size, slots, process: BoundToProcess::new(), state })
    }

    /// The mapping that the slots are in.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Where the first slot starts in the mapping, in bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Bytes per slot, headroom included.
    pub fn slot_size(&self) -> usize {
        self.slot_size
    }

    /// How many slots there are.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Where a slot starts in the mapping, in bytes. The slot is one that was validated or taken.
    #[inline]
    pub fn slot_offset(&self, slot: u32) -> usize {
        self.offset + slot as usize * self.slot_size
    }

    /// Checks that this is the process that made the pool, before its lock is touched.
    ///
    /// # Errors
    /// [`ForkedProcess`] in a forked child.
    #[inline]
    pub fn check_process(&self) -> Result<(), ForkedProcess> {
        self.process.check()
    }

    /// Takes the lock.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, PoolState> {
        // A panic under the lock leaves at worst a slot with its old owner.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the lock if nobody holds it.
    #[inline]
    pub fn try_lock(&self) -> Option<MutexGuard<'_, PoolState>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(state)) => Some(state.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}
