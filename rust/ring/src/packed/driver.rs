//! The driver's side of the packed ring.

use super::resume::Kept;
use super::{PackedRing, avail_flags, is_used, rest};
use crate::chain::{Segment, check_buffer};
use crate::error::RingError;
use crate::event::{Cursor, packed_event, packed_word};
use crate::indirect::{IndirectTables, write_flag};
use crate::options::RingFeatures;
use crate::outstanding::{Entry, Outstanding, Published, clamp};
use crate::ring::{Buffer, DriverRing, Form, RingState, Snapshot, Takeover, Used};
use crate::spec::{DESC_F_INDIRECT, DESC_F_NEXT, EVENT_FLAGS_DESC, EVENT_FLAGS_DISABLE, EVENT_FLAGS_ENABLE};
use virtio_memory::{FencePoint, full_fence};

/// Makes descriptors available, takes used ones back.
#[derive(Debug)]
pub struct PackedDriver {
    pub(super) ring: PackedRing,
    pub(super) features: RingFeatures,
    tables: Option<IndirectTables>,
    pub(super) ids: Outstanding,
    pub(super) kept: Option<Kept>,
    free: u16,
    /// Where the next descriptor goes.
    pub(super) next: Cursor,
    /// The first head since the last publish: its word is written last.
    head: Option<(u16, u64)>,
    /// Chains added, and chains published, counted on.
    added: u16,
    published: u16,
    /// Slots added since the last publish, and published since the last decision.
    pub(super) unpublished: u16,
    since: u32,
    /// Where the next used descriptor will be.
    pub(super) used: Cursor,
    /// In-order: chains still to come from the used descriptor that was read last, and its length.
    pub(super) run: u16,
    run_len: u32,
}

impl PackedDriver {
    /// A driver on a zeroed ring.
    pub fn new(ring: PackedRing, features: RingFeatures, tables: Option<IndirectTables>) -> Self {
        let size = ring.size;
        PackedDriver {
            features,
            tables,
            ids: Outstanding::new(size),
            kept: None,
            free: size,
            next: Cursor::START,
            head: None,
            added: 0,
            published: 0,
            unpublished: 0,
            since: 0,
            used: Cursor::START,
            run: 0,
            run_len: 0,
            ring,
        }
    }

    /// The same, for a device that may end and have another take its place.
    pub fn resumable(mut self) -> Self {
        self.kept = Some(Kept::new(self.ring.size));
        self
    }

    /// The next buffer's id: in order it is the place of its head, so that runs can be followed.
    #[inline(always)]
    fn take_id(&mut self) -> u16 {
        if self.features.in_order { self.next.offset } else { self.ids.take() }
    }

    /// One descriptor at the cursor. The first head since the last publish is kept back.
    #[inline(always)]
    fn describe(&mut self, address: u64, len: u32, id: u16, flags: u16) {
        let Cursor { offset, wrap } = self.next;
        let word = rest(len, id, flags | avail_flags(wrap));
        self.ring.set_address(offset, address);
        if self.head.is_some() {
            self.ring.desc.store(2 * usize::from(offset) + 1, word);
        } else {
            self.head = Some((offset, word));
        }
        self.next = self.next.step(1, self.ring.size);
    }

    pub(super) fn published(&self) -> Published {
        Published { end: self.published, unpublished: self.added.wrapping_sub(self.published) }
    }

    /// Why a used id is refused.
    #[cold]
    pub(super) fn refused(&self, id: u16) -> RingError {
        let (id, size) = (u32::from(id), self.ring.size);
        if id >= u32::from(size) { RingError::UsedIdOutOfRange { id, size } } else { RingError::UsedIdNotOutstanding { id } }
    }

    /// The id and length at the used cursor, if that descriptor is used.
    #[inline(always)]
    fn look(&self) -> Option<(u16, u32)> {
        let word = self.ring.word(self.used.offset);
        is_used(word, self.used.wrap).then_some(((word >> 32) as u16, word as u32))
    }

