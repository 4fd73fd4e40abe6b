//! The device's side of the split ring.

use super::{FLAGS, IDX, SplitRing};
use crate::batch::ChainBatch;
use crate::chain::{Chain, Direction, Segment, Walk};
use crate::error::RingError;
use crate::event::{self, Cursor};
use crate::indirect::{TableCopy, direction};
use crate::inflight::{Flight, InFlight, Names, Run, count_from};
use crate::options::{Areas, RingFeatures};
use crate::ring::{Completion, Completions, DeviceRing, Fill, Filled, RingState, Snapshot};
use crate::spec::{AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, USED_F_NO_NOTIFY};
use crate::tracking::{Footprint, Resubmission};
use virtio_memory::{FencePoint, RegionTable, full_fence};
#[cfg(not(loom))]
use virtio_memory::{U16RingCells, U32RingCells, U64RingCells};
#[cfg(loom)]
type U16RingCells<'a> = &'a virtio_memory::U16Ring;
#[cfg(loom)]
type U32RingCells<'a> = &'a virtio_memory::U32Ring;
#[cfg(loom)]
type U64RingCells<'a> = &'a virtio_memory::U64Ring;

/// Takes from the available ring, adds to the used ring.
#[derive(Debug)]
pub struct SplitDevice {
    pub(super) ring: SplitRing,
    pub(super) features: RingFeatures,
    /// Where the device area lies: what is written there is marked in the dirty log.
    used_address: u64,
    limit: u16,
    table: TableCopy,
    pub(super) flights: InFlight,
    /// The next available position to look at, and the index that was read last.
    pub(super) next: u16,
    seen: u16,
    /// The next used position to write; up to `published` the driver has been told.
    pub(super) used: u16,
    published: u16,
    since: u32,
    /// Nothing was decided yet since set-up or restore: the first decision notifies.
    first_decision: bool,
    pub(super) run: Option<Run<u16>>,
    /// What the last chain of an unusual kind began with: the usual ones after it are probably alike.
    direction: Direction,
}

impl SplitDevice {
    /// A device on a ring. `base` is the avail position to resume from; without it both sides start at 0.
    pub fn new(ring: SplitRing, features: RingFeatures, areas: Areas, limit: u16, base: Option<u16>) -> Result<Self, RingError> {
        let size = ring.size;
        let avail = base.unwrap_or(0);
        let mut used = 0;
        if base.is_some() {
            // The base carries no used index: read it once, and check it (device-17).
            used = ring.used_index();
            let behind = avail.wrapping_sub(used);
            if behind > size {
                return Err(RingError::RestoredUsedIndex { used, base: avail, behind, size });
            }
        }
        Ok(SplitDevice {
            ring,
            features,
            used_address: areas.device,
            limit,
            table: TableCopy::new(limit),
            flights: InFlight::new(size, Names::Heads, usize::from(avail & (size - 1))),
            next: avail,
            seen: avail,
            used,
            published: used,
            since: 0,
            first_decision: true,
            run: None,
            direction: Direction::Readable,
        })
    }

    /// The index is at most the ring's size ahead (device-05).
    #[inline(always)]
    pub(super) fn ready(&mut self, wanted: usize) -> Result<u16, RingError> {
        let ready = self.seen.wrapping_sub(self.next);
        if usize::from(ready) >= wanted {
            return Ok(ready);
        }
        let index = self.ring.avail.load_acquire(IDX);
        let ahead = index.wrapping_sub(self.next);
        if ahead > self.ring.size {
            return Err(RingError::AvailIndex { index, last: self.next, ahead, size: self.ring.size });
        }
        self.seen = index;
        Ok(ahead)
    }

    /// Chains of one descriptor of one direction, until `limit` are in, the batch is full, or another kind of chain comes; tells how many.
    #[inline(always)]
    fn pop_short<const WRITABLE: bool>(&mut self, out: &mut ChainBatch, limit: usize) -> (usize, Stop) {
        let InFlight { entries, heads, newest, serial, last, chains, slots, .. } = &mut self.flights;
        let size = heads.len();
        let free = size - *slots as usize;
        let (room, segments) = out.short_room(self.limit, limit.min(free));
        let (first, before) = (usize::from(self.next) & (size - 1), count_from(*serial));
        let mut short = Short { avail: self.ring.heads.cells(), desc: self.ring.desc.cells(), entries, serial: before };
        // Up to the end of the ring, and on from its start.
        let cut = room.len().min(size - first);
        let ((near, far), (near_segments, far_segments)) = (room.split_at_mut(cut), segments.split_at_mut(cut));
        let (mut popped, mut stop) = short.pop::<WRITABLE>(first, near, near_segments, &mut heads[first..]);
        if popped == cut && !far.is_empty() {
            let (more, end) = short.pop::<WRITABLE>(0, far, far_segments, heads);
            (popped, stop) = (popped + more, end);
        }
        if popped > 0 {
            // Only the first one may follow chains that were handed back.
            entries[usize::from(heads[first])].set_gap(before.wrapping_sub(*last));
            *serial = before + popped as u32;
            *last = *serial;
            self.next = self.next.wrapping_add(popped as u16);
            *newest = usize::from(self.next) & (size - 1);
            *chains += popped as u16;
            *slots += popped as u32;
            out.grow(popped);
        }
        if popped == free && popped < limit {
            stop = Stop::NoSlots;
        }
        (popped, stop)
    }

