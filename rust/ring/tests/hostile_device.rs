//! The device is hostile: it breaks one rule at a time with its own hand, and the driver's queue answers as the rule says.

mod common;

use common::raw::{Desc, RawPacked, RawSplit};
use common::*;
use virtqueue::event::Cursor;
use virtqueue::spec::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_FLAGS_DISABLE};
use virtqueue::{Direction, Form, Format, RingError, RingFeatures, RingState, Segment, Used};

/// A device played by hand: it writes used elements one after the other, whatever was made available.
enum RawDevice {
    Split { ring: RawSplit, idx: u16 },
    Packed { ring: RawPacked, next: u32 },
}

impl RawDevice {
    fn new(rig: &Rig) -> Self {
        match rig.format {
            Format::Split => RawDevice::Split { ring: rig.raw_split(), idx: 0 },
            Format::Packed => RawDevice::Packed { ring: rig.raw_packed(), next: 0 },
        }
    }

    /// The id of the chain that starts at this position (split: of the available ring; packed: a running number of slots).
    fn id_at(&self, position: u32) -> u32 {
        match self {
            RawDevice::Split { ring, .. } => ring.head_at(position as u16).into(),
            RawDevice::Packed { ring, .. } => ring.get(ring.cursor(position).offset).1.into(),
        }
    }

    /// Writes one used element and shows it; a packed ring goes on by `slots`.
    fn uses(&mut self, id: u32, len: u32, slots: u32) {
        match self {
            RawDevice::Split { ring, idx } => {
                ring.set_element(*idx, id, len);
                *idx = idx.wrapping_add(1);
                ring.set_used_idx(*idx);
            }
            RawDevice::Packed { ring, next } => {
                ring.set_used(*next, id as u16, len, DESC_F_WRITE);
                *next += slots;
            }
        }
    }
}

/// A small ring of each format, its driver with tokens 10, 11, ... published, and the device by hand.
fn each_with_outstanding(features: RingFeatures, count: usize, mut body: impl FnMut(Rig, Driver, RawDevice)) {
    each(features, |rig| {
        let mut driver = rig.driver();
        publish(&mut driver, 10, count);
        let device = RawDevice::new(&rig);
        body(rig, driver, device);
    });
}

#[test]
fn driver_01_descriptors_rewritten_by_the_device_change_nothing() {
    each(EVENT_IDX, |rig| {
        let mut driver = rig.driver();
        let segments = [Segment::readable(rig.data, 8), Segment::writable(rig.data + 8, 8), Segment::writable(rig.data + 16, 8)];
        for token in [1, 2] {
            publish_chain(&mut driver, token, &segments, Form::Direct);
        }
        let mut device = RawDevice::new(&rig);
        let ids = [device.id_at(0), device.id_at(if rig.format == Format::Split { 1 } else { 3 })];
        // Every descriptor claims to be a chain of its own, to go on for ever, or to be elsewhere.
        match &device {
            RawDevice::Split { ring, .. } => {
                for index in 0..rig.size {
                    ring.set_desc(index, Desc { address: u64::MAX, len: u32::MAX, flags: 0xffff, tag: index });
                }
                for place in 0..rig.size {
                    ring.avail.store(2 + usize::from(place), 0xffff);
                }
            }
            RawDevice::Packed { ring, .. } => {
                for offset in 0..rig.size {
                    ring.desc.store(2 * usize::from(offset), u64::MAX);
                }
            }
        }
        for id in ids {
            device.uses(id, 16, 3);
        }
        assert_eq!(reclaim(&mut driver), [(1, 16), (2, 16)]);
        assert_eq!((driver.free(), driver.outstanding()), (rig.size, 0));
        // The freed descriptors carry the next chain whole, to a device that starts where it is.
        let at = Cursor { offset: if rig.format == Format::Split { 2 } else { 6 }, wrap: true };
        let mut real = rig.restored(Some(RingState { avail: at, used: at })).expect("restored");
        publish_chain(&mut driver, 3, &segments, Form::Direct);
        assert_eq!(pop_with_segments(&mut real, 1)[0].1, segments);
    });
}

