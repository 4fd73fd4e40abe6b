//! A driver and a device in two threads on one shared ring, with data that both really write and read.
//!
//! An index read as two bytes, or a descriptor word in two halves, would be torn here. ROUNDS=n sends n chains through each ring. Under
//! ThreadSanitizer (scripts/tsan.sh) this shows that the ring alone orders every access to the buffers; the one test that breaks the
//! protocol on purpose shows that the sanitizer would see it if it did not.

mod common;

use common::*;
use std::sync::Arc;
use std::time::Duration;
use virtio_memory::{EventFd, RegionTable};
use virtqueue::{Form, Format, RingFeatures, Segment, Used};

/// Bytes that a chain's data may take, and how many chains have a place of their own.
const PLACE: u64 = 1024;
const PLACES: u64 = DATA / PLACE;
/// Far longer than any wait should be: only a lost wake-up reaches it.
const TOO_LONG: Option<Duration> = Some(Duration::from_secs(60));

fn rounds() -> u64 {
    std::env::var("ROUNDS").map_or(10_000, |rounds| rounds.parse().expect("ROUNDS is a number"))
}

/// Segments of chain `token`: one to three readable ones, up to two writable ones.
fn segments(rig: &Rig, token: u64) -> Vec<Segment> {
    let mut at = rig.data + token % PLACES * PLACE;
    let readable = (0..1 + token % 3).map(|k| (true, 1 + (token + 7 * k) % 60));
    let writable = (0..token % 4 / 2 + token % 2).map(|k| (false, 1 + (token + 11 * k) % 70));
    let parts: Vec<_> = readable.chain(writable).collect();
    let mut make = |(reads, len): (bool, u64)| {
        let segment = if reads { Segment::readable(at, len as u32) } else { Segment::writable(at, len as u32) };
        at += len;
        segment
    };
    parts.into_iter().map(&mut make).collect()
}

fn byte(token: u64, side: u64, position: usize) -> u8 {
    (token * 37 + side * 91 + position as u64 * 3) as u8
}

/// Fills a segment with the bytes of one side.
fn fill(memory: &RegionTable, segment: &Segment, token: u64, side: u64) {
    let bytes: Vec<u8> = (0..segment.len as usize).map(|k| byte(token, side, k)).collect();
    memory.write(segment.address, &bytes).expect("mapped");
}

/// Checks that a segment holds them.
fn check(memory: &RegionTable, segment: &Segment, token: u64, side: u64) {
    let mut bytes = [0; 128];
    let bytes = &mut bytes[..segment.len as usize];
    memory.read(segment.address, bytes).expect("mapped");
    assert!(bytes.iter().enumerate().all(|(k, b)| *b == byte(token, side, k)), "contents of {token}: {bytes:?}");
}

fn is_readable(segment: &Segment) -> bool {
    segment.direction == virtqueue::Direction::Readable
}

/// How both sides wait when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// They look again.
    Polling,
    /// They arm, look once more, and sleep until they are notified.
    Sleeping,
}

/// Adds as much as fits, publishes, takes back what was used, checks it.
fn drive(rig: &Rig, mut driver: Driver, total: u64, waiting: Waiting, kick: &EventFd, call: &EventFd) {
    let memory = rig.memory.table();
    let (mut added, mut back) = (0, 0);
    let mut pending = vec![false; PLACES as usize];
    let mut out = [Used::default(); 7];
    while back < total {
        let batch_end = total.min(added + 1 + added % 9);
        while added < batch_end && !pending[(added % PLACES) as usize] {
            let segments = segments(rig, added);
            let form = if rig.features.indirect && added % 2 == 0 { Form::Indirect } else { Form::Direct };
            segments.iter().filter(|s| is_readable(s)).for_each(|s| fill(&memory, s, added, 0));
            if driver.add(added, &segments, form).is_err() {
                break;
            }
            pending[(added % PLACES) as usize] = true;
            added += 1;
        }
        if driver.publish() {
            kick.signal().expect("kick");
        }
        let count = driver.pop_used_batch(&mut out).expect("a device that keeps the rules");
        for used in &out[..count] {
            let segments = segments(rig, used.token);
            let writable: Vec<&Segment> = segments.iter().filter(|s| !is_readable(s)).collect();
            assert_eq!(used.len, writable.iter().map(|s| s.len).sum::<u32>());
            writable.into_iter().for_each(|s| check(&memory, s, used.token, 1));
            assert!(std::mem::take(&mut pending[(used.token % PLACES) as usize]));
        }
        back += count as u64;
        if count == 0 && (driver.free() < 3 || added == total) {
            match waiting {
                Waiting::Polling => std::thread::yield_now(),
                Waiting::Sleeping => {
                    if !driver.arm() {
                        assert!(call.wait(TOO_LONG).expect("call"), "lost wake-up of the driver");
                        call.drain().expect("call");
                    }
                    driver.disarm();
                }
            }
        }
    }
    assert_eq!((driver.outstanding(), driver.free()), (0, rig.size));
}

