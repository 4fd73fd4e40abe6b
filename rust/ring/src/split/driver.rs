//! The driver's side of the split ring.

use super::{FLAGS, IDX, SplitRing, rest};
use crate::chain::{Direction, Segment, check_buffer};
use crate::error::RingError;
use crate::event;
use crate::indirect::{IndirectTables, write_flag};
use crate::options::RingFeatures;
use crate::outstanding::{Entry, Outstanding, Published, clamp};
use crate::ring::{Buffer, DriverRing, Form, RingState, Snapshot, Takeover, Used};
use crate::spec::{AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, USED_F_NO_NOTIFY};
use virtio_memory::{FencePoint, full_fence};
#[cfg(not(loom))]
use virtio_memory::{U16RingCells, U32RingCells, U64RingCells};
#[cfg(loom)]
type U16RingCells<'a> = &'a virtio_memory::U16Ring;
#[cfg(loom)]
type U32RingCells<'a> = &'a virtio_memory::U32Ring;
#[cfg(loom)]
type U64RingCells<'a> = &'a virtio_memory::U64Ring;

/// Adds to the available ring, takes from the used ring.
#[derive(Debug)]
pub struct SplitDriver {
    pub(super) ring: SplitRing,
    pub(super) features: RingFeatures,
    tables: Option<IndirectTables>,
    pub(super) ids: Outstanding,
    /// The descriptor after this one in its chain; the shared `next` is never read back.
    links: Box<[u16]>,
    /// Shadow of the available ring: head by position.
    order: Box<[u16]>,
    free: u16,
    /// In-order: the next descriptor of the table.
    next_desc: u16,
    /// The next available position; up to `published` the device has been told.
    next: u16,
    published: u16,
    since: u32,
    pub(super) last_used: u16,
    seen_used: u16,
    /// In-order: the newest `even` chains, at most `size`, have heads that lie `shift` after their positions.
    shift: u16,
    even: u16,
    /// In-order: chains still to come from the element that was read last, and its length.
    run: u16,
    run_len: u32,
}

impl SplitDriver {
    /// A driver on a zeroed ring.
    pub fn new(ring: SplitRing, features: RingFeatures, tables: Option<IndirectTables>) -> Self {
        let size = ring.size;
        SplitDriver {
            features,
            tables,
            ids: Outstanding::new(size),
            links: vec![0; usize::from(size)].into(),
            order: vec![u16::MAX; usize::from(size)].into(),
            free: size,
            next_desc: 0,
            next: 0,
            published: 0,
            since: 0,
            last_used: 0,
            seen_used: 0,
            shift: 0,
            even: 0,
            run: 0,
            run_len: 0,
            ring,
        }
    }

    /// A descriptor for the next segment: from the free list, or in ring order.
    #[inline(always)]
    fn take(&mut self) -> u16 {
        self.free -= 1;
        if self.features.in_order {
            let id = self.next_desc;
            self.next_desc = (id + 1) & self.ring.mask();
            id
        } else {
            self.ids.take()
        }
    }

    #[inline(always)]
    fn describe(&self, id: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.ring.desc.cells().store_pair(usize::from(id), [address, rest(len, flags, next)]);
    }

    /// Puts a head into the available ring; only `publish` shows it.
    #[inline(always)]
    fn offer(&mut self, head: u16, token: u64, writable: u32, slots: u16) {
        let place = usize::from(self.next & self.ring.mask());
        self.ids.set(head, Entry::new(token, writable, slots, self.next));
        if !self.features.in_order {
            self.ring.heads.cells().store(place, head);
        } else {
            self.keep_even(head, 1);
            if self.order[place] != head {
                // In order the same heads come round again: a store would only dirty the line.
                self.order[place] = head;
                self.ring.heads.cells().store(place, head);
            }
        }
        self.next = self.next.wrapping_add(1);
    }

    /// In-order: `count` chains of one descriptor (or the first of them alone) from `head` on come next. Tells whether the available ring
    /// holds their heads already.
    #[inline(always)]
    fn keep_even(&mut self, head: u16, count: u16) -> bool {
        let shift = head.wrapping_sub(self.next) & self.ring.mask();
        let even = if shift == self.shift { self.even } else { 0 };
        (self.shift, self.even) = (shift, (u32::from(even) + u32::from(count)).min(self.ring.size.into()) as u16);
        even == self.ring.size
    }

