//! The driver's queue: a ring with its latched error and its counters.

use crate::chain::Segment;
use crate::error::RingError;
use crate::ring::{Buffer, DriverRing, Form, RingState, Snapshot, Takeover, Used};
use std::sync::Arc;
use virtio_memory::RegionTable;

/// What a driver's queue has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverCounters {
    /// Chains added.
    pub added: u64,
    /// Chains that came back.
    pub used: u64,
    /// Available-buffer notifications that the device wanted.
    pub notified: u64,
    /// Published batches that it did not want to be told of.
    pub suppressed: u64,
    /// Used lengths above what was posted.
    pub clamped: u64,
}

/// The driver's side of a virtqueue. After a mistake of the device it stands still: batches give 0 until it is reset.
#[derive(Debug)]
pub struct DriverQueue<R> {
    ring: R,
    /// Where the ring is, if somebody else could take that away.
    memory: Option<Arc<RegionTable>>,
    broken: Option<RingError>,
    counters: DriverCounters,
}

impl<R: DriverRing> DriverQueue<R> {
    /// A queue over a ring.
    pub fn new(ring: R) -> Self {
        DriverQueue { ring, memory: None, broken: None, counters: DriverCounters::default() }
    }

    /// As `new`, in memory whose loss breaks the queue.
    pub fn guarded(ring: R, memory: Arc<RegionTable>) -> Self {
        DriverQueue { memory: Some(memory), ..DriverQueue::new(ring) }
    }

    /// How many entries there are.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// How many ring descriptors are free.
    #[inline]
    pub fn free(&self) -> u16 {
        self.ring.free()
    }

    /// How many chains are outstanding.
    #[inline]
    pub fn outstanding(&self) -> u16 {
        self.ring.outstanding()
    }

    /// The first mistake of the device, if there was one.
    #[inline]
    pub fn broken(&self) -> Option<&RingError> {
        self.broken.as_ref()
    }

    /// Breaks the queue for a reason found outside the ring; the first reason stays.
    pub fn break_with(&mut self, error: RingError) {
        self.broken.get_or_insert(error);
    }

    /// Breaks the queue if a file under its memory was truncated: zeros stand where bytes were, and nothing that was read there counts
    /// (device-24). What all calls that look at the ring ask of themselves; a queue that is broken already passes.
    ///
    /// # Errors
    /// `MemoryLost`, once.
    #[inline]
    pub fn check_memory(&mut self) -> Result<(), RingError> {
        let Some((address, len)) = self.memory.as_ref().and_then(|memory| memory.poisoned()) else { return Ok(()) };
        if self.broken.is_some() {
            return Ok(());
        }
        let error = RingError::MemoryLost { address, len };
        self.broken = Some(error.clone());
        Err(error)
    }

    /// What it has done.
    pub fn counters(&self) -> DriverCounters {
        self.counters
    }

    /// Adds a chain; nobody sees it before `publish`.
    pub fn add(&mut self, token: u64, segments: &[Segment], form: Form) -> Result<(), RingError> {
        if self.broken.is_some() {
            return Err(RingError::Broken);
        }
        self.check_memory()?;
        self.ring.add(token, segments, form)?;
        self.counters.added += 1;
        Ok(())
    }

    /// Adds buffers of one segment until the ring is full; tells how many.
    #[inline]
    pub fn add_batch(&mut self, buffers: &[Buffer]) -> Result<usize, RingError> {
        if self.broken.is_some() {
            return Ok(0);
        }
        self.check_memory()?;
        let n = self.ring.add_batch(buffers)?;
        self.counters.added += n as u64;
        Ok(n)
    }

    /// Makes everything added visible with one store, and tells whether the device wants to be notified. False, and the queue breaks, if
    /// memory was lost.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.broken.is_some() || self.check_memory().is_err() {
            return false;
        }
        self.ring.publish();
        self.decide() & self.check_memory().is_ok()
    }

    #[inline]
    fn decide(&mut self) -> bool {
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

    /// Takes used chains until `out` is full; tells how many.
    #[inline]
    pub fn pop_used_batch(&mut self, out: &mut [Used]) -> Result<usize, RingError> {
        if self.broken.is_some() {
            return Ok(0);
        }
        self.check_memory()?;
        let result = self.ring.pop_used_batch(out, &mut self.counters.clamped);
        self.check_memory()?; // chains that zeros made used
        match result {
            Ok(n) => {
                self.counters.used += n as u64;
                Ok(n)
            }
            Err(error) => {
                self.broken = Some(error.clone());
                Err(error)
            }
        }
    }

    /// Asks for a notification at the next used chain; true if there is something to look at already, or if the queue is broken.
    pub fn arm(&mut self) -> bool {
        self.broken.is_some() || self.check_memory().is_err() || self.ring.arm() || self.check_memory().is_err()
    }

    /// Asks for no notifications.
    pub fn disarm(&mut self) {
        if self.broken.is_none() {
            self.ring.disarm();
        }
    }

    /// What a notification carries under NOTIFICATION_DATA (2.9): queue index below, position above.
    pub fn notification_data(&self, index: u16) -> u32 {
        u32::from(index) | u32::from(self.ring.notification_position()) << 16
    }

    /// Hands back every outstanding token: what a device reset gives to the caller. The queue is then broken for good.
    pub fn reset(&mut self) -> Vec<u64> {
        self.broken.get_or_insert(RingError::Broken);
        self.ring.take_outstanding()
    }

    /// Where another device takes the ring over, after the one before is gone for good. The queue goes on; what was used stays to be popped.
    ///
    /// # Errors
    /// `NotKept` for a packed ring that keeps nothing to make available again; `Broken`; and the mistakes of the device that is gone, which
    /// break the queue.
    pub fn resume(&mut self, how: Takeover) -> Result<RingState, RingError> {
        if self.broken.is_some() {
            return Err(RingError::Broken);
        }
        self.check_memory()?;
        let result = self.ring.resume(how);
        self.check_memory()?;
        if let Err(error) = &result
            && error.breaks()
        {
            self.broken = Some(error.clone());
        }
        result
    }

    /// The private shadows beside the shared state.
    pub fn snapshot(&self) -> Snapshot {
        self.ring.snapshot()
    }
}