/// Takes what is available, checks it, fills what is writable, and gives it back, newest first where it may.
fn serve(rig: &Rig, mut device: Device, total: u64, waiting: Waiting, kick: &EventFd, call: &EventFd) {
    let mut batch = device.batch(5);
    let mut served = 0;
    while served < total {
        batch.clear();
        let count = device.pop_batch(&mut batch).expect("a driver that keeps the rules");
        let mut completions = Vec::new();
        for (chain, token) in batch.chains().iter().zip(served..) {
            assert_eq!(batch.segments(chain), segments(rig, token));
            batch.readable(chain).iter().for_each(|s| check(device.memory(), s, token, 0));
            batch.writable(chain).iter().for_each(|s| fill(device.memory(), s, token, 1));
            completions.push(done(chain, chain.writable));
        }
        completions.reverse();
        give_back(&mut device, &completions).expect("in flight");
        if device.publish() {
            call.signal().expect("call");
        }
        served += count as u64;
        if count == 0 {
            match waiting {
                Waiting::Polling => std::thread::yield_now(),
                Waiting::Sleeping => {
                    if !device.arm() {
                        assert!(kick.wait(TOO_LONG).expect("kick"), "lost wake-up of the device");
                        kick.drain().expect("kick");
                    }
                    device.disarm();
                }
            }
        }
    }
}

/// Both ends at work on one ring. The device's thread is joined, not scoped: the sanitizer does not see how the library waits for a scope.
fn run(format: Format, size: u16, features: RingFeatures, waiting: Waiting) {
    let rig = Arc::new(Rig::new(format, size, features));
    let (driver, device) = (rig.driver(), rig.device());
    let bells = Arc::new([EventFd::new().expect("eventfd"), EventFd::new().expect("eventfd")]);
    let total = rounds();
    let (other_rig, other_bells) = (rig.clone(), bells.clone());
    let thread = std::thread::spawn(move || serve(&other_rig, device, total, waiting, &other_bells[0], &other_bells[1]));
    drive(&rig, driver, total, waiting, &bells[0], &bells[1]);
    thread.join().expect("device");
}

#[test]
fn split_rings_polled() {
    for features in [PLAIN, INDIRECT, IN_ORDER] {
        run(Format::Split, 16, features, Waiting::Polling);
    }
}

#[test]
fn packed_rings_polled() {
    for (size, features) in [(16, PLAIN), (13, INDIRECT), (7, IN_ORDER)] {
        run(Format::Packed, size, features, Waiting::Polling);
    }
}

#[test]
fn split_rings_with_sleeping_sides() {
    for features in [PLAIN, EVENT_IDX, RingFeatures { in_order: true, ..EVENT_IDX }] {
        run(Format::Split, 16, features, Waiting::Sleeping);
    }
}

#[test]
fn packed_rings_with_sleeping_sides() {
    for (size, features) in [(16, PLAIN), (13, EVENT_IDX), (7, RingFeatures { in_order: true, ..EVENT_IDX })] {
        run(Format::Packed, size, features, Waiting::Sleeping);
    }
}

/// A peer that writes a buffer which is not his garbles bytes, and nothing else. This is a race, on purpose: the sanitizer must report it.
#[test]
fn a_peer_that_ignores_the_ring_garbles_bytes() {
    let rig = Arc::new(Rig::new(Format::Split, 8, PLAIN));
    let other = rig.clone();
    let peer = std::thread::spawn(move || (0..1000_u32).for_each(|k| other.write(other.data, &[k as u8; 64])));
    for _ in 0..1000 {
        assert_eq!(rig.read(rig.data, 64).len(), 64);
    }
    peer.join().expect("peer");
    assert_eq!(rig.read(rig.data, 64), [999_u32 as u8; 64]);
}
