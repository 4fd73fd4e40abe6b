//! A device's process may die between any two stores: what the ring and the in-flight area hold then is enough to go on. After each single
//! store of pop, rewind, complete, publish and of recovery itself, a successor finds every chain exactly once, in order.
#![cfg(debug_assertions)]

mod common;

use common::raw::{Desc, RawPacked, RawSplit};
use common::{Device, EVENT_IDX, IN_ORDER, INDIRECT, PLAIN, Rig, done};
use std::collections::BTreeMap;
use std::sync::Arc;
use virtio_memory::record::{self, Stored};
use virtio_memory::{HugePages, Mapping};
use virtqueue::packed::{PackedDevice, PackedRing};
use virtqueue::spec::{DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_USED, DESC_F_WRITE};
use virtqueue::split::{SplitDevice, SplitRing};
use virtqueue::{AnyDevice, Chain, DeviceQueue, Format, PackedArea, RingError, RingFeatures, RingState, SplitArea, region_size, spans};

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    /// Below `sides`.
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % sides
    }
}

/// A driver played by hand, whose private state can be copied. A chain's token is in its first segment's address.
#[derive(Clone)]
struct Driver {
    next: u32,
    used: u32,
    token: u64,
    /// By id: token, descriptors.
    outstanding: BTreeMap<u16, (u64, Vec<u16>)>,
    free: Vec<u16>,
}

impl Driver {
    fn new(size: u16) -> Self {
        Driver { next: 0, used: 0, token: 1, outstanding: BTreeMap::new(), free: (0..size).rev().collect() }
    }

    fn tokens(&self) -> Vec<u64> {
        let mut tokens: Vec<u64> = self.outstanding.values().map(|(token, _)| *token).collect();
        tokens.sort_unstable();
        tokens
    }

    /// One chain of so many segments, behind an indirect table if there is one.
    fn add(&mut self, rig: &Rig, segments: usize, indirect: bool) -> bool {
        let slots = if indirect { 1 } else { segments };
        if self.free.len() < slots {
            return false;
        }
        let taken: Vec<u16> = (0..slots).filter_map(|_| self.free.pop()).collect();
        let id = taken[0];
        let segment = |k: usize| Desc { address: self.token << 8 | k as u64, len: 16, flags: DESC_F_WRITE, tag: 0 };
        let chain: Vec<Desc> = if indirect {
            let table = rig.data + 64 * u64::from(id);
            for k in 0..segments {
                let d = segment(k);
                let last = k + 1 == segments;
                let word = match rig.format {
                    Format::Split if !last => u64::from(d.flags | DESC_F_NEXT) << 32 | (k as u64 + 1) << 48,
                    Format::Split => u64::from(d.flags) << 32,
                    Format::Packed => u64::from(d.flags) << 48,
                };
                rig.write(table + 16 * k as u64, &d.address.to_le_bytes());
                rig.write(table + 16 * k as u64 + 8, &(word | u64::from(d.len)).to_le_bytes());
            }
            vec![Desc { address: table, len: 16 * segments as u32, flags: DESC_F_INDIRECT, tag: id }]
        } else {
            (0..segments).map(segment).collect()
        };
        match rig.format {
            Format::Split => {
                let ring = rig.raw_split();
                for (k, d) in chain.iter().enumerate() {
                    let more = taken.get(k + 1);
                    let flags = if more.is_some() { d.flags | DESC_F_NEXT } else { d.flags };
                    ring.set_desc(taken[k], Desc { flags, tag: more.copied().unwrap_or(0), ..*d });
                }
                ring.offer(self.next as u16, id);
                self.next += 1;
            }
            Format::Packed => {
                let ring = rig.raw_packed();
                for (k, d) in chain.iter().enumerate().rev() {
                    let flags = if k + 1 < slots { d.flags | DESC_F_NEXT } else { d.flags };
                    ring.offer(self.next + k as u32, Desc { flags, tag: id, ..*d });
                }
                self.next += slots as u32;
            }
        }
        self.outstanding.insert(id, (self.token, taken));
        self.token += 1;
        true
    }

    /// Takes what is used; each of it is outstanding.
    fn reclaim(&mut self, rig: &Rig) -> Vec<u64> {
        let mut tokens = Vec::new();
        match rig.format {
            Format::Split => self.reclaim_split(rig, &rig.raw_split(), &mut tokens),
            Format::Packed => self.reclaim_packed(rig, &rig.raw_packed(), &mut tokens),
        }
        tokens
    }

    fn take(&mut self, id: u16, tokens: &mut Vec<u64>) -> usize {
        let (token, descriptors) = self.outstanding.remove(&id).unwrap_or_else(|| panic!("id {id} is not outstanding"));
        tokens.push(token);
        self.free.extend(&descriptors);
        descriptors.len()
    }

    /// In order one element may stand for all before it.
    fn run(&self, rig: &Rig, id: u16) -> Vec<u16> {
        if !rig.features.in_order {
            return vec![id];
        }
        let last = self.outstanding.get(&id).unwrap_or_else(|| panic!("id {id} is not outstanding")).0;
        let mut run: Vec<(u64, u16)> = self.outstanding.iter().map(|(id, (token, _))| (*token, *id)).collect();
        run.sort_unstable();
        run.into_iter().filter(|(token, _)| *token <= last).map(|(_, id)| id).collect()
    }