    fn pop_free_order(&mut self, out: &mut [Used], clamped: &mut u64) -> Result<usize, RingError> {
        let (size, published) = (self.ring.size, self.published());
        let desc = self.ring.desc.cells();
        let Outstanding { entries, stack, free, .. } = &mut self.ids;
        let (entries, stack, kept) = (&mut entries[..], &mut stack[..], self.kept.as_ref());
        let (mut at, mut top, mut popped, mut freed, mut refused) = (self.used, *free, 0, 0, None);
        for used in out {
            let word = desc.load_acquire(2 * usize::from(at.offset) + 1);
            if !is_used(word, at.wrap) {
                break;
            }
            let (len, id) = (word as u32, (word >> 32) as u16);
            let Some(entry) = entries.get_mut(usize::from(id)).filter(|e| e.slots() != 0 && published.contains(e.position())) else {
                refused = Some(id);
                break;
            };
            *used = Used { token: entry.token, len: clamp(len, entry.writable(), clamped) };
            let slots = entry.take_out();
            stack[top] = id;
            top += 1;
            popped += 1;
            freed += slots;
            // The usual step does not wait for the table's answer.
            at = if slots == 1 { at.step(1, size) } else { at.step(slots, size) };
            if slots > 1
                && let Some(kept) = kept
            {
                top += kept.free(id, slots, &mut stack[top..]);
            }
        }
        *free = top;
        self.free += freed;
        self.ids.chains -= popped as u16;
        self.used = at;
        match refused {
            Some(id) if popped == 0 => Err(self.refused(id)),
            _ => Ok(popped),
        }
    }

    /// The run that the next used descriptor stands for, if there is one (driver-14): one chain, or all up to the one that it names.
    fn next_run(&mut self) -> Result<bool, RingError> {
        let Some((id, len)) = self.look() else { return Ok(false) };
        let published = self.published();
        let Some(entry) = self.ids.get(id.into()).filter(|e| published.contains(e.position())) else {
            return Err(self.refused(id));
        };
        // Chains come back in order, so the oldest is as many before `end` as were published and are outstanding.
        let limit = self.ids.chains - published.unpublished;
        let run = entry.position().wrapping_sub(published.end.wrapping_sub(limit)).wrapping_add(1);
        if run == 0 || run > limit {
            return Err(RingError::InOrderRun { id: id.into(), run, limit });
        }
        (self.run, self.run_len) = (run, len);
        Ok(true)
    }

