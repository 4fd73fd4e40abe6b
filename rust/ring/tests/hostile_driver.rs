//! The driver is hostile in what it makes available: it breaks one rule at a time with its own hand, and the device's queue answers as the
//! rule says. Indirect tables and the order of segments have a file of their own, and so have publishing and suppression.

mod common;

use common::raw::{Desc, desc};
use common::*;
use virtio_memory::MemoryError;
use virtqueue::event::Cursor;
use virtqueue::spec::{DESC_F_AVAIL, DESC_F_NEXT, DESC_F_USED, DESC_F_WRITE};
use virtqueue::{Fault, Format, RingError, RingState, Segment};

#[test]
fn device_05_avail_index_runs_ahead() {
    for index in [9, 10, 0x100, 0x7fff, 0x8000, 0xffff] {
        let rig = Rig::new(Format::Split, 8, PLAIN);
        let mut device = rig.device();
        rig.raw_split().set_avail_idx(index);
        let error = RingError::AvailIndex { index, last: 0, ahead: index, size: 8 };
        assert_eq!(pop_error(&mut device), error);
        assert_device_broken(&mut device, &error);
    }
}

#[test]
fn device_05_a_whole_ring_may_be_available() {
    let rig = Rig::new(Format::Split, 8, PLAIN);
    let (mut driver, mut device) = (rig.driver(), rig.device());
    publish(&mut driver, 0, 8);
    assert_eq!(pop(&mut device, 8).len(), 8);
}

#[test]
fn device_05_avail_index_goes_back_or_ahead_at_the_wrap() {
    for (last, index) in [(0xfffe, 0xfffd), (0xfffe, 7), (0xffff, 0xfffe), (0, 0xffff), (3, 2), (3, 12)] {
        let rig = Rig::new(Format::Split, 8, PLAIN);
        rig.raw_split().set_used_idx(last);
        let mut device = rig.restored(Some(split_state(last))).expect("restored");
        rig.raw_split().set_avail_idx(index);
        let error = RingError::AvailIndex { index, last, ahead: index.wrapping_sub(last), size: 8 };
        assert_eq!(pop_error(&mut device), error);
        assert_device_broken(&mut device, &error);
    }
    // Exactly the size ahead is right, over the wrap too.
    let rig = Rig::new(Format::Split, 8, PLAIN);
    rig.raw_split().set_used_idx(0xfffc);
    let mut device = rig.restored(Some(split_state(0xfffc))).expect("restored");
    (0..8).for_each(|index| {
        rig.raw_split().set_desc(index, desc(rig.data, 1, 0));
        rig.raw_split().offer(0xfffc_u16.wrapping_add(index), index);
    });
    assert_eq!(pop(&mut device, 9).len(), 8);
}

fn split_state(index: u16) -> RingState {
    let cursor = Cursor { offset: index, wrap: false };
    RingState { avail: cursor, used: cursor }
}

#[test]
fn device_06_head_beyond_the_ring() {
    for head in [8, 9, 0x8000, 0xffff] {
        let rig = Rig::new(Format::Split, 8, PLAIN);
        let mut device = rig.device();
        rig.raw_split().offer(0, head);
        let error = RingError::HeadOutOfRange { head, size: 8 };
        assert_eq!(pop_error(&mut device), error);
        assert_device_broken(&mut device, &error);
    }
}

#[test]
fn device_06_head_that_is_in_flight() {
    let rig = Rig::new(Format::Split, 8, PLAIN);
    let mut device = rig.device();
    let raw = rig.raw_split();
    raw.set_desc(5, desc(rig.data, 16, DESC_F_WRITE));
    raw.offer(0, 5);
    raw.offer(1, 5);
    // The first one is a chain as any other; the second is told by the call after it.
    assert_eq!(pop(&mut device, 4).len(), 1);
    let error = RingError::HeadInFlight { head: 5 };
    assert_eq!(pop_error(&mut device), error);
    assert_device_broken(&mut device, &error);
}

