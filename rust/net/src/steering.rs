//! Which queue pair a frame takes (5.1.6.5.5): a flow stays on one, where the other end sent of it if that is known.
//!
//! A flow is what has the same two ends: addresses and ports of TCP, UDP and SCTP, addresses of other IP packets and of fragments, Ethernet
//! addresses and type of the rest. Both directions are one flow.

use crate::error::BurstError;
use crate::keep_rest;
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering::Relaxed;
use virtio_memory::{BufferPool, Burst, PoolState, Row};

/// Flows that are told apart by where they came from.
const FLOWS: usize = 4096;
/// Bytes that tell a flow: two VLAN tags, IPv6, ports.
const LOOK: usize = 66;

/// Remembers from which pair a flow came. Threads may share it: what it tells is a matter of speed, and always legal.
#[derive(Debug)]
pub struct Steering {
    /// One more than the pair of a flow; 0: not seen.
    seen: Box<[AtomicU16]>,
}

impl Default for Steering {
    fn default() -> Self {
        Steering { seen: (0..FLOWS).map(|_| AtomicU16::new(0)).collect() }
    }
}

impl Steering {
    /// A packet of this flow came from `pair`.
    #[inline]
    pub fn learn(&self, frame: &[u8], pair: u16) {
        let seen = &self.seen[flow(frame) as usize % FLOWS];
        if seen.load(Relaxed) != pair + 1 {
            seen.store(pair + 1, Relaxed);
        }
    }

    /// The packets of this burst came from `pair`.
    pub fn learn_burst(&self, burst: &Burst, pair: u16) {
        let (pool, mut first) = (burst.pool(), true);
        let mut bytes = [0; LOOK];
        for index in 0..burst.count() {
            let row = burst.row(index);
            // What somebody else writes there meanwhile is believed as little as it is elsewhere.
            let inside = (0..i64::from(pool.slots())).contains(&row.slot)
                && (0..pool.slot_size() as i64).contains(&row.offset)
                && (1..=pool.slot_size() as i64 - row.offset).contains(&row.length);
            if first && inside {
                let row = Row { slot: row.slot as u32, offset: row.offset as u32, length: row.length as u32, more: false };
                self.learn(start(pool, &row, &mut bytes), pair);
            }
            first = row.more == 0;
        }
    }

    /// The pair that a frame takes, of so many (at least one).
    #[inline]
    pub fn choose(&self, frame: &[u8], pairs: u16) -> u16 {
        let flow = flow(frame);
        match self.seen[flow as usize % FLOWS].load(Relaxed) {
            seen if (1..=pairs).contains(&seen) => seen - 1,
            _ => ((u64::from((flow >> 32) as u32) * u64::from(pairs)) >> 32) as u16,
        }
    }
}

/// Deals a burst's packets to pairs, and keeps the room for that.
#[derive(Debug, Default)]
pub struct Dealer {
    rows: Vec<Row>,
    pairs: Vec<u16>,
    group: Vec<Row>,
    rest: Vec<Row>,
}

impl Dealer {
    /// Reads and checks the burst's rows, and chooses a pair for each packet.
    ///
    /// # Errors
    /// `Row`: nothing is done then.
    pub fn read(&mut self, state: &mut PoolState, burst: &Burst, steering: &Steering, pairs: u16) -> Result<(), BurstError> {
        burst.validate(state, &mut self.rows)?;
        self.pairs.clear();
        let mut bytes = [0; LOOK];
        for packet in self.rows.chunk_by(|row, _| row.more) {
            let pair = steering.choose(start(burst.pool(), &packet[0], &mut bytes), pairs);
            self.pairs.extend(packet.iter().map(|_| pair));
        }
        Ok(())
    }

    /// The pair of all packets, if it is one.
    pub fn only(&self) -> Option<u16> {
        let first = *self.pairs.first()?;
        self.pairs.iter().all(|pair| *pair == first).then_some(first)
    }

    /// Gives each pair its packets as the burst's only rows, in their order, for `send` to send. What that leaves, and what comes after an
    /// error, stands in the burst afterwards. Tells how many packets were sent.
    ///
    /// # Errors
    /// The first of `send`.
    pub fn deal<E>(&mut self, burst: &Burst, pairs: u16, mut send: impl FnMut(u16) -> Result<usize, E>) -> Result<usize, E> {
        let (mut sent, mut failed) = (0, None);
        self.rest.clear();
        for pair in 0..pairs {
            self.group.clear();
            self.group.extend(self.rows.iter().zip(&self.pairs).filter(|(_, its)| **its == pair).map(|(row, _)| *row));
            if self.group.is_empty() {
                continue;
            }
            if failed.is_none() {
                keep_rest(burst, &self.group);
                match send(pair) {
                    Ok(packets) => sent += packets,
                    Err(error) => failed = Some(error),
                }
                let left = burst.count().min(self.group.len());
                self.group.drain(..self.group.len() - left);
            }
            self.rest.extend_from_slice(&self.group);
        }
        keep_rest(burst, &self.rest);
        failed.map_or(Ok(sent), Err)
    }
}

/// The first bytes of a packet, as far as its first row goes; none of a pool that is lost.
#[inline]
fn start<'a>(pool: &BufferPool, row: &Row, bytes: &'a mut [u8; LOOK]) -> &'a [u8] {
    let bytes = &mut bytes[..LOOK.min(row.length as usize)];
    match pool.mapping().read(pool.slot_offset(row.slot) + row.offset as usize, bytes) {
        Ok(()) => bytes,
        Err(_) => &[],
    }
}

/// A number for a frame's flow, the same for both directions.
fn flow(frame: &[u8]) -> u64 {
    let (mut at, mut kind) = (14, number(frame, 12, 2));
    while matches!(kind, 0x8100 | 0x88a8) && at < 22 {
        kind = number(frame, at + 2, 2);
        at += 4;
    }
    let (from, to, ports) = match kind {
        0x0800 => {
            let protocol = number(frame, at + 9, 1);
            let whole = number(frame, at + 6, 2) & 0x3fff == 0; // fragments have no ports
            let end = at + 4 * (number(frame, at, 1) & 15) as usize;
            (number(frame, at + 12, 4), number(frame, at + 16, 4), (protocol, end, whole))
        }
        0x86dd => {
            let address = |at| number(frame, at, 8) ^ number(frame, at + 8, 8).rotate_left(17);
            (address(at + 8), address(at + 24), (number(frame, at + 6, 1), at + 40, true))
        }
        _ => (number(frame, 0, 6), number(frame, 6, 6), (0, 0, false)),
    };
    let (protocol, end, whole) = ports;
    let (mut from, mut to) = (mix(from), mix(to));
    if whole && matches!(protocol, 6 | 17 | 132) {
        from = mix(from ^ number(frame, end, 2));
        to = mix(to ^ number(frame, end + 2, 2));
    }
    mix(from.min(to).wrapping_mul(3).wrapping_add(from.max(to)) ^ kind << 8 ^ protocol)
}

/// A number of up to 8 bytes, big-endian; what is not there counts 0.
#[inline(always)]
fn number(frame: &[u8], at: usize, bytes: usize) -> u64 {
    frame.get(at..at + bytes).map_or(0, |field| field.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// The finalizer of SplitMix64: every bit of the result depends on every bit of `value`.
#[inline(always)]
fn mix(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}
