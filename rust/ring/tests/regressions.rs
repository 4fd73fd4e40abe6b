//! Defects that other rings had, and this one could have had: each is driven to the place where it shows.

mod common;

use common::*;
use virtqueue::event::Cursor;
use virtqueue::{Buffer, Direction, Form, Format, RingError, RingFeatures, Segment, Used};

/// Sends `count` buffers there and back in batches, with contents of no interest.
fn run(driver: &mut Driver, device: &mut Device, mut count: usize) {
    let step = usize::from(driver.size()).min(256);
    let mut batch = device.batch(step);
    let mut out = vec![Used::default(); step];
    while count > 0 {
        let n = count.min(step);
        publish(driver, 0, n);
        batch.clear();
        assert_eq!(device.pop_batch(&mut batch), Ok(n));
        device.complete_batch(virtqueue::Unwritten(&batch)).expect("in flight");
        device.publish();
        assert_eq!(driver.pop_used_batch(&mut out), Ok(n));
        count -= n;
    }
}

/// An index reduced modulo 0xffff fails after 65,534 buffers, one that is never reduced after 65,536.
#[test]
fn indexes_are_16_bits_wide() {
    for features in [PLAIN, EVENT_IDX, IN_ORDER] {
        let rig = Rig::new(Format::Split, 256, features);
        let (mut driver, mut device, raw) = (rig.driver(), rig.device(), rig.raw_split());
        run(&mut driver, &mut device, 65_500);
        for number in 65_500..65_600_u32 {
            assert_eq!((raw.avail_idx(), raw.used_idx()), (number as u16, number as u16));
            assert_eq!(driver.notification_data(0) >> 16, number & 0xffff);
            assert_eq!(device.state().avail, Cursor { offset: number as u16, wrap: false });
            run(&mut driver, &mut device, 1);
        }
        run(&mut driver, &mut device, 140_000);
        assert_eq!(raw.avail_idx(), 205_600_u32 as u16);
    }
}

/// `avail_idx >= avail_event + 1` on numbers that wrap misses a batch of 8 at event 65528 to 65534.
#[test]
fn a_batch_of_8_at_the_end_of_the_index_notifies() {
    for event in 65_525..65_542_u32 {
        let rig = Rig::new(Format::Split, 256, EVENT_IDX);
        let (mut driver, mut device, raw) = (rig.driver(), rig.device(), rig.raw_split());
        run(&mut driver, &mut device, 65_528);
        raw.avail_event.store(0, event as u16);
        raw.set_used_event(event as u16);
        let passed = (65_528..65_536).contains(&event);
        assert_eq!(publish(&mut driver, 0, 8), passed, "available, event {event}");
        let chains = pop(&mut device, 8);
        assert_eq!(complete(&mut device, &chains), passed, "used, event {event}");
    }
    // The same around the wrap counter of a packed ring.
    for event in 90..110_u32 {
        let rig = Rig::new(Format::Packed, 100, EVENT_IDX);
        let (mut driver, mut device, raw) = (rig.driver(), rig.device(), rig.raw_packed());
        run(&mut driver, &mut device, 96);
        let word = virtqueue::event::packed_word(virtqueue::spec::EVENT_FLAGS_DESC, raw.cursor(event));
        raw.device_event.store(0, word);
        raw.driver_event.store(0, word);
        let passed = (96..104).contains(&event);
        assert_eq!(publish(&mut driver, 0, 8), passed, "available, event {event}");
        let chains = pop(&mut device, 8);
        assert_eq!(complete(&mut device, &chains), passed, "used, event {event}");
    }
}

/// An event index that never moves stops notifications after the first: whoever goes to sleep is woken, every time.
#[test]
fn the_event_index_moves_with_every_sleep() {
    for features in [PLAIN, EVENT_IDX, RingFeatures { in_order: true, ..EVENT_IDX }] {
        for (format, size) in [(Format::Split, 4), (Format::Packed, 3)] {
            let rig = Rig::new(format, size, features);
            let (mut driver, mut device) = (rig.driver(), rig.device());
            for round in 0..70_000_u64 {
                let count = 1 + round as usize % 3;
                assert!(!device.arm(), "nothing is there: the device sleeps");
                assert!(publish(&mut driver, 0, count), "{format:?}, round {round}");
                if round % 2 == 0 {
                    device.disarm();
                }
                let chains = pop(&mut device, 4);
                assert!(!driver.arm(), "nothing is there: the driver sleeps");
                assert!(complete(&mut device, &chains), "{format:?}, round {round}");
                if round % 2 == 1 {
                    driver.disarm();
                }
                assert_eq!(reclaim(&mut driver).len(), count);
            }
        }
    }
}

