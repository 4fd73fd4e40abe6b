//! The device's side of the packed ring.

use super::{BOTH, PackedRing, avail_flags, is_avail, rest, used_flags};
use crate::batch::ChainBatch;
use crate::chain::{Chain, Direction, Walk};
use crate::error::RingError;
use crate::event::{Cursor, packed_event, packed_word};
use crate::indirect::{TableCopy, direction};
use crate::inflight::{InFlight, Names, Run, after, count_from};
use crate::options::{Areas, RingFeatures};
use crate::ring::{Completion, Completions, DeviceRing, Fill, Filled, RingState, Snapshot};
use crate::spec::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_FLAGS_DESC, EVENT_FLAGS_DISABLE, EVENT_FLAGS_ENABLE};
use crate::tracking::{Footprint, Resubmission};
#[cfg(not(loom))]
use virtio_memory::U64Cells;
use virtio_memory::{FencePoint, RegionTable, full_fence};
#[cfg(loom)]
type U64Cells<'a> = virtio_memory::U64Array;

/// Takes available descriptors, writes used ones over them.
#[derive(Debug)]
pub struct PackedDevice {
    pub(super) ring: PackedRing,
    pub(super) features: RingFeatures,
    /// Where the areas lie: what is written there is marked in the dirty log.
    areas: Areas,
    limit: u16,
    table: TableCopy,
    pub(super) flights: InFlight,
    /// The next descriptor to look at.
    pub(super) next: Cursor,
    /// Where the next used descriptor goes; up to `published` the driver has been told.
    used: Cursor,
    published: Cursor,
    /// The first used descriptor since the last publish: its word is written last.
    head: Option<(u16, u64)>,
    /// Slots and chains completed since the last publish, slots published since the last decision.
    unpublished: u32,
    unpublished_chains: u32,
    since: u32,
    /// Nothing was decided yet since set-up or restore: the first decision notifies.
    first_decision: bool,
    pub(super) run: Option<Run<Cursor>>,
    /// What the last chain of an unusual kind began with: the usual ones after it are probably alike.
    direction: Direction,
}

impl PackedDevice {
    /// A device on a ring, from saved positions or from the start.
    pub fn new(ring: PackedRing, features: RingFeatures, areas: Areas, limit: u16, base: Option<RingState>) -> Result<Self, RingError> {
        let size = ring.size;
        let state = base.unwrap_or(RingState { avail: Cursor::START, used: Cursor::START });
        for cursor in [state.avail, state.used] {
            if cursor.offset >= size {
                return Err(RingError::BadRestore { position: cursor.offset, size });
            }
        }
        Ok(PackedDevice {
            ring,
            features,
            areas,
            limit,
            table: TableCopy::new(limit),
            flights: InFlight::new(size, Names::Places, 0),
            next: state.avail,
            used: state.used,
            published: state.used,
            head: None,
            unpublished: 0,
            unpublished_chains: 0,
            since: 0,
            first_decision: true,
            run: None,
            direction: Direction::Readable,
        })
    }

