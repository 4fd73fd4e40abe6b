//! In-flight tracking: what a device had popped and not yet published outlives its process, in an area that somebody else keeps (vhost-user,
//! "Inflight I/O tracking").
//!
//! [`SplitArea`] and [`PackedArea`] write one queue's region of it in the layouts of the text, store by store, so that after each of them a
//! successor finds every chain exactly once: in the ring, or here. [`Tracking`] is what the queue has of it: whom to tell, and which chains of
//! a predecessor are still to be popped again.

#[cfg(not(loom))]
mod area;
#[cfg(not(loom))]
mod packed;
#[cfg(not(loom))]
mod split;

#[cfg(not(loom))]
pub use area::region_size;
#[cfg(not(loom))]
pub use packed::PackedArea;
#[cfg(not(loom))]
pub use split::SplitArea;

use crate::batch::ChainBatch;
use crate::chain::Chain;
use crate::error::RingError;
use crate::ring::{DeviceRing, RingState};
use std::collections::VecDeque;
use virtio_memory::RegionTable;

/// What a chain takes of its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Ring descriptors.
    pub slots: u16,
    /// Packed: the buffer id.
    pub id: u16,
}

/// Sees what is in flight, so that a crash between two steps loses nothing.
pub trait InFlightObserver: Send {
    /// Chains were popped, these for the first time; `footprint` tells of each by its head.
    fn popped(&mut self, chains: &[Chain], footprint: &dyn Fn(u16) -> Footprint);
    /// A chain of a predecessor was popped again, under this name.
    fn resumed(&mut self, chain: &Chain, again: &Resubmission);
    /// These chains, the newest first, were handed back to the ring, unused.
    fn rewound(&mut self, heads: &[u16]);
    /// These were completed, which nobody sees yet; their names may be given to others from now on.
    fn completed(&mut self, heads: &[u16]);
    /// These heads become used with the next store: all that were completed since the last time.
    fn before_publish(&mut self, heads: &[u16]);
    /// They are used now.
    fn after_publish(&mut self, heads: &[u16], state: RingState);
    /// Whether what it writes to is still there.
    ///
    /// # Errors
    /// `InFlightLost` if it was taken away.
    fn check(&self) -> Result<(), RingError>;
}

/// A chain that a predecessor had in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resubmission {
    /// By its head: the descriptor table holds it still.
    Split {
        /// Index into the descriptor table.
        head: u16,
    },
    /// By copies of its descriptors, since the ring's may be written over: address and second word each.
    Packed {
        /// Its first entry in the area.
        entry: u16,
        /// Address; length, id and flags.
        descriptors: Box<[[u64; 2]]>,
    },
}

impl Resubmission {
    /// Ring descriptors that it takes, where that is known before it is walked.
    fn slots(&self) -> u16 {
        match self {
            Resubmission::Split { .. } => 1,
            Resubmission::Packed { descriptors, .. } => descriptors.len() as u16,
        }
    }
}

/// What an area told when it was opened.
#[derive(Debug)]
pub struct Opened<A> {
    /// The writer.
    pub area: A,
    /// Where a queue of its own resumes, if there was a predecessor: what this one had in flight is popped again from there.
    pub resume: Option<RingState>,
    /// Its chains in flight, in the order in which it popped them.
    pub left: VecDeque<Resubmission>,
}

/// What a queue has of in-flight tracking.
pub(crate) struct Tracking {
    observer: Box<dyn InFlightObserver>,
    /// Chains of a predecessor that are to be popped before any new one.
    left: VecDeque<Resubmission>,
    /// Those that were, and are in flight: name, serial.
    again: Vec<(u16, u32, Resubmission)>,
    /// Chains that are handed back, the newest first.
    newest: Vec<(u16, u32)>,
    names: Vec<u16>,
    /// How many chains the observer knows to be completed, since the last publish.
    told: usize,
}

impl Tracking {
    pub(crate) fn new(observer: Box<dyn InFlightObserver>, left: VecDeque<Resubmission>) -> Self {
        Tracking { observer, left, again: Vec::new(), newest: Vec::new(), names: Vec::new(), told: 0 }
    }

    /// The chains of a predecessor go first in the ring's count, though they are not popped yet.
    pub(crate) fn make_room<R: DeviceRing>(&self, ring: &mut R) {
        ring.skip(self.left.len() as u16, self.left.iter().map(Resubmission::slots).sum());
    }

    /// Whether chains of a predecessor wait to be popped.
    pub(crate) fn left(&self) -> bool {
        !self.left.is_empty()
    }

    pub(crate) fn check(&self) -> Result<(), RingError> {
        self.observer.check()
    }

    /// Pops what a predecessor had, then new chains; how many in all. The observer is not told of these yet.
    #[cold]
    pub(crate) fn pop_batch<R: DeviceRing>(
        &mut self,
        ring: &mut R,
        memory: &RegionTable,
        out: &mut ChainBatch,
    ) -> Result<(usize, usize), RingError> {
        let mut resumed = 0;
        let result = loop {
            let Some(next) = self.left.front() else { break ring.pop_batch(memory, out) };
            if !out.has_room(ring.chain_limit()) {
                break Ok(0);
            }
            if let Err(error) = ring.resubmit(memory, next, out) {
                break Err(error);
            }
            let (Some(again), Some(chain)) = (self.left.pop_front(), out.chains().last()) else { break Ok(0) };
            self.observer.resumed(chain, &again);
            self.again.push((chain.head, chain.serial, again));
            resumed += 1;
        };
        match result {
            Ok(fresh) => Ok((resumed + fresh, fresh)),
            Err(_) if resumed > 0 => Ok((resumed, 0)), // told when nothing precedes it
            Err(error) => Err(error),
        }
    }

    /// Tells of new chains.
    pub(crate) fn popped<R: DeviceRing>(&mut self, ring: &R, chains: &[Chain]) {
        if !chains.is_empty() {
            self.observer.popped(chains, &|head| ring.footprint(head));
        }
    }

    /// Hands the newest chains back: new ones to the ring, a predecessor's to be popped again.
    #[cold]
    pub(crate) fn rewind<R: DeviceRing>(&mut self, ring: &mut R, count: usize) -> Result<(), RingError> {
        self.newest.clear();
        ring.newest(count, &mut self.newest)?;
        ring.rewind(count)?;
        self.names.clear();
        let (mut chains, mut slots) = (0, 0);
        for &(name, serial) in &self.newest {
            match self.again.iter().rposition(|(head, known, _)| (*head, *known) == (name, serial)) {
                Some(place) => {
                    let (_, _, again) = self.again.remove(place);
                    chains += 1;
                    slots += again.slots();
                    self.left.push_front(again);
                }
                None => self.names.push(name),
            }
        }
        ring.skip(chains, slots); // they are not in the ring: it resumes behind them
        if !self.names.is_empty() {
            self.observer.rewound(&self.names);
        }
        Ok(())
    }

    /// `told` are all that were completed since the last publish.
    #[cold]
    pub(crate) fn completed(&mut self, told: &[u16]) {
        let new = told.get(self.told..).unwrap_or_default();
        self.told = told.len();
        if !new.is_empty() {
            self.observer.completed(new);
            self.again.retain(|(name, ..)| !new.contains(name));
        }
    }

    pub(crate) fn before_publish(&mut self, told: &[u16]) {
        if !told.is_empty() {
            self.observer.before_publish(told);
        }
    }

    pub(crate) fn after_publish(&mut self, told: &[u16], state: RingState) {
        if !told.is_empty() {
            self.observer.after_publish(told, state);
        }
        self.told = 0;
    }
}