    fn reclaim_split(&mut self, rig: &Rig, ring: &RawSplit, tokens: &mut Vec<u64>) {
        while self.used as u16 != ring.used_idx() {
            let (id, _) = ring.element(self.used as u16);
            for id in self.run(rig, id as u16) {
                self.take(id, tokens);
                self.used += 1;
            }
        }
    }

    fn reclaim_packed(&mut self, rig: &Rig, ring: &RawPacked, tokens: &mut Vec<u64>) {
        loop {
            let at = ring.cursor(self.used);
            let (_, id, flags) = ring.get(at.offset);
            let both = if at.wrap { DESC_F_AVAIL | DESC_F_USED } else { 0 };
            if flags & (DESC_F_AVAIL | DESC_F_USED) != both || self.outstanding.is_empty() {
                break;
            }
            for id in self.run(rig, id) {
                self.used += self.take(id, tokens) as u32;
            }
        }
    }
}

/// A ring and its in-flight area.
struct Place {
    rig: Rig,
    area: Arc<Mapping>,
}

/// What both hold.
#[derive(Clone)]
struct Image(Vec<u8>, Vec<u8>);

impl Place {
    fn new(format: Format, size: u16, features: RingFeatures) -> Self {
        let rig = Rig::new(format, size, features);
        let area = Arc::new(Mapping::memfd(region_size(format, size), "area", HugePages::Off).expect("memfd"));
        Place { rig, area }
    }

    fn image(&self) -> Image {
        let read = |mapping: &Mapping, len: usize| {
            let mut bytes = vec![0; len];
            mapping.read(0, &mut bytes).expect("mapped");
            bytes
        };
        // Tables lie at the data's beginning; nothing else there counts.
        Image(read(&self.rig.mapping, (self.rig.data - common::BASE) as usize + 2048), read(&self.area, self.area.len()))
    }

    fn set(&self, image: &Image) {
        self.rig.mapping.write(0, &image.0).expect("mapped");
        self.area.write(0, &image.1).expect("mapped");
    }

    /// One store of another place, as if it were here.
    fn replay(&self, other: &Place, stored: &Stored) {
        for (from, to) in [(&other.rig.mapping, &self.rig.mapping), (&other.area, &self.area)] {
            let start = from.as_ptr() as usize;
            if (start..start + from.len()).contains(&stored.address) {
                to.write(stored.address - start, &stored.value.to_le_bytes()[..stored.width]).expect("mapped");
                return;
            }
        }
        panic!("a store somewhere else");
    }

    /// A device that tracks what is in flight, and goes on with what stands there.
    fn device(&self, base: Option<RingState>) -> Result<Device, RingError> {
        let (rig, table) = (&self.rig, self.rig.memory.table());
        let spans = spans(&table, rig.format, rig.size, rig.areas)?;
        let span = self.area.span(0, self.area.len()).expect("area");
        let (view, limit) = (rig.memory.view(), rig.size.max(8));
        Ok(match rig.format {
            Format::Split => {
                let ring = SplitRing::new(rig.size, &spans)?;
                let opened = SplitArea::open(&span, &ring, base.map(|state| state.avail.offset))?;
                let base = opened.resume.or(base).map(|state| state.avail.offset);
                let ring = SplitDevice::new(ring, rig.features, rig.areas, limit, base)?;
                let mut queue = DeviceQueue::new(AnyDevice::Split(ring), view);
                queue.resume(Box::new(opened.area), opened.left);
                queue
            }
            Format::Packed => {
                let ring = PackedRing::new(rig.size, &spans)?;
                let opened = PackedArea::open(&span, &ring, base)?;
                let ring = PackedDevice::new(ring, rig.features, rig.areas, limit, opened.resume.or(base))?;
                let mut queue = DeviceQueue::new(AnyDevice::Packed(ring), view);
                queue.resume(Box::new(opened.area), opened.left);
                queue
            }
        })
    }
}

/// Chains with their tokens.
fn pop(device: &mut Device, limit: usize) -> Vec<(Chain, u64)> {
    common::pop_with_segments(device, limit).into_iter().map(|(chain, segments)| (chain, segments[0].address >> 8)).collect()
}

fn complete(device: &mut Device, chains: &[(Chain, u64)], dice: &mut Dice) {
    let completions: Vec<_> = chains.iter().map(|(chain, _)| done(chain, if dice.roll(2) == 0 { 0 } else { chain.writable })).collect();
    common::give_back(device, &completions).expect("in flight");
}

fn shuffle<T>(items: &mut [T], dice: &mut Dice) {
    for i in (1..items.len()).rev() {
        items.swap(i, dice.roll(i + 1));
    }
}

