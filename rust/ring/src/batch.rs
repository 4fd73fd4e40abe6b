//! Room for a batch of popped chains, made once and used again.

use crate::chain::{Chain, Direction, Segment};

/// Chains and their segments. A pop fills it from the start.
#[derive(Debug)]
pub struct ChainBatch {
    chains: Box<[Chain]>,
    /// How many chains may be in, at most as many as fit.
    limit: usize,
    count: usize,
    segments: Box<[Segment]>,
    segments_used: usize,
    /// Each chain, in or not, says that its segment is the one of its own place. So it is but for chains of more segments or of none, and
    /// those after them: then the places must be written.
    even: bool,
}

impl ChainBatch {
    /// Room for `capacity` chains, of which the longest has `chain_limit` segments.
    pub fn new(capacity: usize, chain_limit: u16) -> Self {
        let capacity = capacity.max(1);
        ChainBatch {
            chains: (0..capacity as u32).map(|first| Chain { first, segments: 1, ..Chain::default() }).collect(),
            limit: capacity,
            count: 0,
            segments: vec![Segment::default(); capacity + usize::from(chain_limit)].into(),
            segments_used: 0,
            even: true,
        }
    }

    /// Makes every place say so again.
    #[cold]
    fn even_out(&mut self) {
        for (chain, first) in self.chains.iter_mut().zip(0..) {
            (chain.first, chain.segments) = (first, 1);
        }
        self.even = true;
    }

    /// How many chains fit.
    pub fn capacity(&self) -> usize {
        self.chains.len()
    }

    /// Forgets all chains (they stay in flight).
    #[inline]
    pub fn clear(&mut self) {
        self.clear_for(usize::MAX);
    }

    /// Forgets all chains, and takes no more than this many until it is cleared again.
    #[inline]
    pub fn clear_for(&mut self, most: usize) {
        self.limit = most.min(self.chains.len());
        self.count = 0;
        self.segments_used = 0;
        if !self.even {
            self.even_out();
        }
    }

    /// The chains that are in.
    #[inline]
    pub fn chains(&self) -> &[Chain] {
        &self.chains[..self.count]
    }

    /// Each chain with its segments.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = (&Chain, &[Segment])> {
        let mut rest = &self.segments[..self.segments_used];
        self.chains().iter().map(move |chain| {
            let (segments, behind) = rest.split_at(usize::from(chain.segments).min(rest.len()));
            rest = behind;
            (chain, segments)
        })
    }

    /// A chain's segments, readable ones first.
    #[inline]
    pub fn segments(&self, chain: &Chain) -> &[Segment] {
        let first = chain.first as usize;
        &self.segments[first..first + usize::from(chain.segments)]
    }

    /// A chain's readable segments.
    #[inline]
    pub fn readable(&self, chain: &Chain) -> &[Segment] {
        let segments = self.segments(chain);
        &segments[..readable_count(segments)]
    }

    /// A chain's writable segments.
    #[inline]
    pub fn writable(&self, chain: &Chain) -> &[Segment] {
        let segments = self.segments(chain);
        &segments[readable_count(segments)..]
    }

    /// How many more chains fit.
    #[inline(always)]
    pub(crate) fn room(&self) -> usize {
        self.limit - self.count
    }

    /// Whether one more chain of up to `limit` segments fits.
    pub(crate) fn has_room(&self, limit: u16) -> bool {
        self.room() > 0 && self.segments.len() - self.segments_used >= usize::from(limit)
    }

    /// How many segments fit in all.
    pub(crate) fn segment_capacity(&self) -> usize {
        self.segments.len()
    }

    /// Whether an empty batch holds a chain of `limit` segments.
    #[inline(always)]
    pub(crate) fn fits(&self, limit: u16) -> bool {
        self.segments.len() >= usize::from(limit)
    }

    /// Where the next chain's segments go, and how many are already there.
    #[inline(always)]
    pub(crate) fn tail(&mut self) -> (&mut [Segment], u32) {
        let used = self.segments_used;
        (&mut self.segments[used..], used as u32)
    }

    /// Room for chains of one segment, at most `most`, such that a chain of `limit` segments still fits behind all but the last. Two slices of
    /// one length. What is written there is in with [`ChainBatch::grow`], which also says where the chains' segments are.
    #[inline(always)]
    pub(crate) fn short_room(&mut self, limit: u16, most: usize) -> (&mut [Chain], &mut [Segment]) {
        let behind = (self.segments.len() - self.segments_used + 1).saturating_sub(usize::from(limit));
        let n = (self.limit - self.count).min(behind).min(most);
        (&mut self.chains[self.count..][..n], &mut self.segments[self.segments_used..][..n])
    }

    /// So many chains of one segment were written to that room.
    #[inline(always)]
    pub(crate) fn grow(&mut self, count: usize) {
        if !self.even {
            self.place(count);
        }
        self.count += count;
        self.segments_used += count;
    }

    /// Says of the next chains that each has one segment, and which.
    #[cold]
    fn place(&mut self, count: usize) {
        for (chain, first) in self.chains[self.count..][..count].iter_mut().zip(self.segments_used as u32..) {
            (chain.first, chain.segments) = (first, 1);
        }
    }

    /// A chain whose segments were written to the tail.
    pub(crate) fn push(&mut self, chain: Chain) {
        self.chains[self.count] = chain;
        self.even &= chain.first as usize == self.count && chain.segments == 1;
        self.segments_used += usize::from(chain.segments);
        self.count += 1;
    }

    /// Takes the newest chains out again.
    pub(crate) fn truncate(&mut self, count: usize) {
        if count < self.count {
            self.count = count;
            self.segments_used = self.chains[..count].last().map_or(0, |c| c.first as usize + usize::from(c.segments));
        }
    }
}

/// How many segments are readable; they come first.
#[inline(always)]
fn readable_count(segments: &[Segment]) -> usize {
    segments.iter().position(|s| s.direction == Direction::Writable).unwrap_or(segments.len())
}
