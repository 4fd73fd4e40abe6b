//! The split ring (2.7): descriptor table, available ring, used ring.

mod device;
mod driver;
mod fill;
mod resume;

pub use device::SplitDevice;
pub use driver::SplitDriver;

use crate::error::RingError;
#[cfg(not(loom))]
use virtio_memory::Span;
use virtio_memory::{U16Array, U16Ring, U32Array, U32Ring, U64Array, U64Ring};

/// The three areas as words. The used ring's flags and index are 16 bits wide, its elements two times 32: no word has two widths.
#[derive(Clone, Debug)]
pub struct SplitRing {
    size: u16,
    /// Two words a descriptor: address; length, flags and next. Written by the driver.
    desc: U64Ring,
    /// flags, idx, ring[size], used_event. Written by the driver.
    avail: U16Array,
    /// The ring in it.
    heads: U16Ring,
    /// flags, idx. Written by the device.
    used: U16Array,
    /// id and length of each used element. Written by the device.
    elements: U32Ring,
    /// avail_event. Written by the device.
    avail_event: U16Array,
}

const FLAGS: usize = 0;
const IDX: usize = 1;
const RING: usize = 2;

impl SplitRing {
    /// The ring in three spans of at least the layout's lengths.
    ///
    /// # Errors
    /// A span is too short or unaligned; `SizeNotPowerOfTwo`.
    #[cfg(not(loom))]
    pub fn new(size: u16, [descriptor, driver, device]: &[Span; 3]) -> Result<Self, RingError> {
        let n = usize::from(size);
        let find = || {
            let desc = descriptor.u64s(0, 2 * n)?;
            let avail = driver.u16s(0, 3 + n)?;
            let (used, elements) = (device.u16s(0, 2)?, device.u32s(4, 2 * n)?);
            Ok((desc, avail, used, elements, device.u16s(4 + 8 * n, 1)?))
        };
        Self::from_words(size, find().map_err(RingError::Area)?)
    }

    /// A ring for the model checker.
    #[cfg(loom)]
    pub fn model(size: u16) -> Self {
        let n = usize::from(size);
        let words = (U64Array::zeroed(2 * n), U16Array::zeroed(3 + n), U16Array::zeroed(2), U32Array::zeroed(2 * n), U16Array::zeroed(1));
        Self::from_words(size, words).unwrap()
    }

    fn from_words(size: u16, words: (U64Array, U16Array, U16Array, U32Array, U16Array)) -> Result<Self, RingError> {
        let (desc, avail, used, elements, avail_event) = words;
        let n = usize::from(size);
        let (Some(desc), Some(heads), Some(elements)) = (desc.ring(0, 2 * n), avail.ring(RING, n), elements.ring(0, 2 * n)) else {
            return Err(RingError::SizeNotPowerOfTwo { size: size.into() });
        };
        Ok(SplitRing { size, desc, avail, heads, used, elements, avail_event })
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The used index as it stands there: for set-up only (device-17).
    pub(crate) fn used_index(&self) -> u16 {
        self.used.load_acquire(IDX)
    }

    #[inline(always)]
    fn mask(&self) -> u16 {
        self.size - 1
    }

    /// Where used_event stands in the available ring (2.7.6).
    #[inline(always)]
    fn used_event(&self) -> usize {
        RING + usize::from(self.size)
    }

    fn shared(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("avail.flags", self.avail.load(FLAGS).into()),
            ("avail.idx", self.avail.load(IDX).into()),
            ("used_event", self.avail.load(self.used_event()).into()),
            ("used.flags", self.used.load(FLAGS).into()),
            ("used.idx", self.used.load(IDX).into()),
            ("avail_event", self.avail_event.load(0).into()),
        ]
    }
}

/// The second word of a descriptor.
#[inline(always)]
fn rest(len: u32, flags: u16, next: u16) -> u64 {
    u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48
}
