//! The device's queue: a ring with its view of guest memory, its latched error, its counters and its observer.

use crate::batch::ChainBatch;
use crate::error::RingError;
use crate::ring::{Completion, Completions, DeviceRing, Fill, Filled, RingState, Snapshot};
use crate::tracking::{InFlightObserver, Resubmission, Tracking};
use std::collections::VecDeque;
use virtio_memory::{RegionTable, View};

/// What a device's queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    /// Chains popped, less those handed back.
    pub popped: u64,
    /// Chains published as used.
    pub used: u64,
    /// Used-buffer notifications that the driver wanted.
    pub notified: u64,
    /// Published batches that it did not want to be told of.
    pub suppressed: u64,
    /// Chains given back undone, because their data could not be carried.
    pub dropped: u64,
}

/// The device's side of a virtqueue. After a mistake of the driver it stands still: batches give 0 until it is reset.
pub struct DeviceQueue<R> {
    ring: R,
    view: View,
    broken: Option<RingError>,
    counters: DeviceCounters,
    tracking: Option<Box<Tracking>>,
}

impl<R: DeviceRing> DeviceQueue<R> {
    /// A queue over a ring; buffers are found through `view`.
    pub fn new(ring: R, view: View) -> Self {
        DeviceQueue { ring, view, broken: None, counters: DeviceCounters::default(), tracking: None }
    }

    /// Tells an observer of every chain from here on.
    pub fn observe(&mut self, observer: Box<dyn InFlightObserver>) {
        self.resume(observer, VecDeque::new());
    }

    /// As [`DeviceQueue::observe`], on a ring that stands where a predecessor's published part ends; what that one had in flight is popped
    /// again before anything new, in this order.
    pub fn resume(&mut self, observer: Box<dyn InFlightObserver>, left: VecDeque<Resubmission>) {
        self.ring.observe();
        let tracking = Tracking::new(observer, left);
        tracking.make_room(&mut self.ring);
        self.tracking = Some(Box::new(tracking));
    }

    /// How many entries there are.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// How many chains are in flight.
    #[inline]
    pub fn outstanding(&self) -> u16 {
        self.ring.outstanding()
    }

    /// A batch that this queue can fill.
    pub fn batch(&self, capacity: usize) -> ChainBatch {
        ChainBatch::new(capacity, self.ring.chain_limit())
    }

    /// The first mistake of the driver, if there was one.
    #[inline]
    pub fn broken(&self) -> Option<&RingError> {
        self.broken.as_ref()
    }

    /// Breaks the queue for a reason found outside the ring (a buffer that is not mapped); the first reason stays.
    pub fn break_with(&mut self, error: RingError) {
        self.broken.get_or_insert(error);
    }

    /// What it has done.
    pub fn counters(&self) -> DeviceCounters {
        self.counters
    }

    /// Counts chains whose data could not be carried.
    pub fn count_dropped(&mut self, count: u64) {
        self.counters.dropped += count;
    }

    /// Guest memory as the last `pop_batch` saw it.
    #[inline]
    pub fn memory(&self) -> &RegionTable {
        &self.view
    }

    /// Guest memory as it is now.
    #[inline]
    pub fn refresh(&mut self) -> &RegionTable {
        self.view.refresh();
        &self.view
    }

    /// Breaks the queue if a file under guest memory was truncated: zeros stand where bytes were, and nothing that was read there counts
    /// (device-24). What `pop_batch` and `publish` ask of themselves; a queue that is broken already passes.
    ///
    /// # Errors
    /// `MemoryLost`, once.
    #[inline]
    pub fn check_memory(&mut self) -> Result<(), RingError> {
        match self.view.poisoned() {
            Some((address, len)) if self.broken.is_none() => Err(self.latch(RingError::MemoryLost { address, len })),
            _ => Ok(()),
        }
    }

    #[cold]
    fn latch(&mut self, error: RingError) -> RingError {
        self.broken = Some(error.clone());
        error
    }

    /// Pops chains into `out`, after those that are in; tells how many.
    #[inline]
    pub fn pop_batch(&mut self, out: &mut ChainBatch) -> Result<usize, RingError> {
        if self.broken.is_some() {
            return Ok(0);
        }
        if !out.fits(self.ring.chain_limit()) {
            return Err(RingError::BatchTooSmall { room: out.segment_capacity(), limit: self.ring.chain_limit() });
        }
        self.view.refresh();
        self.check_memory()?;
        if self.tracking.is_some() {
            return self.pop_tracked(out);
        }
        let result = self.ring.pop_batch(&self.view, out);
        if let Err(error) = self.check_memory() {
            return self.hand_back(result.unwrap_or(0), out, error);
        }
        match result {
            Ok(n) => {
                self.counters.popped += n as u64;
                Ok(n)
            }
            Err(error) => Err(self.latch(error)),
        }
    }

