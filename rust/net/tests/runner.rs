//! The loop that runs pumps: it moves, sleeps, goes on without those that fail, and ends.

mod common;

use common::{BOTH, Link, link, packet};
use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use virtio_memory::{EventFd, RegionTable};
use virtio_net_path::pump::runner::{MAX_STATIONS, Station, Wake, run};
use virtio_net_path::pump::{DeviceTransmit, DriverTransmit, Step};
use virtio_net_path::{BurstError, DriverBursts, Rules};
use virtqueue::{AnyDevice, AnyDriver, DeviceQueue, DriverQueue};

const FEATURES: u128 = 1 << 32;

/// One end of a transmit queue.
#[allow(clippy::large_enum_variant, reason = "two of them are made")]
enum End {
    Driver(DriverQueue<AnyDriver>, DriverBursts, DriverTransmit, RegionTable),
    Device(DeviceQueue<AnyDevice>, DeviceTransmit),
}

struct One {
    end: End,
    tap: UnixDatagram,
    /// What it is told by, and what tells the other end.
    event: Arc<EventFd>,
    other: Arc<EventFd>,
    slept: Arc<AtomicU64>,
    steps: u64,
    error: Option<BurstError>,
}

impl Station for One {
    type Error = BurstError;

    fn step(&mut self) -> Result<Step, BurstError> {
        self.steps += 1;
        let tap = self.tap.as_fd();
        let (step, notify) = match &mut self.end {
            End::Driver(queue, bursts, pump, table) => (pump.step(queue, bursts, table, tap)?, queue.publish()),
            End::Device(queue, pump) => (pump.step(queue, tap)?, queue.publish()),
        };
        if notify {
            self.other.signal()?;
        }
        Ok(step)
    }

    fn arm(&mut self) -> Result<bool, BurstError> {
        Ok(match &mut self.end {
            End::Driver(queue, ..) => queue.arm(),
            End::Device(queue, _) => queue.arm(),
        })
    }

    fn disarm(&mut self) {
        match &mut self.end {
            End::Driver(queue, ..) => queue.disarm(),
            End::Device(queue, _) => queue.disarm(),
        }
    }

    fn tap(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }

    fn event(&self) -> &EventFd {
        &self.event
    }

    fn sleeps(&mut self) {
        self.slept.fetch_add(1, Relaxed);
    }

    fn ended(&mut self, error: BurstError) {
        self.error = Some(error);
    }
}

/// Both ends, and the far ends of their TAPs.
fn ends(link: Link) -> (One, One, UnixDatagram, UnixDatagram) {
    let Link { guest, driver, device, from_driver, pool, .. } = link;
    let pair = || {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        (near, far)
    };
    let ((near, source), (far, sink)) = (pair(), pair());
    let (doorbell, interrupt) = (Arc::new(EventFd::new().unwrap()), Arc::new(EventFd::new().unwrap()));
    let transmit = DriverTransmit::new(&driver, pool, Rules::driver(FEATURES), 700).unwrap();
    let to_tap = DeviceTransmit::new(&device, Rules::device(FEATURES)).unwrap();
    let one = |end, tap, event: &Arc<EventFd>, other: &Arc<EventFd>| One {
        end,
        tap,
        event: event.clone(),
        other: other.clone(),
        slept: Arc::default(),
        steps: 0,
        error: None,
    };
    let table = RegionTable::new(guest.table().regions().to_vec(), None).unwrap();
    let driver = one(End::Driver(driver, from_driver, transmit, table), near, &interrupt, &doorbell);
    let device = one(End::Device(device, to_tap), far, &doorbell, &interrupt);
    (driver, device, source, sink)
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&[0; 12], frame].concat()
}

#[test]
fn two_runners_in_two_threads_pass_frames_on_and_sleep() {
    for format in BOTH {
        let (mut driver, mut device, source, sink) = ends(link(format, 16, 64, false));
        let wakes = [Wake::new().unwrap(), Wake::new().unwrap()];
        let slept = [driver.slept.clone(), device.slept.clone()];
        std::thread::scope(|scope| {
            let first = scope.spawn(|| run(std::slice::from_mut(&mut driver), &wakes[0], None));
            let second = scope.spawn(|| run(std::slice::from_mut(&mut device), &wakes[1], None));
            let mut bytes = [0; 1024];
            for seed in 0..300 {
                // One slot, or several.
                let frame = framed(&packet(1 + seed * 37 % 700, seed));
                source.send(&frame).unwrap();
                let count = sink.recv(&mut bytes).unwrap();
                assert_eq!(&bytes[..count], &frame[..]);
            }
            while slept.iter().any(|slept| slept.load(Relaxed) == 0) {
                std::thread::yield_now();
            }
            wakes.iter().for_each(Wake::stop);
            assert_eq!((first.join().unwrap(), second.join().unwrap()), (Ok(()), Ok(())));
        });
        assert!(driver.error.is_none() && device.error.is_none());
    }
}

