//! The packed ring (2.8): one descriptor ring that both sides write, and two event suppression structures.

mod device;
mod driver;
mod fill;
mod resume;

pub use device::PackedDevice;
pub use driver::PackedDriver;

#[cfg(not(loom))]
use crate::error::RingError;
#[cfg(not(loom))]
use crate::event::Cursor;
use crate::spec::{DESC_F_AVAIL, DESC_F_USED};
#[cfg(not(loom))]
use virtio_memory::Span;
use virtio_memory::{U32Array, U64Array};

/// The three areas as words.
#[derive(Clone, Debug)]
pub struct PackedRing {
    size: u16,
    /// Two words a descriptor: address; length, id and flags. Written by the driver, then by the device, in turn.
    desc: U64Array,
    /// When the device may notify: one word. Written by the driver.
    driver_event: U32Array,
    /// When the driver may notify: one word. Written by the device.
    device_event: U32Array,
}

impl PackedRing {
    /// The ring in three spans of at least the layout's lengths.
    ///
    /// # Errors
    /// A span is too short or unaligned.
    #[cfg(not(loom))]
    pub fn new(size: u16, [descriptor, driver, device]: &[Span; 3]) -> Result<Self, RingError> {
        let find = || Ok((descriptor.u64s(0, 2 * usize::from(size))?, driver.u32s(0, 1)?, device.u32s(0, 1)?));
        let (desc, driver_event, device_event) = find().map_err(RingError::Area)?;
        Ok(PackedRing { size, desc, driver_event, device_event })
    }

    /// A ring for the model checker.
    #[cfg(loom)]
    pub fn model(size: u16) -> Self {
        PackedRing {
            size,
            desc: U64Array::zeroed(2 * usize::from(size)),
            driver_event: U32Array::zeroed(1),
            device_event: U32Array::zeroed(1),
        }
    }

    #[cfg(not(loom))]
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// Both words of a descriptor.
    #[cfg(not(loom))]
    pub(crate) fn descriptor(&self, at: Cursor) -> [u64; 2] {
        [self.address(at.offset), self.word(at.offset)]
    }

    /// Whether a descriptor is available in this lap.
    #[cfg(not(loom))]
    pub(crate) fn is_available(&self, at: Cursor) -> bool {
        is_avail(self.word(at.offset), at.wrap)
    }

    /// Makes a descriptor available in this lap, if it is used: the device's own hand, before it showed that.
    #[cfg(not(loom))]
    pub(crate) fn make_available(&self, at: Cursor) {
        let word = self.word(at.offset);
        if is_used(word, at.wrap) {
            self.publish_word(at.offset, word & !BOTH | u64::from(avail_flags(at.wrap)) << 48);
        }
    }

    /// The second word of a descriptor, before anything else of it is read.
    #[inline(always)]
    fn word(&self, offset: u16) -> u64 {
        self.desc.load_acquire(2 * usize::from(offset) + 1)
    }

    #[inline(always)]
    fn address(&self, offset: u16) -> u64 {
        self.desc.load(2 * usize::from(offset))
    }

    #[inline(always)]
    fn set_address(&self, offset: u16, address: u64) {
        self.desc.store(2 * usize::from(offset), address);
    }

    /// The store that makes a batch visible.
    #[inline(always)]
    fn publish_word(&self, offset: u16, word: u64) {
        self.desc.store_release(2 * usize::from(offset) + 1, word);
    }

    fn shared(&self) -> Vec<(&'static str, u64)> {
        vec![("driver_event", self.driver_event.load(0).into()), ("device_event", self.device_event.load(0).into())]
    }
}

const BOTH: u64 = ((DESC_F_AVAIL | DESC_F_USED) as u64) << 48;

/// The second word of a descriptor.
#[inline(always)]
fn rest(len: u32, id: u16, flags: u16) -> u64 {
    u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48
}

/// The flags that mean "available" in this lap (2.8.1).
#[inline(always)]
fn avail_flags(wrap: bool) -> u16 {
    if wrap { DESC_F_AVAIL } else { DESC_F_USED }
}

/// The flags that mean "used" in this lap (2.8.1).
#[inline(always)]
fn used_flags(wrap: bool) -> u16 {
    if wrap { DESC_F_AVAIL | DESC_F_USED } else { 0 }
}

#[inline(always)]
fn is_avail(word: u64, wrap: bool) -> bool {
    word & BOTH == u64::from(avail_flags(wrap)) << 48
}

#[inline(always)]
fn is_used(word: u64, wrap: bool) -> bool {
    word & BOTH == u64::from(used_flags(wrap)) << 48
}
