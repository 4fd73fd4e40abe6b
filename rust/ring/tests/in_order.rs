//! IN_ORDER on both sides: runs of used buffers (device-21), ring order and both styles of used elements (driver-14).

mod common;

use common::*;
use virtqueue::{Buffer, Direction, Form, Format, RingError, RingFeatures, Segment, Used};

/// A device and a driver with IN_ORDER, and chains of one descriptor each; a chain is (readable, writable) bytes.
fn in_order(format: Format, chains: &[(u32, u32)]) -> (Rig, Driver, Device) {
    let rig = Rig::new(format, 8, IN_ORDER);
    let mut driver = rig.driver();
    for (token, &(readable, writable)) in chains.iter().enumerate() {
        let segment = if writable > 0 { Segment::writable(rig.data, writable) } else { Segment::readable(rig.data, readable) };
        driver.add(token as u64, &[segment], Form::Direct).expect("added");
    }
    driver.publish();
    let device = rig.device();
    (rig, driver, device)
}

/// How many used elements the device wrote for what it published: places that do not look as before.
fn elements(rig: &Rig, count: u16) -> Vec<(u32, u32)> {
    match rig.format {
        Format::Split => (0..count).map(|position| rig.raw_split().element(position)).collect(),
        Format::Packed => (0..count)
            .map(|offset| rig.raw_packed().get(offset))
            .map(|(len, id, flags)| if flags & 0x8080 == 0x8080 { (id.into(), len) } else { (u32::MAX, 0) })
            .collect(),
    }
}

#[test]
fn device_21_transmitted_chains_are_one_run() {
    for format in BOTH {
        let (rig, mut driver, mut device) = in_order(format, &[(60, 0); 5]);
        if format == Format::Split {
            (0..8).for_each(|position| rig.raw_split().set_element(position, u32::MAX, 0));
        }
        let chains = pop(&mut device, 5);
        complete(&mut device, &chains);
        assert_eq!(elements(&rig, 5), [(4, 0), (u32::MAX, 0), (u32::MAX, 0), (u32::MAX, 0), (u32::MAX, 0)]);
        assert_eq!(reclaim(&mut driver), [0, 1, 2, 3, 4].map(|token| (token, 0)));
        assert_eq!(driver.free(), 8);
    }
}

#[test]
fn device_21_a_chain_that_was_not_filled_ends_its_run() {
    for format in BOTH {
        let (rig, mut driver, mut device) = in_order(format, &[(0, 16), (0, 16), (0, 16), (60, 0), (0, 16), (0, 16)]);
        if format == Format::Split {
            (0..8).for_each(|position| rig.raw_split().set_element(position, u32::MAX, 0));
        }
        let lengths = [16, 15, 16, 0, 0, 16];
        let chains = pop(&mut device, 6);
        let completions: Vec<_> = chains.iter().zip(lengths).map(|(chain, len)| done(chain, len)).collect();
        give_back(&mut device, &completions).expect("in flight");
        device.publish();
        // 0 filled, 1 not: one run up to 1. 2 filled, 3 without a writable part, 4 not filled: one run up to 4. 5 by itself.
        let none = (u32::MAX, 0);
        assert_eq!(elements(&rig, 6), [(1, 15), none, (4, 0), none, none, (5, 16)]);
        assert_eq!(reclaim(&mut driver), [(0, 16), (1, 15), (2, 16), (3, 0), (4, 0), (5, 16)]);
    }
}

#[test]
fn device_21_completion_out_of_order_is_held() {
    for format in BOTH {
        let (_, mut driver, mut device) = in_order(format, &[(0, 16); 4]);
        let chains = pop(&mut device, 4);
        complete(&mut device, &chains[2..3]);
        assert_eq!(device.outstanding(), 4, "held until the ones before it are done");
        complete(&mut device, &chains[1..2]);
        assert_eq!(reclaim(&mut driver), []);
        assert_eq!(give_back(&mut device, &[done(&chains[2], 16)]), Err(RingError::NotInFlight { head: chains[2].head }), "twice");
        complete(&mut device, &chains[..1]);
        assert_eq!(reclaim(&mut driver), [(0, 16), (1, 16), (2, 16)]);
        complete(&mut device, &chains[3..]);
        assert_eq!(reclaim(&mut driver), [(3, 16)]);
        assert_eq!((device.outstanding(), driver.free()), (0, 8));
    }
}

