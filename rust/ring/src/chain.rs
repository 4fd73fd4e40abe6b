//! One buffer: its segments, and the bounded walk that finds them (2.7.4, 2.7.5, 2.8.5 to 2.8.7).

use crate::error::RingError;

/// Who may write a segment; always told from the device's view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Direction {
    /// The device reads it.
    #[default]
    Readable = 0,
    /// The device writes it.
    Writable = 1,
}

impl Direction {
    /// `len` if it is writable, else 0; without a branch.
    #[inline(always)]
    pub(crate) fn writable(self, len: u32) -> u32 {
        len & 0u32.wrapping_sub(self as u32)
    }
}

/// One descriptor's span.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Address as the device sees it.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Who may write it.
    pub direction: Direction,
}

impl Segment {
    /// A span that the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Segment { address, len, direction: Direction::Readable }
    }

    /// A span that the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Segment { address, len, direction: Direction::Writable }
    }
}

impl Segment {
    /// Writes all of it; the direction only if it is another one than stood there, since it seldom is.
    #[inline(always)]
    pub(crate) fn set(&mut self, address: u64, len: u32, direction: Direction) {
        (self.address, self.len) = (address, len);
        if self.direction != direction {
            self.direction = direction;
        }
    }
}

/// A chain that the device side popped; its segments lie in the batch it was popped into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// The ring's name for it while it is in flight.
    pub head: u16,
    /// Counts pops: tells this chain from an earlier one of the same head.
    pub serial: u32,
    /// Its readable bytes.
    pub readable: u32,
    /// Its writable bytes.
    pub writable: u32,
    /// Its first segment in the batch, and how many there are.
    pub(crate) first: u32,
    pub(crate) segments: u16,
}

/// What a driver's buffer adds up to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sums {
    pub writable: u32,
}

/// Checks a driver's buffer before anything is written (2.7.4.2, 2.7.5.2, 2.8.17).
pub(crate) fn check_buffer(segments: &[Segment], limit: usize) -> Result<Sums, RingError> {
    if segments.is_empty() {
        return Err(RingError::EmptyBuffer);
    }
    if segments.len() > limit {
        return Err(RingError::TooManySegments { segments: segments.len(), limit });
    }
    let (mut total, mut writable, mut seen_writable) = (0u64, 0u64, false);
    for (index, segment) in segments.iter().enumerate() {
        if segment.len == 0 {
            return Err(RingError::EmptySegment { index });
        }
        total += u64::from(segment.len);
        match segment.direction {
            Direction::Writable => {
                seen_writable = true;
                writable += u64::from(segment.len);
            }
            Direction::Readable if seen_writable => return Err(RingError::SegmentOrder { index }),
            Direction::Readable => {}
        }
    }
    if total > u64::from(u32::MAX) {
        return Err(RingError::BufferTooLong { bytes: total });
    }
    Ok(Sums { writable: writable as u32 })
}

/// Collects the segments of one chain from the far side, bounded in number and in bytes.
pub(crate) struct Walk<'a> {
    out: &'a mut [Segment],
    segments: usize,
    seen: u16,
    limit: u16,
    readable: u64,
    writable: u64,
    writing: bool,
}

impl<'a> Walk<'a> {
    /// `out` holds at least `limit` segments.
    pub(crate) fn new(out: &'a mut [Segment], limit: u16) -> Self {
        Walk { out, segments: 0, seen: 0, limit, readable: 0, writable: 0, writing: false }
    }

    /// One more descriptor of data. Empty ones count, but leave no segment.
    pub(crate) fn descriptor(&mut self, address: u64, len: u32, direction: Direction) -> Result<(), RingError> {
        self.seen += 1;
        if self.seen > self.limit {
            return Err(RingError::ChainTooLong { limit: self.limit });
        }
        match direction {
            Direction::Writable => {
                self.writing = true;
                self.writable += u64::from(len);
            }
            Direction::Readable if self.writing => return Err(RingError::ReadableAfterWritable { position: self.seen - 1 }),
            Direction::Readable => self.readable += u64::from(len),
        }
        let total = self.readable + self.writable;
        if total > u64::from(u32::MAX) {
            return Err(RingError::ChainTooManyBytes { bytes: total });
        }
        if len == 0 {
            return Ok(()); // accepted and skipped
        }
        let Some(place) = self.out.get_mut(self.segments) else {
            return Err(RingError::ChainTooLong { limit: self.limit });
        };
        *place = Segment { address, len, direction };
        self.segments += 1;
        Ok(())
    }

    /// How many entries an indirect table may still have.
    pub(crate) fn room(&self) -> u16 {
        self.limit - self.seen
    }

    /// The chain's sums; head, serial and place are the caller's.
    pub(crate) fn finish(self, head: u16, serial: u32, first: u32) -> Chain {
        Chain { head, serial, readable: self.readable as u32, writable: self.writable as u32, first, segments: self.segments as u16 }
    }
}