    fn pop_in_order(&mut self, out: &mut [Used], clamped: &mut u64) -> Result<usize, RingError> {
        let mut popped = 0;
        while popped < out.len() {
            if self.run == 0 {
                match self.next_run() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(_) if popped > 0 => break,
                    Err(error) => return Err(error),
                }
            }
            let m = usize::from(self.run).min(out.len() - popped);
            let (mut at, mut freed, size) = (self.used, 0, self.ring.size);
            let entries = &mut self.ids.entries[..];
            for used in &mut out[popped..popped + m] {
                // A head's place is its id.
                let entry = &mut entries[usize::from(at.offset)];
                // Every chain of a run but the last has no writable part or was filled.
                *used = Used { token: entry.token, len: entry.writable() };
                let slots = entry.take_out();
                freed += slots;
                at = if slots == 1 { at.step(1, size) } else { at.step(slots, size) };
            }
            self.used = at;
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

impl DriverRing for PackedDriver {
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
        let id = self.take_id();
        if let (Form::Indirect, Some(tables)) = (form, &self.tables) {
            let (address, len) = tables.write(id, segments, |_, s| rest(s.len, 0, write_flag(s.direction)));
            if let Some(kept) = &mut self.kept {
                kept.keep(id, address, rest(len, 0, DESC_F_INDIRECT));
            }
            self.describe(address, len, id, DESC_F_INDIRECT);
        } else {
            let mut place = id;
            for (i, segment) in segments.iter().enumerate() {
                let next = if i + 1 < segments.len() { DESC_F_NEXT } else { 0 };
                if self.kept.is_some() {
                    place = self.keep(place, segment, next);
                }
                self.describe(segment.address, segment.len, id, write_flag(segment.direction) | next);
            }
        }
        let slots = needed as u16;
        self.ids.set(id, Entry::new(token, sums.writable, slots, self.added));
        self.added = self.added.wrapping_add(1);
        self.unpublished += slots;
        self.free -= slots;
        Ok(())
    }

    #[inline]
    fn add_batch(&mut self, buffers: &[Buffer]) -> Result<usize, RingError> {
        if let Some(index) = buffers.iter().position(|b| b.len == 0) {
            return Err(RingError::EmptySegment { index });
        }
        let n = buffers.len().min(usize::from(self.free));
        let (size, added, in_order) = (self.ring.size, self.added, self.features.in_order);
        let Cursor { mut offset, mut wrap } = self.next;
        let first = if in_order { 0 } else { self.ids.free - n };
        let desc = self.ring.desc.cells();
        let (entries, stack) = (&mut self.ids.entries[..], &self.ids.stack[..]);
        let (mut head, mut flags, mut kept) = (self.head, avail_flags(wrap), self.kept.as_mut());
        for (k, buffer) in buffers[..n].iter().enumerate() {
            let id = if in_order { offset } else { stack[first + (n - 1 - k)] };
            let writable = buffer.direction.writable(buffer.len);
            entries[usize::from(id)] = Entry::new(buffer.token, writable, 1, added.wrapping_add(k as u16));
            if let Some(kept) = &mut kept {
                kept.keep(id, buffer.address, rest(buffer.len, 0, write_flag(buffer.direction)));
            }
            let word = rest(buffer.len, id, write_flag(buffer.direction) | flags);
            if head.is_some() {
                desc.store_pair(offset.into(), [buffer.address, word]);
            } else {
                desc.store(2 * usize::from(offset), buffer.address);
                head = Some((offset, word));
            }
            offset += 1;
            if offset == size {
                (offset, wrap) = (0, !wrap);
                flags = avail_flags(wrap);
            }
        }
        self.head = head;
        if !in_order {
            self.ids.free = first;
        }
        self.next = Cursor { offset, wrap };
        self.free -= n as u16;
        self.ids.chains += n as u16;
        self.added = added.wrapping_add(n as u16);
        self.unpublished += n as u16;
        Ok(n)
    }

    #[inline]
    fn publish(&mut self) {
        if let Some((offset, word)) = self.head.take() {
            self.ring.publish_word(offset, word);
            self.since = self.since.saturating_add(self.unpublished.into());
            self.unpublished = 0;
            if !self.features.in_order && Published::half_way(self.published, self.added) {
                self.ids.renumber(self.added);
            }
            self.published = self.added;
        }
    }

    #[inline]
    fn should_notify(&mut self) -> Option<bool> {
        let since = std::mem::take(&mut self.since);
        if since == 0 {
            return None;
        }
        full_fence(FencePoint::DriverDecide);
        let published = self.next.back(self.unpublished, self.ring.size);
        Some(packed_event(self.ring.device_event.load(0), published, since, self.ring.size, self.features.event_idx))
    }

    #[inline]
    fn pop_used_batch(&mut self, out: &mut [Used], clamped: &mut u64) -> Result<usize, RingError> {
        if self.features.in_order { self.pop_in_order(out, clamped) } else { self.pop_free_order(out, clamped) }
    }

    fn arm(&mut self) -> bool {
        let flags = if self.features.event_idx { EVENT_FLAGS_DESC } else { EVENT_FLAGS_ENABLE };
        self.ring.driver_event.store_release(0, packed_word(flags, self.used));
        full_fence(FencePoint::DriverArm);
        self.run != 0 || self.look().is_some()
    }

    fn disarm(&mut self) {
        self.ring.driver_event.store_release(0, packed_word(EVENT_FLAGS_DISABLE, self.used));
    }

    fn notification_position(&self) -> u16 {
        self.next.back(self.unpublished, self.ring.size).to_bits()
    }

    fn take_outstanding(&mut self) -> Vec<u64> {
        self.ids.drain()
    }

    fn resume(&mut self, how: Takeover) -> Result<RingState, RingError> {
        self.take_over(how)
    }

    fn snapshot(&self) -> Snapshot {
        let private = vec![
            ("next_avail", self.next.offset.into()),
            ("avail_wrap", self.next.wrap.into()),
            ("next_used", self.used.offset.into()),
            ("used_wrap", self.used.wrap.into()),
            ("free", self.free.into()),
            ("outstanding", self.ids.chains.into()),
        ];
        Snapshot { private, shared: self.ring.shared() }
    }
}