/// Chains in flight never occupy more slots than the ring has: on the split ring they share descriptors, on the packed one the driver
/// writes over descriptors that did not come back.
#[test]
fn device_06_more_slots_in_flight_than_the_ring_has() {
    let rig = Rig::new(Format::Split, 8, PLAIN);
    let mut device = rig.device();
    let raw = rig.raw_split();
    for index in 0..8 {
        let flags = if index < 7 { DESC_F_NEXT } else { 0 };
        raw.set_desc(index, Desc { tag: index + 1, ..desc(rig.data, 1, flags) });
    }
    raw.offer(0, 0);
    raw.offer(1, 7);
    assert_eq!(pop(&mut device, 4).len(), 1);
    let error = RingError::TooManyInFlight { slots: 9, size: 8 };
    assert_eq!(pop_error(&mut device), error);
    assert_device_broken(&mut device, &error);

    // The same with two chains of several descriptors, four and five of them.
    let rig = Rig::new(Format::Split, 8, PLAIN);
    let mut device = rig.device();
    let raw = rig.raw_split();
    for index in 0..8 {
        let flags = if index == 3 { 0 } else { DESC_F_NEXT };
        raw.set_desc(index, Desc { tag: (index + 1) % 8, ..desc(rig.data, 1, flags) });
    }
    raw.offer(0, 0);
    raw.offer(1, 7);
    assert_eq!(pop(&mut device, 8).len(), 1);
    assert_eq!(pop_error(&mut device), error);
    assert_device_broken(&mut device, &error);

    let rig = Rig::new(Format::Packed, 8, PLAIN);
    let (mut driver, mut device) = (rig.raw_driver(), rig.device());
    for _ in 0..4 {
        driver.offer(&[desc(rig.data, 1, 0), desc(rig.data, 1, 0)]);
    }
    assert_eq!(pop(&mut device, 9).len(), 4);
    driver.offer(&[desc(rig.data, 1, 0)]);
    assert_eq!(pop_error(&mut device), error);
    assert_device_broken(&mut device, &error);
}

/// A chain that is completed stays in flight until the driver is told: it cannot have come round again.
#[test]
fn device_06_slots_count_until_they_are_published() {
    for features in [PLAIN, IN_ORDER] {
        each(features, |rig| {
            let (mut driver, mut device) = (rig.raw_driver(), rig.device());
            for _ in 0..8 {
                driver.offer(&[desc(rig.data, 1, 0)]);
            }
            let chains = pop(&mut device, 8);
            let completions: Vec<_> = chains.iter().map(|chain| done(chain, 0)).collect();
            give_back(&mut device, &completions).expect("in flight");
            driver.offer(&[desc(rig.data, 1, 0)]);
            let error = RingError::TooManyInFlight { slots: 9, size: 8 };
            assert_eq!(pop_error(&mut device), error, "{:?}", rig.format);
            assert_device_broken(&mut device, &error);
        });
    }
}

#[test]
fn device_07_loops_end() {
    for (links, limit) in [([0, 0], 8), ([1, 0], 8), ([1, 1], 8), ([1, 0], 3), ([0, 0], 1)] {
        let rig = Rig::new(Format::Split, 8, PLAIN).with_chain_limit(limit);
        let mut device = rig.device();
        let raw = rig.raw_split();
        for (index, next) in links.into_iter().enumerate() {
            raw.set_desc(index as u16, Desc { tag: next, ..desc(rig.data, 1, DESC_F_NEXT) });
        }
        raw.offer(0, 0);
        let error = RingError::ChainTooLong { limit: limit as u16 };
        assert_eq!(pop_error(&mut device), error);
        assert_device_broken(&mut device, &error);
    }
    // A packed list cannot go back, but it can go on round the ring.
    for limit in [8, 3, 1] {
        let rig = Rig::new(Format::Packed, 8, PLAIN).with_chain_limit(limit);
        let mut device = rig.device();
        (0..8).for_each(|number| rig.raw_packed().offer(number, desc(rig.data, 1, DESC_F_NEXT)));
        let error = RingError::ChainTooLong { limit: limit as u16 };
        assert_eq!(pop_error(&mut device), error);
        assert_device_broken(&mut device, &error);
    }
}