/// What is held was completed: it cannot be handed back, nor can what was popped before it.
#[test]
fn device_21_a_held_chain_is_not_rewound() {
    for format in BOTH {
        let (_, mut driver, mut device) = in_order(format, &[(0, 16); 3]);
        let chains = pop(&mut device, 3);
        complete(&mut device, &chains[2..]);
        let error = RingError::CannotRewind { count: 1, reason: "a newer chain was completed" };
        assert_eq!(device.rewind(1), Err(error));
        complete(&mut device, &chains[..2]);
        assert_eq!(reclaim(&mut driver), [(0, 16), (1, 16), (2, 16)]);
    }
}

/// Runs end at a publish: an element always stands where the driver looks next.
#[test]
fn device_21_a_run_does_not_outlive_its_publish() {
    for format in BOTH {
        let (_, mut driver, mut device) = in_order(format, &[(60, 0); 6]);
        let chains = pop(&mut device, 6);
        for pair in chains.chunks(2) {
            give_back(&mut device, &[done(&pair[0], 0)]).expect("in flight");
            give_back(&mut device, &[done(&pair[1], 0)]).expect("in flight");
            device.publish();
            assert_eq!(reclaim(&mut driver).len(), 2);
        }
    }
}

#[test]
fn driver_14_descriptors_are_taken_in_ring_order() {
    for features in [IN_ORDER, RingFeatures { indirect: true, ..IN_ORDER }] {
        let rig = Rig::new(Format::Split, 8, features);
        let (mut driver, mut device) = (rig.driver(), rig.device());
        let raw = rig.raw_split();
        let mut expected = 0;
        for token in 0..40_u16 {
            let segments = [Segment::readable(rig.data, 4), Segment::readable(rig.data, 4), Segment::writable(rig.data, 4)];
            let (form, slots) = if features.indirect && token % 2 == 0 { (Form::Indirect, 1) } else { (Form::Direct, 3) };
            publish_chain(&mut driver, token.into(), &segments, form);
            assert_eq!(raw.head_at(token), expected);
            for k in 0..slots - 1 {
                assert_eq!(raw.desc_flags((expected + k) % 8).1, (expected + k + 1) % 8, "next is the descriptor after it");
            }
            expected = (expected + slots) % 8;
            let chains = pop(&mut device, 1);
            complete(&mut device, &chains);
            assert_eq!(reclaim(&mut driver), [(token.into(), 4)]);
        }
    }
}

/// A device may give one element for each chain, or one for a run, and change its mind at any time.
#[test]
fn driver_14_both_styles_of_used_elements() {
    for format in BOTH {
        let rig = Rig::new(format, 8, IN_ORDER);
        let mut driver = rig.driver();
        let mut token = 0;
        let mut position = 0_u16;
        for runs in [[1, 1, 1].as_slice(), &[3, 2], &[8], &[1, 4, 1, 2], &[5], &[7, 1], &[2, 2, 2, 2]] {
            let count: u16 = runs.iter().sum();
            publish(&mut driver, token, count.into());
            let mut expected = Vec::new();
            for run in runs {
                let last = position + run - 1;
                match format {
                    Format::Split => rig.raw_split().set_element(position, (last % 8).into(), 7),
                    Format::Packed => rig.raw_packed().set_used(position.into(), last % 8, 7, 0),
                }
                expected.extend((0..*run).map(|k| (token + u64::from(k), if k + 1 == *run { 7 } else { 16 })));
                token += u64::from(*run);
                position += run;
            }
            if format == Format::Split {
                rig.raw_split().set_used_idx(position);
            }
            assert_eq!(reclaim(&mut driver), expected, "{runs:?}");
            assert_eq!(driver.free(), 8);
        }
    }
}

