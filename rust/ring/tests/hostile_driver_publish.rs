//! The driver is hostile to what the device publishes: private positions (device-17), the order of publishing (device-18), decisions
//! (device-19) and suppression fields (device-20).

mod common;

use common::raw::desc;
use common::*;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_memory::{DirtyBitmap, Mapping, Region};
use virtqueue::event::{Cursor, packed_word};
use virtqueue::spec::{AVAIL_F_NO_INTERRUPT, EVENT_FLAGS_DESC, EVENT_FLAGS_DISABLE, EVENT_FLAGS_ENABLE, USED_F_NO_NOTIFY};
use virtqueue::{DeviceRing, Direction, DriverRing, Form, Format, RingError, RingState, Segment, Used};

/// Uses `count` chains of one descriptor, and tells whether the driver is notified.
fn use_chains(driver: &mut Driver, device: &mut Device, count: usize) -> bool {
    publish(driver, 0, count);
    let chains = pop(device, count);
    assert_eq!(chains.len(), count);
    let notify = complete(device, &chains);
    assert_eq!(reclaim(driver).len(), count);
    notify
}

#[test]
fn device_17_the_used_index_is_never_read_back() {
    let rig = Rig::new(Format::Split, 8, PLAIN);
    let (mut driver, mut device) = (rig.driver(), rig.device());
    for round in 0..20_u16 {
        use_chains(&mut driver, &mut device, 3);
        assert_eq!(rig.raw_split().used_idx(), 4 * round + 3);
        rig.raw_split().set_used_idx(0x7777);
        // The next publish puts it right, from private numbers.
        assert_eq!(device.state().used.offset, 4 * round + 3);
        use_chains(&mut driver, &mut device, 1);
        assert_eq!(rig.raw_split().used_idx(), 4 * round + 4);
    }
}

/// A packed device keeps its place even if every descriptor claims another lap.
#[test]
fn device_17_the_packed_cursor_is_private() {
    let rig = Rig::new(Format::Packed, 8, PLAIN);
    let (mut driver, mut device) = (rig.driver(), rig.device());
    use_chains(&mut driver, &mut device, 3);
    for offset in (0..8).filter(|&offset| offset != 3) {
        rig.raw_packed().set(offset, desc(rig.data, 1, 0x0080));
    }
    assert_eq!(pop(&mut device, 8), [], "only the place at the cursor is looked at");
    let at = Cursor { offset: 3, wrap: true };
    assert_eq!(device.state(), RingState { avail: at, used: at });
}

#[test]
fn device_17_a_restored_split_ring_reads_the_used_index_once() {
    let rig = Rig::new(Format::Split, 8, PLAIN);
    let cursor = |offset| Cursor { offset, wrap: false };
    let restore = |used: u16, base: u16| {
        rig.raw_split().set_used_idx(used);
        rig.restored(Some(RingState { avail: cursor(base), used: cursor(0) })).map(|device| device.state())
    };
    for (used, base) in [(0, 0), (0, 8), (100, 100), (100, 108), (0xffff, 3), (0xfff8, 0)] {
        assert_eq!(restore(used, base), Ok(RingState { avail: cursor(base), used: cursor(used) }));
    }
    for (used, base) in [(0, 9), (1, 0), (100, 99), (0, 0xffff), (0xffff, 8), (0x8000, 0)] {
        let error = RingError::RestoredUsedIndex { used, base, behind: base.wrapping_sub(used), size: 8 };
        assert!(error.breaks());
        assert_eq!(restore(used, base), Err(error));
    }
}

#[test]
fn device_17_a_restored_packed_ring_checks_its_positions() {
    let rig = Rig::new(Format::Packed, 5, PLAIN);
    let good = Cursor { offset: 4, wrap: false };
    for position in [5, 6, 0x7fff] {
        let bad = Cursor { offset: position, wrap: true };
        for state in [RingState { avail: bad, used: good }, RingState { avail: good, used: bad }] {
            assert_eq!(rig.restored(Some(state)).err(), Some(RingError::BadRestore { position, size: 5 }));
        }
    }
    let state = RingState { avail: good, used: good };
    assert_eq!(rig.restored(Some(state)).expect("restored").state(), state);
}

