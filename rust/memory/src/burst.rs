//! Many packets at once: rows of (slot, offset, length, more), the currency of every hot call.
//!
//! The columns are open to whoever uses the burst (numpy writes them), so they are not trusted: each is read once, by a relaxed load, and
//! checked. Which slots the burst was given is remembered apart from them, so that giving back needs no column.

use crate::error::MemoryError;
use crate::pool::{BufferPool, HEADROOM, Lender, Owner, PoolState};
use crate::row::{Column, Limit, RawRow, Row, RowError};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicUsize};

/// The most rows of one burst: the largest virtqueue.
const MAX_CAPACITY: usize = 32768;

/// Rows of one pool's slots, with a fixed capacity and a count of their own.
#[derive(Debug)]
pub struct Burst {
    owner: Owner,
    pool: Arc<BufferPool>,
    count: AtomicUsize,
    slots: Box<[AtomicI64]>,
    offsets: Box<[AtomicI64]>,
    lengths: Box<[AtomicI64]>,
    more: Box<[AtomicI64]>,
    /// The slots that came to this burst since it last gave back; those that it passed on stay listed. Written under the pool's lock.
    given: Box<[AtomicU32]>,
    given_count: AtomicUsize,
    unsent: AtomicU32,
}

/// The bytes of each row: the column, or one number in its place.
struct Lengths<'a> {
    column: &'a [AtomicI64],
    all: Option<u32>,
}

impl Lengths<'_> {
    #[inline(always)]
    fn get(&self, row: usize) -> i64 {
        match self.all {
            Some(length) => length.into(),
            None => self.column[row].load(Relaxed),
        }
    }
}

/// One row to be written, and where its slot is listed.
struct Place<'a> {
    slot: &'a AtomicI64,
    offset: &'a AtomicI64,
    length: &'a AtomicI64,
    more: &'a AtomicI64,
    given: &'a AtomicU32,
}

impl Place<'_> {
    #[inline(always)]
    fn set(self, row: Row) {
        self.given.store(row.slot, Relaxed);
        self.slot.store(row.slot.into(), Relaxed);
        self.offset.store(row.offset.into(), Relaxed);
        self.length.store(row.length.into(), Relaxed);
        self.more.store(row.more.into(), Relaxed);
    }
}

impl Burst {
    /// An empty burst with room for `capacity` rows.
    ///
    /// # Errors
    /// `BadSize` unless the capacity is 1 to 32768.
    pub fn new(pool: Arc<BufferPool>, capacity: usize) -> Result<Self, MemoryError> {
        if !(1..=MAX_CAPACITY).contains(&capacity) {
            let (value, max) = (capacity as u64, MAX_CAPACITY as u64);
            return Err(MemoryError::BadSize { what: "burst capacity", value, min: 1, max, multiple_of: 1 });
        }
        let column = || (0..capacity).map(|_| AtomicI64::new(0)).collect();
        let owner = pool.lock().new_owner();
        Ok(Self {
            owner,
            pool,
            count: AtomicUsize::new(0),
            slots: column(),
            offsets: column(),
            lengths: column(),
            more: column(),
            given: (0..capacity).map(|_| AtomicU32::new(0)).collect(),
            given_count: AtomicUsize::new(0),
            unsent: AtomicU32::new(0),
        })
    }

    /// The burst's number in its pool.
    #[inline]
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// The pool whose slots the rows name.
    #[inline]
    pub fn pool(&self) -> &Arc<BufferPool> {
        &self.pool
    }

    /// How many rows there is room for.
    #[inline]
    pub fn capacity(&self) -> usize {
        self.slots.len()
    }

    /// How many rows are valid.
    #[inline]
    pub fn count(&self) -> usize {
        self.count.load(Relaxed)
    }

