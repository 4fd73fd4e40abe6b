//! The seam between the formats: where a buffer is written, and which store makes it visible. Everything else is shared.

use crate::batch::ChainBatch;
use crate::chain::{Direction, Segment};
use crate::error::RingError;
use crate::event::Cursor;
use crate::tracking::{Footprint, Resubmission};
use virtio_memory::RegionTable;

/// A driver's buffer of one segment, with the caller's name for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Buffer {
    /// The caller's name for the chain; comes back in [`Used`].
    pub token: u64,
    /// Address as the device sees it.
    pub address: u64,
    /// Bytes, at least 1.
    pub len: u32,
    /// Who may write it.
    pub direction: Direction,
}

/// A used chain, on the driver's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// The caller's name for the chain.
    pub token: u64,
    /// Bytes that the device wrote, clamped to the writable bytes that were posted.
    pub len: u32,
}

/// A chain to give back, on the device's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    /// [`crate::Chain::head`]
    pub head: u16,
    /// [`crate::Chain::serial`]
    pub serial: u32,
    /// Bytes written, at most the chain's writable bytes.
    pub len: u32,
}

/// Chains to give back, walked more than once: a slice of [`Completion`], or all chains of a batch.
pub trait Completions: Copy {
    /// Each of them, in the order in which they become used.
    fn all(&self) -> impl Iterator<Item = Completion>;
}

impl Completions for &[Completion] {
    #[inline(always)]
    fn all(&self) -> impl Iterator<Item = Completion> {
        self.iter().copied()
    }
}

/// Every chain of a batch, nothing written to any.
#[derive(Clone, Copy, Debug)]
pub struct Unwritten<'a>(pub &'a ChainBatch);

impl Completions for Unwritten<'_> {
    #[inline(always)]
    fn all(&self) -> impl Iterator<Item = Completion> {
        self.0.chains().iter().map(|chain| Completion { head: chain.head, serial: chain.serial, len: 0 })
    }
}

/// How a driver writes a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One ring descriptor for each segment.
    Direct,
    /// One ring descriptor for a table (2.7.5.3, 2.8.7).
    Indirect,
}

/// Positions that outlive a queue: what vhost-user's vring base carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingState {
    /// The next available entry to look at. Split: the 16-bit index in `offset`, with `wrap` unused.
    pub avail: Cursor,
    /// The next used entry to write. Split: as above.
    pub used: Cursor,
}

/// How a device takes a ring over from one that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takeover {
    /// Whatever was published and not used is made available again, oldest first: it may be done twice, and nothing is lost.
    Again,
    /// Somebody else knows what the device before had begun: the ring stays as it is.
    Tracked,
}

/// A ring's private shadows beside its shared state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Private numbers by name.
    pub private: Vec<(&'static str, u64)>,
    /// What stands in shared memory now, by name.
    pub shared: Vec<(&'static str, u64)>,
}

/// The driver's side of one format.
pub trait DriverRing {
    /// How many entries there are.
    fn size(&self) -> u16;
    /// How many ring descriptors are free.
    fn free(&self) -> u16;
    /// How many chains are outstanding.
    fn outstanding(&self) -> u16;
    /// Writes one chain; nobody sees it before `publish`.
    fn add(&mut self, token: u64, segments: &[Segment], form: Form) -> Result<(), RingError>;
    /// Writes buffers of one segment until the ring is full; tells how many. Nothing is written if one of them is not legal.
    fn add_batch(&mut self, buffers: &[Buffer]) -> Result<usize, RingError>;
    /// One release store makes everything added visible; none if nothing was added.
    fn publish(&mut self);
    /// Whether the device wants to be told of what was published since this was last asked; `None` if nothing was.
    fn should_notify(&mut self) -> Option<bool>;
    /// Takes used chains until `out` is full; tells how many. A mistake of the device is told once nothing precedes it.
    fn pop_used_batch(&mut self, out: &mut [Used], clamped: &mut u64) -> Result<usize, RingError>;
    /// Asks for a notification at the next used chain; true if one is there already.
    fn arm(&mut self) -> bool;
    /// Asks for no notifications.
    fn disarm(&mut self);
    /// Where NOTIFICATION_DATA's upper half points: the next available entry (2.9).
    fn notification_position(&self) -> u16;
    /// Tokens that are outstanding; forgets them.
    fn take_outstanding(&mut self) -> Vec<u64>;
    /// Where another device begins: behind all that was used, with both positions there. No device may look at the ring meanwhile.
    fn resume(&mut self, how: Takeover) -> Result<RingState, RingError>;
    /// For people.
    fn snapshot(&self) -> Snapshot;
}

/// Fills buffers of one writable descriptor, one after the other.
pub trait Fill {
    /// This buffer comes soon.
    fn soon(&mut self, memory: &RegionTable, address: u64, len: u32);
    /// Fills a buffer: how many bytes, at most `len`. `None` leaves it, and all behind it, as they are.
    fn fill(&mut self, memory: &RegionTable, address: u64, len: u32) -> Option<u32>;
}

/// Why filling ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// As many as were wanted.
    All,
    /// No more chains are there.
    Empty,
    /// The next chain is of another kind, was left alone, or is a mistake: pop it.
    Other,
}

