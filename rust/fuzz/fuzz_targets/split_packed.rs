//! The same operations on a split and on a packed ring: the same answers, the same tokens, the same contents of chains; and whoever went to
//! sleep is told of what comes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::rc::Rc;
use virtio_fuzz::common::{Device, Driver, Rig, done};
use virtio_fuzz::{Bytes, PLANTED, rig};
use virtqueue::{Buffer, Chain, Direction, Form, Format, RingError, RingFeatures, Segment, Used};

/// A segment: offset in the data area, bytes, direction.
type Part = (u64, u32, Direction);

/// What an operation showed: equal on both rings, or one of them is wrong.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Nothing,
    Refused(RingError),
    Count(usize),
    /// Readable bytes, writable bytes, segments.
    Chains(Vec<(u32, u32, Vec<Part>)>),
    Used(Vec<(u64, u32)>),
    More(bool),
}

#[derive(Clone, Debug)]
enum Op {
    Add(Vec<Part>, Form),
    AddBatch(Vec<Part>),
    Publish,
    Pop(usize),
    Complete(Vec<(usize, u8)>),
    PublishUsed,
    Rewind(usize),
    Reclaim(usize),
    DriverArm,
    DriverDisarm,
    DeviceArm,
    DeviceDisarm,
}

impl Op {
    fn segment(bytes: &mut Bytes, direction: Direction) -> Part {
        (u64::from(bytes.u8()) * 16, u32::from(bytes.u8() % 64), direction)
    }

    fn take(bytes: &mut Bytes) -> Op {
        match bytes.u8() % 20 {
            kind @ 0..=2 => {
                let (readable, writable) = (bytes.below(4), bytes.below(4));
                let mut segments: Vec<_> = (0..readable).map(|_| Self::segment(bytes, Direction::Readable)).collect();
                segments.extend((0..writable).map(|_| Self::segment(bytes, Direction::Writable)));
                Op::Add(segments, if kind == 0 { Form::Direct } else { Form::Indirect })
            }
            3 | 4 => {
                let direction = bytes.direction();
                Op::AddBatch((0..bytes.below(8)).map(|_| Self::segment(bytes, direction)).collect())
            }
            5 | 6 => Op::Publish,
            7..=9 => Op::Pop(1 + bytes.below(6)),
            10..=12 => Op::Complete((0..1 + bytes.below(4)).map(|_| (bytes.u8().into(), bytes.u8())).collect()),
            13 | 14 => Op::PublishUsed,
            15 => Op::Rewind(bytes.below(4)),
            16 | 17 => Op::Reclaim(bytes.below(8)),
            18 => [Op::DriverArm, Op::DeviceArm][bytes.below(2)].clone(),
            _ => [Op::DriverDisarm, Op::DeviceDisarm][bytes.below(2)].clone(),
        }
    }
}

/// A side that armed and saw nothing, until it is told.
#[derive(Default)]
struct Sleeper(bool);

impl Sleeper {
    fn told(&mut self, notified: bool, shown: u64) {
        assert!(notified || !self.0 || shown == 0, "left asleep");
        assert!(shown > 0 || !notified, "told of nothing");
        self.0 &= shown == 0;
    }
}

struct Side {
    rig: Rc<Rig>,
    driver: Driver,
    device: Device,
    next_token: u64,
    /// Chains in flight, oldest first.
    flying: Vec<Chain>,
    driver_sleeps: Sleeper,
    device_sleeps: Sleeper,
    published: u64,
}

impl Side {
    fn new(format: Format, size: u16, features: RingFeatures) -> Self {
        let rig = rig(format, size, features, size);
        let (driver, device) = (rig.driver(), rig.device());
        Side {
            rig,
            driver,
            device,
            next_token: 0,
            flying: Vec::new(),
            driver_sleeps: Sleeper::default(),
            device_sleeps: Sleeper::default(),
            published: 0,
        }
    }

    fn at(&self, &(offset, len, direction): &Part) -> Segment {
        Segment { address: self.rig.data + offset, len, direction }
    }