    /// Says how many rows are valid.
    ///
    /// # Errors
    /// `OutOfRange` beyond the capacity.
    #[inline]
    pub fn set_count(&self, count: usize) -> Result<(), MemoryError> {
        if count > self.capacity() {
            return Err(MemoryError::OutOfRange { offset: 0, len: count as u64, size: self.capacity() as u64 });
        }
        self.count.store(count, Relaxed);
        Ok(())
    }

    /// A column, `capacity` values of it.
    #[inline]
    pub fn column(&self, column: Column) -> &[AtomicI64] {
        match column {
            Column::Slots => &self.slots,
            Column::Offsets => &self.offsets,
            Column::Lengths => &self.lengths,
            Column::More => &self.more,
        }
    }

    /// A row as it stands, each column read once. The index is below the capacity.
    #[inline]
    pub fn row(&self, index: usize) -> RawRow {
        RawRow {
            slot: self.slots[index].load(Relaxed),
            offset: self.offsets[index].load(Relaxed),
            length: self.lengths[index].load(Relaxed),
            more: self.more[index].load(Relaxed),
        }
    }

    /// Says that every valid row has `length` bytes.
    #[inline]
    pub fn set_lengths(&self, length: u32) {
        self.lengths[..self.count()].iter().for_each(|row| row.store(length.into(), Relaxed));
    }

    /// Writes a row. The index is below the capacity.
    #[inline]
    pub fn set_row(&self, index: usize, row: Row) {
        self.slots[index].store(row.slot.into(), Relaxed);
        self.offsets[index].store(row.offset.into(), Relaxed);
        self.lengths[index].store(row.length.into(), Relaxed);
        self.more[index].store(row.more.into(), Relaxed);
    }

    /// Reads all valid rows once and checks them: each slot exists, is this burst's and stands in one row only; the bytes are inside the
    /// slot, at least one of them; `more` is 0 or 1, and 0 in the last row. The rows are left in `rows`, which grows if it has to (room for
    /// the largest burst once, no allocation later); how many.
    ///
    /// # Errors
    /// [`RowError`] for the first that is not legal.
    #[inline]
    pub fn validate(&self, state: &mut PoolState, rows: &mut Vec<Row>) -> Result<usize, RowError> {
        self.validate_as(state, rows, None)
    }

    /// As [`Burst::validate`]; `all` stands for every row's length, if it is given.
    ///
    /// # Errors
    /// As [`Burst::validate`].
    #[inline]
    pub fn validate_as(&self, state: &mut PoolState, rows: &mut Vec<Row>, all: Option<u32>) -> Result<usize, RowError> {
        let count = self.count();
        rows.resize(count, Row::default());
        state.begin();
        let slot_size = self.pool.slot_size() as i64;
        // Slices first: a relaxed load makes the compiler forget what it read through `self`.
        let (slots, offsets) = (&self.slots[..count], &self.offsets[..count]);
        let (lengths, more) = (Lengths { column: &self.lengths[..count], all }, &self.more[..count]);
        let mut before = 0;
        for (index, row) in rows.iter_mut().enumerate() {
            let (slot, offset) = (slots[index].load(Relaxed), offsets[index].load(Relaxed));
            let (length, more) = (lengths.get(index), more[index].load(Relaxed));
            let met = usize::try_from(slot).ok().and_then(|slot| state.meet(slot));
            let legal = met == Some((self.owner, false))
                && (0..slot_size).contains(&offset)
                && (1..=slot_size - offset).contains(&length)
                && (more == 0 || more == 1);
            if !legal {
                return Err(self.explain(index, RawRow { slot, offset, length, more }, met));
            }
            *row = Row { slot: slot as u32, offset: offset as u32, length: length as u32, more: more != 0 };
            before = more;
        }
        if before == 1 {
            let last = count - 1;
            return Err(RowError { row: last, column: Column::More, value: 1, limit: Limit::Unfinished });
        }
        Ok(count)
    }

