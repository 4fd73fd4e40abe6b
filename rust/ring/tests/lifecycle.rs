//! Both ends of a ring as they are meant to be used: add, publish, pop, complete, publish, reclaim; chains and batches, direct and
//! indirect, at every size; what is handed back, saved and restored; and the counters beside it.

mod common;

use common::*;
use std::sync::{Arc, Mutex};
use virtqueue::{
    Buffer, Chain, Direction, Footprint, Form, Format, InFlightObserver, Resubmission, RingError, RingFeatures, RingState, Segment, Used,
};

#[test]
fn a_chain_goes_there_and_back_with_its_contents() {
    for features in all_features() {
        for form in [Form::Direct, Form::Indirect] {
            if form == Form::Indirect && !features.indirect {
                continue;
            }
            each(features, |rig| {
                let (mut driver, mut device) = (rig.driver(), rig.device());
                for round in 0..30_u8 {
                    rig.write(rig.data, &[round; 40]);
                    let segments = [
                        Segment::readable(rig.data, 24),
                        Segment::readable(rig.data + 24, 16),
                        Segment::writable(rig.data + 100, 8),
                        Segment::writable(rig.data + 200, 8),
                    ];
                    publish_chain(&mut driver, round.into(), &segments, form);
                    assert_eq!(driver.free(), if form == Form::Direct { 4 } else { 7 });
                    let (chain, got) = pop_with_segments(&mut device, 4).remove(0);
                    assert_eq!(got, segments);
                    assert_eq!((chain.readable, chain.writable), (40, 16));
                    let mut bytes = [0; 16];
                    device.memory().read(got[1].address, &mut bytes).expect("mapped");
                    assert_eq!(bytes, [round; 16]);
                    device.memory().write(got[2].address, &[!round; 8]).expect("mapped");
                    give_back(&mut device, &[done(&chain, 8)]).expect("in flight");
                    device.publish();
                    assert_eq!(reclaim(&mut driver), [(round.into(), 8)]);
                    assert_eq!(rig.read(rig.data + 100, 8), [!round; 8]);
                    assert_eq!((driver.free(), driver.outstanding(), device.outstanding()), (8, 0, 0));
                }
            });
        }
    }
}

/// 200,000 buffers: every index and wrap counter goes round at least three times. Batches are as uneven as the ring allows, the device
/// completes each batch backwards, and every token comes back once, in the order in which the device used them.
fn run_200_000(rig: &Rig) {
    let (mut driver, mut device) = (rig.driver(), rig.device());
    let size = usize::from(rig.size);
    let mut batch = device.batch(size.min(512));
    let mut out = vec![Used::default(); size.min(300)];
    let mut completions = Vec::new();
    let (mut added, mut expected, mut reclaimed) = (0_u64, std::collections::VecDeque::new(), 0_u64);
    let mut step = 0_usize;
    while reclaimed < 200_000 {
        step += 1;
        let count = (1 + step * 7 % 61).min(size);
        let buffers: Vec<Buffer> =
            (added..added + count as u64).map(|token| buffer(token, 64 + (token % 64) as u32, direction(token))).collect();
        added += driver.add_batch(&buffers).expect("legal") as u64;
        driver.publish();
        batch.clear();
        device.pop_batch(&mut batch).expect("popped");
        completions.clear();
        completions.extend(batch.chains().iter().map(|chain| done(chain, chain.writable / 2)));
        if !rig.features.in_order {
            completions.reverse();
        }
        for chain in batch.chains() {
            let token = expected.len() as u64 + reclaimed;
            let bytes = 64 + (token % 64) as u32;
            let writable = if direction(token) == Direction::Writable { bytes } else { 0 };
            assert_eq!((chain.readable, chain.writable), (bytes - writable, writable));
            expected.push_back((token, writable / 2));
        }
        let fresh = batch.chains().len();
        if !rig.features.in_order {
            let from = expected.len() - fresh;
            expected.make_contiguous()[from..].reverse();
        }
        give_back(&mut device, &completions).expect("in flight");
        device.publish();
        // The driver lags: it takes a part only, and sometimes nothing.
        let take = if step.is_multiple_of(5) { 0 } else { out.len().min(1 + step * 3 % 97) };
        let n = driver.pop_used_batch(&mut out[..take]).expect("used");
        for used in &out[..n] {
            assert_eq!(expected.pop_front(), Some((used.token, used.len)));
        }
        reclaimed += n as u64;
    }
    let counters = (driver.counters(), device.counters());
    assert_eq!((counters.0.added, counters.0.used, counters.1.popped, counters.1.used), (added, reclaimed, added, added));
    assert_eq!(u64::from(driver.outstanding()), added - reclaimed);
}