    fn check_room(&self, slots: u16) -> Result<(), RingError> {
        let slots = self.flights.slots + u32::from(slots);
        if slots > u32::from(self.ring.size) {
            return Err(RingError::TooManyInFlight { slots, size: self.ring.size });
        }
        Ok(())
    }

    /// Any chain, from its first descriptor on. Each descriptor is read once.
    #[inline(never)]
    fn walk(&mut self, memory: &RegionTable, head: u16, first_words: [u64; 2], out: &mut ChainBatch) -> Result<(), RingError> {
        let [mut address, mut rest] = first_words;
        self.direction = direction((rest >> 32) as u16);
        let (tail, first) = out.tail();
        let mut walk = Walk::new(tail, self.limit);
        let mut slots = 1u16;
        loop {
            let (len, flags, next) = (rest as u32, (rest >> 32) as u16, (rest >> 48) as u16);
            if flags & DESC_F_INDIRECT != 0 {
                if !self.features.indirect {
                    return Err(RingError::IndirectNotNegotiated);
                }
                if flags & DESC_F_NEXT != 0 {
                    return Err(RingError::IndirectWithNext);
                }
                self.table.walk_split(memory, address, len, &mut walk)?;
                break;
            }
            walk.descriptor(address, len, direction(flags))?;
            if flags & DESC_F_NEXT == 0 {
                break;
            }
            if next >= self.ring.size {
                return Err(RingError::NextOutOfRange { next, limit: self.ring.size.into() });
            }
            slots += 1;
            if slots > self.ring.size {
                return Err(RingError::ChainTooLong { limit: self.ring.size });
            }
            [address, rest] = self.ring.desc.cells().load_pair(next.into());
        }
        self.check_room(slots)?;
        let mut chain = walk.finish(head, 0, first);
        chain.serial = self.flights.start(head, 0, slots, chain.writable);
        out.push(chain);
        Ok(())
    }

    /// One element for each.
    #[inline(never)]
    fn complete_free_order<C: Completions>(&mut self, completions: C) -> Result<(), RingError> {
        // Counted on past 16 bits: the ring's cells mask what they are given.
        let (elements, mut used) = (self.ring.elements.cells(), usize::from(self.used));
        // What is written here is only shown by the index.
        self.flights.finish_batch(completions, |head, _, len| {
            element(&elements, used, head, len);
            used += 1;
        })?;
        self.used = used as u16;
        Ok(())
    }

    /// In order: writes the element of the run that is open.
    #[inline(always)]
    pub(super) fn close_run(&mut self) {
        if let Some(run) = self.run.take() {
            element(&self.ring.elements.cells(), run.place.into(), run.id, run.len);
        }
    }

    /// In order: what is done, from the oldest on, goes into runs.
    #[inline(never)]
    fn complete_in_order<C: Completions>(&mut self, completions: C) -> Result<(), RingError> {
        let (elements, mut run, mut used) = (self.ring.elements.cells(), self.run, self.used);
        if let Some((head, flight, len, _, chains)) = self.flights.finish_run::<true, _>(completions) {
            match &mut run {
                Some(open) if open.full => open.extend(head, &flight, len),
                _ => {
                    if let Some(closed) = run {
                        element(&elements, closed.place.into(), closed.id, closed.len);
                    }
                    run = Some(Run::new(used, head, &flight, len));
                }
            }
            (self.run, self.used) = (run, used.wrapping_add(chains as u16));
            return Ok(());
        }
        self.flights.finish_in_order(completions, |head, flight, len| {
            match &mut run {
                Some(open) if open.full => open.extend(head, flight, len),
                _ => {
                    if let Some(closed) = run {
                        element(&elements, closed.place.into(), closed.id, closed.len);
                    }
                    run = Some(Run::new(used, head, flight, len));
                }
            }
            used = used.wrapping_add(1);
        })?;
        (self.run, self.used) = (run, used);
        Ok(())
    }