    /// As [`Burst::validate`], where every row is a packet of its own: true if they all are, and legal. Otherwise nothing is known of them.
    /// `all` as in [`Burst::validate_as`].
    #[inline]
    pub fn check_short(&self, state: &mut PoolState, all: Option<u32>) -> bool {
        self.each_short(state, 0, all, |_| ())
    }

    /// As [`Burst::check_short`], where every row begins `headroom` bytes behind its slot's start or later; they are left in `rows`.
    #[inline]
    pub fn read_short(&self, state: &mut PoolState, rows: &mut Vec<Row>, headroom: usize) -> bool {
        rows.resize(self.count(), Row::default());
        let mut places = rows.iter_mut();
        self.each_short(state, headroom, None, |row| {
            if let Some(place) = places.next() {
                *place = row;
            }
        })
    }

    #[inline(always)]
    fn each_short(&self, state: &mut PoolState, headroom: usize, all: Option<u32>, mut read: impl FnMut(Row)) -> bool {
        let (count, slot_size, least, owner) = (self.count(), self.pool.slot_size() as u64, headroom as u64, self.owner);
        let (stamp, span) = (state.begin(), slot_size.saturating_sub(least));
        let (_, entries) = state.parts();
        // Slices first: a relaxed load makes the compiler forget what it read through `self`.
        let (slots, offsets) = (&self.slots[..count], &self.offsets[..count]);
        let (lengths, more) = (Lengths { column: &self.lengths[..count], all }, &self.more[..count]);
        for row in 0..count {
            let (slot, offset) = (slots[row].load(Relaxed) as u64, offsets[row].load(Relaxed) as u64);
            let (length, more) = (lengths.get(row) as u64, more[row].load(Relaxed));
            // Negative numbers are large ones.
            let Some(entry) = entries.get_mut(slot as usize) else { return false };
            let (before, room) = (offset.wrapping_sub(least), slot_size.wrapping_sub(offset));
            if entry.owner != owner || entry.stamp == stamp || before >= span || length.wrapping_sub(1) >= room || more != 0 {
                return false;
            }
            entry.stamp = stamp;
            read(Row { slot: slot as u32, offset: offset as u32, length: length as u32, more: false });
        }
        true
    }

    /// Which rule a row breaks that breaks one.
    #[cold]
    fn explain(&self, row: usize, raw: RawRow, met: Option<(Owner, bool)>) -> RowError {
        let slot_size = self.pool.slot_size() as i64;
        let error = |column, value, limit| RowError { row, column, value, limit };
        match met {
            None => return error(Column::Slots, raw.slot, Limit::Range { min: 0, max: i64::from(self.pool.slots()) - 1 }),
            Some((owner, _)) if owner != self.owner => return error(Column::Slots, raw.slot, Limit::NotOwned),
            Some((_, true)) => return error(Column::Slots, raw.slot, Limit::Twice),
            Some(_) => {}
        }
        if !(0..slot_size).contains(&raw.offset) {
            return error(Column::Offsets, raw.offset, Limit::Range { min: 0, max: slot_size - 1 });
        }
        if raw.length < 1 || raw.length > slot_size - raw.offset {
            return error(Column::Lengths, raw.length, Limit::Range { min: 1, max: slot_size - raw.offset });
        }
        error(Column::More, raw.more, Limit::Range { min: 0, max: 1 })
    }

    /// Lists a slot that came to this burst; there is room.
    #[inline]
    fn list(&self, slot: u32) {
        let listed = self.given_count.load(Relaxed);
        self.given[listed].store(slot, Relaxed);
        self.given_count.store(listed + 1, Relaxed);
    }

    /// Whether one more slot can be listed.
    #[inline]
    fn has_room(&self, state: &PoolState) -> bool {
        self.given_count.load(Relaxed) < self.given.len() || self.forget_passed_on(state)
    }

