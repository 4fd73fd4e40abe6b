//! The driver's side of the split ring.

use super::{FLAGS, IDX, SplitRing, rest};
use crate::chain::{Segment, check_buffer};
use crate::error::RingError;
use crate::event;
use crate::indirect::{IndirectTables, write_flag};
use crate::options::RingFeatures;
use crate::outstanding::{Entry, Outstanding, Published, clamp};
use crate::ring::{Buffer, DriverRing, Form, Snapshot, Used};
use crate::spec::{AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, USED_F_NO_NOTIFY};
use virtio_memory::{FencePoint, full_fence};

/// Adds to the available ring, takes from the used ring.
#[derive(Debug)]
pub struct SplitDriver {
    ring: SplitRing,
    features: RingFeatures,
    tables: Option<IndirectTables>,
    ids: Outstanding,
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
    last_used: u16,
    seen_used: u16,
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
        self.ids.set(head, Entry { token, writable, slots, position: self.next });
        if !self.features.in_order {
            self.ring.heads.cells().store(place, head);
        } else if self.order[place] != head {
            // In order the same heads come round again: a store would only dirty the line.
            self.order[place] = head;
            self.ring.heads.cells().store(place, head);
        }
        self.next = self.next.wrapping_add(1);
    }

    fn published(&self) -> Published {
        Published { end: self.published, unpublished: self.next.wrapping_sub(self.published) }
    }

    /// Why a used id is refused.
    #[cold]
    fn refused(&self, id: u32) -> RingError {
        let size = self.ring.size;
        if id >= u32::from(size) { RingError::UsedIdOutOfRange { id, size } } else { RingError::UsedIdNotOutstanding { id } }
    }

    /// How many used chains there are, at least `wanted` if there are so many.
    #[inline(always)]
    fn ready(&mut self, wanted: usize) -> Result<u16, RingError> {
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
        let all = published.unpublished == 0;
        let elements = self.ring.elements.cells();
        let Outstanding { entries, stack, free, .. } = &mut self.ids;
        let (entries, stack, links) = (&mut entries[..], &mut stack[..], &self.links[..]);
        let (mut last, mut top, mut popped, mut refused) = (self.last_used, *free, 0, None);
        for used in &mut out[..n] {
            let [id, len] = elements.load_pair(last.into());
            let Some(entry) = entries.get_mut(id as usize).filter(|e| e.slots != 0 && (all || published.contains(e.position))) else {
                refused = Some(id);
                break;
            };
            *used = Used { token: entry.token, len: clamp(len, entry.writable, clamped) };
            stack[top] = id as u16;
            top += 1;
            let mut id = id as u16;
            for _ in 1..std::mem::take(&mut entry.slots) {
                id = links[usize::from(id)];
                stack[top] = id;
                top += 1;
            }
            last = last.wrapping_add(1);
            popped += 1;
        }
        self.free += (top - *free) as u16;
        *free = top;
        self.ids.chains -= popped as u16;
        self.last_used = last;
        match refused {
            Some(id) if popped == 0 => Err(self.refused(id)),
            _ => Ok(popped),
        }
    }

    /// The run that the next used element stands for (driver-14): one chain, or all up to the one that it names.
    fn next_run(&mut self) -> Result<(), RingError> {
        let [id, len] = self.ring.elements.cells().load_pair(self.last_used.into());
        let limit = self.seen_used.wrapping_sub(self.last_used);
        let Some(entry) = self.ids.get(id).filter(|e| self.published().contains(e.position)) else {
            return Err(self.refused(id));
        };
        let run = entry.position.wrapping_sub(self.last_used).wrapping_add(1);
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
            let (mut last, mut freed) = (self.last_used, 0);
            for used in &mut out[popped..popped + m] {
                let head = self.order[usize::from(last & mask)];
                let entry = &mut self.ids.entries[usize::from(head)];
                // Every chain of a run but the last has no writable part or was filled.
                *used = Used { token: entry.token, len: entry.writable };
                freed += std::mem::take(&mut entry.slots);
                last = last.wrapping_add(1);
            }
            self.last_used = last;
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
        if let Some(index) = buffers.iter().position(|b| b.len == 0) {
            return Err(RingError::EmptySegment { index });
        }
        let n = buffers.len().min(usize::from(self.free));
        let (mask, next) = (self.ring.mask(), self.next);
        let (desc, heads) = (self.ring.desc.cells(), self.ring.heads.cells());
        let (entries, order) = (&mut self.ids.entries[..], &mut self.order[..]);
        let mut put = |buffer: &Buffer, id: u16, position: u16| {
            desc.store_pair(usize::from(id), [buffer.address, rest(buffer.len, write_flag(buffer.direction), 0)]);
            let writable = buffer.direction.writable(buffer.len);
            entries[usize::from(id)] = Entry { token: buffer.token, writable, slots: 1, position };
        };
        let mut position = next;
        if self.features.in_order {
            let mut id = self.next_desc;
            for buffer in &buffers[..n] {
                put(buffer, id, position);
                let place = &mut order[usize::from(position & mask)];
                if *place != id {
                    *place = id;
                    heads.store(position.into(), id);
                }
                id = (id + 1) & mask;
                position = position.wrapping_add(1);
            }
        } else {
            let top = self.ids.free;
            for (buffer, &id) in buffers.iter().zip(self.ids.stack[top - n..top].iter().rev()) {
                put(buffer, id, position);
                heads.store(position.into(), id);
                position = position.wrapping_add(1);
            }
        }
        if self.features.in_order {
            self.next_desc = (self.next_desc + n as u16) & mask;
        } else {
            self.ids.free -= n;
        }
        self.free -= n as u16;
        self.ids.chains += n as u16;
        self.next = next.wrapping_add(n as u16);
        Ok(n)
    }

    #[inline]
    fn publish(&mut self) {
        if self.next != self.published {
            self.ring.avail.store_release(IDX, self.next);
            self.since = self.since.saturating_add(u32::from(self.next.wrapping_sub(self.published)));
            if !self.features.in_order && Published::half_way(self.published, self.next) {
                self.ids.renumber(self.next.wrapping_sub(1));
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
