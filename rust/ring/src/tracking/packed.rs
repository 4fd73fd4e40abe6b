//! A packed queue's region: copies of the descriptors, since used ones are written over them, in entries that a free list links.

use super::area::packed::{
    ADDR, COUNTER, FLAGS, FREE_HEAD, ID, INFLIGHT, LAST, LEN, NEXT, NUM, OLD_FREE_HEAD, OLD_USED_IDX, OLD_USED_WRAP_COUNTER, USED_IDX,
    USED_WRAP_COUNTER,
};
use super::area::{DESC_NUM, FEATURES, HEADER_VERSION, VERSION, Words, in_order};
use super::{Footprint, InFlightObserver, Opened, Resubmission};
use crate::chain::Chain;
use crate::error::RingError;
use crate::event::Cursor;
use crate::options::Format;
use crate::packed::PackedRing;
use crate::ring::RingState;
use virtio_memory::Span;

/// A chain's entries.
#[derive(Clone, Copy, Debug, Default)]
struct Entries {
    first: u16,
    last: u16,
    slots: u16,
}

/// Writes a packed queue's region.
#[derive(Debug)]
pub struct PackedArea {
    words: Words,
    ring: PackedRing,
    size: u16,
    counter: u64,
    /// Where the next new chain is in the ring.
    next: Cursor,
    /// The used position that was told last.
    used: Cursor,
    /// The free list: its head, and each entry's link. `size` ends it.
    free: u16,
    links: Box<[u16]>,
    /// By a chain's name.
    chains: Box<[Entries]>,
    /// Those of chains that were completed since the last publish.
    done: Vec<Entries>,
}

impl PackedArea {
    /// Begins a new region, for a ring that is set up with this base, or goes on with a predecessor's.
    ///
    /// # Errors
    /// `Area` if the span is too short or unaligned; `InFlightArea`, `InFlightLink`, `InFlightCounter` if what stands there cannot be.
    pub fn open(span: &Span, ring: &PackedRing, base: Option<RingState>) -> Result<Opened<Self>, RingError> {
        let size = ring.size();
        let base = base.unwrap_or(RingState { avail: Cursor::START, used: Cursor::START });
        let mut area = PackedArea {
            words: Words::new(span, Format::Packed, size)?,
            ring: ring.clone(),
            size,
            counter: 0,
            next: base.avail,
            used: base.used,
            free: 0,
            links: (1..=size).collect(),
            chains: vec![Entries::default(); size.into()].into(),
            done: Vec::with_capacity(size.into()),
        };
        if !area.words.begun(size)? {
            if let Some(cursor) = [base.avail, base.used].into_iter().find(|cursor| cursor.offset >= size) {
                return Err(RingError::BadRestore { position: cursor.offset, size });
            }
            for entry in 0..size {
                area.words.store(entry, NEXT, NEXT.put(area.link(entry).into()));
            }
            area.words.set_header(FEATURES, 0);
            area.set_used(base.used);
            area.set_free(0);
            return Ok(Opened { area, resume: None, left: [].into() });
        }
        area.settle()?;
        let left = area.find_chains()?;
        let slots = left.iter().map(Resubmission::slots).sum();
        area.next = area.used.step(slots, size);
        area.take_back(slots);
        area.words.check()?;
        let resume = RingState { avail: area.used, used: area.used };
        Ok(Opened { area, resume: Some(resume), left: left.into() })
    }

    /// Decides what became of a batch that a predecessor was about to publish, and rolls on or back.
    fn settle(&mut self) -> Result<(), RingError> {
        let (first, second) = (self.words.header(FREE_HEAD), self.words.header(USED_IDX));
        let cursor = |index: u64, wrap: u64| {
            let cursor = Cursor { offset: index as u16, wrap: wrap != 0 };
            if cursor.offset < self.size {
                Ok(cursor)
            } else {
                Err(RingError::InFlightLink { what: "used index", index: cursor.offset, size: self.size })
            }
        };
        let used = cursor(USED_IDX.get(second), USED_WRAP_COUNTER.get(second))?;
        let old = cursor(OLD_USED_IDX.get(second), OLD_USED_WRAP_COUNTER.get(second))?;
        let published = used != old && !self.ring.is_available(old);
        (self.free, self.used) = if published { (FREE_HEAD.get(first) as u16, used) } else { (OLD_FREE_HEAD.get(first) as u16, old) };
        // The links first: while the positions differ, the ring says again which it was.
        self.set_free(self.free);
        self.set_used(self.used);
        Ok(())
    }

