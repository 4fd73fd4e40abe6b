//! What Python does in two processes, done from Rust in two threads (or in one, in turn) with the same crates: slots of a pool go round
//! through a ring, in bursts, locks taken as the binding takes them.

use crate::Threads;
use crate::pair::pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, Mutex};
use std::time::Instant;
use virtio_memory::{Burst, BufferPool, Column, GuestMemory, HugePages, Mapping, Region};
use virtio_net_path::{DeviceBursts, DriverBursts};
use virtqueue::*;

const BASE: u64 = 0x10_0000;

/// What a run is: ring format and size, burst, bytes written and read in each buffer (0: descriptors only).
#[derive(Clone, Copy)]
pub struct Run {
    pub threads: Threads,
    pub format: Format,
    pub size: u16,
    pub burst: usize,
    pub payload: usize,
    pub total: usize,
}

fn memory(bytes: usize) -> Arc<Mapping> {
    Arc::new(Mapping::memfd(bytes, "bursts", HugePages::Off).expect("memory"))
}

/// Nanoseconds a buffer.
pub fn measure(run: Run) -> f64 {
    let features = RingFeatures { event_idx: true, indirect: false, in_order: false };
    let mapping = memory(4 << 20);
    let guest = GuestMemory::new();
    guest.add(Region::new(BASE, 4 << 20, mapping.clone(), 0).unwrap()).unwrap();
    let areas = Areas { descriptor: BASE, driver: BASE + 0x8000, device: BASE + 0xa000 };
    let spans = spans(&guest.table(), run.format, run.size, areas).unwrap();
    let (driver, device) = match run.format {
        Format::Split => {
            let ring = split::SplitRing::new(run.size, &spans).unwrap();
            let device = split::SplitDevice::new(ring.clone(), features, areas, run.size, None).unwrap();
            (AnyDriver::Split(split::SplitDriver::new(ring, features, None)), AnyDevice::Split(device))
        }
        Format::Packed => {
            let ring = packed::PackedRing::new(run.size, &spans).unwrap();
            let device = packed::PackedDevice::new(ring.clone(), features, areas, run.size, None).unwrap();
            (AnyDriver::Packed(packed::PackedDriver::new(ring, features, None)), AnyDevice::Packed(device))
        }
    };
    let (driver, device) = (DriverQueue::new(driver), DeviceQueue::new(device, guest.view()));
    match run.threads {
        Threads::One => {
            pin(0);
            let (mut near, mut far) = (Near::new(run, driver, mapping), Far::new(run, device));
            let start = Instant::now();
            near.start();
            while near.done < run.total {
                far.step();
                near.step();
            }
            start.elapsed().as_nanos() as f64 / near.done as f64
        }
        Threads::Two => {
            let barrier = Barrier::new(2);
            std::thread::scope(|scope| {
                let far = scope.spawn(|| {
                    pin(1);
                    let mut far = Far::new(run, device);
                    barrier.wait();
                    while far.done < run.total {
                        far.step();
                    }
                    // The last chains of a run with payload are given back when they are popped no more.
                    far.give_back();
                    far.done
                });
                pin(0);
                let mut near = Near::new(run, driver, mapping);
                barrier.wait();
                let start = Instant::now();
                near.start();
                while near.done < run.total {
                    near.step();
                }
                let nanos = start.elapsed().as_nanos() as f64 / near.done as f64;
                assert_eq!(far.join().unwrap(), run.total, "buffers lost");
                nanos
            })
        }
    }
}

/// The driver: slots go round.
struct Near {
    run: Run,
    queue: Mutex<(DriverQueue<AnyDriver>, DriverBursts)>,
    pool: Arc<BufferPool>,
    burst: Burst,
    template: Vec<u8>,
    added: usize,
    done: usize,
}

impl Near {
    fn new(run: Run, queue: DriverQueue<AnyDriver>, mapping: Arc<Mapping>) -> Self {
        let bursts = DriverBursts::new(mapping.clone(), BASE, 0);
        let pool = Arc::new(BufferPool::new(mapping, 1 << 20, 2 * u32::from(run.size) - 1, 2048).unwrap());
        let burst = Burst::new(pool.clone(), run.burst).unwrap();
        Near { run, queue: Mutex::new((queue, bursts)), pool, burst, template: vec![0x5a; run.payload.max(1)], added: 0, done: 0 }
    }

    fn add(&mut self) {
        let burst = &self.burst;
        for row in 0..burst.count() {
            burst.column(Column::Lengths)[row].store(self.template.len() as i64, Ordering::Relaxed);
        }
        if self.run.payload > 0 {
            let _state = self.pool.lock();
            for row in 0..burst.count() {
                let raw = burst.row(row);
                let at = self.pool.slot_offset(raw.slot as u32) + raw.offset as usize;
                self.pool.mapping().write(at, &self.template).unwrap();
            }
        }
        let (queue, bursts) = &mut *self.queue.lock().unwrap();
        bursts.bind(burst, queue.outstanding().into()).unwrap();
        self.added += bursts.add(queue, &mut self.pool.lock(), burst, Direction::Readable).unwrap();
        queue.publish();
    }

    /// Fills the ring.
    fn start(&mut self) {
        while self.added < usize::from(self.run.size) {
            self.burst.fill(&mut self.pool.lock());
            self.add();
        }
    }

    /// What came back goes out again.
    fn step(&mut self) {
        let popped = {
            let (queue, bursts) = &mut *self.queue.lock().unwrap();
            bursts.pop_used(queue, &mut self.pool.lock(), &self.burst).unwrap()
        };
        self.done += popped;
        if popped > 0 && self.added < self.run.total {
            self.burst.set_count(popped.min(self.run.total - self.added)).unwrap();
            self.add();
        }
    }
}

/// The device: it takes what is there, and gives it back.
struct Far {
    run: Run,
    queue: Mutex<DeviceQueue<AnyDevice>>,
    bursts: DeviceBursts,
    batch: ChainBatch,
    pool: Arc<BufferPool>,
    burst: Burst,
    done: usize,
}

impl Far {
    fn new(run: Run, queue: DeviceQueue<AnyDevice>) -> Self {
        let pool = Arc::new(BufferPool::new(memory(4 << 20), 0, 2 * u32::from(run.size) - 1, 2048).unwrap());
        let burst = Burst::new(pool.clone(), run.burst).unwrap();
        let mut bursts = DeviceBursts::new(&queue);
        bursts.bind(&queue, &burst).unwrap();
        Far { run, batch: queue.batch(run.burst), queue: Mutex::new(queue), bursts, pool, burst, done: 0 }
    }

    fn step(&mut self) {
        let queue = &mut *self.queue.lock().unwrap();
        if self.run.payload == 0 {
            self.batch.clear();
            self.done += queue.pop_batch(&mut self.batch).unwrap();
            queue.complete_batch(Unwritten(&self.batch)).unwrap();
            queue.publish();
        } else {
            let mut state = self.pool.lock();
            self.bursts.complete(queue, &mut state, &self.burst).unwrap();
            queue.publish();
            self.done += self.bursts.pop(queue, &mut state, &self.burst).unwrap();
        }
    }

    fn give_back(&mut self) {
        let queue = &mut *self.queue.lock().unwrap();
        self.bursts.complete(queue, &mut self.pool.lock(), &self.burst).unwrap();
        queue.publish();
    }
}
