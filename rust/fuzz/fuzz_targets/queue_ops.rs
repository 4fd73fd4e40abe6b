//! Both sides of one ring under arbitrary operations, while either far end writes arbitrary words into whatever it may write: no panic,
//! every error is the far end's fault and is told once, and every token comes back exactly once, from a pop or at reset.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::collections::HashMap;
use virtio_fuzz::common::raw::{RawPacked, RawSplit};
use virtio_fuzz::common::{Device, Driver, Rig, done};
use virtio_fuzz::{Bytes, PLANTED, check_chain, rig};
use virtio_memory::RegionTable;
use virtqueue::{Buffer, Chain, Completion, Direction, Fault, Fill, Filled, Form, Format, RingError, Segment, Used};

/// The ring's words, at their own widths.
enum Raw {
    Split(RawSplit),
    Packed(RawPacked),
}

struct Run<'a> {
    rig: &'a Rig,
    raw: Raw,
    driver: Driver,
    device: Device,
    next_token: u64,
    /// The tokens that the driver has not got back: writable bytes, and whether they were published.
    out: HashMap<u64, (u32, bool)>,
    /// Chains that the device popped and has not completed.
    flying: Vec<Chain>,
    limit: u16,
    /// Whether somebody's hand wrote something.
    lies: bool,
}

/// Fills as many buffers as it is told to, each with one byte less than it holds.
struct Filler<'a>(&'a mut Option<usize>);

impl Fill for Filler<'_> {
    fn soon(&mut self, _: &RegionTable, _: u64, len: u32) {
        assert!(len > 0);
    }

    fn fill(&mut self, _: &RegionTable, _: u64, len: u32) -> Option<u32> {
        assert!(len > 0);
        *self.0 = self.0.and_then(|left| left.checked_sub(1));
        self.0.map(|_| len - 1)
    }
}