#[test]
fn a_pump_that_fails_leaves_the_others_running() {
    let (driver, device, _source, _sink) = ends(link(BOTH[0], 16, 64, false));
    driver.tap.shutdown(std::net::Shutdown::Both).unwrap();
    let slept = device.slept.clone();
    let mut both = [driver, device];
    let wake = Wake::new().unwrap();
    std::thread::scope(|scope| {
        let runner = scope.spawn(|| run(&mut both, &wake, None));
        while slept.load(Relaxed) == 0 {
            std::thread::yield_now();
        }
        wake.stop();
        assert_eq!(runner.join().unwrap(), Ok(()));
    });
    assert_eq!((both[0].error.is_some(), both[1].error.is_none(), both[0].steps), (true, true, 1));
    // Stopped before it begins.
    let before = both[1].steps;
    run(&mut both[1..], &wake, None).unwrap();
    assert_eq!(both[1].steps, before);
}

/// A pump that never has anything to do, but for its TAP.
struct Idle<'a> {
    tap: UnixDatagram,
    event: EventFd,
    starved: bool,
    steps: &'a Cell<u64>,
    wake: &'a Wake,
    error: Option<BurstError>,
}

impl Station for Idle<'_> {
    type Error = BurstError;

    fn step(&mut self) -> Result<Step, BurstError> {
        self.steps.set(self.steps.get() + 1);
        Ok(Step { moved: 0, starved: self.starved, soon: self.starved })
    }

    fn arm(&mut self) -> Result<bool, BurstError> {
        Ok(true)
    }

    fn disarm(&mut self) {}

    fn tap(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }

    fn event(&self) -> &EventFd {
        &self.event
    }

    fn sleeps(&mut self) {
        if self.steps.get() == 5 {
            self.wake.stop();
        }
    }

    fn ended(&mut self, error: BurstError) {
        self.error = Some(error);
    }
}

#[test]
fn what_waits_for_news_that_nobody_tells_sleeps_each_time() {
    let (near, far) = UnixDatagram::pair().unwrap();
    far.send(&[0; 72]).unwrap(); // which it does not want now
    let (steps, wake) = (Cell::new(0), Wake::new().unwrap());
    let mut idle = [Idle { tap: near, event: EventFd::new().unwrap(), starved: true, steps: &steps, wake: &wake, error: None }];
    run(&mut idle, &wake, None).unwrap();
    assert_eq!((steps.get(), idle[0].error.is_none()), (5, true));
}

#[test]
fn what_the_thread_does_beside_is_done_without_news_and_can_end_the_runner() {
    let (near, _far) = UnixDatagram::pair().unwrap();
    let (steps, wake, mut calls) = (Cell::new(10), Wake::new().unwrap(), 0);
    let mut idle = [Idle { tap: near, event: EventFd::new().unwrap(), starved: false, steps: &steps, wake: &wake, error: None }];
    let mut beside = || {
        calls += 1;
        calls == 3
    };
    run(&mut idle, &wake, Some(&mut beside)).unwrap();
    assert!(calls == 3 && idle[0].error.is_none() && !wake.stopped());
}

#[test]
fn a_tap_that_has_ended_ends_its_pump_and_the_last_pump_the_runner() {
    let (near, _far) = UnixDatagram::pair().unwrap();
    near.shutdown(std::net::Shutdown::Both).unwrap();
    let (steps, wake) = (Cell::new(0), Wake::new().unwrap());
    let mut idle = [Idle { tap: near, event: EventFd::new().unwrap(), starved: false, steps: &steps, wake: &wake, error: None }];
    run(&mut idle, &wake, None).unwrap();
    assert!(matches!(idle[0].error, Some(BurstError::Memory(virtio_memory::MemoryError::Os { errno: 77, .. }))));
    assert_eq!(steps.get(), 1);
    let mut many = Vec::new();
    for _ in 0..=MAX_STATIONS {
        let (tap, _) = UnixDatagram::pair().unwrap();
        many.push(Idle { tap, event: EventFd::new().unwrap(), starved: false, steps: &steps, wake: &wake, error: None });
    }
    assert!(run(&mut many, &wake, None).is_err());
}