    /// Chains of one descriptor of one direction, until the batch is full, none is left, or another kind of chain comes; tells how many.
    #[inline(always)]
    fn pop_short<const WRITABLE: bool>(&mut self, out: &mut ChainBatch) -> (usize, Stop) {
        let (kind, direction) = if WRITABLE { (DESC_F_WRITE, Direction::Writable) } else { (0, Direction::Readable) };
        const KINDS: u64 = ((DESC_F_NEXT | DESC_F_INDIRECT | DESC_F_WRITE) as u64) << 48;
        let size = self.ring.size;
        let InFlight { entries, newest, serial, last, chains, slots, .. } = &mut self.flights;
        let free = usize::from(size) - *slots as usize;
        let (chains_room, segments_room) = out.short_room(self.limit, usize::MAX);
        let (mut place, before) = (*newest, count_from(*serial));
        let (mut oldest, mut popped, mut stop) = (0, 0, Stop::Full);
        let Cursor { mut offset, mut wrap } = self.next;
        let mut expected = u64::from(avail_flags(wrap) | kind) << 48;
        let (entries, desc) = (&mut entries[..], self.ring.desc.cells());
        for (chain, segment) in chains_room.iter_mut().zip(segments_room) {
            let word = desc.load_acquire(2 * usize::from(offset) + 1);
            let len = word as u32;
            if word & (BOTH | KINDS) != expected || len == 0 || popped == free {
                if word & BOTH == expected & BOTH {
                    stop = Stop::Other(word);
                }
                break;
            }
            let address = desc.load(2 * usize::from(offset));
            let Some(mut flight) = entries.get_mut(place) else { break };
            if flight.serial() != 0 {
                place = InFlight::free_place(entries, place);
                flight = &mut entries[place];
            }
            if popped == 0 {
                oldest = place;
            }
            let (readable, writable) = if WRITABLE { (0, len) } else { (len, 0) };
            let (head, serial) = (place as u16, before + 1 + popped as u32);
            flight.set_short(serial, (word >> 32) as u16, writable);
            place = after(place, usize::from(size));
            (chain.head, chain.serial, chain.readable, chain.writable) = (head, serial, readable, writable);
            segment.set(address, len, direction);
            popped += 1;
            offset += 1;
            if offset == size {
                (offset, wrap) = (0, !wrap);
                expected ^= BOTH;
            }
        }
        if popped > 0 {
            // Only the first one may follow chains that were handed back.
            entries[oldest].set_gap(before.wrapping_sub(*last));
            *serial = before + popped as u32;
            *last = *serial;
            *newest = place;
            *chains += popped as u16;
            *slots += popped as u32;
            self.next = Cursor { offset, wrap };
            out.grow(popped);
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

    /// A list of descriptors, or a table, from its first word on. The first one's flags make the others visible; each is read once.
    #[inline(never)]
    fn pop_other(&mut self, memory: &RegionTable, first_word: u64, out: &mut ChainBatch) -> Result<(), RingError> {
        self.direction = direction((first_word >> 48) as u16);
        let (tail, first) = out.tail();
        let mut walk = Walk::new(tail, self.limit);
        let (ring, mut at, mut known) = (&self.ring, self.next, Some(first_word));
        let listed = walk_list(&mut self.table, self.features, ring.size, memory, &mut walk, || {
            let word = known.take().unwrap_or_else(|| ring.word(at.offset));
            let address = ring.address(at.offset);
            at = at.step(1, ring.size);
            Some([address, word])
        })?;
        let end = at;
        let chain = walk.finish(0, 0, first);
        self.start(chain, listed, out)?;
        self.next = end;
        Ok(())
    }

    /// A chain that was walked is in flight.
    fn start(&mut self, mut chain: Chain, Listed { slots, last_word }: Listed, out: &mut ChainBatch) -> Result<(), RingError> {
        self.check_room(slots)?;
        chain.head = self.flights.next_place();
        // The buffer id stands in the last descriptor of the list (2.8.6).
        chain.serial = self.flights.start(chain.head, (last_word >> 32) as u16, slots, chain.writable);
        out.push(chain);
        Ok(())
    }

    /// What was completed since the last publish, taken apart for a loop that keeps it in locals.
    #[inline(always)]
    pub(super) fn tail(&self) -> Tail {
        Tail { size: self.ring.size, used: self.used, head: self.head, slots: self.unpublished, chains: self.unpublished_chains }
    }

    #[inline(always)]
    pub(super) fn set_tail(&mut self, tail: Tail) {
        (self.used, self.head, self.unpublished, self.unpublished_chains) = (tail.used, tail.head, tail.slots, tail.chains);
    }

    /// In order: writes the element of the run that is open.
    #[inline(always)]
    pub(super) fn close_run(&mut self) {
        if let Some(run) = self.run.take() {
            let mut tail = self.tail();
            tail.element(&self.ring.desc.cells(), run.place, run.id, run.len);
            self.set_tail(tail);
        }
    }

    /// In order: what is done, from the oldest on, goes into runs.
    #[inline(always)]
    fn complete_in_order<C: Completions>(&mut self, completions: C) -> Result<(), RingError> {
        let (desc, mut run, mut tail) = (self.ring.desc.cells(), self.run, self.tail());
        if let Some((_, flight, len, slots, chains)) = self.flights.finish_run::<false, _>(completions) {
            match &mut run {
                Some(open) if open.full => open.extend(flight.id(), &flight, len),
                _ => {
                    if let Some(closed) = run {
                        tail.element(&desc, closed.place, closed.id, closed.len);
                    }
                    run = Some(Run::new(tail.used, flight.id(), &flight, len));
                }
            }
            self.run = run;
            tail.used = tail.used.step(slots as u16, tail.size);
            tail.slots += slots;
            tail.chains += chains;
            self.set_tail(tail);
            return Ok(());
        }
        self.flights.finish_in_order(completions, |_, flight, len| {
            match &mut run {
                Some(open) if open.full => open.extend(flight.id(), flight, len),
                _ => {
                    if let Some(closed) = run {
                        tail.element(&desc, closed.place, closed.id, closed.len);
                    }
                    run = Some(Run::new(tail.used, flight.id(), flight, len));
                }
            }
            tail.advance(flight.slots());
        })?;
        self.run = run;
        self.set_tail(tail);
        Ok(())
    }

    #[cold]
    fn mark_used(&self, memory: &RegionTable, from: Cursor, slots: u32) {
        let before_wrap = slots.min(u32::from(self.ring.size - from.offset));
        memory.mark(self.areas.descriptor + 16 * u64::from(from.offset), 16 * u64::from(before_wrap));
        memory.mark(self.areas.descriptor, 16 * u64::from(slots - before_wrap));
    }

    fn set_event(&self, memory: &RegionTable, flags: u32, at: Cursor) {
        self.ring.device_event.store_release(0, packed_word(flags, at));
        memory.mark(self.areas.device, 4);
    }
}

/// Why a run of short chains ended.
enum Stop {
    Full,
    Other(u64),
}

/// A list of descriptors that was walked.
struct Listed {
    slots: u16,
    last_word: u64,
}

/// A list of descriptors, or a table, taken one by one from `next`.
#[inline(always)]
fn walk_list(
    table: &mut TableCopy,
    features: RingFeatures,
    size: u16,
    memory: &RegionTable,
    walk: &mut Walk,
    mut next: impl FnMut() -> Option<[u64; 2]>,
) -> Result<Listed, RingError> {
    let mut slots = 0;
    while slots < size
        && let Some([address, word]) = next()
    {
        slots += 1;
        let (len, flags) = (word as u32, (word >> 48) as u16);
        if flags & DESC_F_INDIRECT != 0 {
            if !features.indirect {
                return Err(RingError::IndirectNotNegotiated);
            }
            if slots > 1 || flags & DESC_F_NEXT != 0 {
                return Err(RingError::IndirectInList);
            }
            table.walk_packed(memory, address, len, walk)?;
            return Ok(Listed { slots, last_word: word });
        }
        walk.descriptor(address, len, direction(flags))?;
        if flags & DESC_F_NEXT == 0 {
            return Ok(Listed { slots, last_word: word });
        }
    }
    Err(RingError::ChainTooLong { limit: slots })
}

/// Used descriptors since the last publish.
pub(super) struct Tail {
    size: u16,
    pub(super) used: Cursor,
    head: Option<(u16, u64)>,
    slots: u32,
    chains: u32,
}

impl Tail {
    /// One used descriptor. The first since the last publish is kept back.
    #[inline(always)]
    pub(super) fn element(&mut self, desc: &U64Cells, at: Cursor, id: u16, len: u32) {
        let write = if len > 0 { DESC_F_WRITE } else { 0 };
        let word = rest(len, id, used_flags(at.wrap) | write);
        if self.head.is_some() {
            desc.store(2 * usize::from(at.offset) + 1, word);
        } else {
            self.head = Some((at.offset, word));
        }
    }

    #[inline(always)]
    pub(super) fn advance(&mut self, slots: u16) {
        // The usual step does not wait for the table's answer.
        self.used = if slots == 1 { self.used.step(1, self.size) } else { self.used.step(slots, self.size) };
        self.slots += u32::from(slots);
        self.chains += 1;
    }
}

impl DeviceRing for PackedDevice {
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
        let mut popped = 0;
        loop {
            let (more, stop) = match self.direction {
                Direction::Readable => self.pop_short::<false>(out),
                Direction::Writable => self.pop_short::<true>(out),
            };
            popped += more;
            match stop {
                Stop::Full => return Ok(popped),
                Stop::Other(word) => match self.pop_other(memory, word, out) {
                    Ok(()) => popped += 1,
                    Err(_) if popped > 0 => return Ok(popped),
                    Err(error) => return Err(error),
                },
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
        let (desc, mut tail) = (self.ring.desc.cells(), self.tail());
        // Used descriptors go over available ones that a refused batch may still hand back: check all before the first is written.
        self.flights.check_batch(completions)?;
        self.flights.finish_batch(completions, |_, flight, len| {
            tail.element(&desc, tail.used, flight.id(), len);
            tail.advance(flight.slots());
        })?;
        self.set_tail(tail);
        Ok(())
    }

    fn rewind(&mut self, count: usize) -> Result<(), RingError> {
        self.flights.check_rewind(count)?;
        for _ in 0..count {
            if let Some(flight) = self.flights.rewind_one() {
                self.next = self.next.back(flight.slots(), self.ring.size);
            }
        }
        Ok(())
    }

    #[inline]
    fn publish(&mut self, memory: &RegionTable) -> u32 {
        self.close_run();
        let Some((offset, word)) = self.head.take() else { return 0 };
        self.ring.publish_word(offset, word);
        if memory.dirty().is_some() {
            self.mark_used(memory, self.published, self.unpublished);
        }
        self.since = self.since.saturating_add(self.unpublished);
        self.unpublished = 0;
        self.published = self.used;
        self.flights.published();
        std::mem::take(&mut self.unpublished_chains)
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
        Some(packed_event(self.ring.driver_event.load(0), self.published, since, self.ring.size, self.features.event_idx))
    }

    fn arm(&mut self, memory: &RegionTable) -> bool {
        if !self.features.event_idx {
            self.set_event(memory, EVENT_FLAGS_ENABLE, self.next);
            full_fence(FencePoint::DeviceArm);
            return is_avail(self.ring.word(self.next.offset), self.next.wrap);
        }
        // The event stands behind all that is there, so that it comes for the next one even if some are left. At most `size` are.
        let (mut end, mut ahead) = (self.next, 0);
        loop {
            while ahead < self.ring.size && is_avail(self.ring.word(end.offset), end.wrap) {
                end = end.step(1, self.ring.size);
                ahead += 1;
            }
            self.set_event(memory, EVENT_FLAGS_DESC, end);
            full_fence(FencePoint::DeviceArm);
            if ahead == self.ring.size || !is_avail(self.ring.word(end.offset), end.wrap) {
                return ahead > 0;
            }
        }
    }

    fn disarm(&mut self, memory: &RegionTable) {
        self.set_event(memory, EVENT_FLAGS_DISABLE, self.next);
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
        let Resubmission::Packed { entry, descriptors } = again else { return Ok(()) };
        let (tail, first) = out.tail();
        let (mut walk, mut rest) = (Walk::new(tail, self.limit), descriptors.iter().copied());
        let listed = walk_list(&mut self.table, self.features, self.ring.size, memory, &mut walk, || rest.next())?;
        if rest.next().is_some() {
            return Err(RingError::InFlightLink { what: "chain's end", index: *entry, size: self.ring.size });
        }
        let chain = walk.finish(0, 0, first);
        self.start(chain, listed, out)
    }

    fn skip(&mut self, _: u16, slots: u16) {
        self.next = self.next.step(slots, self.ring.size);
    }

    fn state(&self) -> RingState {
        RingState { avail: self.next, used: self.published }
    }

    fn snapshot(&self) -> Snapshot {
        let private = vec![
            ("next_avail", self.next.offset.into()),
            ("avail_wrap", self.next.wrap.into()),
            ("next_used", self.used.offset.into()),
            ("used_wrap", self.used.wrap.into()),
            ("in_flight", self.flights.chains.into()),
            ("slots_in_flight", self.flights.slots.into()),
        ];
        Snapshot { private, shared: self.ring.shared() }
    }
}
