//! Two ends of one ring over a shared mapping, and every shared word within reach, so that a test can play either end by hand.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod raw;

use raw::{RawDriver, RawPacked, RawSplit};
use std::sync::Arc;
use virtio_memory::{GuestMemory, HugePages, Mapping, Region};
use virtqueue::packed::{PackedDevice, PackedDriver, PackedRing};
use virtqueue::split::{SplitDevice, SplitDriver, SplitRing};
use virtqueue::{
    AnyDevice, AnyDriver, Areas, Buffer, Chain, ChainBatch, Completion, DeviceQueue, Direction, DriverQueue, Form, Format, IndirectTables,
    RingError, RingFeatures, RingState, Segment, Used, check_chain_limit, check_size, layout, spans,
};

/// Where the device sees the mapping's first byte.
pub const BASE: u64 = 0x10_0000;
/// Descriptors in one of the driver's indirect tables.
pub const TABLE: u16 = 8;
/// Bytes of the data area.
pub const DATA: u64 = 64 * 1024;

pub const BOTH: [Format; 2] = [Format::Split, Format::Packed];

pub const PLAIN: RingFeatures = RingFeatures { event_idx: false, indirect: false, in_order: false };
pub const EVENT_IDX: RingFeatures = RingFeatures { event_idx: true, ..PLAIN };
pub const INDIRECT: RingFeatures = RingFeatures { indirect: true, ..PLAIN };
pub const IN_ORDER: RingFeatures = RingFeatures { in_order: true, ..PLAIN };

pub type Driver = DriverQueue<AnyDriver>;
pub type Device = DeviceQueue<AnyDevice>;

/// Every combination of the three features.
pub fn all_features() -> impl Iterator<Item = RingFeatures> {
    (0..8).map(|bits| RingFeatures { event_idx: bits & 1 != 0, indirect: bits & 2 != 0, in_order: bits & 4 != 0 })
}

/// Memory with room for one ring, its driver's tables and some data.
pub struct Rig {
    pub format: Format,
    pub size: u16,
    pub features: RingFeatures,
    pub mapping: Arc<Mapping>,
    pub memory: GuestMemory,
    pub areas: Areas,
    /// The device's address of the driver's tables, and of the data area.
    pub tables: u64,
    pub data: u64,
    /// The device's bound on a chain; none means the ring's size.
    pub chain_limit: Option<u64>,
}

impl Rig {
    pub fn new(format: Format, size: u16, features: RingFeatures) -> Self {
        let size = check_size(format, size.into(), 32768).expect("size");
        let mut end = BASE;
        let mut place = |len: u64| {
            let at = end;
            end = (end + len).next_multiple_of(64);
            at
        };
        let [descriptor, driver, device] = layout(format, size).map(|(len, _)| place(len));
        let tables = place(if features.indirect { 16 * u64::from(TABLE) * u64::from(size) } else { 0 });
        let data = place(DATA);
        let mapping = Arc::new(Mapping::memfd((end - BASE) as usize, "ring", HugePages::Off).expect("memfd"));
        let memory = GuestMemory::new();
        memory.add(Region::new(BASE, mapping.len() as u64, mapping.clone(), 0).expect("region")).expect("add");
        let areas = Areas { descriptor, driver, device };
        Rig { format, size, features, mapping, memory, areas, tables, data, chain_limit: None }
    }

    /// The same ring, in a table of its own, with another bound on chains.
    pub fn with_chain_limit(mut self, limit: u64) -> Self {
        self.chain_limit = Some(limit);
        self
    }

    pub fn driver(&self) -> Driver {
        DriverQueue::new(self.driver_ring())
    }

    /// The driver's ring without its queue.
    pub fn driver_ring(&self) -> AnyDriver {
        let table = self.memory.table();
        let spans = spans(&table, self.format, self.size, self.areas).expect("areas");
        let tables = self.features.indirect.then(|| {
            let words = IndirectTables::words(self.size, TABLE);
            let span = table.span(self.tables, 8 * words as u64).expect("tables");
            IndirectTables::new(span.u64s(0, words).expect("aligned"), self.tables, TABLE)
        });
        match self.format {
            Format::Split => AnyDriver::Split(SplitDriver::new(SplitRing::new(self.size, &spans).expect("ring"), self.features, tables)),
            Format::Packed => {
                AnyDriver::Packed(PackedDriver::new(PackedRing::new(self.size, &spans).expect("ring"), self.features, tables))
            }
        }
    }

    pub fn device(&self) -> Device {
        self.restored(None).expect("device")
    }

    /// A device that goes on where another one stopped. A split queue's state is its avail position alone.
    pub fn restored(&self, base: Option<RingState>) -> Result<Device, RingError> {
        Ok(DeviceQueue::new(self.device_ring(base)?, self.memory.view()))
    }

    /// The device's ring without its queue.
    pub fn device_ring(&self, base: Option<RingState>) -> Result<AnyDevice, RingError> {
        let table = self.memory.table();
        let spans = spans(&table, self.format, self.size, self.areas)?;
        let limit = check_chain_limit(self.size, self.chain_limit)?;
        Ok(match self.format {
            Format::Split => {
                let ring = SplitRing::new(self.size, &spans).expect("ring");
                AnyDevice::Split(SplitDevice::new(ring, self.features, self.areas, limit, base.map(|state| state.avail.offset))?)
            }
            Format::Packed => {
                let ring = PackedRing::new(self.size, &spans).expect("ring");
                AnyDevice::Packed(PackedDevice::new(ring, self.features, self.areas, limit, base)?)
            }
        })
    }