    /// In-order: the heads of a batch of `count` buffers, where they are not there from the last time round.
    #[cold]
    fn show_in_order(&mut self, count: usize) {
        let mask = self.ring.mask();
        for k in 0..count as u16 {
            let (place, id) = (self.next.wrapping_add(k) & mask, (self.next_desc + k) & mask);
            if std::mem::replace(&mut self.order[usize::from(place)], id) != id {
                self.ring.heads.cells().store(place.into(), id);
            }
        }
    }

    pub(super) fn published(&self) -> Published {
        Published { end: self.published, unpublished: self.next.wrapping_sub(self.published) }
    }

    /// Why a used id is refused.
    #[cold]
    pub(super) fn refused(&self, id: u32) -> RingError {
        let size = self.ring.size;
        if id >= u32::from(size) { RingError::UsedIdOutOfRange { id, size } } else { RingError::UsedIdNotOutstanding { id } }
    }

    /// How many used chains there are, at least `wanted` if there are so many.
    #[inline(always)]
    pub(super) fn ready(&mut self, wanted: usize) -> Result<u16, RingError> {
        let ready = self.seen_used.wrapping_sub(self.last_used);
        if usize::from(ready) >= wanted {
            return Ok(ready);
        }
        let index = self.ring.used.load_acquire(IDX);
        let ahead = index.wrapping_sub(self.last_used);
        let outstanding = self.ids.chains - self.published().unpublished;
        if ahead > outstanding {
            return Err(RingError::UsedIndex { index, last: self.last_used, ahead, outstanding });
        }
        self.seen_used = index;
        Ok(ahead)
    }

    fn pop_free_order(&mut self, out: &mut [Used], clamped: &mut u64) -> Result<usize, RingError> {
        let n = usize::from(self.ready(out.len())?).min(out.len());
        let published = self.published();
        let (mut popped, mut result) = (0, Ok(()));
        while popped < n {
            let (at, out) = (self.last_used.wrapping_add(popped as u16), &mut out[popped..n]);
            let Outstanding { entries, stack, free, .. } = &mut self.ids;
            let mut short = Short { elements: self.ring.elements.cells(), entries, stack: &mut stack[*free..], clamped };
            // With nothing that was only added, whatever is outstanding was published.
            let (more, end) = match published.unpublished {
                0 => short.pop(at, out, |_| true),
                _ => short.pop(at, out, |position| published.contains(position)),
            };
            (popped, *free) = (popped + more, *free + more);
            self.free += more as u16;
            let Some((id, len)) = end else { break };
            // A chain of several descriptors, or none that is out.
            let Some(entry) = entries.get_mut(id as usize).filter(|e| e.slots() != 0 && published.contains(e.position())) else {
                result = Err(id);
                break;
            };
            out[more] = Used { token: entry.token, len: clamp(len, entry.writable(), clamped) };
            let (mut id, slots) = (id as u16, entry.take_out());
            for left in (0..slots).rev() {
                stack[*free] = id;
                *free += 1;
                if left > 0 {
                    id = self.links[usize::from(id)];
                }
            }
            self.free += slots;
            popped += 1;
        }
        self.ids.chains -= popped as u16;
        self.last_used = self.last_used.wrapping_add(popped as u16);
        match result {
            Err(id) if popped == 0 => Err(self.refused(id)),
            _ => Ok(popped),
        }
    }

    /// The run that the next used element stands for (driver-14): one chain, or all up to the one that it names.
    fn next_run(&mut self) -> Result<(), RingError> {
        let [id, len] = self.ring.elements.cells().load_pair(self.last_used.into());
        let limit = self.seen_used.wrapping_sub(self.last_used);
        let Some(entry) = self.ids.get(id).filter(|e| self.published().contains(e.position())) else {
            return Err(self.refused(id));
        };
        let run = entry.position().wrapping_sub(self.last_used).wrapping_add(1);
        if run == 0 || run > limit {
            return Err(RingError::InOrderRun { id, run, limit });
        }
        (self.run, self.run_len) = (run, len);
        Ok(())
    }