/// A larger limit is for tables: a list in the ring is never longer than the ring.
#[test]
fn device_07_loops_end_under_a_larger_limit() {
    each(PLAIN, |rig| {
        let rig = rig.with_chain_limit(1024);
        let mut device = rig.device();
        match rig.format {
            Format::Split => {
                rig.raw_split().set_desc(0, desc(rig.data, 1, DESC_F_NEXT));
                rig.raw_split().offer(0, 0);
            }
            Format::Packed => (0..8).for_each(|number| rig.raw_packed().offer(number, desc(rig.data, 1, DESC_F_NEXT))),
        }
        let error = RingError::ChainTooLong { limit: 8 };
        assert_eq!(pop_error(&mut device), error);
        assert_device_broken(&mut device, &error);
    });
}

#[test]
fn device_07_chains_up_to_the_limit_and_no_longer() {
    each(PLAIN, |rig| {
        let rig = rig.with_chain_limit(5);
        let (mut driver, mut device) = (rig.raw_driver(), rig.device());
        driver.offer(&[desc(rig.data, 2, 0); 5]);
        let got = pop_with_segments(&mut device, 4);
        assert_eq!(got[0].1, [Segment::readable(rig.data, 2); 5]);
        assert_eq!((got[0].0.readable, got[0].0.writable), (10, 0));
        complete(&mut device, &[got[0].0]);
        driver.offer(&[desc(rig.data, 2, 0); 6]);
        let error = RingError::ChainTooLong { limit: 5 };
        assert_eq!(pop_error(&mut device), error);
        assert_device_broken(&mut device, &error);
    });
}

#[test]
fn device_07_next_beyond_the_ring() {
    for next in [8, 9, 0x8000, 0xffff] {
        let rig = Rig::new(Format::Split, 8, PLAIN);
        let mut device = rig.device();
        rig.raw_split().set_desc(0, Desc { tag: next, ..desc(rig.data, 1, DESC_F_NEXT) });
        rig.raw_split().offer(0, 0);
        let error = RingError::NextOutOfRange { next, limit: 8 };
        assert_eq!(pop_error(&mut device), error);
        assert_device_broken(&mut device, &error);
    }
}

/// What was popped is private: descriptors that change afterwards change neither segments nor bounds.
#[test]
fn device_10_descriptors_are_read_once() {
    each(INDIRECT, |rig| {
        let (mut driver, mut device) = (rig.raw_driver(), rig.device());
        rig.write(rig.data, &[(rig.data + 64).to_le_bytes(), 32_u64.to_le_bytes()].concat());
        driver.offer(&[desc(rig.data + 16, 16, 0), desc(rig.data + 32, 16, DESC_F_WRITE)]);
        driver.offer(&[desc(rig.data, 16, 4)]);
        let mut batch = device.batch(4);
        assert_eq!(device.pop_batch(&mut batch), Ok(2));
        rig.write(rig.data, &[0xff; 16]);
        match rig.format {
            Format::Split => (0..8).for_each(|index| rig.raw_split().set_desc(index, desc(u64::MAX, u32::MAX, 0xffff))),
            Format::Packed => (0..8).for_each(|offset| rig.raw_packed().set(offset, desc(u64::MAX, u32::MAX, 0xffff))),
        }
        let (first, second) = (batch.chains()[0], batch.chains()[1]);
        assert_eq!(batch.readable(&first), [Segment::readable(rig.data + 16, 16)]);
        assert_eq!(batch.writable(&first), [Segment::writable(rig.data + 32, 16)]);
        assert_eq!(batch.segments(&second), [Segment::readable(rig.data + 64, 32)]);
        let too_long = RingError::UsedTooLong { len: 17, writable: 16 };
        assert_eq!(give_back(&mut device, &[done(&first, 17)]), Err(too_long));
        complete(&mut device, &[first, second]);
        assert_eq!((device.outstanding(), device.broken()), (0, None));
    });
}