fn direction(token: u64) -> Direction {
    if token.is_multiple_of(3) { Direction::Writable } else { Direction::Readable }
}

#[test]
fn split_rings_run_through_200_000_buffers() {
    for size in [1, 2, 256, 32768] {
        for features in [PLAIN, EVENT_IDX, IN_ORDER] {
            run_200_000(&Rig::new(Format::Split, size, features));
        }
    }
}

#[test]
fn packed_rings_run_through_200_000_buffers() {
    for size in [1, 2, 3, 37, 100, 256, 32768] {
        for features in [PLAIN, EVENT_IDX, IN_ORDER] {
            run_200_000(&Rig::new(Format::Packed, size, features));
        }
    }
}

/// Chains of one to four descriptors wrap inside a chain, at every place of the ring.
#[test]
fn chains_wrap_at_every_place() {
    for features in all_features() {
        for (format, size) in [(Format::Split, 4), (Format::Split, 8), (Format::Packed, 4), (Format::Packed, 5), (Format::Packed, 7)] {
            let rig = Rig::new(format, size, features);
            let (mut driver, mut device) = (rig.driver(), rig.device());
            for token in 0..20_000 {
                let count = 1 + token as usize * 5 % 4;
                let segments: Vec<Segment> =
                    (0..count as u64).map(|k| Segment::readable(rig.data + 16 * k, 1 + token as u32 % 9)).collect();
                let form = if features.indirect && token % 3 == 0 { Form::Indirect } else { Form::Direct };
                publish_chain(&mut driver, token, &segments, form);
                let (chain, got) = pop_with_segments(&mut device, 2).remove(0);
                assert_eq!(got, segments);
                complete(&mut device, &[chain]);
                assert_eq!(reclaim(&mut driver), [(token, 0)]);
            }
        }
    }
}

#[test]
fn a_batch_fills_the_ring_and_no_more() {
    for (format, size) in [(Format::Split, 1), (Format::Split, 16), (Format::Packed, 1), (Format::Packed, 11)] {
        let rig = Rig::new(format, size, PLAIN);
        let (mut driver, mut device) = (rig.driver(), rig.device());
        let buffers: Vec<Buffer> = (0..40).map(|token| buffer(token, 1, Direction::Readable)).collect();
        assert_eq!(driver.add_batch(&buffers), Ok(size.into()));
        assert_eq!(driver.add_batch(&buffers), Ok(0));
        assert_eq!(pop(&mut device, 40), [], "nothing is seen before the publish");
        driver.publish();
        let mut batch = device.batch(4);
        let mut total = 0;
        loop {
            batch.clear();
            match device.pop_batch(&mut batch).expect("popped") {
                0 => break,
                n => total += n,
            }
        }
        assert_eq!(total, size.into());
    }
}

/// Chains handed back come again, the same ones in the same order, and may be handed back any number of times.
#[test]
fn rewound_chains_come_again() {
    for features in all_features() {
        each(features, |rig| {
            let (mut driver, mut device) = (rig.driver(), rig.device());
            let mut token = 0;
            for round in 0..50 {
                for count in [1, 3, 2] {
                    publish_chain(&mut driver, token, &vec![Segment::writable(rig.data + token % 64, 8); count], Form::Direct);
                    token += 1;
                }
                let first = pop_with_segments(&mut device, 4);
                assert_eq!(first.len(), 3);
                device.rewind(2).expect("the newest");
                let state = device.state();
                let again = pop_with_segments(&mut device, 4);
                let segments = |popped: &[(Chain, Vec<Segment>)]| popped.iter().map(|(_, s)| s.clone()).collect::<Vec<_>>();
                assert_eq!(segments(&again), segments(&first[1..]), "round {round}");
                device.rewind(2).expect("the newest");
                assert_eq!(device.state(), state);
                let again = pop_with_segments(&mut device, 4);
                complete(&mut device, &[first[0].0, again[0].0, again[1].0]);
                assert_eq!(reclaim(&mut driver), [token - 3, token - 2, token - 1].map(|t| (t, [8, 24, 16][(t % 3) as usize])));
            }
            assert_eq!(device.counters().popped, 150);
        });
    }
}