    fn pop_in_order(&mut self, out: &mut [Used], clamped: &mut u64) -> Result<usize, RingError> {
        let n = usize::from(self.ready(out.len())?).min(out.len());
        let mask = self.ring.mask();
        let mut popped = 0;
        while popped < n {
            if self.run == 0
                && let Err(error) = self.next_run()
            {
                return if popped > 0 { Ok(popped) } else { Err(error) };
            }
            let m = usize::from(self.run).min(n - popped);
            let (part, entries) = (&mut out[popped..popped + m], &mut self.ids.entries[..]);
            let mut freed = 0;
            if self.even >= self.ids.chains {
                let first = usize::from(self.last_used.wrapping_add(self.shift) & mask);
                let (near, far) = part.split_at_mut(m.min(entries.len() - first));
                freed += take_back(near, &mut entries[first..]) + take_back(far, entries);
            } else {
                for (k, used) in part.iter_mut().enumerate() {
                    let head = self.order[usize::from(self.last_used.wrapping_add(k as u16) & mask)];
                    freed += take_back(std::slice::from_mut(used), &mut entries[usize::from(head)..]);
                }
            }
            self.last_used = self.last_used.wrapping_add(m as u16);
            self.free += freed;
            self.ids.chains -= m as u16;
            popped += m;
            self.run -= m as u16;
            if self.run == 0 {
                let end = &mut out[popped - 1];
                end.len = clamp(self.run_len, end.len, clamped);
            }
        }
        Ok(popped)
    }
}

/// In order: takes back the chains of these entries, as many as `out` holds; gives the descriptors that are free now.
#[inline(always)]
fn take_back(out: &mut [Used], entries: &mut [Entry]) -> u16 {
    let mut freed = 0;
    for (used, entry) in out.iter_mut().zip(entries) {
        // Every chain of a run but the last has no writable part or was filled.
        *used = Used { token: entry.token, len: entry.writable() };
        freed += entry.take_out();
    }
    freed
}

/// What the loop over the usual used chains needs, and no more: it has few registers.
struct Short<'a, 'b> {
    elements: U32RingCells<'a>,
    entries: &'a mut [Entry],
    /// Where free ids go.
    stack: &'a mut [u16],
    clamped: &'b mut u64,
}

impl Short<'_, '_> {
    /// Takes back chains of one descriptor until `out` is full; tells how many, and the element at which it stopped before.
    #[inline(never)]
    fn pop(&mut self, at: u16, out: &mut [Used], published: impl Fn(u16) -> bool) -> (usize, Option<(u32, u32)>) {
        let (elements, entries, at) = (self.elements, &mut self.entries[..], usize::from(at));
        let mut popped = 0;
        for (used, place) in out.iter_mut().zip(&mut *self.stack) {
            let [id, len] = elements.load_pair(at + popped);
            let Some(entry) = entries.get_mut(id as usize).filter(|e| e.slots() == 1 && published(e.position())) else {
                return (popped, Some((id, len)));
            };
            *used = Used { token: entry.token, len: clamp(len, entry.writable(), self.clamped) };
            entry.take_out();
            *place = id as u16;
            popped += 1;
        }
        (popped, None)
    }
}

/// What the loops that write a batch need, and no more.
struct Batch<'a> {
    desc: U64RingCells<'a>,
    heads: U16RingCells<'a>,
    entries: &'a mut [Entry],
}

/// One buffer of this direction with descriptor `id`; false if it is of the other, or empty, and then nothing was written.
#[inline(always)]
fn put<const WRITABLE: bool>(desc: U64RingCells, entry: &mut Entry, buffer: &Buffer, id: usize, position: u16) -> bool {
    let (direction, writable) = if WRITABLE { (Direction::Writable, buffer.len) } else { (Direction::Readable, 0) };
    if buffer.len == 0 || buffer.direction != direction {
        return false;
    }
    *entry = Entry::new(buffer.token, writable, 1, position);
    desc.store_pair(id, [buffer.address, rest(buffer.len, write_flag(direction), 0)]);
    true
}