    #[cold]
    fn mark_used(&self, memory: &RegionTable, count: u16) {
        let first = self.published.wrapping_sub(count) & self.ring.mask();
        let before_wrap = count.min(self.ring.size - first);
        memory.mark(self.used_address, 4);
        memory.mark(self.used_address + 4 + 8 * u64::from(first), 8 * u64::from(before_wrap));
        memory.mark(self.used_address + 4, 8 * u64::from(count - before_wrap));
    }

    fn set_event(&self, memory: &RegionTable, position: u16) {
        self.ring.avail_event.store(0, position);
        memory.mark(self.used_address + 4 + 8 * u64::from(self.ring.size), 2);
    }

    fn set_flags(&self, memory: &RegionTable, flags: u16) {
        self.ring.used.store(FLAGS, flags);
        memory.mark(self.used_address, 2);
    }
}

/// Why a run of short chains ended.
enum Stop {
    Full,
    NoSlots,
    HeadOutOfRange(u16),
    HeadInFlight(u16),
    Other { head: u16, address: u64, rest: u64 },
}

/// What the loop over the usual chains needs, and no more: it has few registers.
struct Short<'a> {
    avail: U16RingCells<'a>,
    desc: U64RingCells<'a>,
    entries: &'a mut [Flight],
    /// The serial that was given out last.
    serial: u32,
}

impl Short<'_> {
    /// Chains from `place` on, not across the ring's end, until there is no room; `heads` is the shadow from `place` on.
    #[inline(never)]
    fn pop<const WRITABLE: bool>(
        &mut self,
        place: usize,
        chains: &mut [Chain],
        segments: &mut [Segment],
        heads: &mut [u16],
    ) -> (usize, Stop) {
        let (kind, direction) = if WRITABLE { (DESC_F_WRITE, Direction::Writable) } else { (0, Direction::Readable) };
        let (desc, entries, serial) = (self.desc, &mut self.entries[..], self.serial + 1);
        let places = heads.iter_mut().zip(self.avail.loads(place));
        let mut popped = 0;
        for ((chain, segment), (name, head)) in chains.iter_mut().zip(segments).zip(places) {
            let Some(flight) = entries.get_mut(usize::from(head)) else { return (popped as usize, Stop::HeadOutOfRange(head)) };
            if flight.serial() != 0 {
                return (popped as usize, Stop::HeadInFlight(head));
            }
            let [address, rest] = desc.load_pair(head.into());
            let (len, flags) = (rest as u32, (rest >> 32) as u16);
            if flags & (DESC_F_NEXT | DESC_F_INDIRECT | DESC_F_WRITE) != kind || len == 0 {
                return (popped as usize, Stop::Other { head, address, rest });
            }
            let (readable, writable) = if WRITABLE { (0, len) } else { (len, 0) };
            flight.set_short(serial + popped, 0, writable);
            *name = head;
            (chain.head, chain.serial, chain.readable, chain.writable) = (head, serial + popped, readable, writable);
            segment.set(address, len, direction);
            popped += 1;
        }
        self.serial += popped;
        (popped as usize, Stop::Full)
    }
}

#[inline(always)]
pub(super) fn element(elements: &U32RingCells, position: usize, id: u16, len: u32) {
    elements.store_pair(position, [id.into(), len]);
}

impl DeviceRing for SplitDevice {
    fn size(&self) -> u16 {
        self.ring.size
    }

    fn outstanding(&self) -> u16 {
        self.flights.chains
    }

    fn chain_limit(&self) -> u16 {
        self.limit
    }

    // Always, since it has two callers: with in-flight tracking and without, which must not pay for that.
    #[inline(always)]
    fn pop_batch(&mut self, memory: &RegionTable, out: &mut ChainBatch) -> Result<usize, RingError> {
        let n = usize::from(self.ready(out.room())?).min(out.room());
        let mut popped = 0;
        loop {
            let (more, stop) = match self.direction {
                Direction::Readable => self.pop_short::<false>(out, n - popped),
                Direction::Writable => self.pop_short::<true>(out, n - popped),
            };
            popped += more;
            let size = self.ring.size;
            let result = match stop {
                Stop::Full => return Ok(popped),
                Stop::NoSlots => Err(RingError::TooManyInFlight { slots: u32::from(size) + 1, size }),
                Stop::HeadOutOfRange(head) => Err(RingError::HeadOutOfRange { head, size }),
                Stop::HeadInFlight(head) => Err(RingError::HeadInFlight { head }),
                Stop::Other { head, address, rest } => self.walk(memory, head, [address, rest], out),
            };
            match result {
                Ok(()) => {
                    self.next = self.next.wrapping_add(1);
                    popped += 1;
                }
                Err(_) if popped > 0 => return Ok(popped),
                Err(error) => return Err(error),
            }
        }
    }

