//! A driver's and a device's queue over one memory, with a pool for each side.
#![allow(dead_code)] // each test file uses a part

use std::sync::Arc;
use virtio_memory::{Allocator, BufferPool, Burst, GuestMemory, HugePages, Mapping, Region, Row};
use virtio_net_path::{BurstError, DeviceBursts, DriverBursts};
use virtqueue::packed::{PackedDevice, PackedDriver, PackedRing};
use virtqueue::split::{SplitDevice, SplitDriver, SplitRing};
use virtqueue::{AnyDevice, AnyDriver, Areas, DeviceQueue, Direction, DriverQueue, Format, IndirectTables, RingFeatures, layout, spans};

/// Where the device sees the memory.
pub const BASE: u64 = 1 << 32;
pub const SLOT_SIZE: usize = 256;
/// Bytes of a slot after the headroom.
pub const PAYLOAD: usize = SLOT_SIZE - 64;
pub const BOTH: [Format; 2] = [Format::Split, Format::Packed];

pub struct Link {
    pub memory: Arc<Mapping>,
    pub guest: GuestMemory,
    pub driver: DriverQueue<AnyDriver>,
    pub device: DeviceQueue<AnyDevice>,
    pub from_driver: DriverBursts,
    pub to_device: DeviceBursts,
    /// The driver's pool, in the memory that both see, and the device's, in its own.
    pub pool: Arc<BufferPool>,
    pub far: Arc<BufferPool>,
}

pub fn link(format: Format, size: u16, slots: u32, indirect: bool) -> Link {
    let memory = Arc::new(Mapping::memfd(1 << 20, "test", HugePages::Off).unwrap());
    let guest = GuestMemory::new();
    guest.add(Region::new(BASE, memory.len() as u64, memory.clone(), 0).unwrap()).unwrap();
    let mut room = Allocator::new(memory.len());
    let at = layout(format, size).map(|(len, _)| BASE + room.allocate(len as usize, 64).unwrap() as u64);
    let areas = Areas { descriptor: at[0], driver: at[1], device: at[2] };
    let features = RingFeatures { indirect, ..RingFeatures::default() };
    let view = guest.view();
    let spans = spans(&view, format, size, areas).unwrap();
    let tables = indirect.then(|| {
        let words = IndirectTables::words(size, 4);
        let offset = room.allocate(8 * words, 64).unwrap();
        IndirectTables::new(memory.span(offset, 8 * words).unwrap().u64s(0, words).unwrap(), BASE + offset as u64, 4)
    });
    let (driver, device) = match format {
        Format::Split => {
            let ring = SplitRing::new(size, &spans).unwrap();
            let device = SplitDevice::new(ring.clone(), features, areas, size, None).unwrap();
            (AnyDriver::Split(SplitDriver::new(ring, features, tables)), AnyDevice::Split(device))
        }
        Format::Packed => {
            let ring = PackedRing::new(size, &spans).unwrap();
            let device = PackedDevice::new(ring.clone(), features, areas, size, None).unwrap();
            (AnyDriver::Packed(PackedDriver::new(ring, features, tables)), AnyDevice::Packed(device))
        }
    };
    let offset = room.allocate(slots as usize * SLOT_SIZE, 64).unwrap();
    let pool = Arc::new(BufferPool::new(memory.clone(), offset, slots, SLOT_SIZE).unwrap());
    let own = Arc::new(Mapping::memfd(1 << 20, "far", HugePages::Off).unwrap());
    let far = Arc::new(BufferPool::new(own, 0, slots, SLOT_SIZE).unwrap());
    let device = DeviceQueue::new(device, view);
    let to_device = DeviceBursts::new(&device);
    let from_driver = DriverBursts::new(memory.clone(), BASE, if indirect { 4 } else { 0 });
    Link { memory, guest, driver: DriverQueue::new(driver), device, from_driver, to_device, pool, far }
}

impl Link {
    /// A burst of the driver's pool with room for `capacity` rows.
    pub fn near_burst(&self, capacity: usize) -> Burst {
        Burst::new(self.pool.clone(), capacity).unwrap()
    }

    /// A burst of the device's pool.
    pub fn far_burst(&self, capacity: usize) -> Burst {
        Burst::new(self.far.clone(), capacity).unwrap()
    }

    pub fn add(&mut self, burst: &Burst, direction: Direction) -> Result<usize, BurstError> {
        self.from_driver.bind(burst, self.driver.outstanding().into())?;
        let added = self.from_driver.add(&mut self.driver, &mut burst.pool().lock(), burst, direction)?;
        self.driver.publish();
        Ok(added)
    }

    pub fn pop_used(&mut self, burst: &Burst) -> Result<usize, BurstError> {
        self.from_driver.bind(burst, self.driver.outstanding().into())?;
        self.from_driver.pop_used(&mut self.driver, &mut burst.pool().lock(), burst)
    }

    pub fn complete(&mut self, burst: &Burst) -> Result<usize, BurstError> {
        self.to_device.bind(&self.device, burst)?;
        let completed = self.to_device.complete(&mut self.device, &mut burst.pool().lock(), burst)?;
        self.device.publish();
        Ok(completed)
    }

    pub fn pop(&mut self, burst: &Burst) -> Result<usize, BurstError> {
        self.complete(burst)?;
        let popped = self.to_device.pop(&mut self.device, &mut burst.pool().lock(), burst)?;
        self.device.publish();
        Ok(popped)
    }

    pub fn fill(&mut self, burst: &Burst) -> Result<usize, BurstError> {
        let filled = self.to_device.fill(&mut self.device, &mut burst.pool().lock(), burst)?;
        self.device.publish();
        Ok(filled)
    }
}

/// Fills the burst with new slots that hold these packets; a longer one takes several rows.
pub fn write(burst: &Burst, packets: &[&[u8]]) {
    let pool = burst.pool();
    let mut state = pool.lock();
    burst.give_back(&mut state);
    let mut row = 0;
    for packet in packets {
        let mut pieces = packet.chunks(PAYLOAD).peekable();
        while let Some(piece) = pieces.next() {
            let slot = burst.take(&mut state).expect("a free slot");
            pool.mapping().write(pool.slot_offset(slot) + 64, piece).unwrap();
            burst.set_row(row, Row { slot, offset: 64, length: piece.len() as u32, more: pieces.peek().is_some() });
            row += 1;
        }
    }
    burst.set_count(row).unwrap();
}

/// The packets that stand in the burst.
pub fn read(burst: &Burst) -> Vec<Vec<u8>> {
    let (pool, mut packets, mut packet) = (burst.pool(), Vec::new(), Vec::new());
    for index in 0..burst.count() {
        let row = burst.row(index);
        let mut piece = vec![0; row.length as usize];
        pool.mapping().read(pool.slot_offset(row.slot as u32) + row.offset as usize, &mut piece).unwrap();
        packet.extend(piece);
        if row.more == 0 {
            packets.push(std::mem::take(&mut packet));
        }
    }
    packets
}

/// A packet of `len` bytes that differ.
pub fn packet(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + seed * 31 + i / 251) as u8).collect()
}