/// After set-up and after a restore the driver's wishes are not known to be current: the first decision notifies whatever they say.
#[test]
fn device_17_the_first_decision_notifies() {
    for features in [PLAIN, EVENT_IDX] {
        each(features, |rig| {
            let (mut driver, mut device) = (rig.driver(), rig.device());
            driver.disarm();
            assert!(use_chains(&mut driver, &mut device, 2), "first after set-up");
            assert!(!use_chains(&mut driver, &mut device, 2), "the driver is disarmed");
            let mut device = rig.restored(Some(device.state())).expect("restored");
            assert!(use_chains(&mut driver, &mut device, 2), "first after a restore");
            assert!(!use_chains(&mut driver, &mut device, 2));
        });
    }
}

/// Nothing shows before the publish, all of it shows after it, and an empty publish writes nothing at all.
#[test]
fn device_18_a_batch_is_shown_by_one_store() {
    for features in all_features() {
        each(features, |rig| {
            let (mut driver, mut device) = (rig.driver(), rig.device());
            publish(&mut driver, 0, 6);
            let chains = pop(&mut device, 6);
            for chain in &chains {
                give_back(&mut device, &[done(chain, 16)]).expect("in flight");
                assert_eq!(reclaim(&mut driver), []);
            }
            assert_eq!(device.counters().used, 0);
            device.publish();
            assert_eq!((reclaim(&mut driver).len(), device.counters().used), (6, 6));
            if rig.format == Format::Split {
                rig.raw_split().set_used_idx(0x1234);
            }
            let bytes = || (0..rig.mapping.len()).step_by(8).map(|at| rig.mapping.load(at, 8)).collect::<Vec<_>>();
            let before = bytes();
            assert!(!device.publish());
            assert_eq!(bytes(), before, "an empty publish");
            assert_eq!(device.counters().notified + device.counters().suppressed, 1, "and it decides nothing");
        });
    }
}

/// What the device writes is in the dirty log: used elements, index, suppression fields; and no page that it did not write.
#[test]
fn device_18_what_is_published_is_marked_dirty() {
    for format in BOTH {
        for features in [PLAIN, EVENT_IDX, IN_ORDER] {
            let rig = Rig::new(format, 1024, features);
            let (mut driver, mut device) = (rig.driver(), rig.device());
            let pages = (BASE + rig.mapping.len() as u64).div_ceil(4096);
            let dirty = Arc::new(DirtyBitmap::new(pages).expect("bitmap"));
            rig.memory.set_dirty(Some(dirty.clone()));
            let marked = || -> Vec<u64> {
                let bits = |(number, word)| (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| 64 * number + bit);
                dirty.take().into_iter().flat_map(bits).collect()
            };
            // Positions 1020 to 1028: the last element of the ring and the first.
            for round in 0..205 {
                let count = 5;
                publish(&mut driver, 0, count);
                let chains = pop(&mut device, count);
                assert_eq!(marked(), [], "popping writes nothing");
                complete(&mut device, &chains);
                let first = round * count as u64 % 1024;
                let places: Vec<u64> = (first..first + count as u64).map(|position| position % 1024).collect();
                let (from, step) = if format == Format::Split { (rig.areas.device + 4, 8) } else { (rig.areas.descriptor, 16) };
                let ends = |place: &u64| [from + step * place, from + step * place + step - 1];
                let mut expected: Vec<u64> = places.iter().flat_map(ends).map(|address| address / 4096).collect();
                if format == Format::Split {
                    expected.push(rig.areas.device / 4096);
                }
                expected.sort_unstable();
                expected.dedup();
                assert_eq!(marked(), expected, "{format:?}, from {first}");
                assert_eq!(reclaim(&mut driver).len(), count);
            }
            let event = match (format, features.event_idx) {
                (Format::Split, true) => rig.areas.device + 4 + 8 * 1024,
                _ => rig.areas.device,
            };
            device.arm();
            assert_eq!(marked(), [event / 4096]);
            device.disarm();
            assert_eq!(marked(), [event / 4096]);
        }
    }
}

/// Whatever batch carries the used position over the event, the driver is notified, at any place of the ring and over the wrap.
#[test]
fn device_19_a_batch_that_steps_over_the_event() {
    each(EVENT_IDX, |rig| {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        use_chains(&mut driver, &mut device, 1);
        let mut position = 1_u32;
        for round in 0..200 {
            let count = 1 + round % 8;
            set_event(&rig, position + round % count);
            assert!(use_chains(&mut driver, &mut device, count as usize), "{:?}, round {round}", rig.format);
            position += count;
            set_event(&rig, position - 1);
            assert!(!use_chains(&mut driver, &mut device, count as usize), "the event was passed before");
            position += count;
            set_event(&rig, position + count);
            assert!(!use_chains(&mut driver, &mut device, count as usize), "the event is one further");
            position += count;
        }
    });
}

