//! Every "must I notify?" is decided here (2.7.7, 2.7.10, 2.8.10).
//!
//! A decision covers everything published since the last one, so that a batch cannot step over the event index. Packed positions are
//! unrolled to one running number first: one rule serves both formats.

use crate::spec::{EVENT_FLAGS_DESC, EVENT_FLAGS_DISABLE, EVENT_FLAGS_ENABLE};

/// Whether going from `old` to `new` passes `event` (2.7.7.1): all numbers wrap at 2^16.
#[inline(always)]
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The split ring's decision: `since` entries were published since the last one, the newest index is `new`.
#[inline(always)]
pub fn split_event(event: u16, new: u16, since: u32) -> bool {
    // More than the index can tell apart: the event was passed for certain.
    since > u32::from(u16::MAX) || need_event(event, new, new.wrapping_sub(since as u16))
}

/// A place in a packed ring: an offset and the wrap counter there (2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Descriptor, below the ring's size.
    pub offset: u16,
    /// The wrap counter: 1 in the first lap.
    pub wrap: bool,
}

impl Cursor {
    /// Where both sides start (2.8.1).
    pub const START: Cursor = Cursor { offset: 0, wrap: true };

    /// The cursor `slots` (at most `size`) further on.
    #[inline(always)]
    pub fn step(self, slots: u16, size: u16) -> Cursor {
        let next = u32::from(self.offset) + u32::from(slots);
        if next >= u32::from(size) {
            Cursor { offset: (next - u32::from(size)) as u16, wrap: !self.wrap }
        } else {
            Cursor { offset: next as u16, wrap: self.wrap }
        }
    }

    /// The cursor `slots` (at most `size`) before this one.
    #[inline(always)]
    pub fn back(self, slots: u16, size: u16) -> Cursor {
        if slots > self.offset {
            Cursor { offset: (u32::from(self.offset) + u32::from(size) - u32::from(slots)) as u16, wrap: !self.wrap }
        } else {
            Cursor { offset: self.offset - slots, wrap: self.wrap }
        }
    }

    /// Fifteen bits of offset and the wrap counter on top (2.8.14, 2.9).
    #[inline(always)]
    pub fn to_bits(self) -> u16 {
        self.offset | u16::from(self.wrap) << 15
    }

    /// The reverse of [`Cursor::to_bits`].
    #[inline(always)]
    pub fn from_bits(bits: u16) -> Cursor {
        Cursor { offset: bits & 0x7fff, wrap: bits >> 15 == 1 }
    }
}

/// The packed event suppression structure as one 32-bit word: offset and wrap counter below, flags above (2.8.14).
#[inline(always)]
pub fn packed_word(flags: u32, at: Cursor) -> u32 {
    u32::from(at.to_bits()) | flags << 16
}

/// The packed ring's decision: `since` slots were published since the last one, up to `next`; `word` is what the other side wrote.
///
/// A word that makes no sense (DESC without EVENT_IDX, the reserved value 3, an offset beyond the ring) means "notify".
#[inline(always)]
pub fn packed_event(word: u32, next: Cursor, since: u32, size: u16, event_idx: bool) -> bool {
    match (word >> 16) & 3 {
        EVENT_FLAGS_ENABLE => true,
        EVENT_FLAGS_DISABLE => false,
        EVENT_FLAGS_DESC if event_idx => {
            let at = Cursor::from_bits(word as u16);
            if at.offset >= size {
                return true;
            }
            // The running number of the current lap is the offset itself; the other wrap counter means the lap before.
            let event = if at.wrap == next.wrap { at.offset } else { at.offset.wrapping_sub(size) };
            // One lap covers every place that the structure can name.
            let since = since.min(u32::from(size)) as u16;
            need_event(event, next.offset, next.offset.wrapping_sub(since))
        }
        _ => true,
    }
}