#[test]
fn only_the_newest_chains_can_be_rewound() {
    each(PLAIN, |rig| {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        publish(&mut driver, 0, 4);
        let chains = pop(&mut device, 4);
        give_back(&mut device, &[done(&chains[2], 0)]).expect("in flight");
        device.rewind(0).expect("none");
        device.rewind(1).expect("the newest");
        assert_eq!(device.rewind(1), Err(RingError::CannotRewind { count: 1, reason: "a newer chain was completed" }));
        assert_eq!(device.rewind(3), Err(RingError::CannotRewind { count: 3, reason: "fewer are in flight" }));
        assert_eq!(device.outstanding(), 2);
        let again = pop(&mut device, 4);
        assert_eq!(again.len(), 1);
        complete(&mut device, &[again[0], chains[0], chains[1]]);
        assert_eq!(reclaim(&mut driver), [(2, 0), (3, 16), (0, 16), (1, 16)]);
    });
}

#[test]
fn a_batch_is_rewound_from_a_chain_on() {
    each(PLAIN, |rig| {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        let segments = |token: u64| vec![Segment::readable(rig.data + 8 * token, 8); 1 + token as usize % 2];
        for token in 0..5 {
            publish_chain(&mut driver, token, &segments(token), Form::Direct);
        }
        let mut batch = device.batch(16);
        assert_eq!(device.pop_batch(&mut batch), Ok(5));
        device.rewind_from(&mut batch, 2).expect("the newest");
        assert_eq!((batch.chains().len(), device.outstanding()), (2, 2));
        assert_eq!(device.pop_batch(&mut batch), Ok(3), "after those that are in");
        for (chain, token) in batch.chains().iter().zip(0..) {
            assert_eq!(batch.segments(chain), segments(token));
        }
        device.complete_batch(virtqueue::Unwritten(&batch)).expect("in flight");
        device.publish();
        assert_eq!(reclaim(&mut driver), [0, 1, 2, 3, 4].map(|token| (token, 0)));
    });
}

/// A device stops and another one goes on from its state, at every place of the ring and of its wrap counters.
#[test]
fn a_restored_device_goes_on() {
    for features in all_features() {
        for (format, size) in [(Format::Split, 4), (Format::Packed, 4), (Format::Packed, 5)] {
            let rig = Rig::new(format, size, features);
            let mut driver = rig.driver();
            let mut state: Option<RingState> = None;
            for token in 0..100 {
                let mut device = rig.restored(state).expect("restored");
                publish(&mut driver, 2 * token, 2);
                // What was popped and not used is taken back before the state is saved.
                let chains = pop(&mut device, 2);
                device.rewind(1).expect("the newest");
                complete(&mut device, &chains[..1]);
                let mut device = rig.restored(Some(device.state())).expect("restored");
                let chains = pop(&mut device, 2);
                assert_eq!(chains.len(), 1);
                assert!(complete(&mut device, &chains), "the first decision");
                assert_eq!(reclaim(&mut driver), [(2 * token, 16), (2 * token + 1, 16)]);
                state = Some(device.state());
            }
        }
    }
}

/// NOTIFICATION_DATA: queue index below; above it the next available position, with the wrap counter on the packed ring (2.9).
#[test]
fn notification_data_is_the_next_available_position() {
    let rig = Rig::new(Format::Split, 8, PLAIN);
    let (mut driver, mut device) = (rig.driver(), rig.device());
    for round in 0..40_u32 {
        assert_eq!(driver.notification_data(7), 7 | (5 * round) << 16);
        driver.add(0, &[Segment::readable(rig.data, 4); 3], Form::Direct).expect("added");
        assert_eq!(driver.notification_data(7), 7 | (5 * round) << 16, "not published");
        publish(&mut driver, 0, 4);
        let chains = pop(&mut device, 8);
        complete(&mut device, &chains);
        reclaim(&mut driver);
    }
    let rig = Rig::new(Format::Packed, 5, PLAIN);
    let (mut driver, mut device) = (rig.driver(), rig.device());
    for number in 0..40_u32 {
        let wrap = u32::from(3 * number / 5 % 2 == 0);
        assert_eq!(driver.notification_data(0xffff), 0xffff | (3 * number % 5) << 16 | wrap << 31);
        driver.add(0, &[Segment::readable(rig.data, 4); 3], Form::Direct).expect("added");
        assert_eq!(driver.notification_data(0) >> 31, wrap, "not published");
        driver.publish();
        let chains = pop(&mut device, 8);
        complete(&mut device, &chains);
        reclaim(&mut driver);
    }
}

