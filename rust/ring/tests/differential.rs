//! The same random history on a split ring, on a packed ring and on a plain model: the same tokens, lengths and contents at every step, and
//! nobody who sleeps is left asleep.

mod common;
mod model;

use common::*;
use model::{Made, Model, Wish};
use proptest::prelude::*;
use std::collections::BTreeMap;
use virtqueue::{Buffer, Chain, Direction, Form, Format, RingError, RingFeatures, Segment, Used};

#[derive(Clone, Debug)]
enum Op {
    Add {
        readable: Vec<u32>,
        writable: Vec<u32>,
        indirect: bool,
    },
    AddBatch {
        count: usize,
        len: u32,
        writable: bool,
    },
    Publish,
    Pop {
        limit: usize,
    },
    /// Picks among the chains in flight, and how much of each is written, in percent.
    Complete {
        picks: Vec<(usize, u32)>,
    },
    PublishUsed,
    Rewind {
        count: usize,
    },
    Reclaim {
        limit: usize,
    },
    DriverArm,
    DriverDisarm,
    DeviceArm,
    DeviceDisarm,
}

fn op() -> impl Strategy<Value = Op> {
    let lens = |most| prop::collection::vec(1..100_u32, 0..=most);
    let percent = prop_oneof![3 => Just(100_u32), 1 => Just(0_u32), 1 => 0..100_u32];
    prop_oneof![
        4 => (lens(3), lens(3), any::<bool>()).prop_filter("no segment", |(r, w, _)| r.len() + w.len() > 0)
            .prop_map(|(readable, writable, indirect)| Op::Add { readable, writable, indirect }),
        3 => (1..6_usize, 1..100_u32, any::<bool>()).prop_map(|(count, len, writable)| Op::AddBatch { count, len, writable }),
        4 => Just(Op::Publish),
        5 => (1..6_usize).prop_map(|limit| Op::Pop { limit }),
        5 => prop::collection::vec((any::<usize>(), percent), 1..5).prop_map(|picks| Op::Complete { picks }),
        4 => Just(Op::PublishUsed),
        1 => (0..3_usize).prop_map(|count| Op::Rewind { count }),
        5 => (1..8_usize).prop_map(|limit| Op::Reclaim { limit }),
        1 => Just(Op::DriverArm),
        1 => Just(Op::DriverDisarm),
        1 => Just(Op::DeviceArm),
        1 => Just(Op::DeviceDisarm),
    ]
}

/// One ring under a history, beside the model that says what must come of it.
struct Run {
    rig: Rig,
    driver: Driver,
    device: Device,
    model: Model,
    next_token: u64,
    /// Places of 1 KiB in the data area, for chains that are outstanding.
    places: Vec<u64>,
    /// Chains in flight by token, with their segments.
    flying: BTreeMap<u64, (Chain, Vec<Segment>)>,
}

impl Run {
    fn new(format: Format, size: u16, features: RingFeatures) -> Self {
        let rig = Rig::new(format, size, features);
        let (driver, device) = (rig.driver(), rig.device());
        let model = Model::new(size.into(), TABLE.into(), features);
        let places = (0..DATA).step_by(1024).collect();
        Run { rig, driver, device, model, next_token: 0, places, flying: BTreeMap::new() }
    }

    /// The bytes that a side puts at an offset of a chain.
    fn bytes(token: u64, side: u64, len: usize) -> Vec<u8> {
        (0..len as u64).map(|k| (token * 31 + side * 101 + k * 7) as u8).collect()
    }

    fn make(&mut self, readable: Vec<u32>, writable: Vec<u32>) -> (Made, Vec<Segment>) {
        let token = self.next_token;
        self.next_token += 1;
        let place = *self.places.last().expect("more places than slots");
        let mut at = self.rig.data + place;
        let mut segment = |len: &u32, direction| {
            let segment = Segment { address: at, len: *len, direction };
            at += u64::from(*len);
            segment
        };
        let mut segments: Vec<Segment> = readable.iter().map(|len| segment(len, Direction::Readable)).collect();
        segments.extend(writable.iter().map(|len| segment(len, Direction::Writable)));
        let made = Made { token, place, readable, writable, slots: 0 };
        self.rig.write(self.rig.data + place, &Self::bytes(token, 0, made.readable_bytes() as usize));
        (made, segments)
    }