    fn step(&mut self, op: &Op) -> Seen {
        match op {
            Op::Add(parts, form) => {
                let segments: Vec<Segment> = parts.iter().map(|part| self.at(part)).collect();
                self.next_token += 1;
                self.driver.add(self.next_token, &segments, *form).map_or_else(Seen::Refused, |()| Seen::Nothing)
            }
            Op::AddBatch(parts) => {
                let (first, segments) = (self.next_token + 1, parts.iter().map(|part| self.at(part)));
                let make = |(s, token): (Segment, u64)| Buffer { token, address: s.address, len: s.len, direction: s.direction };
                let buffers: Vec<Buffer> = segments.zip(first..).map(make).collect();
                self.next_token += parts.len() as u64;
                self.driver.add_batch(&buffers).map_or_else(Seen::Refused, Seen::Count)
            }
            Op::Publish => {
                let before = self.published;
                let notified = self.driver.publish();
                self.published = self.driver.counters().added;
                self.device_sleeps.told(notified, self.published - before);
                Seen::Nothing
            }
            Op::Pop(limit) => self.pop(*limit),
            Op::Complete(picks) => {
                let mut completions = Vec::new();
                for (pick, part) in picks {
                    if !self.flying.is_empty() {
                        let chain = self.flying.remove(pick % self.flying.len());
                        let part = if *part > 0xc0 { 255 } else { u32::from(*part) };
                        completions.push(done(&chain, chain.writable * part / 255));
                    }
                }
                if PLANTED && self.rig.format == Format::Packed && completions.len() == 3 {
                    // The fault: the packed side forgets what it wrote to the last of three chains.
                    completions[2].len = 0;
                }
                self.device.complete_batch(&completions[..]).map_or_else(Seen::Refused, |()| Seen::Nothing)
            }
            Op::PublishUsed => {
                let before = self.device.counters().used;
                let notified = self.device.publish();
                self.driver_sleeps.told(notified, self.device.counters().used - before);
                Seen::Nothing
            }
            Op::Rewind(count) => match self.device.rewind(*count) {
                Ok(()) => {
                    self.flying.truncate(self.flying.len() - count);
                    Seen::Nothing
                }
                Err(error) => Seen::Refused(error),
            },
            Op::Reclaim(limit) => {
                let mut out = [Used::default(); 8];
                let count = self.driver.pop_used_batch(&mut out[..*limit]).expect("nobody breaks a rule");
                Seen::Used(out[..count].iter().map(|used| (used.token, used.len)).collect())
            }
            Op::DriverArm => {
                self.driver_sleeps.0 = !self.driver.arm();
                Seen::More(self.driver_sleeps.0)
            }
            Op::DeviceArm => {
                self.device_sleeps.0 = !self.device.arm();
                Seen::More(self.device_sleeps.0)
            }
            Op::DriverDisarm => {
                self.driver.disarm();
                self.driver_sleeps.0 = false;
                Seen::Nothing
            }
            Op::DeviceDisarm => {
                self.device.disarm();
                self.device_sleeps.0 = false;
                Seen::Nothing
            }
        }
    }

    /// A batch may be full before it holds as many chains as it could: pops go on until there are so many, or no more.
    fn pop(&mut self, limit: usize) -> Seen {
        let mut seen = Vec::new();
        while seen.len() < limit {
            let mut batch = self.device.batch(limit - seen.len());
            if self.device.pop_batch(&mut batch).expect("nobody breaks a rule") == 0 {
                break;
            }
            for chain in batch.chains() {
                let segments = batch.segments(chain).iter().map(|s| (s.address - self.rig.data, s.len, s.direction)).collect();
                seen.push((chain.readable, chain.writable, segments));
                self.flying.push(*chain);
            }
        }
        Seen::Chains(seen)
    }
}

fn run(bytes: &mut Bytes) {
    let size = [1, 2, 4, 8, 16][bytes.below(5)];
    let features = bytes.features();
    let mut split = Side::new(Format::Split, size, features);
    let mut packed = Side::new(Format::Packed, size, features);
    while bytes.more() {
        let op = Op::take(bytes);
        assert_eq!(split.step(&op), packed.step(&op), "{op:?}");
        let counts = |side: &Side| (side.driver.free(), side.driver.outstanding(), side.device.outstanding());
        assert_eq!(counts(&split), counts(&packed), "{op:?}");
    }
    assert_eq!(split.driver.broken(), None);
    let (mut a, mut b) = (split.driver.reset(), packed.driver.reset());
    a.sort_unstable();
    b.sort_unstable();
    assert_eq!(a, b);
}

fuzz_target!(|input: &[u8]| run(&mut Bytes(input)));