/// What stands at this place is enough for a successor: every chain that is outstanding comes once, in order, and can be completed once, in
/// any order; and the ring goes on round and round.
fn check_recovery(place: &Place, driver: &Driver, dice: &mut Dice) {
    let mut driver = driver.clone();
    let mut device = place.device(None).expect("recovered");
    driver.reclaim(&place.rig);
    let mut popped = Vec::new();
    loop {
        let more = pop(&mut device, 1 + dice.roll(4));
        if more.is_empty() {
            break;
        }
        popped.extend(more);
        if dice.roll(3) == 0 {
            let count = 1 + dice.roll(popped.len());
            device.rewind(count).expect("the newest");
            popped.truncate(popped.len() - count);
        }
    }
    let tokens: Vec<u64> = popped.iter().map(|(_, token)| *token).collect();
    assert_eq!(tokens, driver.tokens(), "each once, in order");
    for _ in 0..3 {
        shuffle(&mut popped, dice);
        while !popped.is_empty() {
            let part = popped.split_off(popped.len() - 1 - dice.roll(popped.len()));
            complete(&mut device, &part, dice);
            device.publish();
            driver.reclaim(&place.rig);
        }
        assert_eq!(driver.tokens(), []);
        while driver.add(&place.rig, 1 + dice.roll(3), false) {}
        popped = pop(&mut device, 64);
        assert_eq!(popped.iter().map(|(_, token)| *token).collect::<Vec<_>>(), driver.tokens());
    }
}

/// Runs a step of the device, then lets its process die after each single store of it.
fn killed_anywhere(place: &Place, other: &Place, driver: &Driver, dice: &mut Dice, step: impl FnOnce()) -> usize {
    let before = place.image();
    record::start();
    step();
    let stores = record::take();
    for count in 0..=stores.len() {
        other.set(&before);
        stores[..count].iter().for_each(|stored| other.replay(place, stored));
        let killed = other.image();
        // The successor may die while it recovers.
        record::start();
        drop(other.device(None).expect("recovered"));
        let recovery = record::take();
        for count in 0..recovery.len() {
            other.set(&killed);
            recovery[..count].iter().for_each(|stored| other.replay(other, stored));
            check_recovery(other, driver, dice);
        }
        other.set(&killed);
        check_recovery(other, driver, dice);
    }
    stores.len()
}

fn play(format: Format, size: u16, features: RingFeatures, seed: u64, steps: usize) -> usize {
    let (place, other) = (Place::new(format, size, features), Place::new(format, size, features));
    let mut dice = Dice((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut driver = Driver::new(size);
    let mut device = place.device(None).expect("device");
    let mut flying: Vec<(Chain, u64)> = Vec::new();
    let mut kills = 0;
    for _ in 0..steps {
        match dice.roll(8) {
            0 | 1 => {
                for _ in 0..=dice.roll(usize::from(size)) {
                    let indirect = features.indirect && dice.roll(2) == 0;
                    let segments = 1 + dice.roll(3);
                    driver.add(&place.rig, segments, indirect);
                }
            }
            2 => drop(driver.reclaim(&place.rig)),
            3 | 4 => {
                let limit = 1 + dice.roll(usize::from(size));
                kills += killed_anywhere(&place, &other, &driver, &mut dice, || flying.extend(pop(&mut device, limit)));
            }
            5 => {
                // Newer ones may be completed: then nothing happens.
                let count = dice.roll(flying.len() + 1);
                kills += killed_anywhere(&place, &other, &driver, &mut dice, || {
                    if device.rewind(count).is_ok() {
                        flying.sort_by_key(|(_, token)| *token);
                        flying.truncate(flying.len() - count);
                    }
                });
            }
            6 => {
                shuffle(&mut flying, &mut dice);
                let part = flying.split_off(flying.len() - dice.roll(flying.len() + 1));
                let mut own = Dice(dice.0 | 1);
                kills += killed_anywhere(&place, &other, &driver, &mut dice, || complete(&mut device, &part, &mut own));
                kills += killed_anywhere(&place, &other, &driver, &mut dice, || {
                    device.publish();
                });
            }
            _ if dice.roll(4) == 0 => {
                // It dies in between, with what it did.
                drop(device);
                flying.clear();
                driver.reclaim(&place.rig);
                device = place.device(None).expect("recovered");
            }
            _ => {
                shuffle(&mut flying, &mut dice);
                let part = flying.split_off(flying.len() - dice.roll(flying.len() + 1));
                let mut own = Dice(dice.0 | 1);
                kills += killed_anywhere(&place, &other, &driver, &mut dice, || complete(&mut device, &part, &mut own));
            }
        }
    }
    kills
}

#[test]
fn every_chain_is_completed_once_whatever_store_was_the_last() {
    for (format, size) in [(Format::Split, 4), (Format::Split, 8), (Format::Packed, 4), (Format::Packed, 5), (Format::Packed, 8)] {
        for features in [PLAIN, IN_ORDER, INDIRECT, RingFeatures { indirect: true, ..IN_ORDER }, EVENT_IDX] {
            let kills: usize = (0..4).map(|seed| play(format, size, features, seed, 200)).sum();
            assert!(kills > 300, "{format:?} {size}: {kills}");
        }
    }
}