    fn add(&mut self, readable: &[u32], writable: &[u32], form: Form) -> Result<(), RingError> {
        let (made, segments) = self.make(readable.to_vec(), writable.to_vec());
        let token = made.token;
        let expected = self.model.add(made, form);
        let result = self.driver.add(token, &segments, form);
        assert_eq!(result, expected);
        if result.is_ok() {
            self.places.pop();
        }
        result
    }

    fn add_batch(&mut self, count: usize, len: u32, writable: bool) {
        let fits = count.min(self.model.free());
        let mut buffers = Vec::new();
        for _ in 0..count {
            let (made, segments) = if writable { self.make(vec![], vec![len]) } else { self.make(vec![len], vec![]) };
            buffers.push(Buffer { token: made.token, address: segments[0].address, len, direction: segments[0].direction });
            if buffers.len() <= fits {
                self.places.pop();
                self.model.add(made, Form::Direct).expect("room");
            }
        }
        assert_eq!(self.driver.add_batch(&buffers), Ok(fits));
    }

    /// What the decision must be, by what the other side wishes.
    fn check_decision(notify: bool, shown: usize, wish: &mut Wish, first: bool) {
        if shown == 0 {
            assert!(!notify, "nothing to tell of");
            return;
        }
        match wish {
            Wish::Asleep => assert!(notify, "whoever sleeps is woken"),
            Wish::Disarmed => assert_eq!(notify, first, "whoever wants nothing is left alone, but for the first decision"),
            Wish::Any => assert!(notify || !first),
        }
        if *wish == Wish::Asleep {
            *wish = Wish::Any;
        }
    }

    fn pop(&mut self, limit: usize) {
        let mut left = limit;
        while left > 0 {
            let popped = pop_with_segments(&mut self.device, left);
            if popped.is_empty() {
                assert!(!self.model.any_available());
                return;
            }
            left -= popped.len();
            for (chain, segments) in popped {
                let made = self.model.pop().expect("the model has it too");
                assert_eq!((chain.readable, chain.writable), (made.readable_bytes(), made.writable_bytes()));
                let lens = |direction| segments.iter().filter(|s| s.direction == direction).map(|s| s.len).collect::<Vec<_>>();
                assert_eq!((lens(Direction::Readable), lens(Direction::Writable)), (made.readable, made.writable));
                let mut got = Vec::new();
                for segment in segments.iter().filter(|s| s.direction == Direction::Readable) {
                    got.extend(self.rig.read(segment.address, segment.len as usize));
                }
                assert_eq!(got, Self::bytes(made.token, 0, got.len()), "what the driver wrote");
                self.flying.insert(made.token, (chain, segments));
            }
        }
    }

    fn complete(&mut self, picks: &[(usize, u32)]) {
        let mut completions = Vec::new();
        for (pick, percent) in picks {
            let candidates = self.model.in_flight();
            if candidates.is_empty() {
                break;
            }
            let token = candidates[pick % candidates.len()];
            let (chain, segments) = self.flying.remove(&token).expect("in flight");
            let len = (u64::from(chain.writable) * u64::from(*percent) / 100) as u32;
            let bytes = Self::bytes(token, 1, len as usize);
            let mut from = 0;
            for segment in segments.iter().filter(|s| s.direction == Direction::Writable) {
                let to = bytes.len().min(from + segment.len as usize);
                self.rig.write(segment.address, &bytes[from..to]);
                from = to;
            }
            completions.push(done(&chain, len));
            self.model.complete(token, len);
        }
        give_back(&mut self.device, &completions).expect("in flight");
    }

