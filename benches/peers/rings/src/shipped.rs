//! The shipped rings behind the same two traits: every check on, tokens kept, notifications decided.

use crate::pair::{Device, Driver};
use std::sync::Arc;
use virtio_memory::{GuestMemory, HugePages, Mapping, Region};
use virtqueue::*;

/// Driver's half.
pub struct ShippedDriver<R> {
    queue: DriverQueue<R>,
    buffers: Vec<Buffer>,
    used: Vec<Used>,
    sum: u64,
}

/// Device's half.
pub struct ShippedDevice<R> {
    queue: DeviceQueue<R>,
    batch: ChainBatch,
    sum: u64,
}

/// The format, made from its words.
pub fn make(format: Format, size: usize, in_order: bool, burst: usize) -> (ShippedDriver<AnyDriver>, ShippedDevice<AnyDevice>) {
    let features = RingFeatures { event_idx: true, indirect: false, in_order };
    let size = size as u16;
    let mapping = Arc::new(Mapping::memfd(1 << 20, "rings", HugePages::Off).unwrap());
    let guest = GuestMemory::new();
    guest.add(Region::new(0x10_0000, 1 << 20, mapping, 0).unwrap()).unwrap();
    let areas = Areas { descriptor: 0x10_0000, driver: 0x12_0000, device: 0x13_0000 };
    let spans = spans(&guest.table(), format, size, areas).unwrap();
    let limit = check_chain_limit(size, None).unwrap();
    let (driver, device) = match format {
        Format::Split => {
            let ring = split::SplitRing::new(size, &spans).unwrap();
            let driver = split::SplitDriver::new(ring.clone(), features, None);
            let device = split::SplitDevice::new(ring, features, areas, limit, None).unwrap();
            (AnyDriver::Split(driver), AnyDevice::Split(device))
        }
        Format::Packed => {
            let ring = packed::PackedRing::new(size, &spans).unwrap();
            let driver = packed::PackedDriver::new(ring.clone(), features, None);
            let device = packed::PackedDevice::new(ring, features, areas, limit, None).unwrap();
            (AnyDriver::Packed(driver), AnyDevice::Packed(device))
        }
    };
    let device = DeviceQueue::new(device, guest.view());
    let buffer = |k: usize| Buffer { token: k as u64, address: 0x10_0000 + 2048 * k as u64, len: 64, direction: Direction::Readable };
    let driver = ShippedDriver {
        queue: DriverQueue::new(driver),
        buffers: (0..burst).map(buffer).collect(),
        used: vec![Used::default(); usize::from(size)],
        sum: 0,
    };
    let batch = device.batch(burst);
    (driver, ShippedDevice { queue: device, batch, sum: 0 })
}

impl<R: DriverRing> Driver for ShippedDriver<R> {
    fn room(&self) -> usize {
        self.queue.free().into()
    }

    #[inline(always)]
    fn add(&mut self, count: usize) {
        assert_eq!(self.queue.add_batch(&self.buffers[..count]).unwrap(), count);
        self.queue.publish();
    }

    #[inline(always)]
    fn reclaim(&mut self) -> usize {
        let count = self.queue.pop_used_batch(&mut self.used).unwrap();
        for used in &self.used[..count] {
            self.sum = self.sum.wrapping_add(used.token + u64::from(used.len));
        }
        count
    }

    fn sum(&self) -> u64 {
        self.sum
    }
}

impl<R: DeviceRing> Device for ShippedDevice<R> {
    #[inline(always)]
    fn serve(&mut self, limit: usize) -> usize {
        self.batch.clear();
        let count = self.queue.pop_batch(&mut self.batch).unwrap();
        debug_assert!(count <= limit);
        if count == 0 {
            return 0;
        }
        let mut sum = self.sum;
        for (_, segments) in self.batch.iter() {
            sum = sum.wrapping_add(segments[0].address).wrapping_add(segments[0].len.into());
        }
        self.sum = sum;
        self.queue.complete_batch(Unwritten(&self.batch)).unwrap();
        self.queue.publish();
        count
    }

    fn sum(&self) -> u64 {
        self.sum
    }
}
