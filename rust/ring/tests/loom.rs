//! The shipped publish, arm and decide code of both sides and both formats under the model checker: every interleaving, and every value
//! that a load may still see. Nobody sleeps while something is there for him; with any one of the four fences taken away, somebody does.
//!
//! Run by scripts/loom.sh (`--cfg loom`); a plain `cargo test` has nothing to do here.
#![cfg(loom)]

use loom::sync::{Arc, Condvar, Mutex};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use virtio_memory::fence::removed;
use virtio_memory::{FencePoint, GuestMemory};
use virtqueue::packed::{PackedDevice, PackedDriver, PackedRing};
use virtqueue::split::{SplitDevice, SplitDriver, SplitRing};
use virtqueue::{
    AnyDevice, AnyDriver, Areas, Buffer, Completion, DeviceQueue, Direction, DriverQueue, Format, RingFeatures, Segment, Used,
};

type Driver = DriverQueue<AnyDriver>;
type Device = DeviceQueue<AnyDevice>;

/// Chains that go there and back: more than a ring of one or two entries holds.
const CHAINS: u32 = 3;

/// A ring to be modelled.
#[derive(Clone, Copy, Debug)]
struct Kind {
    format: Format,
    event_idx: bool,
    in_order: bool,
    size: u16,
}

fn kinds() -> impl Iterator<Item = Kind> {
    (0..16).map(|bits| Kind {
        format: if bits & 8 == 0 { Format::Split } else { Format::Packed },
        event_idx: bits & 4 != 0,
        in_order: bits & 2 != 0,
        size: 1 + (bits & 1),
    })
}

impl Kind {
    /// Both ends, after one chain went there and back: the first decision is past, the positions are no longer those of zeroed memory.
    fn ends(self) -> (Driver, Device) {
        let features = RingFeatures { event_idx: self.event_idx, in_order: self.in_order, indirect: false };
        let (driver, device) = match self.format {
            Format::Split => {
                let ring = SplitRing::model(self.size);
                let device = SplitDevice::new(ring.clone(), features, Areas::default(), self.size, None).expect("device");
                (AnyDriver::Split(SplitDriver::new(ring, features, None)), AnyDevice::Split(device))
            }
            Format::Packed => {
                let ring = PackedRing::model(self.size);
                let device = PackedDevice::new(ring.clone(), features, Areas::default(), self.size, None).expect("device");
                (AnyDriver::Packed(PackedDriver::new(ring, features, None)), AnyDevice::Packed(device))
            }
        };
        let (mut driver, mut device) = (DriverQueue::new(driver), DeviceQueue::new(device, GuestMemory::new().view()));
        publish(&mut driver, 0);
        assert_eq!(serve(&mut device, 0).0, 1);
        assert_eq!(reclaim(&mut driver, 0), 1);
        // Both are at work, and want no notifications.
        driver.disarm();
        device.disarm();
        (driver, device)
    }
}

/// Chain `number` made available; whether the device is to be notified.
fn publish(driver: &mut Driver, number: u32) -> bool {
    let buffer = Buffer { token: number.into(), address: 0x1000 + u64::from(number), len: 16 + number, direction: Direction::Writable };
    assert_eq!(driver.add_batch(&[buffer]), Ok(1));
    driver.publish()
}

/// Uses what is available, of which `number` is the first; tells how many chains that were, and whether the driver is to be notified.
fn serve(device: &mut Device, number: u32) -> (u32, bool) {
    let mut batch = device.batch(2);
    device.pop_batch(&mut batch).expect("legal");
    let mut count = 0;
    for chain in batch.chains() {
        let this = number + count;
        assert_eq!(batch.segments(chain), [Segment::writable(0x1000 + u64::from(this), 16 + this)], "what the driver wrote");
        let completion = Completion { head: chain.head, serial: chain.serial, len: 1 + this };
        device.complete_batch(std::slice::from_ref(&completion)).expect("in flight");
        count += 1;
    }
    (count, device.publish())
}

/// Takes what was used, of which `number` is the first; tells how many chains that were.
fn reclaim(driver: &mut Driver, number: u32) -> u32 {
    let mut out = [Used::default(); 2];
    let count = driver.pop_used_batch(&mut out).expect("legal");
    for (used, this) in out[..count].iter().zip(number..) {
        assert_eq!(*used, Used { token: this.into(), len: 1 + this }, "what the device wrote");
    }
    count as u32
}