    fn reclaim(&mut self, limit: usize) {
        let mut out = vec![Used::default(); limit];
        let count = self.driver.pop_used_batch(&mut out).expect("used");
        for used in &out[..count] {
            let (made, len) = self.model.reclaim().expect("the model has it too");
            assert_eq!((used.token, used.len), (made.token, len));
            let at = self.rig.data + made.place + u64::from(made.readable_bytes());
            assert_eq!(self.rig.read(at, len as usize), Self::bytes(made.token, 1, len as usize), "what the device wrote");
            self.places.push(made.place);
        }
        assert!(count == limit || !self.model.any_used());
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Add { readable, writable, indirect } => {
                let _ = self.add(readable, writable, if *indirect { Form::Indirect } else { Form::Direct });
            }
            Op::AddBatch { count, len, writable } => self.add_batch(*count, *len, *writable),
            Op::Publish => {
                let (notify, shown) = (self.driver.publish(), self.model.publish());
                Self::check_decision(notify, shown, &mut self.model.device, false);
            }
            Op::Pop { limit } => self.pop(*limit),
            Op::Complete { picks } => self.complete(picks),
            Op::PublishUsed => {
                let (notify, shown) = (self.device.publish(), self.model.publish_used());
                let first = shown > 0 && !self.model.device_decided;
                self.model.device_decided |= first;
                Self::check_decision(notify, shown, &mut self.model.driver, first);
            }
            Op::Rewind { count } => {
                let newest: Vec<u64> = self.model.in_flight().into_iter().rev().take(*count).collect();
                let possible = self.model.rewind(*count);
                assert_eq!(self.device.rewind(*count).is_ok(), possible);
                if possible {
                    newest.iter().for_each(|token| drop(self.flying.remove(token)));
                }
            }
            Op::Reclaim { limit } => self.reclaim(*limit),
            Op::DriverArm => {
                assert_eq!(self.driver.arm(), self.model.any_used());
                self.model.driver = if self.model.any_used() { Wish::Any } else { Wish::Asleep };
            }
            Op::DriverDisarm => {
                self.driver.disarm();
                self.model.driver = Wish::Disarmed;
            }
            Op::DeviceArm => {
                assert_eq!(self.device.arm(), self.model.any_available());
                self.model.device = if self.model.any_available() { Wish::Any } else { Wish::Asleep };
            }
            Op::DeviceDisarm => {
                self.device.disarm();
                self.model.device = Wish::Disarmed;
            }
        }
        assert_eq!(usize::from(self.driver.free()), self.model.free());
        assert_eq!(usize::from(self.driver.outstanding()), self.model.outstanding());
    }

    /// Everything that is still on its way arrives.
    fn drain(&mut self) {
        self.step(&Op::Publish);
        for _ in 0..self.rig.size {
            self.pop(self.rig.size.into());
            self.complete(&vec![(0, 100); self.rig.size.into()]);
            self.step(&Op::PublishUsed);
            self.reclaim(self.rig.size.into());
        }
        assert_eq!((self.model.outstanding(), self.driver.free(), self.device.outstanding()), (0, self.rig.size, 0));
    }
}

fn history() -> impl Strategy<Value = (u16, RingFeatures, Vec<Op>)> {
    let size = prop::sample::select(vec![1_u16, 2, 4, 8, 16]);
    let features = (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(event_idx, indirect, in_order)| RingFeatures {
        event_idx,
        indirect,
        in_order,
    });
    (size, features, prop::collection::vec(op(), 1..400))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn split_packed_and_model_agree((size, features, ops) in history()) {
        for format in BOTH {
            let mut run = Run::new(format, size, features);
            ops.iter().for_each(|op| run.step(op));
            run.drain();
        }
    }

    /// Sizes that only the packed ring has.
    #[test]
    fn packed_and_model_agree_at_odd_sizes((_, features, ops) in history(), size in prop::sample::select(vec![3_u16, 5, 6, 7, 11, 37])) {
        let mut run = Run::new(Format::Packed, size, features);
        ops.iter().for_each(|op| run.step(op));
        run.drain();
    }
}