    /// Reads the free list and the chains in flight; no entry may be in two of them, or in none.
    fn find_chains(&mut self) -> Result<Vec<Resubmission>, RingError> {
        let size = self.size;
        let mut seen = vec![false; size.into()];
        let mut take = |what, index: u16| match seen.get_mut(usize::from(index)) {
            Some(seen) if !*seen => {
                *seen = true;
                Ok(index)
            }
            _ => Err(RingError::InFlightLink { what, index, size }),
        };
        for entry in 0..size {
            self.links[usize::from(entry)] = NEXT.get(self.words.load(entry, NEXT)) as u16;
        }
        let mut at = self.free;
        while at != size {
            at = take("free list", at)?;
            let word = self.words.load(at, INFLIGHT);
            if INFLIGHT.get(word) != 0 {
                self.words.store(at, INFLIGHT, word & !INFLIGHT.put(u64::MAX));
            }
            at = self.link(at);
        }
        let heads = (0..size).filter(|&entry| INFLIGHT.get(self.words.load(entry, INFLIGHT)) != 0);
        let (heads, counter) = in_order(heads.map(|entry| (self.words.load(entry, COUNTER), entry)).collect())?;
        self.counter = counter;
        let mut left = Vec::with_capacity(heads.len());
        for entry in heads {
            let word = self.words.load(entry, NUM);
            let mut descriptors = Vec::new();
            let mut at = entry;
            if NUM.get(word) == 0 {
                return Err(RingError::InFlightLink { what: "chain without descriptors", index: entry, size });
            }
            for count in 0..NUM.get(word) {
                at = take("chain", if count == 0 { entry } else { self.link(at) })?;
                let rest = self.words.load(at, ID);
                let rest = LEN.get(rest) | ID.get(rest) << 32 | FLAGS.get(rest) << 48;
                descriptors.push([self.words.load(at, ADDR), rest]);
            }
            if LAST.get(word) != u64::from(at) {
                return Err(RingError::InFlightLink { what: "chain's last", index: LAST.get(word) as u16, size });
            }
            left.push(Resubmission::Packed { entry, descriptors: descriptors.into() });
        }
        match seen.iter().position(|seen| !seen) {
            Some(index) => Err(RingError::InFlightLink { what: "entry that is nowhere", index: index as u16, size }),
            None => Ok(left),
        }
    }

    /// A batch is written from its second element on, and then shown by the first. Elements of one that was not shown must not be found
    /// behind the next.
    fn take_back(&self, slots: u16) {
        let mut at = self.used;
        for _ in 0..slots {
            self.ring.make_available(at);
            at = at.step(1, self.size);
        }
    }

    fn link(&self, entry: u16) -> u16 {
        self.links[usize::from(entry)]
    }

    /// Both heads of the free list at once.
    fn set_free(&self, old: u16) {
        let version = HEADER_VERSION.put(VERSION) | DESC_NUM.put(self.size.into());
        self.words.set_header(FREE_HEAD, version | FREE_HEAD.put(self.free.into()) | OLD_FREE_HEAD.put(old.into()));
    }

    /// The used position, and the one before this batch.
    fn set_used(&self, old: Cursor) {
        let new = USED_IDX.put(self.used.offset.into()) | USED_WRAP_COUNTER.put(self.used.wrap.into());
        let old = OLD_USED_IDX.put(old.offset.into()) | OLD_USED_WRAP_COUNTER.put(old.wrap.into());
        self.words.set_header(USED_IDX, new | old);
    }

    /// Puts a chain's entries in front of the free list. In the area they are there only with the header.
    fn free_entries(&mut self, entries: Entries) {
        self.links[usize::from(entries.last)] = self.free;
        if entries.last == entries.first {
            self.set_head(entries, true);
        } else {
            self.words.store(entries.last, NEXT, NEXT.put(self.free.into()));
        }
        self.free = entries.first;
    }

    /// The first word of a chain's first entry.
    fn set_head(&self, entries: Entries, inflight: bool) {
        let link = NEXT.put(self.link(entries.first).into());
        let word = link | LAST.put(entries.last.into()) | NUM.put(entries.slots.into());
        self.words.store(entries.first, INFLIGHT, word | INFLIGHT.put(inflight.into()));
    }
}

impl InFlightObserver for PackedArea {
    fn popped(&mut self, chains: &[Chain], footprint: &dyn Fn(u16) -> Footprint) {
        for chain in chains {
            let Footprint { slots, id } = footprint(chain.head);
            let mut entries = Entries { first: self.free, last: self.free, slots };
            for slot in 0..slots {
                entries.last = self.free;
                // Read once more than the chain was: this copy is believed by nobody before it has been walked again.
                let [address, rest] = self.ring.descriptor(self.next);
                let id = if slot + 1 == slots { id.into() } else { rest >> 32 };
                self.words.store(self.free, ID, ID.put(id) | FLAGS.put(rest >> 48) | LEN.put(rest));
                self.words.store(self.free, ADDR, address);
                self.free = self.link(self.free);
                self.next = self.next.step(1, self.size);
            }
            self.words.store(entries.first, COUNTER, COUNTER.put(self.counter));
            self.counter += 1;
            self.set_head(entries, true);
            self.chains[usize::from(chain.head)] = entries;
        }
        // From here on they are no free entries, and in flight.
        self.set_free(self.free);
    }

    fn resumed(&mut self, chain: &Chain, again: &Resubmission) {
        if let Resubmission::Packed { entry, descriptors } = again {
            let slots = descriptors.len() as u16;
            let last = (1..slots).fold(*entry, |at, _| self.link(at));
            self.chains[usize::from(chain.head)] = Entries { first: *entry, last, slots };
        }
    }

    fn rewound(&mut self, heads: &[u16]) {
        for &head in heads {
            let entries = self.chains[usize::from(head)];
            self.free_entries(entries);
            self.set_free(self.free);
            self.set_head(entries, false);
            self.next = self.next.back(entries.slots, self.size);
        }
    }

    fn completed(&mut self, heads: &[u16]) {
        self.done.extend(heads.iter().map(|&head| self.chains[usize::from(head)]));
    }

    fn before_publish(&mut self, _: &[u16]) {
        let (free, used) = (self.free, self.used);
        for place in 0..self.done.len() {
            let entries = self.done[place];
            self.free_entries(entries);
            self.used = self.used.step(entries.slots, self.size);
        }
        self.set_free(free);
        self.set_used(used);
    }

    fn after_publish(&mut self, _: &[u16], _: RingState) {
        for &entries in &self.done {
            self.set_head(entries, false);
        }
        self.done.clear();
        self.set_free(self.free);
        self.set_used(self.used);
    }

    fn check(&self) -> Result<(), RingError> {
        self.words.check()
    }
}