#[test]
fn driver_02_used_index_runs_ahead() {
    for (published, index) in [(2, 3), (2, 9), (0, 1), (2, 0xffff), (8, 9), (2, 0x8000)] {
        let rig = Rig::new(Format::Split, 8, PLAIN);
        let mut driver = rig.driver();
        publish(&mut driver, 0, published);
        rig.raw_split().set_used_idx(index);
        let outstanding = published as u16;
        let error = RingError::UsedIndex { index, last: 0, ahead: index, outstanding };
        assert_eq!(reclaim_error(&mut driver), error);
        assert_driver_broken(&mut driver, &error, &(0..published as u64).collect::<Vec<_>>());
    }
}

#[test]
fn driver_02_used_index_goes_back() {
    each_with_outstanding(PLAIN, 4, |rig, mut driver, mut device| {
        let RawDevice::Split { .. } = device else { return };
        let id = device.id_at(0);
        device.uses(id, 0, 1);
        assert_eq!(reclaim(&mut driver), [(10, 0)]);
        rig.raw_split().set_used_idx(0);
        let error = RingError::UsedIndex { index: 0, last: 1, ahead: 0xffff, outstanding: 3 };
        assert_eq!(reclaim_error(&mut driver), error);
        assert_driver_broken(&mut driver, &error, &[11, 12, 13]);
    });
}

/// What was added but not published cannot come back, neither by index nor by id.
#[test]
fn driver_02_used_before_it_was_published() {
    each(PLAIN, |rig| {
        let mut driver = rig.driver();
        publish(&mut driver, 1, 1);
        driver.add(2, &[Segment::readable(rig.data, 4)], Form::Direct).expect("added");
        let mut device = RawDevice::new(&rig);
        let published = device.id_at(0);
        let secret = (0..rig.size.into()).find(|&id| id != published && is_outstanding(&rig, id)).expect("some id");
        device.uses(secret, 0, 1);
        let error = RingError::UsedIdNotOutstanding { id: secret };
        assert_eq!(reclaim_error(&mut driver), error);
        assert_driver_broken(&mut driver, &error, &[1, 2]);
    });
    let rig = Rig::new(Format::Split, 8, PLAIN);
    let mut driver = rig.driver();
    driver.add(2, &[Segment::readable(rig.data, 4)], Form::Direct).expect("added");
    rig.raw_split().set_used_idx(1);
    let error = RingError::UsedIndex { index: 1, last: 0, ahead: 1, outstanding: 0 };
    assert_eq!(reclaim_error(&mut driver), error);
}

/// Whether a fresh driver that adds two chains uses this id for one of them.
fn is_outstanding(rig: &Rig, id: u32) -> bool {
    let twin = Rig::new(rig.format, rig.size, rig.features);
    publish(&mut twin.driver(), 0, 2);
    let device = RawDevice::new(&twin);
    (0..2).any(|position| device.id_at(position) == id)
}

#[test]
fn driver_02_id_beyond_the_ring() {
    each_with_outstanding(PLAIN, 2, |rig, mut driver, mut device| {
        device.uses(8, 0, 1);
        let error = RingError::UsedIdOutOfRange { id: 8, size: rig.size };
        assert_eq!(reclaim_error(&mut driver), error);
        assert_driver_broken(&mut driver, &error, &[10, 11]);
    });
    // The split ring's ids have 32 bits, and none of them is cut off.
    for id in [0x1_0000, u32::MAX, 0x8000_0000] {
        each_with_outstanding(PLAIN, 2, |rig, mut driver, mut device| {
            if rig.format == Format::Split {
                device.uses(id, 0, 1);
                assert_eq!(reclaim_error(&mut driver), RingError::UsedIdOutOfRange { id, size: 8 });
            }
        });
    }
}

#[test]
fn driver_02_id_that_is_not_outstanding() {
    each_with_outstanding(PLAIN, 2, |rig, mut driver, mut device| {
        let free = (0..rig.size.into()).find(|&id| id != device.id_at(0) && id != device.id_at(1)).expect("free id");
        device.uses(free, 0, 1);
        let error = RingError::UsedIdNotOutstanding { id: free };
        assert_eq!(reclaim_error(&mut driver), error);
        assert_driver_broken(&mut driver, &error, &[10, 11]);
    });
}

