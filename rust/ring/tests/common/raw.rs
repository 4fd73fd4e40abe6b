//! The shared words of a ring, to be written by hand: any descriptor, index or flag.

use virtio_memory::{RegionTable, U16Array, U32Array, U64Array};
use virtqueue::event::Cursor;
use virtqueue::spec::{DESC_F_AVAIL, DESC_F_NEXT, DESC_F_USED};
use virtqueue::{Areas, Format, spans};

/// One descriptor as a driver writes it; packed rings add the bits of availability.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    /// Split: `next`. Packed: the buffer id.
    pub tag: u16,
}

pub fn desc(address: u64, len: u32, flags: u16) -> Desc {
    Desc { address, len, flags, tag: 0 }
}

fn rest(len: u32, low: u16, high: u16) -> u64 {
    u64::from(len) | u64::from(low) << 32 | u64::from(high) << 48
}

pub struct RawSplit {
    pub size: u16,
    pub desc: U64Array,
    pub avail: U16Array,
    pub used: U16Array,
    pub elements: U32Array,
    pub avail_event: U16Array,
}

impl RawSplit {
    pub fn new(table: &RegionTable, size: u16, areas: Areas) -> Self {
        let n = usize::from(size);
        let [descriptor, driver, device] = spans(table, Format::Split, size, areas).expect("areas");
        RawSplit {
            size,
            desc: descriptor.u64s(0, 2 * n).expect("desc"),
            avail: driver.u16s(0, 3 + n).expect("avail"),
            used: device.u16s(0, 2).expect("used"),
            elements: device.u32s(4, 2 * n).expect("elements"),
            avail_event: device.u16s(4 + 8 * n, 1).expect("avail_event"),
        }
    }

    pub fn set_desc(&self, index: u16, d: Desc) {
        self.desc.store(2 * usize::from(index), d.address);
        self.desc.store(2 * usize::from(index) + 1, rest(d.len, d.flags, d.tag));
    }

    /// flags and next of a descriptor.
    pub fn desc_flags(&self, index: u16) -> (u16, u16) {
        let word = self.desc.load(2 * usize::from(index) + 1);
        ((word >> 32) as u16, (word >> 48) as u16)
    }

    /// Puts a head at a position of the available ring, and the index behind it.
    pub fn offer(&self, position: u16, head: u16) {
        self.avail.store(2 + usize::from(position % self.size), head);
        self.avail.store_release(1, position.wrapping_add(1));
    }

    pub fn head_at(&self, position: u16) -> u16 {
        self.avail.load(2 + usize::from(position % self.size))
    }

    pub fn avail_idx(&self) -> u16 {
        self.avail.load_acquire(1)
    }

    pub fn set_avail_idx(&self, index: u16) {
        self.avail.store_release(1, index);
    }

    pub fn avail_flags(&self) -> u16 {
        self.avail.load(0)
    }

    pub fn set_avail_flags(&self, flags: u16) {
        self.avail.store(0, flags);
    }

    pub fn used_event(&self) -> u16 {
        self.avail.load(2 + usize::from(self.size))
    }

    pub fn set_used_event(&self, event: u16) {
        self.avail.store(2 + usize::from(self.size), event);
    }

    /// Writes a used element at a position; only the index shows it.
    pub fn set_element(&self, position: u16, id: u32, len: u32) {
        let at = 2 * usize::from(position % self.size);
        self.elements.store(at, id);
        self.elements.store(at + 1, len);
    }

    pub fn element(&self, position: u16) -> (u32, u32) {
        let at = 2 * usize::from(position % self.size);
        (self.elements.load(at), self.elements.load(at + 1))
    }

    pub fn used_idx(&self) -> u16 {
        self.used.load_acquire(1)
    }

    pub fn set_used_idx(&self, index: u16) {
        self.used.store_release(1, index);
    }

    pub fn set_used_flags(&self, flags: u16) {
        self.used.store(0, flags);
    }
}

pub struct RawPacked {
    pub size: u16,
    pub desc: U64Array,
    pub driver_event: U32Array,
    pub device_event: U32Array,
}

impl RawPacked {
    pub fn new(table: &RegionTable, size: u16, areas: Areas) -> Self {
        let [descriptor, driver, device] = spans(table, Format::Packed, size, areas).expect("areas");
        RawPacked {
            size,
            desc: descriptor.u64s(0, 2 * usize::from(size)).expect("desc"),
            driver_event: driver.u32s(0, 1).expect("driver event"),
            device_event: device.u32s(0, 1).expect("device event"),
        }
    }

    /// The place of a running number: 0 is where both sides start.
    pub fn cursor(&self, number: u32) -> Cursor {
        let size = u32::from(self.size);
        Cursor { offset: (number % size) as u16, wrap: (number / size).is_multiple_of(2) }
    }

    /// Writes a descriptor, flags and all.
    pub fn set(&self, offset: u16, d: Desc) {
        self.desc.store(2 * usize::from(offset), d.address);
        self.desc.store_release(2 * usize::from(offset) + 1, rest(d.len, d.tag, d.flags));
    }

    /// Makes a descriptor available at a running number.
    pub fn offer(&self, number: u32, d: Desc) {
        let at = self.cursor(number);
        let bit = if at.wrap { DESC_F_AVAIL } else { DESC_F_USED };
        self.set(at.offset, Desc { flags: d.flags | bit, ..d });
    }

    /// Marks a descriptor used at a running number, with further flags.
    pub fn set_used(&self, number: u32, id: u16, len: u32, flags: u16) {
        let at = self.cursor(number);
        let bits = if at.wrap { DESC_F_AVAIL | DESC_F_USED } else { 0 };
        self.desc.store_release(2 * usize::from(at.offset) + 1, rest(len, id, flags | bits));
    }

    /// (len, id, flags) of a descriptor.
    pub fn get(&self, offset: u16) -> (u32, u16, u16) {
        let word = self.desc.load_acquire(2 * usize::from(offset) + 1);
        (word as u32, (word >> 32) as u16, (word >> 48) as u16)
    }
}

/// A driver played by hand. It writes descriptors one after the other and never waits for any to come back.
pub enum RawDriver {
    Split { ring: RawSplit, next_desc: u16, idx: u16 },
    Packed { ring: RawPacked, next: u32 },
}

impl RawDriver {
    /// Makes one chain available: flags as given, NEXT added to all but the last. The first descriptor is shown last.
    pub fn offer(&mut self, descriptors: &[Desc]) {
        let last = descriptors.len() - 1;
        match self {
            RawDriver::Split { ring, next_desc, idx } => {
                let at = |k: usize| (*next_desc + k as u16) % ring.size;
                for (k, d) in descriptors.iter().enumerate() {
                    let flags = if k < last { d.flags | DESC_F_NEXT } else { d.flags };
                    ring.set_desc(at(k), Desc { flags, tag: if k < last { at(k + 1) } else { d.tag }, ..*d });
                }
                ring.offer(*idx, *next_desc);
                *idx = idx.wrapping_add(1);
                *next_desc = at(descriptors.len());
            }
            RawDriver::Packed { ring, next } => {
                for (k, d) in descriptors.iter().enumerate().rev() {
                    let flags = if k < last { d.flags | DESC_F_NEXT } else { d.flags };
                    ring.offer(*next + k as u32, Desc { flags, ..*d });
                }
                *next += descriptors.len() as u32;
            }
        }
    }
}