    #[inline]
    fn fill_batch<F: Fill>(&mut self, memory: &RegionTable, most: usize, filler: &mut F) -> (usize, Filled) {
        self.fill(memory, most, filler)
    }

    fn check(&self, completion: &Completion) -> Result<(), RingError> {
        self.flights.check(completion)
    }

    #[inline]
    fn complete_batch<C: Completions>(&mut self, completions: C) -> Result<(), RingError> {
        if self.features.in_order {
            return self.complete_in_order(completions);
        }
        self.complete_free_order(completions)
    }

    fn rewind(&mut self, count: usize) -> Result<(), RingError> {
        self.flights.check_rewind(count)?;
        for _ in 0..count {
            if self.flights.rewind_one().is_some() {
                self.next = self.next.wrapping_sub(1);
            }
        }
        Ok(())
    }

    #[inline]
    fn publish(&mut self, memory: &RegionTable) -> u32 {
        self.close_run();
        let count = self.used.wrapping_sub(self.published);
        if count != 0 {
            self.ring.used.store_release(IDX, self.used);
            self.published = self.used;
            self.flights.published();
            self.since = self.since.saturating_add(count.into());
            if memory.dirty().is_some() {
                self.mark_used(memory, count);
            }
        }
        count.into()
    }

    #[inline]
    fn should_notify(&mut self) -> Option<bool> {
        let since = std::mem::take(&mut self.since);
        if since == 0 {
            return None;
        }
        full_fence(FencePoint::DeviceDecide);
        if std::mem::take(&mut self.first_decision) {
            return Some(true);
        }
        if self.features.event_idx {
            Some(event::split_event(self.ring.avail.load(self.ring.used_event()), self.published, since))
        } else {
            Some(self.ring.avail.load(FLAGS) & AVAIL_F_NO_INTERRUPT == 0)
        }
    }

    fn arm(&mut self, memory: &RegionTable) -> bool {
        if !self.features.event_idx {
            self.set_flags(memory, 0);
            full_fence(FencePoint::DeviceArm);
            return self.ring.avail.load_acquire(IDX) != self.next;
        }
        // The event stands behind all that is there, so that it comes for the next one even if some are left. A driver moves the index on
        // at most `size` times while nothing is taken.
        let mut end = self.ring.avail.load_acquire(IDX);
        for _ in 0..=self.ring.size {
            self.set_event(memory, end);
            full_fence(FencePoint::DeviceArm);
            let now = self.ring.avail.load_acquire(IDX);
            if now == end {
                break;
            }
            end = now;
        }
        end != self.next
    }

    fn disarm(&mut self, memory: &RegionTable) {
        if self.features.event_idx {
            // flags stay 0 here (2.7.10.2): the event index is parked where the next 65535 entries do not pass it.
            self.set_event(memory, self.next.wrapping_sub(1));
        } else {
            self.set_flags(memory, USED_F_NO_NOTIFY);
        }
    }

    fn observe(&mut self) {
        self.flights.observe();
    }

    fn told(&self) -> &[u16] {
        self.flights.told()
    }

    fn clear_told(&mut self) {
        self.flights.clear_told();
    }

    fn footprint(&self, head: u16) -> Footprint {
        self.flights.footprint(head)
    }

    fn newest(&self, count: usize, out: &mut Vec<(u16, u32)>) -> Result<(), RingError> {
        self.flights.walk_newest(count, |name, serial| out.push((name, serial)))
    }

    fn resubmit(&mut self, memory: &RegionTable, again: &Resubmission, out: &mut ChainBatch) -> Result<(), RingError> {
        let &Resubmission::Split { head } = again else { return Ok(()) };
        match self.flights.entries.get(usize::from(head)) {
            None => Err(RingError::HeadOutOfRange { head, size: self.ring.size }),
            Some(flight) if flight.serial() != 0 => Err(RingError::HeadInFlight { head }),
            Some(_) => self.walk(memory, head, self.ring.desc.cells().load_pair(head.into()), out),
        }
    }

    fn skip(&mut self, chains: u16, _: u16) {
        let known = self.seen.wrapping_sub(self.next);
        self.next = self.next.wrapping_add(chains);
        if known < chains {
            self.seen = self.next;
        }
    }

    fn state(&self) -> RingState {
        let cursor = |index| Cursor { offset: index, wrap: false };
        RingState { avail: cursor(self.next), used: cursor(self.published) }
    }

    fn snapshot(&self) -> Snapshot {
        let private = vec![
            ("next_avail", self.next.into()),
            ("next_used", self.used.into()),
            ("published", self.published.into()),
            ("in_flight", self.flights.chains.into()),
            ("slots_in_flight", self.flights.slots.into()),
        ];
        Snapshot { private, shared: self.ring.shared() }
    }
}