/// Asks for a notification when the chain at this running number is used.
fn set_event(rig: &Rig, number: u32) {
    match rig.format {
        Format::Split => rig.raw_split().set_used_event(number as u16),
        Format::Packed => {
            let ring = rig.raw_packed();
            ring.driver_event.store(0, packed_word(EVENT_FLAGS_DESC, ring.cursor(number)));
        }
    }
}

/// Asks for a notification when the chain at this running number is made available.
fn set_device_event(rig: &Rig, number: u32) {
    match rig.format {
        Format::Split => rig.raw_split().avail_event.store(0, number as u16),
        Format::Packed => {
            let ring = rig.raw_packed();
            ring.device_event.store(0, packed_word(EVENT_FLAGS_DESC, ring.cursor(number)));
        }
    }
}

/// The range runs over slots: an event in the middle of a chain is passed by that chain.
#[test]
fn device_19_a_chain_cannot_step_over_the_event() {
    for inside in 0..3 {
        let rig = Rig::new(Format::Packed, 8, EVENT_IDX);
        let (mut driver, mut device) = (rig.driver(), rig.device());
        use_chains(&mut driver, &mut device, 1);
        let mut number = 1;
        for _ in 0..20 {
            publish_chain(&mut driver, 0, &[Segment::readable(rig.data, 4); 3], Form::Direct);
            let chains = pop(&mut device, 1);
            set_event(&rig, number + inside);
            assert!(complete(&mut device, &chains), "event {inside} slots into the chain at {number}");
            reclaim(&mut driver);
            number += 3;
        }
    }
}

/// The decision covers all that was published since the last one, though the event lies in an earlier part of it.
#[test]
fn device_19_an_event_between_two_decisions() {
    each(EVENT_IDX, |rig| {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        use_chains(&mut driver, &mut device, 3);
        publish(&mut driver, 0, 6);
        let chains = pop(&mut device, 6);
        set_event(&rig, 7);
        assert!(!complete(&mut device, &chains[..4]), "3 to 7");
        assert!(complete(&mut device, &chains[4..]), "7 to 9");
        assert!(!device.publish(), "nothing new");
    });
}

/// A decision covers every publish since the last one, and none of what was only added since.
#[test]
fn device_19_one_decision_for_several_publishes() {
    each(EVENT_IDX, |rig| {
        let (mut driver, mut device) = (rig.driver_ring(), rig.device_ring(None).expect("device"));
        let table = rig.memory.table();
        let mut batch = virtqueue::ChainBatch::new(8, 8);
        let mut out = [Used::default(); 8];
        let one = [buffer(0, 16, Direction::Readable)];
        let mut position = 0;
        for round in 0..40 {
            set_device_event(&rig, position);
            set_event(&rig, position);
            for publishes in 0..3 {
                assert_eq!(driver.add_batch(&one), Ok(1), "round {round}, publish {publishes}");
                driver.publish();
            }
            assert_eq!(driver.add_batch(&one), Ok(1));
            assert_eq!(driver.should_notify(), Some(true), "the event is the first of three");
            assert_eq!(driver.should_notify(), None);
            set_device_event(&rig, position + 4);
            driver.publish();
            assert_eq!(driver.should_notify(), Some(false), "the fourth was only added, and the event is the fifth");
            batch.clear();
            assert_eq!(device.pop_batch(&table, &mut batch), Ok(4));
            for chain in batch.chains() {
                device.complete_batch(&[done(chain, 0)][..]).expect("in flight");
                assert_eq!(device.publish(&table), 1);
            }
            assert_eq!(device.should_notify(), Some(true), "the event is the first of four");
            assert_eq!(device.should_notify(), None);
            assert_eq!(driver.pop_used_batch(&mut out, &mut 0), Ok(4));
            position += 4;
        }
    });
}