#[test]
fn driver_02_id_inside_a_chain_is_no_head() {
    let rig = Rig::new(Format::Split, 8, PLAIN);
    let mut driver = rig.driver();
    publish_chain(&mut driver, 1, &[Segment::readable(rig.data, 4), Segment::writable(rig.data, 4)], Form::Direct);
    let mut device = RawDevice::new(&rig);
    let (_, second) = rig.raw_split().desc_flags(device.id_at(0) as u16);
    device.uses(second.into(), 4, 1);
    let error = RingError::UsedIdNotOutstanding { id: second.into() };
    assert_eq!(reclaim_error(&mut driver), error);
    assert_driver_broken(&mut driver, &error, &[1]);
}

#[test]
fn driver_02_same_id_twice() {
    each_with_outstanding(PLAIN, 3, |_, mut driver, mut device| {
        let id = device.id_at(0);
        device.uses(id, 16, 1);
        device.uses(id, 16, 1);
        // What precedes the lie is delivered; the lie is told by the next call.
        assert_eq!(reclaim(&mut driver), [(10, 16)]);
        let error = RingError::UsedIdNotOutstanding { id };
        assert_eq!(reclaim_error(&mut driver), error);
        assert_driver_broken(&mut driver, &error, &[11, 12]);
    });
}

#[test]
fn driver_03_used_length_is_clamped_and_counted() {
    for features in all_features() {
        each(features, |rig| {
            let mut driver = rig.driver();
            publish_chain(&mut driver, 1, &[Segment::writable(rig.data, 100)], Form::Direct);
            publish_chain(&mut driver, 2, &[Segment::readable(rig.data, 100)], Form::Direct);
            publish_chain(&mut driver, 3, &[Segment::readable(rig.data, 8), Segment::writable(rig.data, 100)], Form::Direct);
            publish_chain(&mut driver, 4, &[Segment::writable(rig.data, 100)], Form::Direct);
            let mut device = RawDevice::new(&rig);
            let ids = [0, 1, 2, if rig.format == Format::Split { 3 } else { 4 }].map(|position| device.id_at(position));
            for (id, (len, slots)) in ids.into_iter().zip([(101, 1), (u32::MAX, 1), (100, 2), (99, 1)]) {
                device.uses(id, len, slots);
            }
            assert_eq!(reclaim(&mut driver), [(1, 100), (2, 0), (3, 100), (4, 99)]);
            assert_eq!(driver.counters().clamped, 2);
            assert_eq!(driver.broken(), None);
        });
    }
}

#[test]
fn driver_04_slots_come_from_the_private_table() {
    let rig = Rig::new(Format::Packed, 8, PLAIN);
    let mut driver = rig.driver();
    let three = [Segment::readable(rig.data, 4), Segment::readable(rig.data, 4), Segment::writable(rig.data, 4)];
    publish_chain(&mut driver, 1, &three, Form::Direct);
    publish_chain(&mut driver, 2, &three, Form::Direct);
    let device = RawDevice::new(&rig);
    let (first, second) = (device.id_at(0), device.id_at(3));
    // The used descriptor claims to go on, and to be a table: its flags say nothing about slots.
    rig.raw_packed().set_used(0, first as u16, 4, DESC_F_NEXT | DESC_F_INDIRECT | DESC_F_WRITE);
    assert_eq!(reclaim(&mut driver), [(1, 4)]);
    assert_eq!(driver.free(), 5);
    // The next used descriptor is looked for three slots on, not one.
    rig.raw_packed().set_used(1, second as u16, 4, DESC_F_WRITE);
    assert_eq!(reclaim(&mut driver), []);
    rig.raw_packed().set_used(3, second as u16, 4, DESC_F_WRITE);
    assert_eq!(reclaim(&mut driver), [(2, 4)]);
    assert_eq!(driver.free(), 8);
    // The id must be in use, all 16 bits of it.
    for id in [first, 8, 0xffff] {
        let rig = Rig::new(Format::Packed, 8, PLAIN);
        let mut driver = rig.driver();
        publish(&mut driver, 1, 1);
        let mut device = RawDevice::new(&rig);
        let id = if id == first { (0..8).find(|&id| id != device.id_at(0)).expect("free id") } else { id };
        device.uses(id, 0, 1);
        let error = if id < 8 { RingError::UsedIdNotOutstanding { id } } else { RingError::UsedIdOutOfRange { id, size: 8 } };
        assert_eq!(reclaim_error(&mut driver), error);
        assert_driver_broken(&mut driver, &error, &[1]);
    }
}

