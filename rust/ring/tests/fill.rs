//! Buffers that are filled and given back at once: what the driver gets, and what ends it.

mod common;

use common::raw::desc;
use common::*;
use virtio_memory::RegionTable;
use virtqueue::{Fill, Filled, Form, Format, RingError, Segment};

/// Fills each buffer with some bytes fewer than the one before, until it has had enough; keeps what it was shown.
#[derive(Default)]
struct Filler {
    enough: usize,
    soon: Vec<(u64, u32)>,
    filled: Vec<(u64, u32)>,
}

impl Fill for Filler {
    fn soon(&mut self, _: &RegionTable, address: u64, len: u32) {
        self.soon.push((address, len));
    }

    fn fill(&mut self, _: &RegionTable, address: u64, len: u32) -> Option<u32> {
        if self.filled.len() == self.enough {
            return None;
        }
        let bytes = len.saturating_sub(self.filled.len() as u32);
        self.filled.push((address, len));
        Some(bytes)
    }
}

fn filler(enough: usize) -> Filler {
    Filler { enough, ..Filler::default() }
}

/// Every format, in order and not, of a size that batches do not divide.
fn rings() -> impl Iterator<Item = Rig> {
    [(Format::Split, 128), (Format::Packed, 100)]
        .into_iter()
        .flat_map(|(format, size)| [PLAIN, IN_ORDER].map(|f| Rig::new(format, size, f)))
}

#[test]
fn the_driver_gets_each_buffer_back_as_it_was_filled_and_in_order() {
    for rig in rings() {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        let mut token = 0;
        for round in 0..60 {
            let (count, most) = (1 + 13 * round % 97, 1 + 29 * round % 101);
            publish(&mut driver, token, count);
            let mut left = count;
            while left > 0 {
                let mut filler = filler(usize::MAX);
                let (filled, why) = device.fill_batch(most, &mut filler);
                assert_eq!((filled, why), (left.min(most), if left < most { Filled::Empty } else { Filled::All }), "{:?}", rig.format);
                assert_eq!(filler.soon, filler.filled, "each comes soon before it is filled");
                assert_eq!(reclaim(&mut driver), [], "nobody sees it yet");
                device.publish();
                let used: Vec<(u64, u32)> = (0..filled).map(|k| (token + k as u64, 16u32.saturating_sub(k as u32))).collect();
                assert_eq!(reclaim(&mut driver), used, "{:?}", rig.format);
                token += filled as u64;
                left -= filled;
            }
            assert_eq!((driver.free(), device.outstanding()), (rig.size, 0));
        }
        assert_eq!(device.counters().popped, token);
        assert_eq!(device.counters().used, token);
    }
}

#[test]
fn other_chains_are_left_to_be_popped_and_stay_in_flight() {
    for rig in rings() {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        for round in 0..200u64 {
            publish(&mut driver, 0, 3);
            let both = [Segment::readable(rig.data, 4), Segment::writable(rig.data, 4)];
            publish_chain(&mut driver, 3, &both, Form::Direct);
            publish_chain(&mut driver, 4, &both[..1], Form::Direct);
            publish(&mut driver, 5, 2);
            assert_eq!(device.fill_batch(9, &mut filler(2)), (2, Filled::Other), "it had enough");
            assert_eq!(device.fill_batch(9, &mut filler(9)), (1, Filled::Other), "another kind");
            let chains = pop(&mut device, 1);
            assert!(device.rewind(2).is_err(), "what was filled is done");
            assert_eq!((chains[0].readable, chains[0].writable), (4, 4));
            assert_eq!(device.fill_batch(9, &mut filler(9)), (0, Filled::Other), "one way only");
            let more = pop(&mut device, 1);
            if rig.features.in_order {
                assert_eq!(device.fill_batch(9, &mut filler(9)), (0, Filled::Other), "not before its turn");
                complete(&mut device, &chains);
                complete(&mut device, &more);
                assert_eq!(device.fill_batch(9, &mut filler(9)), (2, Filled::Empty));
                device.publish();
            } else {
                assert_eq!(device.fill_batch(9, &mut filler(9)), (2, Filled::Empty));
                device.publish();
                assert_eq!(device.outstanding(), 2);
                complete(&mut device, &more);
                complete(&mut device, &chains);
            }
            let mut tokens: Vec<u64> = reclaim(&mut driver).iter().map(|(token, _)| *token).collect();
            tokens.sort_unstable();
            assert_eq!(tokens, [0, 1, 2, 3, 4, 5, 6], "round {round}");
            assert_eq!((driver.free(), device.outstanding()), (rig.size, 0));
        }
    }
}