/// What an observer was told, in words.
#[derive(Default)]
struct Diary(Arc<Mutex<Vec<String>>>);

impl InFlightObserver for Diary {
    fn popped(&mut self, chains: &[Chain], _: &dyn Fn(u16) -> Footprint) {
        self.0.lock().expect("diary").push(format!("popped {}", chains.len()));
    }
    fn resumed(&mut self, _: &Chain, _: &Resubmission) {}
    fn rewound(&mut self, heads: &[u16]) {
        self.0.lock().expect("diary").push(format!("rewound {}", heads.len()));
    }
    fn completed(&mut self, heads: &[u16]) {
        self.0.lock().expect("diary").push(format!("completed {heads:?}"));
    }
    fn check(&self) -> Result<(), RingError> {
        Ok(())
    }
    fn before_publish(&mut self, heads: &[u16]) {
        self.0.lock().expect("diary").push(format!("before {heads:?}"));
    }
    fn after_publish(&mut self, heads: &[u16], state: RingState) {
        self.0.lock().expect("diary").push(format!("after {heads:?} at {}", state.used.offset));
    }
}

/// An observer sees every pop, rewind and publish, with exactly the heads that the publish tells of.
#[test]
fn an_observer_sees_what_is_in_flight() {
    for features in [PLAIN, RingFeatures { indirect: true, ..IN_ORDER }] {
        each(features, |rig| {
            let (mut driver, mut device) = (rig.driver(), rig.device());
            let diary = Diary::default();
            let lines = diary.0.clone();
            device.observe(Box::new(diary));
            publish(&mut driver, 0, 4);
            let chains = pop(&mut device, 8);
            assert_eq!(pop(&mut device, 8), []);
            device.rewind(1).expect("the newest");
            let heads: Vec<u16> = chains.iter().map(|chain| chain.head).collect();
            // In order the second chain waits for the first.
            complete(&mut device, &chains[1..2]);
            complete(&mut device, &[chains[0], chains[2]]);
            let told = if features.in_order { [vec![], heads[..3].to_vec()] } else { [vec![heads[1]], vec![heads[0], heads[2]]] };
            let at = if features.in_order { [0, 3] } else { [1, 3] };
            let mut expected = vec!["popped 4".to_string(), "rewound 1".to_string()];
            for (heads, at) in told.iter().zip(at).filter(|(heads, _)| !heads.is_empty()) {
                expected.extend([format!("completed {heads:?}"), format!("before {heads:?}"), format!("after {heads:?} at {at}")]);
            }
            assert_eq!(*lines.lock().expect("diary"), expected);
            assert_eq!(reclaim(&mut driver).len(), 3);
        });
    }
}

#[test]
fn snapshots_and_counters() {
    each(EVENT_IDX, |rig| {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        publish(&mut driver, 0, 3);
        device.disarm();
        publish(&mut driver, 3, 2);
        let chains = pop(&mut device, 4);
        complete(&mut device, &chains[..3]);
        device.count_dropped(2);
        let d = driver.counters();
        assert_eq!((d.added, d.used, d.notified, d.suppressed, d.clamped), (5, 0, 1, 1, 0));
        let d = device.counters();
        assert_eq!((d.popped, d.used, d.notified, d.suppressed, d.dropped), (4, 3, 1, 0, 2));
        let find = |snapshot: &virtqueue::Snapshot, name| snapshot.private.iter().find(|(n, _)| *n == name).expect("named").1;
        assert_eq!(find(&driver.snapshot(), "outstanding"), 5);
        assert_eq!(find(&driver.snapshot(), "free"), 3);
        assert_eq!(find(&driver.snapshot(), "next_avail"), 5);
        assert_eq!(find(&device.snapshot(), "next_avail"), 4);
        assert_eq!(find(&device.snapshot(), "next_used"), 3);
        assert_eq!(find(&device.snapshot(), "in_flight"), 1);
        assert_eq!(driver.snapshot().shared, device.snapshot().shared, "both look at the same words");
    });
}