impl Batch<'_> {
    /// Buffers of one direction, up to the first that is of the other or empty, with the ids on top of the stack, which has enough; how many.
    #[inline(never)]
    fn put_free_order<const WRITABLE: bool>(&mut self, buffers: &[Buffer], stack: &[u16], position: u16) -> usize {
        let (desc, heads, entries, mut left) = (self.desc, self.heads, &mut self.entries[..], stack);
        for (written, buffer) in buffers.iter().enumerate() {
            let Some((&id, rest)) = left.split_last() else { return written };
            let place = usize::from(position) + written;
            if !put::<WRITABLE>(desc, &mut entries[usize::from(id)], buffer, id.into(), place as u16) {
                return written;
            }
            left = rest;
            heads.store(place, id);
        }
        buffers.len()
    }

    /// The same with the descriptors from `first` on, round the ring; the available ring is not written.
    #[inline(never)]
    fn put_in_order<const WRITABLE: bool>(&mut self, buffers: &[Buffer], first: u16, position: u16) -> usize {
        let first = usize::from(first);
        let (near, far) = buffers.split_at(buffers.len().min(self.entries.len() - first));
        let written = put_run::<WRITABLE>(self.desc, &mut self.entries[first..], near, first, position);
        if written < near.len() {
            return written;
        }
        written + put_run::<WRITABLE>(self.desc, self.entries, far, 0, position.wrapping_add(written as u16))
    }

    /// Forgets the first `count` buffers of a batch: they came with the descriptors from `first` on, or with those on top of the stack.
    #[cold]
    fn take_out(&mut self, count: usize, first: u16, stack: Option<&[u16]>) {
        for k in 0..count {
            let id = stack.map_or((usize::from(first) + k) & (self.entries.len() - 1), |stack| stack[stack.len() - 1 - k].into());
            self.entries[id].take_out();
        }
    }
}

/// As [`put`], with the descriptors from `id` on, whose entries these are; how many.
#[inline(always)]
fn put_run<const WRITABLE: bool>(desc: U64RingCells, entries: &mut [Entry], buffers: &[Buffer], id: usize, position: u16) -> usize {
    for (k, (buffer, entry)) in buffers.iter().zip(entries).enumerate() {
        if !put::<WRITABLE>(desc, entry, buffer, id + k, position.wrapping_add(k as u16)) {
            return k;
        }
    }
    buffers.len()
}

impl DriverRing for SplitDriver {
    fn size(&self) -> u16 {
        self.ring.size
    }

    fn free(&self) -> u16 {
        self.free
    }

    fn outstanding(&self) -> u16 {
        self.ids.chains
    }

    fn add(&mut self, token: u64, segments: &[Segment], form: Form) -> Result<(), RingError> {
        let (limit, needed) = match (form, &self.tables) {
            (Form::Direct, _) => (usize::from(self.ring.size), segments.len()),
            (Form::Indirect, Some(tables)) => (tables.entries().min(usize::from(self.ring.size)), 1),
            (Form::Indirect, None) => return Err(RingError::IndirectRefused),
        };
        let sums = check_buffer(segments, limit)?;
        if needed > usize::from(self.free) {
            return Err(RingError::Full { needed, free: usize::from(self.free) });
        }
        let head = self.take();
        if let (Form::Indirect, Some(tables)) = (form, &self.tables) {
            let last = segments.len() - 1;
            let (address, len) = tables.write(head, segments, |i, s| {
                let next = if i < last { DESC_F_NEXT } else { 0 };
                rest(s.len, write_flag(s.direction) | next, if i < last { i as u16 + 1 } else { 0 })
            });
            self.describe(head, address, len, DESC_F_INDIRECT, 0);
        } else {
            let mut id = head;
            for (i, segment) in segments.iter().enumerate() {
                let flags = write_flag(segment.direction);
                if i + 1 == segments.len() {
                    self.describe(id, segment.address, segment.len, flags, 0);
                } else {
                    let next = self.take();
                    self.links[usize::from(id)] = next;
                    self.describe(id, segment.address, segment.len, flags | DESC_F_NEXT, next);
                    id = next;
                }
            }
        }
        self.offer(head, token, sums.writable, needed as u16);
        Ok(())
    }

