//! A split queue's region.

use super::area::split::{COUNTER, INFLIGHT, LAST_BATCH_HEAD, NEXT, USED_IDX};
use super::area::{DESC_NUM, FEATURES, HEADER_VERSION, VERSION, Words, in_order};
use super::{Footprint, InFlightObserver, Opened, Resubmission};
use crate::chain::Chain;
use crate::error::RingError;
use crate::event::Cursor;
use crate::options::Format;
use crate::ring::RingState;
use crate::split::SplitRing;
use virtio_memory::Span;

/// Writes a split queue's region.
#[derive(Debug)]
pub struct SplitArea {
    words: Words,
    size: u16,
    counter: u64,
    last_batch_head: u16,
    used: u16,
}

impl SplitArea {
    /// Begins a new region, for a ring that is set up with this base, or goes on with a predecessor's.
    ///
    /// # Errors
    /// `Area` if the span is too short or unaligned; `InFlightArea`, `InFlightIndex` if what stands there cannot be.
    pub fn open(span: &Span, ring: &SplitRing, base: Option<u16>) -> Result<Opened<Self>, RingError> {
        let size = ring.size();
        let words = Words::new(span, Format::Split, size)?;
        let mut area = SplitArea { words, size, counter: 0, last_batch_head: 0, used: 0 };
        if !area.words.begun(size)? {
            area.used = if base.is_some() { ring.used_index() } else { 0 };
            for entry in 0..size {
                area.words.store(entry, INFLIGHT, 0);
            }
            area.words.set_header(FEATURES, 0);
            area.set_header();
            return Ok(Opened { area, resume: None, left: [].into() });
        }
        let header = area.words.header(USED_IDX);
        area.last_batch_head = LAST_BATCH_HEAD.get(header) as u16;
        area.used = ring.used_index();
        area.finish_batch(USED_IDX.get(header) as u16)?;
        let entries = (0..size).filter(|&entry| INFLIGHT.get(area.words.load(entry, INFLIGHT)) != 0);
        let (heads, counter) = in_order(entries.map(|entry| (area.words.load(entry, COUNTER), entry)).collect())?;
        area.counter = counter;
        area.words.check()?;
        let resume = Cursor { offset: area.used, wrap: false };
        let left = heads.into_iter().map(|head| Resubmission::Split { head }).collect();
        Ok(Opened { area, resume: Some(RingState { avail: resume, used: resume }), left })
    }

    /// The predecessor published a batch, and died before it had taken it out: what its list names is not in flight.
    fn finish_batch(&mut self, told: u16) -> Result<(), RingError> {
        let count = self.used.wrapping_sub(told);
        if count > self.size {
            return Err(RingError::InFlightIndex { used: self.used, told, behind: count, size: self.size });
        }
        let mut seen = vec![false; self.size.into()];
        let mut at = self.last_batch_head;
        for _ in 0..count {
            match seen.get_mut(usize::from(at)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(RingError::InFlightLink { what: "last batch", index: at, size: self.size }),
            }
            let word = self.words.load(at, NEXT);
            let next = NEXT.get(word);
            self.words.store(at, NEXT, NEXT.put(next));
            at = next as u16;
        }
        self.set_header();
        Ok(())
    }

    fn set_header(&self) {
        let version = HEADER_VERSION.put(VERSION) | DESC_NUM.put(self.size.into());
        self.words.set_header(USED_IDX, version | LAST_BATCH_HEAD.put(self.last_batch_head.into()) | USED_IDX.put(self.used.into()));
    }
}

impl InFlightObserver for SplitArea {
    fn popped(&mut self, chains: &[Chain], _: &dyn Fn(u16) -> Footprint) {
        for chain in chains {
            self.words.store(chain.head, COUNTER, COUNTER.put(self.counter));
            self.counter += 1;
            self.words.store(chain.head, INFLIGHT, INFLIGHT.put(1));
        }
    }

    fn resumed(&mut self, _: &Chain, _: &Resubmission) {} // it stands there already

    fn rewound(&mut self, heads: &[u16]) {
        for &head in heads {
            self.words.store(head, INFLIGHT, 0);
        }
    }

    fn completed(&mut self, _: &[u16]) {}

    fn before_publish(&mut self, heads: &[u16]) {
        for &head in heads {
            self.words.store(head, NEXT, INFLIGHT.put(1) | NEXT.put(self.last_batch_head.into()));
            self.last_batch_head = head;
        }
        self.set_header();
    }

    fn after_publish(&mut self, heads: &[u16], state: RingState) {
        // The list stays readable until the index says that it is done with.
        let mut before = 0;
        for &head in heads {
            self.words.store(head, NEXT, NEXT.put(before));
            before = head.into();
        }
        self.used = state.used.offset;
        self.set_header();
    }

    fn check(&self) -> Result<(), RingError> {
        self.words.check()
    }
}