    #[cold]
    fn pop_tracked(&mut self, out: &mut ChainBatch) -> Result<usize, RingError> {
        let Some(tracking) = &mut self.tracking else { return Ok(0) };
        let result = tracking.pop_batch(&mut self.ring, &self.view, out);
        let popped = result.as_ref().map_or(0, |(all, _)| *all);
        if let Err(error) = self.check_memory() {
            return self.hand_back(popped, out, error);
        }
        let (all, fresh) = result.map_err(|error| self.latch(error))?;
        let Some(tracking) = &mut self.tracking else { return Ok(0) };
        tracking.popped(&self.ring, &out.chains()[out.chains().len() - fresh..]);
        if let Err(error) = tracking.check() {
            let error = self.latch(error);
            return self.hand_back(popped, out, error);
        }
        self.counters.popped += all as u64;
        Ok(all)
    }

    /// Chains that were made of zeros.
    #[cold]
    fn hand_back(&mut self, popped: usize, out: &mut ChainBatch, error: RingError) -> Result<usize, RingError> {
        self.ring.rewind(popped)?;
        out.truncate(out.chains().len() - popped);
        Err(error)
    }

    /// Checks a completion without doing it.
    pub fn check(&self, completion: &Completion) -> Result<(), RingError> {
        self.ring.check(completion)
    }

    /// Gives chains back: all of them, or none. Nobody sees it before `publish`.
    #[inline]
    pub fn complete_batch<C: Completions>(&mut self, completions: C) -> Result<(), RingError> {
        if self.broken.is_some() {
            return Ok(());
        }
        let result = self.ring.complete_batch(completions);
        if let Some(tracking) = &mut self.tracking {
            tracking.completed(self.ring.told()); // nothing new, if they were refused
        }
        result
    }

    /// Takes chains of one writable descriptor, at most `most`, and gives each back as soon as `filler` has filled it: what a device does that
    /// keeps none of them. Tells how many, and why no more; all else is for `pop_batch`: other chains, mistakes, every chain of a queue that
    /// is observed. Nobody sees it before `publish`.
    #[inline]
    pub fn fill_batch<F: Fill>(&mut self, most: usize, filler: &mut F) -> (usize, Filled) {
        self.view.refresh();
        if self.broken.is_some() || self.tracking.is_some() || self.view.poisoned().is_some() {
            return (0, Filled::Other);
        }
        let (filled, why) = self.ring.fill_batch(&self.view, most, filler);
        self.counters.popped += filled as u64;
        (filled, why)
    }

    /// Hands the newest `count` chains back to the ring, as if they had not been popped.
    pub fn rewind(&mut self, count: usize) -> Result<(), RingError> {
        if self.broken.is_some() {
            return Ok(());
        }
        match &mut self.tracking {
            None => self.ring.rewind(count)?,
            Some(tracking) => tracking.rewind(&mut self.ring, count)?,
        }
        self.counters.popped -= count as u64;
        Ok(())
    }

    /// Hands all but the first `keep` chains of a batch, the newest ones, back to the ring, and takes them out of the batch.
    pub fn rewind_from(&mut self, batch: &mut ChainBatch, keep: usize) -> Result<(), RingError> {
        self.rewind(batch.chains().len() - keep)?;
        batch.truncate(keep);
        Ok(())
    }

    /// Makes everything completed visible with one store, and tells whether the driver wants to be notified. Nothing is, and the queue
    /// breaks, if memory was lost.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.view.refresh();
        if self.broken.is_some() || self.check_memory().is_err() {
            return false;
        }
        if let Some(tracking) = &mut self.tracking {
            if let Err(error) = tracking.check() {
                self.latch(error);
                return false;
            }
            tracking.before_publish(self.ring.told());
        }
        self.counters.used += u64::from(self.ring.publish(&self.view));
        if let Some(tracking) = &mut self.tracking {
            tracking.after_publish(self.ring.told(), self.ring.state());
            self.ring.clear_told();
        }
        match self.ring.should_notify() {
            Some(true) => {
                self.counters.notified += 1;
                true
            }
            Some(false) => {
                self.counters.suppressed += 1;
                false
            }
            None => false,
        }
    }

    /// Asks for a notification at the next chain that becomes available, whether or not some are left; true if some are, or if the queue is
    /// broken, or would be by the next `pop_batch` because memory was lost.
    pub fn arm(&mut self) -> bool {
        let left = self.tracking.as_ref().is_some_and(|tracking| tracking.left());
        self.broken.is_some() || self.ring.arm(&self.view) || self.view.poisoned().is_some() || left
    }

    /// Asks for no notifications.
    pub fn disarm(&mut self) {
        if self.broken.is_none() {
            self.ring.disarm(&self.view);
        }
    }

    /// Positions to save.
    pub fn state(&self) -> RingState {
        self.ring.state()
    }

    /// The private shadows beside the shared state.
    pub fn snapshot(&self) -> Snapshot {
        self.ring.snapshot()
    }
}