#[test]
fn device_20_flags_without_event_idx() {
    each(PLAIN, |rig| {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        use_chains(&mut driver, &mut device, 1);
        for round in 0..4 {
            assert!(use_chains(&mut driver, &mut device, 1));
            driver.disarm();
            match rig.format {
                Format::Split => assert_eq!(rig.raw_split().avail_flags(), AVAIL_F_NO_INTERRUPT),
                Format::Packed => assert_eq!(rig.raw_packed().driver_event.load(0) >> 16, EVENT_FLAGS_DISABLE),
            }
            assert!(!use_chains(&mut driver, &mut device, 2));
            assert!(!driver.arm());
            match rig.format {
                // Other bits of the flags mean nothing, nor does used_event.
                Format::Split => {
                    rig.raw_split().set_avail_flags(0xfffe);
                    rig.raw_split().set_used_event(round);
                }
                Format::Packed => assert_eq!(rig.raw_packed().driver_event.load(0) >> 16, EVENT_FLAGS_ENABLE),
            }
            assert!(use_chains(&mut driver, &mut device, 2));
        }
        // What the device writes when it wants no notifications.
        device.disarm();
        match rig.format {
            Format::Split => assert_eq!(rig.raw_split().used.load(0), USED_F_NO_NOTIFY),
            Format::Packed => assert_eq!(rig.raw_packed().device_event.load(0) >> 16, EVENT_FLAGS_DISABLE),
        }
        assert!(!publish(&mut driver, 0, 1));
        assert!(device.arm(), "one is there");
        assert!(publish(&mut driver, 0, 1));
    });
}

/// With EVENT_IDX the split ring's flags stay 0 on both sides, and what the other side puts there is not looked at: `disarm` parks the
/// event.
#[test]
fn device_20_flags_stay_0_under_event_idx() {
    let rig = Rig::new(Format::Split, 8, EVENT_IDX);
    let (mut driver, mut device) = (rig.driver(), rig.device());
    let raw = rig.raw_split();
    use_chains(&mut driver, &mut device, 3);
    driver.disarm();
    device.disarm();
    assert_eq!((raw.avail_flags(), raw.used.load(0)), (0, 0));
    assert_eq!((raw.used_event(), raw.avail_event.load(0)), (2, 2));
    for _ in 0..8 {
        assert!(!publish(&mut driver, 0, 5));
        let chains = pop(&mut device, 5);
        assert!(!complete(&mut device, &chains));
        reclaim(&mut driver);
    }
    raw.set_avail_flags(AVAIL_F_NO_INTERRUPT);
    raw.set_used_flags(USED_F_NO_NOTIFY);
    assert!(!driver.arm() && !device.arm());
    assert!(publish(&mut driver, 0, 1));
    let chains = pop(&mut device, 1);
    assert!(complete(&mut device, &chains));
}

/// The packed words that make no sense: all of them mean "notify", and none breaks the queue.
#[test]
fn device_20_packed_words_that_make_no_sense() {
    for features in [PLAIN, EVENT_IDX] {
        let rig = Rig::new(Format::Packed, 8, features);
        let (mut driver, mut device) = (rig.driver(), rig.device());
        use_chains(&mut driver, &mut device, 1);
        let mut words = vec![3 << 16, 0xffff_ffff, 3 << 16 | 0x8005, EVENT_FLAGS_DESC << 16 | 8, EVENT_FLAGS_DESC << 16 | 0xffff];
        if !features.event_idx {
            words.extend([EVENT_FLAGS_DESC << 16, EVENT_FLAGS_DESC << 16 | 0x8007]);
        }
        for word in words {
            rig.raw_packed().driver_event.store(0, word);
            assert!(use_chains(&mut driver, &mut device, 1), "{word:#x}");
        }
        assert_eq!(device.broken(), None);
    }
}

/// Memory that its owner takes away breaks the queue at the next burst (device-24, as far as a ring sees it).
#[test]
fn device_24_memory_taken_away_breaks_the_queue() {
    each(PLAIN, |rig| {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        let path = std::env::temp_dir().join(format!("virtqueue-{}-{:?}", std::process::id(), rig.format));
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("file");
        std::fs::remove_file(&path).expect("removed");
        file.set_len(8192).expect("length");
        let fd = OwnedFd::from(file.try_clone().expect("dup"));
        let foreign = Arc::new(Mapping::from_fd(fd, 0, 8192).expect("mapped"));
        let address = 0x8000_0000;
        rig.memory.add(Region::new(address, 8192, foreign.clone(), 0).expect("region")).expect("added");
        publish(&mut driver, 0, 2);
        assert_eq!(pop(&mut device, 1).len(), 1, "sound memory");
        file.set_len(0).expect("truncated");
        assert_eq!(device.memory().read(address, &mut [0; 8]), Ok(()), "zeros in its place");
        assert!(foreign.poisoned());
        let error = RingError::MemoryLost { address, len: 8192 };
        assert_eq!(pop_error(&mut device), error);
        assert_device_broken(&mut device, &error);
    });
}
