//! A device that ends with chains in flight, and another that takes its place: nothing is lost, whatever the first one left in the ring.

mod common;

use common::*;
use proptest::prelude::*;
use std::collections::{BTreeSet, VecDeque};
use virtqueue::packed::{PackedDriver, PackedRing};
use virtqueue::{
    AnyDriver, Chain, Direction, DriverQueue, Form, Format, IndirectTables, RingError, RingFeatures, Segment, Takeover, spans,
};

fn resumable(rig: &Rig) -> Driver {
    let table = rig.memory.table();
    if rig.format == Format::Split {
        return rig.driver();
    }
    let areas = spans(&table, rig.format, rig.size, rig.areas).expect("areas");
    let tables = rig.features.indirect.then(|| {
        let words = IndirectTables::words(rig.size, TABLE);
        let span = table.span(rig.tables, 8 * words as u64).expect("tables");
        IndirectTables::new(span.u64s(0, words).expect("aligned"), rig.tables, TABLE)
    });
    let ring = PackedRing::new(rig.size, &areas).expect("ring");
    DriverQueue::new(AnyDriver::Packed(PackedDriver::new(ring, rig.features, tables).resumable()))
}

/// A chain's segments, which tell its token.
fn segments(rig: &Rig, token: u64, count: usize) -> Vec<Segment> {
    (0..count).map(|k| Segment::writable(rig.data + token % 1000, 1 + k as u32 + (token / 1000) as u32)).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Add {
        segments: usize,
        indirect: bool,
    },
    AddBatch(usize),
    Publish,
    Pop(usize),
    /// Of those that the device has: in order only the oldest can be.
    Complete(prop::sample::Index),
    Reclaim,
    /// The device ends; it may have been about to use the next chain.
    Replace {
        torn: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (1..4_usize, any::<bool>()).prop_map(|(segments, indirect)| Step::Add { segments, indirect }),
        2 => (1..5_usize).prop_map(Step::AddBatch),
        3 => Just(Step::Publish),
        3 => (1..5_usize).prop_map(Step::Pop),
        4 => any::<prop::sample::Index>().prop_map(Step::Complete),
        2 => Just(Step::Reclaim),
        2 => any::<bool>().prop_map(|torn| Step::Replace { torn }),
    ]
}

/// What the driver added, and what became of it.
struct Run {
    rig: Rig,
    driver: Driver,
    device: Device,
    held: VecDeque<Chain>,
    /// Published and not completed, oldest first: what a device is to see.
    open: VecDeque<(u64, Vec<Segment>)>,
    added: VecDeque<(u64, Vec<Segment>)>,
    /// Completed and not popped by the driver.
    used: BTreeSet<u64>,
    /// Those that this device was given, in the order in which it was.
    given: VecDeque<u64>,
    next: u64,
}