/// A span is checked whole, for overflow and for being mapped from end to end, when it is used.
#[test]
fn device_11_segments_outside_memory() {
    let end = |rig: &Rig| BASE + rig.mapping.len() as u64;
    let unmapped = |address, len| MemoryError::Unmapped { address, len };
    each(PLAIN, |rig| {
        let cases = [
            (0, 1, unmapped(0, 1)),
            (BASE - 1, 2, unmapped(BASE - 1, 2)),
            (end(&rig), 1, unmapped(end(&rig), 1)),
            (end(&rig) - 1, 2, unmapped(end(&rig) - 1, 2)),
            (BASE, u32::MAX, unmapped(BASE, u32::MAX.into())),
            (u64::MAX, 1, unmapped(u64::MAX, 1)),
            (u64::MAX, 2, MemoryError::Overflow { address: u64::MAX, len: 2 }),
            (u64::MAX - 0xffff, u32::MAX, MemoryError::Overflow { address: u64::MAX - 0xffff, len: u32::MAX.into() }),
        ];
        let mut device = rig.device();
        let mut driver = rig.raw_driver();
        for (address, len, expected) in cases {
            driver.offer(&[desc(address, len, 0)]);
            // Where a buffer lies is looked at when it is used: the ring hands it out, and the access is refused.
            let got = pop_with_segments(&mut device, 1);
            let error = device.memory().check(address, len.into()).expect_err("not mapped");
            assert_eq!(error, expected);
            let bytes = got[0].1[0].len.min(64) as usize;
            assert!(bytes < 64 || device.memory().read(address, &mut vec![0; 1 << 20]).is_err());
            complete(&mut device, &[got[0].0]);
        }
        let error = RingError::BufferUnmapped(unmapped(0, 1));
        device.break_with(error.clone());
        assert_eq!(error.fault(), Fault::Driver);
        assert_device_broken(&mut device, &error);
    });
}

/// Available means AVAIL equal to the wrap counter and USED different from it: three of the four combinations are nothing.
#[test]
fn device_12_availability_is_both_bits() {
    for lap in 0..2 {
        for (avail, used) in [(false, false), (false, true), (true, false), (true, true)] {
            let rig = Rig::new(Format::Packed, 4, PLAIN);
            let cursor = Cursor { offset: 0, wrap: lap == 0 };
            let mut device = rig.restored(Some(RingState { avail: cursor, used: cursor })).expect("restored");
            let bits = if avail { DESC_F_AVAIL } else { 0 } | if used { DESC_F_USED } else { 0 };
            rig.raw_packed().set(0, desc(rig.data, 1, bits));
            let available = avail == cursor.wrap && used != cursor.wrap;
            assert_eq!(pop(&mut device, 1).len(), usize::from(available), "lap {lap}, avail {avail}, used {used}");
            assert!(!device.arm());
        }
    }
}

/// The id of the last descriptor counts, whatever it is, and it is only given back.
#[test]
fn device_12_any_id_of_the_last_descriptor_is_echoed() {
    let rig = Rig::new(Format::Packed, 4, PLAIN);
    let (mut driver, mut device) = (rig.raw_driver(), rig.device());
    for (lap, id) in [0, 3, 4, 0x8000, 0xffff, 0xffff].into_iter().enumerate() {
        let with = |tag| Desc { tag, ..desc(rig.data, 1, DESC_F_WRITE) };
        driver.offer(&[with(!id), with(!id), with(id)]);
        driver.offer(&[with(id)]);
        let chains = pop(&mut device, 4);
        assert_eq!(chains.len(), 2, "the same id may be in flight twice");
        complete(&mut device, &chains);
        let raw = rig.raw_packed();
        let bits = if lap % 2 == 0 { DESC_F_AVAIL | DESC_F_USED } else { 0 };
        assert_eq!(raw.get(0), (3, id, bits | DESC_F_WRITE), "first used descriptor of lap {lap}");
        assert_eq!(raw.get(3), (1, id, bits | DESC_F_WRITE), "three slots on");
    }
}

#[test]
fn device_12_the_wrap_counter_toggles_at_any_size() {
    for size in [1, 2, 3, 5, 37] {
        let rig = Rig::new(Format::Packed, size, PLAIN);
        let (mut driver, mut device) = (rig.raw_driver(), rig.device());
        for number in 0..5 * u32::from(size) {
            let at = rig.raw_packed().cursor(number);
            assert_eq!(device.state(), RingState { avail: at, used: at });
            assert_eq!(pop(&mut device, 2).len(), 0, "what came back is not available again");
            driver.offer(&[desc(rig.data, 1, 0)]);
            let chains = pop(&mut device, 2);
            assert_eq!(chains.len(), 1);
            complete(&mut device, &chains);
        }
    }
}