/// A chain that stays out while 65,536 others come and go is still the one it was: the 16-bit number that it was added under has come
/// round by then, and belongs to one that is only added.
#[test]
fn a_chain_stays_out_while_the_positions_go_round() {
    for (format, size) in [(Format::Split, 8), (Format::Packed, 8), (Format::Packed, 7)] {
        for before in 0..6 {
            let rig = Rig::new(format, size, PLAIN);
            let (mut driver, mut device) = (rig.driver(), rig.device());
            publish(&mut driver, 7, 1);
            let slow = pop(&mut device, 1);
            let mut left = 65_535 - before;
            while left > 0 {
                let count = left.min(5);
                publish(&mut driver, 0, count);
                let chains = pop(&mut device, 5);
                complete(&mut device, &chains);
                assert_eq!(reclaim(&mut driver).len(), count);
                left -= count;
            }
            // Added and not published: positions from 65,536 - before on.
            let buffers: Vec<Buffer> = (20..26).map(|token| buffer(token, 1, Direction::Readable)).collect();
            assert_eq!(driver.add_batch(&buffers), Ok(6));
            complete(&mut device, &slow);
            assert_eq!(reclaim(&mut driver), [(7, 16)], "{format:?}, {before} before the place comes round");
            driver.publish();
            assert_eq!(pop(&mut device, 8).len(), 6);
        }
    }
}

/// One bad call in the middle of a batch leaves nothing half done, though used descriptors of a packed ring are written over available
/// ones.
#[test]
fn a_refused_batch_can_still_be_rewound() {
    for features in all_features() {
        each(features, |rig| {
            let (mut driver, mut device) = (rig.driver(), rig.device());
            for token in 0..3 {
                publish_chain(&mut driver, token, &[Segment::writable(rig.data + 8 * token, 8); 2], Form::Direct);
            }
            let first = pop_with_segments(&mut device, 8);
            let mut completions: Vec<_> = first.iter().map(|(chain, _)| done(chain, 8)).collect();
            completions[2].len = 17;
            assert!(give_back(&mut device, &completions).is_err());
            device.publish();
            device.rewind(3).expect("none of them was used");
            let again = pop_with_segments(&mut device, 8);
            assert_eq!(again.iter().map(|(_, s)| s.clone()).collect::<Vec<_>>(), first.iter().map(|(_, s)| s.clone()).collect::<Vec<_>>());
            complete(&mut device, &again.iter().map(|(chain, _)| *chain).collect::<Vec<_>>());
            assert_eq!(reclaim(&mut driver), [(0, 16), (1, 16), (2, 16)]);
        });
    }
}

/// A device that leaves buffers in the queue and sleeps is woken by the next one, not by those that it knows of.
#[test]
fn arming_with_buffers_left_asks_for_the_next_one() {
    for features in [PLAIN, EVENT_IDX] {
        for left in 1..8 {
            each(features, |rig| {
                let (mut driver, mut device) = (rig.driver(), rig.device());
                run(&mut driver, &mut device, 5);
                publish(&mut driver, 0, left);
                assert!(device.arm(), "{left} are left");
                assert_eq!(publish(&mut driver, 0, 1), usize::from(driver.size()) > left);
            });
        }
    }
}

/// A chain that was handed back is never taken for the one that is popped in its place.
#[test]
fn a_chain_that_was_rewound_is_stale() {
    for features in [PLAIN, IN_ORDER] {
        each(features, |rig| {
            let (mut driver, mut device) = (rig.driver(), rig.device());
            publish(&mut driver, 0, 3);
            for _ in 0..5 {
                let stale = pop(&mut device, 3);
                device.rewind(2).expect("the newest");
                let again = pop(&mut device, 2);
                for (old, new) in stale[1..].iter().zip(&again) {
                    assert_eq!(give_back(&mut device, &[done(old, 0)]), Err(RingError::NotInFlight { head: old.head }));
                    assert_eq!((old.readable, old.writable), (new.readable, new.writable));
                }
                device.rewind(3).expect("all of them, over the gap");
            }
            let chains = pop(&mut device, 3);
            complete(&mut device, &chains);
            assert_eq!(reclaim(&mut driver).len(), 3);
        });
    }
}