    /// Strikes the slots that were passed on from the list; whether that made room.
    #[cold]
    fn forget_passed_on(&self, state: &PoolState) -> bool {
        let mut kept = 0;
        for listed in 0..self.given_count.load(Relaxed) {
            let slot = self.given[listed].load(Relaxed);
            if state.owner(slot) == Some(self.owner) {
                self.given[kept].store(slot, Relaxed);
                kept += 1;
            }
        }
        self.given_count.store(kept, Relaxed);
        kept < self.given.len()
    }

    /// Takes one free slot from the pool, if there is one and the burst holds fewer than its capacity. `state` is this burst's pool's.
    #[inline]
    pub fn take(&self, state: &mut PoolState) -> Option<u32> {
        if !self.has_room(state) {
            return None;
        }
        let slot = state.take(self.owner)?;
        self.list(slot);
        Some(slot)
    }

    /// Takes over a slot that `from` owns. `state` is this burst's pool's.
    ///
    /// # Errors
    /// `BadSlot`, `NotOwned`; `OutOfRange` if the burst holds as many slots as it has rows.
    #[inline]
    pub fn adopt(&self, state: &mut PoolState, slot: u32, from: Owner) -> Result<(), MemoryError> {
        if !self.has_room(state) {
            let capacity = self.capacity() as u64;
            return Err(MemoryError::OutOfRange { offset: capacity, len: 1, size: capacity });
        }
        state.transfer(slot, from, self.owner)?;
        self.list(slot);
        Ok(())
    }

    /// Takes over slots that `from` owns, as the rows of this burst, which holds none: it gave back what it had. `state` is this burst's
    /// pool's. Stops at the capacity; how many rows.
    ///
    /// # Errors
    /// `BadSlot`, `NotOwned`; the rows before are the burst's then.
    #[inline]
    pub fn adopt_rows(&self, state: &mut PoolState, from: Owner, rows: impl Iterator<Item = Row>) -> Result<usize, MemoryError> {
        let (mut places, owner) = (self.places(self.capacity()), self.owner);
        let (_, entries) = state.parts();
        let (mut count, mut refused) = (0, None);
        for (place, row) in places.by_ref().zip(rows) {
            match entries.get_mut(row.slot as usize) {
                Some(entry) if entry.owner == from && from != 0 => entry.owner = owner,
                _ => {
                    refused = Some(row.slot);
                    break;
                }
            }
            place.set(row);
            count += 1;
        }
        self.given_count.store(count, Relaxed);
        self.count.store(count, Relaxed);
        match refused {
            Some(slot) => state.transfer(slot, from, owner).map(|()| count),
            None => Ok(count),
        }
    }

    /// Takes up to `count` free slots, lent by `lender`, as the rows of this burst, which holds none: it gave back what it had. `each` (row,
    /// slot) puts the bytes into a slot and tells the row; the first error ends it. How many rows. `state` is this burst's pool's.
    #[inline]
    pub fn take_lent(
        &self,
        state: &mut PoolState,
        lender: Lender,
        count: usize,
        mut each: impl FnMut(usize, u32) -> Result<Row, MemoryError>,
    ) -> (usize, Result<(), MemoryError>) {
        let (mut taken, mut result) = (0, Ok(()));
        for (index, place) in self.places(count.min(self.capacity())).enumerate() {
            let Some(slot) = state.next_free() else { break };
            match each(index, slot) {
                Ok(row) => place.set(Row { slot, ..row }),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
            state.take_lent(self.owner, lender);
            taken += 1;
        }
        self.given_count.store(taken, Relaxed);
        self.count.store(taken, Relaxed);
        (taken, result)
    }

    /// The first `count` rows to be written, at most the capacity.
    #[inline(always)]
    fn places(&self, count: usize) -> impl Iterator<Item = Place<'_>> {
        let (slots, offsets) = (&self.slots[..count], &self.offsets[..count]);
        let (lengths, more, given) = (&self.lengths[..count], &self.more[..count], &self.given[..count]);
        (0..count).map(move |row| Place {
            slot: &slots[row],
            offset: &offsets[row],
            length: &lengths[row],
            more: &more[row],
            given: &given[row],
        })
    }