/// A run may be taken in pieces; what is left of it is there to look at, so a driver that arms does not sleep on it.
#[test]
fn driver_14_a_run_taken_in_pieces() {
    for format in BOTH {
        let (_, mut driver, mut device) = in_order(format, &[(60, 0); 6]);
        let chains = pop(&mut device, 6);
        complete(&mut device, &chains);
        let mut out = [Used::default(); 4];
        assert_eq!(driver.pop_used_batch(&mut out[..1]), Ok(1));
        assert!(driver.arm(), "five more");
        assert_eq!(driver.pop_used_batch(&mut out), Ok(4));
        assert_eq!(out.map(|used| used.token), [1, 2, 3, 4]);
        assert!(driver.arm(), "one more");
        assert_eq!(driver.pop_used_batch(&mut out), Ok(1));
        assert!(!driver.arm(), "nothing more");
    }
}

#[test]
fn driver_14_a_run_beyond_what_was_used() {
    let rig = Rig::new(Format::Split, 8, IN_ORDER);
    let mut driver = rig.driver();
    publish(&mut driver, 10, 5);
    // The index tells of two, the element of four.
    rig.raw_split().set_element(0, 3, 0);
    rig.raw_split().set_used_idx(2);
    let error = RingError::InOrderRun { id: 3, run: 4, limit: 2 };
    assert_eq!(reclaim_error(&mut driver), error);
    assert_driver_broken(&mut driver, &error, &[10, 11, 12, 13, 14]);
}

/// On the packed ring the bound is what is outstanding: an id beyond that is not outstanding at all.
#[test]
fn driver_14_a_run_to_a_chain_that_is_not_outstanding() {
    for format in BOTH {
        for (id, published) in [(3, 3), (7, 3), (0, 0)] {
            let rig = Rig::new(format, 8, IN_ORDER);
            let mut driver = rig.driver();
            publish(&mut driver, 10, published);
            driver
                .add_batch(&[Buffer { token: 20, address: rig.data, len: 1, direction: Direction::Readable }])
                .expect("added, not published");
            match format {
                Format::Split => {
                    rig.raw_split().set_element(0, id, 0);
                    rig.raw_split().set_used_idx(published as u16);
                }
                Format::Packed => rig.raw_packed().set_used(0, id as u16, 0, 0),
            }
            if published == 0 && format == Format::Split {
                assert_eq!(reclaim(&mut driver), []);
                continue;
            }
            let error = RingError::UsedIdNotOutstanding { id };
            assert_eq!(reclaim_error(&mut driver), error, "{format:?}");
            let mut tokens: Vec<u64> = (10..10 + published as u64).collect();
            tokens.push(20);
            assert_driver_broken(&mut driver, &error, &tokens);
        }
    }
}

/// An id that came back already names no run: neither the chain before, nor a round of the whole ring.
#[test]
fn driver_14_a_run_backwards() {
    for format in BOTH {
        let (rig, mut driver, mut device) = in_order(format, &[(60, 0); 6]);
        let chains = pop(&mut device, 2);
        complete(&mut device, &chains);
        assert_eq!(reclaim(&mut driver).len(), 2);
        match format {
            Format::Split => {
                rig.raw_split().set_element(2, 1, 0);
                rig.raw_split().set_used_idx(3);
            }
            Format::Packed => rig.raw_packed().set_used(2, 1, 0, 0),
        }
        let error = RingError::UsedIdNotOutstanding { id: 1 };
        assert_eq!(reclaim_error(&mut driver), error, "{format:?}");
        assert_driver_broken(&mut driver, &error, &[2, 3, 4, 5]);
    }
}

/// Inside a chain of several descriptors there is no head, so no run ends there.
#[test]
fn driver_14_a_run_into_the_middle_of_a_chain() {
    for format in BOTH {
        let rig = Rig::new(format, 8, IN_ORDER);
        let mut driver = rig.driver();
        let two = [Segment::readable(rig.data, 4), Segment::readable(rig.data, 4)];
        for token in [1, 2] {
            publish_chain(&mut driver, token, &two, Form::Direct);
        }
        match format {
            Format::Split => {
                rig.raw_split().set_element(0, 3, 0);
                rig.raw_split().set_used_idx(2);
            }
            Format::Packed => rig.raw_packed().set_used(0, 3, 0, 0),
        }
        let error = RingError::UsedIdNotOutstanding { id: 3 };
        assert_eq!(reclaim_error(&mut driver), error, "{format:?}");
        assert_driver_broken(&mut driver, &error, &[1, 2]);
    }
}