impl Run<'_> {
    fn segments(&mut self, bytes: &mut Bytes) -> Vec<Segment> {
        let (readable, writable) = (bytes.below(4), bytes.below(3));
        let at = self.rig.data;
        let mut segments: Vec<Segment> = (0..readable).map(|_| Segment::readable(at, bytes.u8().into())).collect();
        segments.extend((0..writable).map(|_| Segment::writable(at, bytes.u8().into())));
        segments
    }

    fn add(&mut self, bytes: &mut Bytes, form: Form) {
        let segments = self.segments(bytes);
        let (token, free, outstanding) = (self.next_token, self.driver.free(), self.driver.outstanding());
        self.next_token += 1;
        match self.driver.add(token, &segments, form) {
            Ok(()) => {
                let writable = segments.iter().filter(|s| s.direction == Direction::Writable).map(|s| s.len).sum();
                self.out.insert(token, (writable, false));
            }
            Err(error) => {
                assert!(matches!(error.fault(), Fault::Caller | Fault::Full), "{error}");
                assert_eq!((self.driver.free(), self.driver.outstanding()), (free, outstanding), "state unchanged");
            }
        }
    }

    fn add_batch(&mut self, bytes: &mut Bytes) {
        let direction = bytes.direction();
        let count = bytes.below(8) as u64;
        let len = bytes.u8().into();
        let make = |k| Buffer { token: self.next_token + k, address: self.rig.data, len, direction };
        let buffers: Vec<Buffer> = (0..count).map(make).collect();
        let added = match self.driver.add_batch(&buffers) {
            Ok(added) => added,
            Err(error) => {
                assert_eq!((error.fault(), len), (Fault::Caller, 0));
                0
            }
        };
        let writable = if direction == Direction::Writable { len } else { 0 };
        self.out.extend(buffers[..added].iter().map(|buffer| (buffer.token, (writable, false))));
        self.next_token += count;
    }

    fn pop(&mut self, bytes: &mut Bytes) {
        let was_broken = self.device.broken().is_some();
        let mut batch = self.device.batch(1 + bytes.below(8));
        match self.device.pop_batch(&mut batch) {
            Ok(count) => {
                assert!(count <= batch.capacity() && (count == 0 || !was_broken));
                for chain in batch.chains() {
                    check_chain(&batch, chain, self.limit);
                    assert!(self.flying.iter().all(|other| (other.head, other.serial) != (chain.head, chain.serial)));
                    self.flying.push(*chain);
                }
            }
            Err(error) => self.device_broke(&error, was_broken),
        }
    }

    fn device_broke(&self, error: &RingError, was_broken: bool) {
        assert!(!was_broken, "told twice: {error}");
        assert_eq!((error.fault(), self.device.broken()), (Fault::Driver, Some(error)));
        assert!(self.lies, "nobody lied: {error}");
    }

    fn fill(&mut self, bytes: &mut Bytes) {
        let (most, mut filler) = (bytes.below(20), Some(bytes.below(20)));
        let (before, was_broken) = (self.device.outstanding(), self.device.broken().is_some());
        let (filled, why) = self.device.fill_batch(most, &mut Filler(&mut filler));
        assert!(filled <= most && (filled == 0 || !was_broken) && (why != Filled::All || filled == most));
        assert_eq!(self.device.outstanding(), before);
    }

    fn complete(&mut self, bytes: &mut Bytes) {
        let before = self.device.outstanding();
        let mut completions = Vec::new();
        let mut legal = true;
        let mut rest = self.flying.clone();
        for _ in 0..1 + bytes.below(4) {
            if rest.is_empty() {
                break;
            }
            let chain = rest.remove(bytes.below(rest.len()));
            match bytes.u8() {
                0 => completions.push(Completion { serial: chain.serial ^ 1 << 30, ..done(&chain, 0) }),
                1 => completions.push(done(&chain, chain.writable.saturating_add(1))),
                2 => completions.extend([done(&chain, 0); 2]),
                part => {
                    completions.push(done(&chain, (u64::from(chain.writable) * u64::from(part) / 255) as u32));
                    continue;
                }
            }
            legal = legal && completions.last().is_some_and(|c| c.len == u32::MAX);
        }
        let result = self.device.complete_batch(&completions[..]);
        if self.device.broken().is_some() || !legal {
            assert!(self.device.broken().is_some() || result.is_err());
            assert_eq!(self.device.outstanding(), before, "state unchanged");
        } else {
            assert_eq!(result, Ok(()));
            self.flying = rest;
        }
    }

    fn rewind(&mut self, bytes: &mut Bytes) {
        let count = bytes.below(4);
        let before = self.device.outstanding();
        if self.device.broken().is_some() {
            return;
        }
        if self.device.rewind(count).is_ok() {
            assert!(count <= self.flying.len());
            self.flying.truncate(self.flying.len() - count);
            assert_eq!(usize::from(self.device.outstanding()) + count, before.into());
        } else {
            assert_eq!(self.device.outstanding(), before, "state unchanged");
        }
    }

    fn reclaim(&mut self, bytes: &mut Bytes) {
        let was_broken = self.driver.broken().is_some();
        let mut used = [Used::default(); 8];
        match self.driver.pop_used_batch(&mut used[..bytes.below(9)]) {
            Ok(count) => {
                assert!(count == 0 || !was_broken);
                for used in &used[..count] {
                    let (writable, published) = self.out.remove(&used.token).expect("a token that is out");
                    assert!(published, "used before it was published");
                    assert!(used.len <= writable, "{} of {writable} bytes", used.len);
                }
                // The fault: nobody lies about lengths.
                assert!(!PLANTED || self.driver.counters().clamped == 0, "planted");
            }
            Err(error) => {
                assert!(!was_broken, "told twice: {error}");
                assert_eq!((error.fault(), self.driver.broken()), (Fault::Device, Some(&error)));
                assert!(self.lies, "nobody lied: {error}");
            }
        }
    }

    /// One word that the driver writes.
    fn driver_writes(&mut self, bytes: &mut Bytes) {
        self.lies = true;
        match &self.raw {
            Raw::Split(ring) if bytes.flag() => {
                let at = bytes.below(3 + usize::from(ring.size));
                ring.avail.store(at, bytes.change(ring.avail.load(at).into()) as u16);
            }
            Raw::Packed(ring) if bytes.flag() => ring.driver_event.store(0, bytes.change(ring.driver_event.load(0).into()) as u32),
            Raw::Split(RawSplit { desc, size, .. }) | Raw::Packed(RawPacked { desc, size, .. }) => {
                let at = bytes.below(2 * usize::from(*size));
                desc.store(at, bytes.change(desc.load(at)));
            }
        }
    }

    /// One word that the device writes.
    fn device_writes(&mut self, bytes: &mut Bytes) {
        self.lies = true;
        match &self.raw {
            Raw::Split(ring) => match bytes.u8() % 8 {
                0 => ring.avail_event.store(0, bytes.u16()),
                1..=3 => {
                    let at = bytes.below(2);
                    ring.used.store(at, bytes.change(ring.used.load(at).into()) as u16);
                }
                _ => {
                    let at = bytes.below(2 * usize::from(ring.size));
                    ring.elements.store(at, bytes.change(ring.elements.load(at).into()) as u32);
                }
            },
            Raw::Packed(ring) if bytes.below(4) == 0 => ring.device_event.store(0, bytes.change(ring.device_event.load(0).into()) as u32),
            Raw::Packed(ring) => {
                let at = bytes.below(2 * usize::from(ring.size));
                ring.desc.store(at, bytes.change(ring.desc.load(at)));
            }
        }
    }

    fn step(&mut self, bytes: &mut Bytes) {
        match bytes.u8() % 21 {
            0 => self.add(bytes, Form::Direct),
            1 => self.add(bytes, Form::Indirect),
            2 | 3 => self.add_batch(bytes),
            4 | 5 => {
                self.driver.publish();
                self.out.values_mut().for_each(|(_, published)| *published = true);
            }
            6 | 7 => self.pop(bytes),
            8 | 9 => self.complete(bytes),
            10 | 11 => drop(self.device.publish()),
            12 => self.rewind(bytes),
            13 | 14 => self.reclaim(bytes),
            15 => self.driver_writes(bytes),
            16 => self.device_writes(bytes),
            17 => {
                // Tables, and buffers that are taken for tables.
                self.lies = true;
                let at = self.rig.areas.device + u64::from(bytes.u16());
                let value = [bytes.u8()];
                let _ = if at < self.rig.tables { Ok(()) } else { self.rig.memory.table().write(at, &value) };
            }
            19 => self.fill(bytes),
            18 => match bytes.u8() % 4 {
                0 => drop(self.driver.arm()),
                1 => self.driver.disarm(),
                2 => drop(self.device.arm()),
                _ => self.device.disarm(),
            },
            _ => {
                self.driver.snapshot();
                self.device.snapshot();
                self.driver.notification_data(1);
            }
        }
        let size = self.rig.size;
        assert!(self.driver.free() <= size && self.driver.outstanding() <= size && self.device.outstanding() <= size);
        assert_eq!(usize::from(self.driver.outstanding()), self.out.len());
    }
}

fn run(bytes: &mut Bytes) {
    let format = bytes.format();
    let size = bytes.size(format);
    let limit = if bytes.flag() { 64 } else { size };
    let rig = rig(format, size, bytes.features(), limit);
    let raw = match format {
        Format::Split => Raw::Split(rig.raw_split()),
        Format::Packed => Raw::Packed(rig.raw_packed()),
    };
    let (driver, device) = (rig.driver(), rig.device());
    let mut run = Run { rig: &rig, raw, driver, device, next_token: 0, out: HashMap::new(), flying: Vec::new(), limit, lies: false };
    while bytes.more() {
        run.step(bytes);
    }
    let mut tokens = run.driver.reset();
    let mut out: Vec<u64> = run.out.keys().copied().collect();
    tokens.sort_unstable();
    out.sort_unstable();
    assert_eq!(tokens, out, "what is still out comes back at reset");
}

fuzz_target!(|input: &[u8]| run(&mut Bytes(input)));
