//! Bytes that lie in several segments, taken piece by piece.

use virtio_memory::{MemoryError, RegionTable};
use virtqueue::{Chain, ChainBatch, Segment};

/// Copies what is behind the header; there is as much as `to` wants.
#[inline(always)]
pub(crate) fn copy_frame(memory: &RegionTable, segments: &[Segment], header: usize, to: &mut [u8]) -> Result<(), MemoryError> {
    let mut source = Pieces::new(segments.iter());
    source.each(header, |_, _| Ok(()))?;
    let mut at = 0;
    source.each(to.len(), |address, len| {
        memory.read(address, &mut to[at..at + len])?;
        at += len;
        Ok(())
    })
}

/// A place in the bytes of segments: those given, or the writable ones of chains that follow each other.
pub(crate) struct Pieces<'a> {
    segments: std::slice::Iter<'a, Segment>,
    chains: Option<(&'a ChainBatch, std::slice::Iter<'a, Chain>)>,
    address: u64,
    left: usize,
}

impl<'a> Pieces<'a> {
    pub fn new(segments: std::slice::Iter<'a, Segment>) -> Self {
        Pieces { segments, chains: None, address: 0, left: 0 }
    }

    pub fn over(batch: &'a ChainBatch, chains: &'a [Chain]) -> Self {
        Pieces { segments: [].iter(), chains: Some((batch, chains.iter())), address: 0, left: 0 }
    }

    pub fn next(&mut self) -> Option<&'a Segment> {
        loop {
            if let Some(segment) = self.segments.next() {
                return Some(segment);
            }
            let (batch, chains) = self.chains.as_mut()?;
            self.segments = batch.writable(chains.next()?).iter();
        }
    }

    /// Calls `step` with each piece of the next `len` bytes, which are there.
    #[inline(always)]
    pub fn each(&mut self, mut len: usize, mut step: impl FnMut(u64, usize) -> Result<(), MemoryError>) -> Result<(), MemoryError> {
        while len > 0 {
            if self.left == 0 {
                let Some(segment) = self.next() else { return Ok(()) };
                (self.address, self.left) = (segment.address, segment.len as usize);
            }
            let count = len.min(self.left);
            step(self.address, count)?;
            self.address = self.address.wrapping_add(count as u64);
            self.left -= count;
            len -= count;
        }
        Ok(())
    }
}