    pub fn raw_split(&self) -> RawSplit {
        RawSplit::new(&self.memory.table(), self.size, self.areas)
    }

    pub fn raw_packed(&self) -> RawPacked {
        RawPacked::new(&self.memory.table(), self.size, self.areas)
    }

    /// A driver played by hand, of this rig's format.
    pub fn raw_driver(&self) -> RawDriver {
        match self.format {
            Format::Split => RawDriver::Split { ring: self.raw_split(), next_desc: 0, idx: 0 },
            Format::Packed => RawDriver::Packed { ring: self.raw_packed(), next: 0 },
        }
    }

    /// Bytes of the data area.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.table().read(address, &mut bytes).expect("mapped");
        bytes
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.table().write(address, bytes).expect("mapped");
    }
}

/// Runs a test body for a small ring of each format.
pub fn each(features: RingFeatures, mut body: impl FnMut(Rig)) {
    for format in BOTH {
        body(Rig::new(format, 8, features));
    }
}

/// A buffer of one segment.
pub fn buffer(token: u64, len: u32, direction: Direction) -> Buffer {
    Buffer { token, address: BASE, len, direction }
}

/// Adds `count` writable buffers of 16 bytes with tokens from `first`, publishes them, and tells whether the device is to be notified.
pub fn publish(driver: &mut Driver, first: u64, count: usize) -> bool {
    let buffers: Vec<Buffer> = (first..first + count as u64).map(|token| buffer(token, 16, Direction::Writable)).collect();
    assert_eq!(driver.add_batch(&buffers), Ok(count));
    driver.publish()
}

/// Adds a chain and publishes it.
pub fn publish_chain(driver: &mut Driver, token: u64, segments: &[Segment], form: Form) -> bool {
    driver.add(token, segments, form).expect("added");
    driver.publish()
}

/// Pops up to `limit` chains.
pub fn pop(device: &mut Device, limit: usize) -> Vec<Chain> {
    pop_with_segments(device, limit).into_iter().map(|(chain, _)| chain).collect()
}

/// Pops up to `limit` chains, with their segments.
pub fn pop_with_segments(device: &mut Device, limit: usize) -> Vec<(Chain, Vec<Segment>)> {
    let mut batch = device.batch(limit);
    let count = device.pop_batch(&mut batch).expect("popped");
    assert_eq!(count, batch.chains().len());
    batch.chains().iter().map(|chain| (*chain, batch.segments(chain).to_vec())).collect()
}

/// The error that a pop meets; nothing precedes it.
pub fn pop_error(device: &mut Device) -> RingError {
    let mut batch = device.batch(4);
    device.pop_batch(&mut batch).expect_err("the driver broke a rule")
}

/// The completion of a chain.
pub fn done(chain: &Chain, len: u32) -> Completion {
    Completion { head: chain.head, serial: chain.serial, len }
}

/// Completes a slice of chains.
pub fn give_back(device: &mut Device, completions: &[Completion]) -> Result<(), RingError> {
    device.complete_batch(completions)
}

/// Completes chains, filled, and publishes them; tells whether the driver is to be notified.
pub fn complete(device: &mut Device, chains: &[Chain]) -> bool {
    let completions: Vec<Completion> = chains.iter().map(|chain| done(chain, chain.writable)).collect();
    give_back(device, &completions).expect("in flight");
    device.publish()
}

/// Takes all used chains, as (token, len).
pub fn reclaim(driver: &mut Driver) -> Vec<(u64, u32)> {
    let mut out = vec![Used::default(); usize::from(driver.size()) + 1];
    let count = driver.pop_used_batch(&mut out).expect("used");
    out[..count].iter().map(|used| (used.token, used.len)).collect()
}

/// The error that taking used chains meets; nothing precedes it.
pub fn reclaim_error(driver: &mut Driver) -> RingError {
    driver.pop_used_batch(&mut [Used::default(); 4]).expect_err("the device broke a rule")
}

/// The device met this error, latched it, told it once, and stands still.
pub fn assert_device_broken(device: &mut Device, error: &RingError) {
    assert!(error.breaks(), "{error}");
    assert!(matches!(error.fault(), virtqueue::Fault::Driver | virtqueue::Fault::Memory));
    assert_eq!(device.broken(), Some(error));
    let mut batch: ChainBatch = device.batch(4);
    for _ in 0..3 {
        assert_eq!(device.pop_batch(&mut batch), Ok(0));
    }
    assert!(!device.publish());
    assert!(device.arm(), "whoever waits is woken");
    device.break_with(RingError::Broken);
    assert_eq!(device.broken(), Some(error), "the first error stays");
}

/// The driver met this error, latched it, told it once, stands still, and gives its buffers back at reset.
pub fn assert_driver_broken(driver: &mut Driver, error: &RingError, outstanding: &[u64]) {
    assert!(error.breaks(), "{error}");
    assert_eq!(error.fault(), virtqueue::Fault::Device);
    assert_eq!(driver.broken(), Some(error));
    let mut out = [Used::default(); 4];
    for _ in 0..3 {
        assert_eq!(driver.pop_used_batch(&mut out), Ok(0));
    }
    assert_eq!(driver.add_batch(&[buffer(99, 1, Direction::Readable)]), Ok(0));
    assert_eq!(driver.add(99, &[Segment::readable(BASE, 1)], Form::Direct), Err(RingError::Broken));
    assert!(!driver.publish());
    assert!(driver.arm(), "whoever waits is woken");
    let mut tokens = driver.reset();
    tokens.sort_unstable();
    assert_eq!(tokens, outstanding);
    assert_eq!(driver.reset(), [], "handed back once");
    assert_eq!(driver.broken(), Some(error), "the first error stays");
}