impl Run {
    fn new(rig: Rig) -> Self {
        let (driver, device) = (resumable(&rig), rig.device());
        let (open, added, given) = (VecDeque::new(), VecDeque::new(), VecDeque::new());
        Run { rig, driver, device, held: VecDeque::new(), open, added, used: BTreeSet::new(), given, next: 0 }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Add { segments: count, indirect } => {
                let form = if indirect && self.rig.features.indirect { Form::Indirect } else { Form::Direct };
                let list = segments(&self.rig, self.next, count);
                match self.driver.add(self.next, &list, form) {
                    Ok(()) => self.added.push_back((self.next, list)),
                    Err(error) => assert!(matches!(error, RingError::Full { .. })),
                }
                self.next += 1;
            }
            Step::AddBatch(count) => {
                let list: Vec<_> = (self.next..self.next + count as u64).map(|token| (token, segments(&self.rig, token, 1))).collect();
                let buffers: Vec<_> = list
                    .iter()
                    .map(|(token, s)| virtqueue::Buffer {
                        token: *token,
                        address: s[0].address,
                        len: s[0].len,
                        direction: Direction::Writable,
                    })
                    .collect();
                let fitted = self.driver.add_batch(&buffers).expect("legal");
                self.added.extend(list.into_iter().take(fitted));
                self.next += count as u64;
            }
            Step::Publish => {
                self.driver.publish();
                self.open.append(&mut self.added);
            }
            Step::Pop(limit) => {
                for (chain, list) in pop_with_segments(&mut self.device, limit) {
                    let (token, expected) = &self.open[self.held.len()];
                    assert_eq!(&list, expected, "oldest first");
                    self.given.push_back(*token);
                    self.held.push_back(chain);
                }
            }
            Step::Complete(which) => {
                if self.held.is_empty() {
                    return;
                }
                let place = if self.rig.features.in_order { 0 } else { which.index(self.held.len()) };
                let (chain, token) = (self.held.remove(place).expect("held"), self.given.remove(place).expect("given"));
                complete(&mut self.device, &[chain]);
                let at = self.open.iter().position(|(open, _)| *open == token).expect("open");
                self.open.remove(at);
                assert!(self.used.insert(token));
            }
            Step::Reclaim => {
                for (token, _) in reclaim(&mut self.driver) {
                    assert!(self.used.remove(&token), "{token} came back once, after it was used");
                }
            }
            Step::Replace { torn } => self.replace(torn),
        }
    }

    fn replace(&mut self, torn: bool) {
        let state = self.device.state();
        if torn && self.rig.format == Format::Packed && !self.open.is_empty() {
            // Length and id of what would have been used next stand there, and its flags do not yet.
            let ring = self.rig.raw_packed();
            let word = ring.desc.load(2 * usize::from(state.used.offset) + 1);
            ring.desc.store(2 * usize::from(state.used.offset) + 1, word >> 48 << 48 | 7 << 32 | 0xdead);
        }
        let base = self.driver.resume(Takeover::Again).expect("the device broke no rule");
        if self.rig.format == Format::Packed {
            assert_eq!((base.used, base.avail), (state.used, state.used));
        }
        self.device = self.rig.restored(Some(base)).expect("a base that fits");
        self.held.clear();
        self.given.clear();
    }

    fn finish(mut self) {
        for _ in 0..200 {
            for step in [Step::Publish, Step::Pop(64), Step::Complete(zero()), Step::Reclaim] {
                self.step(&step);
            }
        }
        assert!(self.open.is_empty() && self.used.is_empty(), "every chain came back");
        assert_eq!((self.driver.outstanding(), self.driver.free()), (0, self.rig.size));
    }
}

fn zero() -> prop::sample::Index {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut tree = any::<prop::sample::Index>().new_tree(&mut TestRunner::deterministic()).expect("a value");
    while tree.simplify() {}
    tree.current()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn another_device_is_given_all_that_was_not_used_oldest_first(
        packed in any::<bool>(), in_order in any::<bool>(), indirect in any::<bool>(), steps in prop::collection::vec(step(), 1..300)
    ) {
        let format = if packed { Format::Packed } else { Format::Split };
        let mut run = Run::new(Rig::new(format, 8, RingFeatures { in_order, indirect, event_idx: true }));
        for step in &steps {
            run.step(step);
        }
        run.finish();
    }
}

#[test]
fn order_is_known_also_when_positions_have_gone_round() {
    for format in BOTH {
        let mut run = Run::new(Rig::new(format, 8, PLAIN));
        // Three stay out for ever, while 40,000 others come and go.
        run.step(&Step::AddBatch(3));
        run.step(&Step::Publish);
        run.step(&Step::Pop(3));
        for _ in 0..40_000 {
            run.step(&Step::AddBatch(1));
            run.step(&Step::Publish);
            for (chain, _) in pop_with_segments(&mut run.device, 1) {
                complete(&mut run.device, &[chain]);
                let (token, _) = run.open.pop_back().expect("open");
                run.used.insert(token);
            }
            run.step(&Step::Reclaim);
        }
        run.step(&Step::Replace { torn: true });
        run.step(&Step::Pop(8));
        assert_eq!(run.given, [0, 1, 2]);
        run.finish();
    }
}

#[test]
fn a_queue_that_keeps_nothing_or_met_a_lie_is_not_taken_over() {
    let mut driver = Rig::new(Format::Packed, 8, PLAIN).driver();
    publish(&mut driver, 0, 2);
    assert_eq!(driver.resume(Takeover::Again), Err(RingError::NotKept));
    assert!(driver.broken().is_none());
    assert!(driver.resume(Takeover::Tracked).is_ok());

    let rig = Rig::new(Format::Split, 8, PLAIN);
    let mut driver = rig.driver();
    publish(&mut driver, 0, 2);
    let raw = rig.raw_split();
    raw.used.store(1, 2); // two used elements, both of head 0
    let error = driver.resume(Takeover::Again).expect_err("one head twice");
    assert_eq!(error, RingError::UsedIdNotOutstanding { id: 0 });
    assert_driver_broken(&mut driver, &error, &[0, 1]);
    assert_eq!(driver.resume(Takeover::Again), Err(RingError::Broken));
}
