//! One thread, both halves of a ring, all checks on: add, pop, complete and reclaim, by format, features and burst.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::Arc;
use virtio_memory::{GuestMemory, HugePages, Mapping, Region};
use virtqueue::*;

const BASE: u64 = 0x10_0000;
const SIZE: u16 = 256;

fn pair(format: Format, features: RingFeatures) -> (DriverQueue<AnyDriver>, DeviceQueue<AnyDevice>) {
    let mapping = Arc::new(Mapping::memfd(1 << 20, "ring", HugePages::Off).unwrap());
    let guest = GuestMemory::new();
    guest.add(Region::new(BASE, 1 << 20, mapping, 0).unwrap()).unwrap();
    let areas = Areas { descriptor: BASE, driver: BASE + 0x8000, device: BASE + 0xa000 };
    let spans = spans(&guest.table(), format, SIZE, areas).unwrap();
    let (driver, device) = match format {
        Format::Split => {
            let ring = split::SplitRing::new(SIZE, &spans).unwrap();
            let device = split::SplitDevice::new(ring.clone(), features, areas, SIZE, None).unwrap();
            (AnyDriver::Split(split::SplitDriver::new(ring, features, None)), AnyDevice::Split(device))
        }
        Format::Packed => {
            let ring = packed::PackedRing::new(SIZE, &spans).unwrap();
            let device = packed::PackedDevice::new(ring.clone(), features, areas, SIZE, None).unwrap();
            (AnyDriver::Packed(packed::PackedDriver::new(ring, features, None)), AnyDevice::Packed(device))
        }
    };
    (DriverQueue::new(driver), DeviceQueue::new(device, guest.view()))
}

fn round(criterion: &mut Criterion) {
    for format in [Format::Split, Format::Packed] {
        for (name, event_idx, in_order) in [("flags", false, false), ("event_idx", true, false), ("in_order", true, true)] {
            let mut group = criterion.benchmark_group(format!("round/{format:?}/{name}").to_lowercase());
            for burst in [1usize, 8, 32, 64, 256] {
                let (mut driver, mut device) = pair(format, RingFeatures { event_idx, indirect: false, in_order });
                let buffer = |k| Buffer { token: k, address: BASE + 0x1_0000 + 2048 * k, len: 64, direction: Direction::Readable };
                let buffers: Vec<Buffer> = (0..burst as u64).map(buffer).collect();
                let mut used = vec![Used::default(); burst];
                let mut batch = device.batch(burst);
                group.throughput(Throughput::Elements(burst as u64));
                group.bench_function(BenchmarkId::from_parameter(burst), |bencher| {
                    bencher.iter(|| {
                        driver.add_batch(black_box(&buffers)).unwrap();
                        black_box(driver.publish());
                        batch.clear();
                        device.pop_batch(&mut batch).unwrap();
                        device.complete_batch(Unwritten(&batch)).unwrap();
                        black_box(device.publish());
                        let count = driver.pop_used_batch(&mut used).unwrap();
                        assert_eq!(count, burst);
                        black_box(&used);
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, round);
criterion_main!(benches);
