//! What is measured: a driver's half and a device's half of one ring, in one thread or in two pinned ones.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The driver's half: buffers of one segment.
pub trait Driver {
    /// How many buffers fit now.
    fn room(&self) -> usize;
    /// Adds `count` buffers and makes them visible with one store.
    fn add(&mut self, count: usize);
    /// Takes back everything that is used; tells how many.
    fn reclaim(&mut self) -> usize;
    /// What was seen, so that nothing is optimized away, and so that the run can be checked.
    fn sum(&self) -> u64;
}

/// The device's half.
pub trait Device {
    /// Takes up to `limit` buffers and gives them back with one store; tells how many.
    fn serve(&mut self, limit: usize) -> usize;
    /// As for the driver.
    fn sum(&self) -> u64;
}

/// Ties the calling thread to a core.
pub fn pin(core: usize) {
    // SAFETY: the set is a local, zeroed and of the size that is told.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        assert_eq!(libc::sched_setaffinity(0, std::mem::size_of_val(&set), &set), 0, "cannot pin to core {core}");
    }
}

/// Nanoseconds a buffer, both halves in turn on one core.
#[inline(never)]
pub fn one_thread(driver: &mut impl Driver, device: &mut impl Device, total: usize, burst: usize) -> f64 {
    pin(0);
    let start = Instant::now();
    let mut done = 0;
    while done < total {
        driver.add(burst);
        assert_eq!(device.serve(burst), burst);
        assert_eq!(driver.reclaim(), burst);
        done += burst;
    }
    let nanos = start.elapsed().as_nanos() as f64 / done as f64;
    black_box((driver.sum(), device.sum()));
    nanos
}

/// Nanoseconds a buffer, the halves on two cores, polling.
pub fn two_threads(driver: &mut impl Driver, device: &mut (impl Device + Send), total: usize, burst: usize) -> f64 {
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        let far = scope.spawn(|| {
            pin(1);
            barrier.wait();
            let mut done = 0;
            while done < total {
                done += device.serve(burst);
            }
            black_box(device.sum());
            done
        });
        pin(0);
        barrier.wait();
        let start = Instant::now();
        let (mut added, mut done) = (0, 0);
        while done < total {
            if added < total && driver.room() >= burst {
                driver.add(burst);
                added += burst;
            } else {
                done += driver.reclaim();
            }
        }
        let nanos = start.elapsed().as_nanos() as f64 / total as f64;
        black_box(driver.sum());
        assert_eq!((far.join().unwrap(), done), (total, total), "buffers lost");
        nanos
    })
}

/// Nanoseconds for a cache line to go to the other core and back.
pub fn cache_line_round_trip() -> f64 {
    const TURNS: u64 = 200_000;
    let line = AtomicU64::new(0);
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(1);
            barrier.wait();
            for turn in 0..TURNS {
                while line.load(Ordering::Acquire) != 2 * turn + 1 {}
                line.store(2 * turn + 2, Ordering::Release);
            }
        });
        pin(0);
        barrier.wait();
        let start = Instant::now();
        for turn in 0..TURNS {
            line.store(2 * turn + 1, Ordering::Release);
            while line.load(Ordering::Acquire) != 2 * turn + 2 {}
        }
        start.elapsed().as_nanos() as f64 / TURNS as f64
    })
}