    #[inline]
    fn add_batch(&mut self, buffers: &[Buffer]) -> Result<usize, RingError> {
        let n = buffers.len().min(usize::from(self.free));
        let (fit, left) = buffers.split_at(n);
        if left.iter().any(|b| b.len == 0) {
            return Err(RingError::EmptySegment { index: buffers.iter().position(|b| b.len == 0).unwrap_or(n) });
        }
        let mut batch = Batch { desc: self.ring.desc.cells(), heads: self.ring.heads.cells(), entries: &mut self.ids.entries };
        let (mut written, stack, in_order) = (0, &self.ids.stack[..self.ids.free], self.features.in_order);
        while written < n {
            let (rest, top) = (&fit[written..], &stack[..stack.len() - if in_order { 0 } else { written }]);
            let (id, position) = ((self.next_desc + written as u16) & (self.ring.size - 1), self.next.wrapping_add(written as u16));
            let more = match (in_order, rest[0].direction) {
                (false, Direction::Readable) => batch.put_free_order::<false>(rest, top, position),
                (false, Direction::Writable) => batch.put_free_order::<true>(rest, top, position),
                (true, Direction::Readable) => batch.put_in_order::<false>(rest, id, position),
                (true, Direction::Writable) => batch.put_in_order::<true>(rest, id, position),
            };
            if more == 0 {
                batch.take_out(written, self.next_desc, (!in_order).then_some(stack));
                return Err(RingError::EmptySegment { index: written });
            }
            written += more;
        }
        if self.features.in_order {
            if !self.keep_even(self.next_desc, n as u16) {
                self.show_in_order(n);
            }
            self.next_desc = (self.next_desc + n as u16) & self.ring.mask();
        } else {
            self.ids.free -= n;
        }
        self.free -= n as u16;
        self.ids.chains += n as u16;
        self.next = self.next.wrapping_add(n as u16);
        Ok(n)
    }

    #[inline]
    fn publish(&mut self) {
        if self.next != self.published {
            self.ring.avail.store_release(IDX, self.next);
            self.since = self.since.saturating_add(u32::from(self.next.wrapping_sub(self.published)));
            if !self.features.in_order && Published::half_way(self.published, self.next) {
                self.ids.renumber(self.next);
            }
            self.published = self.next;
        }
    }

    #[inline]
    fn should_notify(&mut self) -> Option<bool> {
        let since = std::mem::take(&mut self.since);
        if since == 0 {
            return None;
        }
        full_fence(FencePoint::DriverDecide);
        if self.features.event_idx {
            Some(event::split_event(self.ring.avail_event.load(0), self.published, since))
        } else {
            Some(self.ring.used.load(FLAGS) & USED_F_NO_NOTIFY == 0)
        }
    }

    #[inline]
    fn pop_used_batch(&mut self, out: &mut [Used], clamped: &mut u64) -> Result<usize, RingError> {
        if self.features.in_order { self.pop_in_order(out, clamped) } else { self.pop_free_order(out, clamped) }
    }

    fn arm(&mut self) -> bool {
        if self.features.event_idx {
            self.ring.avail.store(self.ring.used_event(), self.last_used);
        } else {
            self.ring.avail.store(FLAGS, 0);
        }
        full_fence(FencePoint::DriverArm);
        self.ring.used.load_acquire(IDX) != self.last_used
    }

    fn disarm(&mut self) {
        if self.features.event_idx {
            // flags stay 0 here (2.7.7.1): the event index is parked where the next 65535 entries do not pass it.
            self.ring.avail.store(self.ring.used_event(), self.last_used.wrapping_sub(1));
        } else {
            self.ring.avail.store(FLAGS, AVAIL_F_NO_INTERRUPT);
        }
    }

    fn notification_position(&self) -> u16 {
        self.published
    }

    fn take_outstanding(&mut self) -> Vec<u64> {
        self.ids.drain()
    }

    fn resume(&mut self, how: Takeover) -> Result<RingState, RingError> {
        self.take_over(how)
    }

    fn snapshot(&self) -> Snapshot {
        let private = vec![
            ("next_avail", self.next.into()),
            ("published", self.published.into()),
            ("last_used", self.last_used.into()),
            ("free", self.free.into()),
            ("outstanding", self.ids.chains.into()),
        ];
        Snapshot { private, shared: self.ring.shared() }
    }
}