#[test]
fn driver_05_buffers_come_back_at_reset_and_not_before() {
    for features in all_features() {
        each(features, |rig| {
            let mut driver = rig.driver();
            publish(&mut driver, 10, 8);
            assert_eq!(driver.add_batch(&[buffer(99, 1, Direction::Readable)]), Ok(0), "all slots are outstanding");
            let full = driver.add(99, &[Segment::readable(rig.data, 1)], Form::Direct);
            assert_eq!(full, Err(RingError::Full { needed: 1, free: 0 }));
            let mut device = rig.device();
            let chains = pop(&mut device, 3);
            complete(&mut device, &chains);
            assert_eq!(reclaim(&mut driver), [(10, 16), (11, 16), (12, 16)]);
            driver.add(20, &[Segment::readable(rig.data, 1)], Form::Direct).expect("added, not published");
            let mut tokens = driver.reset();
            tokens.sort_unstable();
            assert_eq!(tokens, [13, 14, 15, 16, 17, 20]);
            assert_eq!(driver.outstanding(), 0);
            assert_eq!(driver.add(21, &[Segment::readable(rig.data, 1)], Form::Direct), Err(RingError::Broken));
            // What the device still uses after the reset is not taken.
            let chains = pop(&mut device, 5);
            complete(&mut device, &chains);
            assert_eq!(driver.pop_used_batch(&mut [Used::default(); 8]), Ok(0));
        });
    }
}

#[test]
fn driver_13_packed_length_counts_with_and_without_write() {
    let rig = Rig::new(Format::Packed, 8, PLAIN);
    let mut driver = rig.driver();
    publish(&mut driver, 1, 3);
    let device = RawDevice::new(&rig);
    for (position, (len, flags)) in [(16, 0), (16, DESC_F_WRITE), (17, 0)].into_iter().enumerate() {
        rig.raw_packed().set_used(position as u32, device.id_at(position as u32) as u16, len, flags);
    }
    assert_eq!(reclaim(&mut driver), [(1, 16), (2, 16), (3, 16)]);
    assert_eq!(driver.counters().clamped, 1);
    // Our own device sets WRITE exactly where it wrote something.
    let mut driver = rig.driver();
    publish(&mut driver, 1, 3);
    let mut device = rig.device();
    let chains = pop(&mut device, 3);
    give_back(&mut device, &[done(&chains[0], 0), done(&chains[1], 1), done(&chains[2], 16)]).expect("in flight");
    device.publish();
    assert_eq!([0, 1, 2].map(|offset| rig.raw_packed().get(offset).2 & DESC_F_WRITE), [0, DESC_F_WRITE, DESC_F_WRITE]);
    assert_eq!(reclaim(&mut driver), [(1, 0), (2, 1), (3, 16)]);
}

/// The event suppression structure is the device's to write: no value of it breaks the driver, and disabled means disabled.
#[test]
fn device_20_any_suppression_word_is_answered() {
    let rig = Rig::new(Format::Packed, 8, EVENT_IDX);
    let mut driver = rig.driver();
    for (token, flags) in (0..8).zip([0, 2, 3, 0x8002, 0xffff, 0xfffc, 2, 3_u32]) {
        rig.raw_packed().device_event.store(0, flags << 16 | 0x7fff);
        assert!(publish(&mut driver, token, 1), "an offset of 32767 is beyond the ring, 3 is reserved");
    }
    assert_eq!(driver.broken(), None);
    let rig = Rig::new(Format::Packed, 8, EVENT_IDX);
    let mut driver = rig.driver();
    rig.raw_packed().device_event.store(0, EVENT_FLAGS_DISABLE << 16);
    assert!(!publish(&mut driver, 0, 1));
}