#[test]
fn in_order_a_run_that_was_not_shown_comes_before_what_is_filled() {
    for format in BOTH {
        let rig = Rig::new(format, 16, IN_ORDER);
        let (mut driver, mut device) = (rig.driver(), rig.device());
        for _ in 0..40 {
            publish(&mut driver, 0, 5);
            let chains = pop(&mut device, 3);
            let all: Vec<_> = chains.iter().map(|chain| done(chain, chain.writable)).collect();
            give_back(&mut device, &all).expect("in flight");
            assert_eq!(device.fill_batch(2, &mut filler(2)), (2, Filled::All));
            device.publish();
            assert_eq!(reclaim(&mut driver), [(0, 16), (1, 16), (2, 16), (3, 16), (4, 15)]);
        }
    }
}

#[test]
fn a_filler_that_claims_more_than_there_was_is_cut_short() {
    struct Liar;
    impl Fill for Liar {
        fn soon(&mut self, _: &RegionTable, _: u64, _: u32) {}
        fn fill(&mut self, _: &RegionTable, _: u64, len: u32) -> Option<u32> {
            Some(len + 1)
        }
    }
    each(PLAIN, |rig| {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        publish(&mut driver, 7, 1);
        assert_eq!(device.fill_batch(1, &mut Liar), (1, Filled::All));
        device.publish();
        assert_eq!(reclaim(&mut driver), [(7, 16)]);
    });
}

#[test]
fn mistakes_of_the_driver_are_left_to_be_popped() {
    // device-05, device-06: an index too far ahead, a head that is none, a head in flight.
    let rig = Rig::new(Format::Split, 16, PLAIN);
    let (raw, mut device) = (rig.raw_split(), rig.device());
    raw.set_desc(0, desc(rig.data, 16, 2));
    raw.offer(0, 0);
    raw.offer(1, 16);
    raw.set_avail_idx(2);
    assert_eq!(device.fill_batch(4, &mut filler(4)), (1, Filled::Other));
    assert_eq!(pop_error(&mut device), RingError::HeadOutOfRange { head: 16, size: 16 });
    assert_eq!(device.fill_batch(4, &mut filler(4)), (0, Filled::Other), "a broken queue stands still");

    let mut device = rig.device();
    raw.set_avail_idx(17);
    assert_eq!(device.fill_batch(4, &mut filler(4)), (0, Filled::Other));
    assert_eq!(pop_error(&mut device), RingError::AvailIndex { index: 17, last: 0, ahead: 17, size: 16 });

    let mut device = rig.device();
    raw.offer(1, 0);
    raw.set_avail_idx(2);
    assert_eq!(pop(&mut device, 1).len(), 1);
    assert_eq!(device.fill_batch(4, &mut filler(4)), (0, Filled::Other));
    assert_eq!(pop_error(&mut device), RingError::HeadInFlight { head: 0 });

    // device-06 for packed: never more slots than there are, whatever the flags say.
    let rig = Rig::new(Format::Packed, 4, PLAIN);
    let (raw, mut device) = (rig.raw_packed(), rig.device());
    for number in 0..4 {
        raw.offer(number, desc(rig.data, 16, 2));
    }
    assert_eq!(device.fill_batch(9, &mut filler(9)), (4, Filled::Other), "nothing was shown as used");
    assert_eq!(pop(&mut device, 4), []);
    device.publish();
    assert_eq!(device.fill_batch(9, &mut filler(9)), (0, Filled::Empty));
}

#[test]
fn device_06_what_is_offered_twice_in_one_batch_is_filled_twice_and_takes_two_slots() {
    let rig = Rig::new(Format::Split, 4, PLAIN);
    let (raw, mut device) = (rig.raw_split(), rig.device());
    raw.set_desc(0, desc(rig.data, 16, 2));
    (0..4).for_each(|number| raw.offer(number, 0));
    raw.set_avail_idx(4);
    assert_eq!(device.fill_batch(9, &mut filler(9)), (4, Filled::Empty));
    raw.set_avail_idx(5);
    assert_eq!(device.fill_batch(9, &mut filler(9)), (0, Filled::Other), "every slot is taken");

    let rig = Rig::new(Format::Packed, 4, PLAIN);
    let (raw, mut device) = (rig.raw_packed(), rig.device());
    (0..4).for_each(|number| raw.offer(number, desc(rig.data, 16, 2)));
    assert_eq!(device.fill_batch(9, &mut filler(9)).0, 4);
    assert_eq!(device.fill_batch(9, &mut filler(9)), (0, Filled::Other), "every slot is taken");
}

#[test]
fn directions_do_not_matter_to_what_comes_after() {
    each(PLAIN, |rig| {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        publish(&mut driver, 0, 4);
        assert_eq!(device.fill_batch(2, &mut filler(2)), (2, Filled::All));
        let chains = pop(&mut device, 4);
        assert_eq!(chains.len(), 2);
        device.rewind(2).expect("the newest two");
        assert_eq!(device.fill_batch(1, &mut filler(1)), (1, Filled::All));
        let chains = pop(&mut device, 4);
        complete(&mut device, &chains);
        assert_eq!(reclaim(&mut driver).iter().map(|(token, _)| *token).collect::<Vec<_>>(), [0, 1, 2, 3]);
    });
}