    /// Reads rows of one row a packet once, checks each as [`Burst::validate`] does, passes its slot on, and tells it to `each`. Stops at
    /// the first that is not such a row. How many rows were passed on, and how many are valid; the caller takes back those that go no further.
    /// `all` as in [`Burst::validate_as`].
    #[inline]
    pub fn pass_short(&self, state: &mut PoolState, to: Owner, all: Option<u32>, mut each: impl FnMut(Row)) -> (usize, usize) {
        let (count, slot_size, owner) = (self.count(), self.pool.slot_size() as u64, self.owner);
        let (_, entries) = state.parts();
        // Slices first: a relaxed load makes the compiler forget what it read through `self`.
        let (slots, offsets) = (&self.slots[..count], &self.offsets[..count]);
        let (lengths, more) = (Lengths { column: &self.lengths[..count], all }, &self.more[..count]);
        for row in 0..count {
            let (slot, offset) = (slots[row].load(Relaxed) as u64, offsets[row].load(Relaxed) as u64);
            let (length, more) = (lengths.get(row) as u64, more[row].load(Relaxed));
            // Negative numbers are large ones. A slot that stands in two rows has its new owner at the second.
            let Some(entry) = entries.get_mut(slot as usize) else { return (row, count) };
            let room = slot_size.wrapping_sub(offset);
            if entry.owner != owner || offset >= slot_size || length.wrapping_sub(1) >= room || more != 0 {
                return (row, count);
            }
            entry.owner = to;
            each(Row { slot: slot as u32, offset: offset as u32, length: length as u32, more: false });
        }
        (count, count)
    }

    /// All slots of the burst were passed on, `count` of them, if that is as many as it held: there is nothing to give back.
    #[inline]
    pub fn forget(&self, count: usize) {
        if count == self.given_count.load(Relaxed) {
            self.given_count.store(0, Relaxed);
        }
    }

    /// Says how many packets a call left in the burst because they did not fit; if they are still there when the burst gives its slots
    /// back, they count as dropped.
    #[inline]
    pub fn set_unsent(&self, packets: u32) {
        self.unsent.store(packets, Relaxed);
    }

    /// Gives back every slot that the burst still owns, counts unsent packets as drops, and leaves no row; how many slots. `state` is this
    /// burst's pool's.
    #[inline]
    pub fn give_back(&self, state: &mut PoolState) -> usize {
        let released = state.release_listed(&self.given[..self.given_count.load(Relaxed)], self.owner);
        self.given_count.store(0, Relaxed);
        self.count.store(0, Relaxed);
        state.add_drops(self.unsent.swap(0, Relaxed).into());
        released
    }

    /// Gives back, then takes as many free slots as there are and the burst has rows for: the bytes after the headroom in one row each;
    /// how many. `state` is this burst's pool's.
    pub fn fill(&self, state: &mut PoolState) -> usize {
        self.give_back(state);
        let (offset, length) = (HEADROOM as u32, (self.pool.slot_size() - HEADROOM) as u32);
        let (free, entries) = state.parts();
        let count = self.capacity().min(free.len());
        let left = free.len() - count;
        for (place, slot) in self.places(count).zip(free[left..].iter().rev()) {
            if let Some(entry) = entries.get_mut(*slot as usize) {
                entry.owner = self.owner;
            }
            place.set(Row { slot: *slot, offset, length, more: false });
        }
        free.truncate(left);
        self.given_count.store(count, Relaxed);
        self.count.store(count, Relaxed);
        count
    }
}

impl Drop for Burst {
    fn drop(&mut self) {
        // In a forked child the lock may be held by a thread that does not exist there, and the slots are the parent's.
        if self.pool.check_process().is_ok() {
            let pool = self.pool.clone();
            let mut state = pool.lock();
            self.give_back(&mut state);
            state.retire_owner(self.owner);
        }
    }
}