/// The device's side of one format.
pub trait DeviceRing {
    /// How many entries there are.
    fn size(&self) -> u16;
    /// How many chains are in flight.
    fn outstanding(&self) -> u16;
    /// The most descriptors that a chain may have.
    fn chain_limit(&self) -> u16;
    /// Pops chains until `out` is full; tells how many. A mistake of the driver is told once nothing precedes it.
    fn pop_batch(&mut self, memory: &RegionTable, out: &mut ChainBatch) -> Result<usize, RingError>;
    /// Takes chains of one writable descriptor, at most `most`, and gives each back as soon as `filler` has filled it; nobody sees it before
    /// `publish`. Tells how many, and why no more. What other chains are in flight stays so.
    fn fill_batch<F: Fill>(&mut self, memory: &RegionTable, most: usize, filler: &mut F) -> (usize, Filled);
    /// Checks that a chain is in flight and that so many bytes fit.
    fn check(&self, completion: &Completion) -> Result<(), RingError>;
    /// Gives chains back; nobody sees it before `publish`. All of them are legal, or nothing is done.
    fn complete_batch<C: Completions>(&mut self, completions: C) -> Result<(), RingError>;
    /// The newest popped chains, newest first, become available again.
    fn rewind(&mut self, count: usize) -> Result<(), RingError>;
    /// One release store makes everything completed visible; tells how many chains that were.
    fn publish(&mut self, memory: &RegionTable) -> u32;
    /// Whether the driver wants to be told of what was published since this was last asked; `None` if nothing was.
    fn should_notify(&mut self) -> Option<bool>;
    /// Asks for a notification at the next chain that becomes available, whether or not some are left; true if some are.
    fn arm(&mut self, memory: &RegionTable) -> bool;
    /// Asks for no notifications.
    fn disarm(&mut self, memory: &RegionTable);
    /// Keeps the heads that are completed from here on, for an observer.
    fn observe(&mut self);
    /// Heads that the next publish tells of; only with `observe`.
    fn told(&self) -> &[u16];
    /// Forgets them.
    fn clear_told(&mut self);
    /// What a chain in flight takes of the ring.
    fn footprint(&self, head: u16) -> Footprint;
    /// Adds the newest `count` chains, as (head, serial), the newest first. Refused as [`DeviceRing::rewind`] would be.
    fn newest(&self, count: usize, out: &mut Vec<(u16, u32)>) -> Result<(), RingError>;
    /// Pops a chain that a predecessor had in flight, which is not in the ring any more.
    fn resubmit(&mut self, memory: &RegionTable, again: &Resubmission, out: &mut ChainBatch) -> Result<(), RingError>;
    /// So many chains of a predecessor are before the next one in the ring, wherever they are.
    fn skip(&mut self, chains: u16, slots: u16);
    /// Positions to save.
    fn state(&self) -> RingState;
    /// For people.
    fn snapshot(&self) -> Snapshot;
}