fn check(model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(3);
    builder.max_branches = 10_000;
    builder.check(model);
}

/// The device goes to sleep while the driver makes one more chain available.
fn available(kind: Kind) {
    check(move || {
        let (mut driver, mut device) = kind.ends();
        let device = loom::thread::spawn(move || !device.arm());
        let notified = publish(&mut driver, 1);
        let asleep = device.join().expect("device");
        assert!(notified || !asleep, "lost wake-up of the device");
    });
}

/// The driver goes to sleep while the device uses one more chain.
fn used(kind: Kind) {
    check(move || {
        let (mut driver, mut device) = kind.ends();
        publish(&mut driver, 1);
        let driver = loom::thread::spawn(move || !driver.arm());
        let (count, notified) = serve(&mut device, 1);
        assert_eq!(count, 1);
        let asleep = driver.join().expect("driver");
        assert!(notified || !asleep, "lost wake-up of the driver");
    });
}

/// An eventfd.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn new() -> Arc<Self> {
        Arc::new(Bell { rung: Mutex::new(false), changed: Condvar::new() })
    }

    fn ring(&self) {
        *self.rung.lock().expect("bell") = true;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut rung = self.rung.lock().expect("bell");
        while !*rung {
            rung = self.changed.wait(rung).expect("bell");
        }
        *rung = false;
    }
}

/// Chains go there and back while both sides sleep whenever there is nothing for them: nobody sleeps for ever (the checker calls that a
/// deadlock), and each sees what the other wrote before it published.
fn there_and_back(kind: Kind, chains: u32) {
    check(move || {
        let (mut driver, mut device) = kind.ends();
        let (kick, call) = (Bell::new(), Bell::new());
        let other = (kick.clone(), call.clone());
        let device = loom::thread::spawn(move || {
            let (kick, call) = other;
            let mut served = 0;
            while served < chains {
                let (count, notify) = serve(&mut device, 1 + served);
                served += count;
                if notify {
                    call.ring();
                }
                if count == 0 && !device.arm() {
                    kick.wait();
                    device.disarm();
                }
            }
        });
        let (mut added, mut back) = (0, 0);
        while back < chains {
            while added < chains && driver.free() > 0 {
                added += 1;
                if publish(&mut driver, added) {
                    kick.ring();
                }
            }
            let count = reclaim(&mut driver, 1 + back);
            back += count;
            if count == 0 && !driver.arm() {
                call.wait();
                driver.disarm();
            }
        }
        device.join().expect("device");
    });
}

/// The switch that takes a fence away is one for the whole process, and so is the panic hook: one test at a time.
static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Runs a model for rings of every kind.
fn holds(model: impl Fn(Kind)) {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    kinds().for_each(model);
}

/// Runs a model for rings of every kind with one fence taken away: each time somebody sleeps while something is there for him.
fn fails_without(point: FencePoint, model: fn(Kind)) {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let hook = std::panic::take_hook();
    // These panics are what is wanted: nobody needs to read them.
    std::panic::set_hook(Box::new(|_| {}));
    removed::set(Some(point));
    let outcomes: Vec<_> = kinds().map(|kind| (kind, catch_unwind(AssertUnwindSafe(|| model(kind))))).collect();
    removed::set(None);
    std::panic::set_hook(hook);
    for (kind, outcome) in outcomes {
        let panic = outcome.expect_err(&format!("{kind:?} does not need the fence at {point:?}"));
        let message = panic.downcast_ref::<&str>().copied().unwrap_or_default();
        assert!(message.starts_with("lost wake-up"), "{kind:?} without {point:?}: {message}");
    }
}

#[test]
fn a_device_that_goes_to_sleep_is_woken() {
    holds(available);
}

#[test]
fn a_driver_that_goes_to_sleep_is_woken() {
    holds(used);
}

#[test]
fn chains_go_there_and_back() {
    holds(|kind| there_and_back(kind, CHAINS));
}

#[test]
fn the_drivers_decision_needs_its_fence() {
    fails_without(FencePoint::DriverDecide, available);
}

#[test]
fn the_devices_arming_needs_its_fence() {
    fails_without(FencePoint::DeviceArm, available);
}

#[test]
fn the_devices_decision_needs_its_fence() {
    fails_without(FencePoint::DeviceDecide, used);
}

#[test]
fn the_drivers_arming_needs_its_fence() {
    fails_without(FencePoint::DriverArm, used);
}
