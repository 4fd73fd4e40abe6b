//! The four pumps, with a pair of datagram sockets in the place of each TAP: both move whole frames.

mod common;

use common::{BOTH, Link, link, packet};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use virtio_net_path::pump::{DeviceReceive, DeviceTransmit, DriverReceive, DriverTransmit, Step};
use virtio_net_path::{BurstError, Rules};
use virtqueue::{Form, RingError, Segment};

const MERGEABLE: u128 = 1 << 32 | 1 << 15;

/// A descriptor for a pump, and its far end.
fn tap() -> (UnixDatagram, UnixDatagram) {
    let (pump, far) = UnixDatagram::pair().unwrap();
    for end in [&pump, &far] {
        end.set_nonblocking(true).unwrap();
    }
    (pump, far)
}

fn framed(header: [u8; 12], frame: &[u8]) -> Vec<u8> {
    [&header[..], frame].concat()
}

fn arrived(far: &UnixDatagram) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 70000];
    match far.recv(&mut bytes) {
        Ok(count) => Some(bytes[..count].to_vec()),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            None
        }
    }
}

#[test]
fn frames_go_from_the_drivers_tap_to_the_devices() {
    for format in BOTH {
        let Link { guest, mut driver, mut device, mut from_driver, pool, .. } = link(format, 16, 64, false);
        let ((near, source), (far, sink)) = (tap(), tap());
        let mut transmit = DriverTransmit::new(&driver, pool.clone(), Rules::driver(MERGEABLE), common::PAYLOAD).unwrap();
        let mut to_tap = DeviceTransmit::new(&device, Rules::device(MERGEABLE)).unwrap();
        let table = guest.table();
        for round in 0..40 {
            for seed in 0..3 {
                source.send(&framed([0; 12], &packet(60 + seed * 60, round + seed))).unwrap();
            }
            let step = transmit.step(&mut driver, &mut from_driver, &table, near.as_fd()).unwrap();
            assert!(step.moved >= 3 && !step.starved, "{step:?}");
            driver.publish();
            assert_eq!(to_tap.step(&mut device, far.as_fd()), Ok(Step { moved: 3, starved: true, soon: false }));
            device.publish();
            for seed in 0..3 {
                assert_eq!(arrived(&sink), Some(framed([0; 12], &packet(60 + seed * 60, round + seed))));
            }
        }
        assert_eq!((transmit.counters.traffic.frames, to_tap.counters.traffic.frames), (120, 120));
        // What no slot holds, and what was not negotiated, is dropped, and costs no slot.
        source.send(&framed([0; 12], &packet(193, 0))).unwrap();
        source.send(&framed([1, 1, 0, 0, 100, 0, 14, 0, 16, 0, 0, 0], &packet(150, 0))).unwrap();
        transmit.step(&mut driver, &mut from_driver, &table, near.as_fd()).unwrap();
        assert_eq!(transmit.counters.traffic.drops, [0, 1, 0, 0, 0, 0, 1]);
        assert_eq!((driver.outstanding(), pool.lock().available()), (0, 64));
    }
}

#[test]
fn frames_go_from_the_devices_tap_to_the_drivers_over_several_buffers() {
    for format in BOTH {
        let Link { guest, mut driver, mut device, mut from_driver, pool, .. } = link(format, 16, 64, false);
        let ((near, sink), (far, source)) = (tap(), tap());
        let mut receive = DriverReceive::new(&driver, pool, Rules::driver(MERGEABLE)).unwrap();
        let mut from_tap = DeviceReceive::new(&device, Rules::device(MERGEABLE), 1000).unwrap();
        let table = guest.table();
        // Without buffers the TAP is not read.
        source.send(&framed([0; 12], &packet(60, 9))).unwrap();
        assert_eq!(from_tap.step(&mut device, far.as_fd()), Ok(Step { moved: 0, starved: true, soon: false }));
        receive.step(&mut driver, &mut from_driver, &table, near.as_fd()).unwrap();
        driver.publish();
        assert_eq!(driver.outstanding(), 16);
        assert_eq!(from_tap.step(&mut device, far.as_fd()).unwrap().moved, 1);
        for round in 0..40 {
            let lengths = [1, 192, 193, 900];
            lengths.iter().for_each(|length| assert!(source.send(&framed([0; 12], &packet(*length, round))).is_ok()));
            let mut steps = 0;
            let mut frames = Vec::new();
            while frames.len() < 4 + usize::from(round == 0) {
                from_tap.step(&mut device, far.as_fd()).unwrap();
                device.publish();
                receive.step(&mut driver, &mut from_driver, &table, near.as_fd()).unwrap();
                driver.publish();
                frames.extend(std::iter::from_fn(|| arrived(&sink)));
                steps += 1;
                assert!(steps < 100);
            }
            if round == 0 {
                assert_eq!(frames.remove(0), framed([0; 12], &packet(60, 9)));
            }
            let wanted = lengths.map(|length| framed([0; 12], &packet(length, round)));
            assert_eq!(frames, wanted);
            assert_eq!(driver.outstanding(), 16, "every buffer is back with the device");
        }
    }
}

#[test]
fn chains_that_are_not_believed_are_given_back_and_memory_outside_breaks_the_queue() {
    for format in BOTH {
        let Link { memory, mut driver, mut device, .. } = link(format, 16, 64, false);
        let (far, sink) = tap();
        let mut to_tap = DeviceTransmit::new(&device, Rules::device(MERGEABLE)).unwrap();
        let base = common::BASE + (1 << 19);
        // A header alone, a checksum that was not negotiated, and one that is fine, its header in three pieces.
        memory.write(1 << 19, &framed([1, 0, 0, 0, 0, 0, 4, 0, 4, 0, 0, 0], &packet(60, 1))).unwrap();
        memory.write((1 << 19) + 128, &framed([0; 12], &packet(60, 2))).unwrap();
        driver.add(0, &[Segment::readable(base, 12)], Form::Direct).unwrap();
        driver.add(1, &[Segment::readable(base, 72)], Form::Direct).unwrap();
        let pieces = [Segment::readable(base + 128, 5), Segment::readable(base + 133, 6), Segment::readable(base + 139, 61)];
        driver.add(2, &pieces, Form::Direct).unwrap();
        driver.publish();
        assert_eq!(to_tap.step(&mut device, far.as_fd()).unwrap().moved, 3);
        device.publish();
        assert_eq!(to_tap.counters.traffic.drops, [1, 0, 1, 0, 0, 0, 0]);
        assert_eq!((arrived(&sink), arrived(&sink)), (Some(framed([0; 12], &packet(60, 2))), None));
        driver.add(3, &[Segment::readable(base, 72), Segment::readable(0x1000, 10)], Form::Direct).unwrap();
        driver.publish();
        assert!(matches!(to_tap.step(&mut device, far.as_fd()), Err(BurstError::Ring(RingError::BufferUnmapped(_)))));
        assert!(device.broken().is_some());
        assert_eq!(arrived(&sink), None);
    }
}
