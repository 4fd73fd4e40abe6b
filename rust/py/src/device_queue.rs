//! `DeviceQueue`: the device's side of one virtqueue.

use crate::args::{Int, Mask};
use crate::batch::ChainBatch;
use crate::burst::Burst;
use crate::chain::Chain;
use crate::errors::{Error, named};
use crate::eventfd::EventFd;
use crate::guest::GuestMemory;
use crate::lock::lock_pool;
use crate::memory::{Memory, Use};
use crate::queue::{Core, Side};
use crate::ring::{self, Ring};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use virtio_memory::{Doorbell, Span};
use virtio_net_path::DeviceBursts;
use virtqueue::event::Cursor;
use virtqueue::packed::{PackedDevice, PackedRing};
use virtqueue::split::{SplitDevice, SplitRing};
use virtqueue::{
    AnyDevice, Areas, Completion, DeviceCounters, Format, InFlightObserver, Opened, PackedArea, Resubmission, RingError, RingState,
    SplitArea, check_chain_limit, region_size, spans,
};

/// What is there until reset or close.
pub struct Open {
    pub queue: virtqueue::DeviceQueue<AnyDevice>,
    interrupt: Doorbell,
    pub bursts: DeviceBursts,
    /// How often chains were handed back: batches may name some that are not in flight then.
    pub rewinds: u64,
    /// For `pop`; made when it is first called.
    popped: Option<virtqueue::ChainBatch>,
    /// The in-flight area is used while the queue is open.
    _area: Option<Use>,
}

impl Open {
    /// Shows what was completed, and tells the driver if it wants to know.
    #[inline]
    pub fn publish(&mut self, ring: &Ring) -> Result<bool, Error> {
        let sound = self.queue.broken().is_none();
        let wanted = self.queue.publish();
        if let Some(error) = self.queue.broken()
            && sound
        {
            return Err(error.clone().into());
        }
        if wanted {
            self.interrupt.ring(ring.index.into())?;
        }
        Ok(wanted)
    }
}

/// What is told of a queue that closed.
#[derive(Default)]
pub struct Last {
    counters: DeviceCounters,
    base: u32,
}

impl Side for Open {
    type Last = Last;

    #[inline]
    fn broken(&self) -> Option<&RingError> {
        self.queue.broken()
    }

    #[inline]
    fn for_pump(&mut self) -> Result<&mut Self, Error> {
        Ok(self)
    }
}

/// The queue itself, which its chains and batches share.
pub type Shared = Core<Open>;

impl Shared {
    /// Whether a chain is in flight no more: it was completed, or the queue is closed.
    pub fn is_done(&self, py: Python<'_>, name: &Completion) -> Result<bool, Error> {
        Ok(self.lock(py)?.open.as_ref().is_none_or(|open| open.queue.check(name).is_err()))
    }

    fn close(&self, py: Python<'_>) -> Result<(), Error> {
        let mut state = self.lock(py)?;
        let open = state.open.take();
        if let Some(open) = &open {
            state.last = Last { counters: open.queue.counters(), base: base_of(self.ring.format, open.queue.state()) };
            state.tell();
        }
        drop(state);
        drop(open); // outside the lock: it takes the pool's
        Ok(())
    }
}

/// vhost-user's vring base: the avail position, for packed with the wrap counter on top and the used position above.
pub fn base_of(format: Format, state: RingState) -> u32 {
    match format {
        Format::Split => state.avail.offset.into(),
        Format::Packed => u32::from(state.avail.to_bits()) | u32::from(state.used.to_bits()) << 16,
    }
}

fn areas_of(areas: &Bound<'_, PyAny>) -> Result<Areas, Error> {
    let (descriptor, driver, device): (Int, Int, Int) = areas.extract().map_err(|error| named("areas", error))?;
    let address = |area: Int, what| area.within(what, 0, u64::MAX.into()).map_err(|error| error.of("areas"));
    let (descriptor, driver) = (address(descriptor, "descriptor area")?, address(driver, "driver area")?);
    Ok(Areas { descriptor, driver, device: address(device, "device area")? })
}

/// A queue's region of an in-flight area, at this offset.
fn region(py: Python<'_>, ring: &Ring, inflight: &Bound<'_, PyAny>) -> Result<(Span, Use), Error> {
    let (memory, offset): (Bound<'_, Memory>, Int) = inflight.extract().map_err(|error| named("inflight", error))?;
    let (mapping, user) = memory.get().used(py)?;
    let offset: usize = offset.within("inflight: offset", 0, mapping.len() as i128)?;
    let wanted = region_size(ring.format, ring.size);
    if !(mapping.as_ptr() as usize + offset).is_multiple_of(8) {
        return Err(Error::Value(format!("inflight: offset {offset} is not aligned to 8 bytes")));
    }
    let left = mapping.len() - offset;
    if left < wanted {
        return Err(Error::Value(format!("inflight: {left} bytes are left at offset {offset}, a region has {wanted}")));
    }
    Ok((mapping.span(offset, wanted)?, user))
}

/// An area's writer, and what a predecessor left.
type Tracked = (Box<dyn InFlightObserver>, VecDeque<Resubmission>);

/// Opens the area of a ring that is set up with this base; where it resumes.
fn tracked<A: InFlightObserver + 'static>(opened: Opened<A>, base: Option<RingState>) -> (Tracked, Option<RingState>) {
    let Opened { area, resume, left } = opened;
    ((Box::new(area), left), resume.or(base))
}

/// The device's side of one virtqueue (2.7, 2.8): pops chains, completes them, publishes the used ones.
#[pyclass(frozen, module = "virtio._core")]
pub struct DeviceQueue {
    pub shared: Arc<Shared>,
}

impl DeviceQueue {
    #[inline]
    fn with<T>(&self, py: Python<'_>, call: impl FnOnce(&mut Open) -> Result<T, Error>) -> Result<T, Error> {
        self.shared.with(py, call)
    }

    /// For `hold`.
    pub fn mutex(&self) -> &Mutex<impl Send + use<>> {
        self.shared.mutex()
    }
}

#[pymethods]
impl DeviceQueue {
    #[new]
    #[pyo3(signature = (memory, size, areas, *, features = Mask::NONE, index = Int::new(0), max_size = Int::new(32768), chain_limit = None,
                        base = None, inflight = None),
           text_signature = "(memory, size, areas, *, features=0, index=0, max_size=32768, chain_limit=None, base=None, inflight=None)")]
    #[allow(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        memory: &Bound<'_, GuestMemory>,
        size: Int,
        areas: &Bound<'_, PyAny>,
        features: Mask,
        index: Int,
        max_size: Int,
        chain_limit: Option<Int>,
        base: Option<Int>,
        inflight: Option<&Bound<'_, PyAny>>,
    ) -> Result<Self, Error> {
        let max_size = max_size.within("maximum queue size", 1, virtqueue::spec::MAX_SIZE.into())?;
        let mut ring = Ring::new(&size, &features, &index, max_size)?;
        ring.areas = areas_of(areas)?;
        let most = ring.size.max(virtqueue::spec::MAX_CHAIN);
        let limit = chain_limit.map(|limit| limit.within("chain limit", 1, most.into())).transpose()?;
        let limit = check_chain_limit(ring.size, limit)?;
        let view = memory.get().regions.view();
        let spans = spans(&view, ring.format, ring.size, ring.areas)?;
        let (span, area) = inflight.map(|inflight| region(memory.py(), &ring, inflight)).transpose()?.unzip();
        let (any, tracking) = match ring.format {
            Format::Split => {
                let words = SplitRing::new(ring.size, &spans)?;
                let base = base.map(|base| base.within("avail base", 0, u16::MAX.into())).transpose()?;
                let state = base.map(|offset| Cursor { offset, wrap: false }).map(|avail| RingState { avail, used: avail });
                let opened = span.map(|span| SplitArea::open(&span, &words, base)).transpose()?.map(|opened| tracked(opened, state));
                let (tracking, state) = opened.map_or((None, state), |(tracking, state)| (Some(tracking), state));
                let base = state.map(|state| state.avail.offset);
                (AnyDevice::Split(SplitDevice::new(words, ring.features, ring.areas, limit, base)?), tracking)
            }
            Format::Packed => {
                let words = PackedRing::new(ring.size, &spans)?;
                let bits = base.map(|base| base.within::<u32>("base", 0, u32::MAX.into())).transpose()?;
                let cursor = |bits: u32| Cursor::from_bits(bits as u16);
                let state = bits.map(|bits| RingState { avail: cursor(bits), used: cursor(bits >> 16) });
                let opened = span.map(|span| PackedArea::open(&span, &words, state)).transpose()?.map(|opened| tracked(opened, state));
                let (tracking, state) = opened.map_or((None, state), |(tracking, state)| (Some(tracking), state));
                (AnyDevice::Packed(PackedDevice::new(words, ring.features, ring.areas, limit, state)?), tracking)
            }
        };
        let mut queue = virtqueue::DeviceQueue::new(any, view);
        if let Some((observer, left)) = tracking {
            queue.resume(observer, left);
        }
        let bursts = DeviceBursts::new(&queue);
        let open = Open { queue, interrupt: Doorbell::None, bursts, rewinds: 0, popped: None, _area: area };
        Ok(DeviceQueue { shared: Arc::new(Shared::new(ring, open)) })
    }

    fn __repr__(&self) -> String {
        self.shared.ring.shown("DeviceQueue")
    }

    /// How many entries there are.
    #[getter]
    fn size(&self) -> u16 {
        self.shared.ring.size
    }

    /// The queue's number.
    #[getter]
    fn index(&self) -> u16 {
        self.shared.ring.index
    }

    /// Which format it is.
    #[getter]
    fn ring_format(&self) -> &'static str {
        self.shared.ring.name()
    }

    /// Addresses of the descriptor, driver and device area.
    #[getter]
    fn areas(&self) -> (u64, u64, u64) {
        self.shared.ring.addresses()
    }

    /// How many chains are in flight.
    #[getter]
    fn outstanding(&self, py: Python<'_>) -> Result<u16, Error> {
        self.with(py, |open| Ok(open.queue.outstanding()))
    }

    /// The driver's first mistake, once a call raised it.
    #[getter]
    fn broken(&self, py: Python<'_>) -> Result<Option<Py<PyAny>>, Error> {
        self.shared.broken(py)
    }

    /// Where to resume: the next available index; packed: offset and wrap counter of it in bits 0 to 15, of the used side above.
    #[getter]
    fn base(&self, py: Python<'_>) -> Result<u32, Error> {
        let state = self.shared.lock(py)?;
        Ok(state.open.as_ref().map_or(state.last.base, |open| base_of(self.shared.ring.format, open.queue.state())))
    }

    /// What `publish` and burst calls signal when the driver wants to know; None for nothing.
    fn connect(&self, py: Python<'_>, interrupt: Option<&Bound<'_, EventFd>>) -> Result<(), Error> {
        let interrupt = match interrupt {
            Some(event) => Doorbell::EventFd(event.get().event(py)?),
            None => Doorbell::None,
        };
        let old = self.with(py, |open| Ok(std::mem::replace(&mut open.interrupt, interrupt)))?;
        drop(old);
        Ok(())
    }

    /// Takes available chains, at most `limit`; [] if there are none.
    #[pyo3(signature = (limit = None))]
    fn pop<'py>(&self, py: Python<'py>, limit: Option<Int>) -> Result<Bound<'py, PyList>, Error> {
        let limit = ring::limit(limit, self.size())?;
        let chains = self.with(py, |open| {
            let size = open.queue.size().into();
            let batch = open.popped.get_or_insert_with(|| open.queue.batch(size));
            batch.clear_for(limit);
            open.queue.pop_batch(batch)?;
            Ok(batch.chains().iter().map(|chain| Chain::new(&self.shared, chain, batch.segments(chain))).collect::<Vec<_>>())
        })?;
        Ok(PyList::new(py, chains)?)
    }

    /// Gives a chain back, `length` bytes of it written.
    #[pyo3(signature = (chain, length = Int::new(0)), text_signature = "($self, chain, length=0)")]
    fn complete(&self, py: Python<'_>, chain: &Bound<'_, Chain>, length: Int) -> Result<(), Error> {
        let chain = chain.get();
        if !Arc::ptr_eq(&self.shared, &chain.queue) {
            return Err(Error::Value(format!("chain {} is another queue's", chain.name.head)));
        }
        let len = length.within("used length", 0, chain.writable.into())?;
        self.with(py, |open| Ok(open.queue.complete_batch(&[Completion { len, ..chain.name }][..])?))
    }

    /// Hands the `count` newest chains back to the ring, as if they had not been popped.
    #[pyo3(signature = (count = Int::new(1)), text_signature = "($self, count=1)")]
    fn rewind(&self, py: Python<'_>, count: Int) -> Result<(), Error> {
        let count = count.within("count", 0, self.size().into())?;
        self.with(py, |open| match open.bursts.lent() {
            0 => {
                open.queue.rewind(count)?;
                open.rewinds += 1;
                Ok(())
            }
            chains => Err(Error::Value(format!("{chains} chains stand in bursts: give their slots back first"))),
        })
    }

    /// Completes, with length 0, every chain that stands in bursts, although its slots did not come back, and publishes.
    fn settle(&self, py: Python<'_>) -> Result<(), Error> {
        self.with(py, |open| {
            open.bursts.settle(&mut open.queue)?;
            open.publish(&self.shared.ring).map(drop)
        })
    }

    /// Makes all completed chains visible with one store, and notifies the driver if it wants it (2.7.7.2, 2.8.10); returns whether.
    fn publish(&self, py: Python<'_>) -> Result<bool, Error> {
        self.with(py, |open| open.publish(&self.shared.ring))
    }

    /// A new, empty batch for this queue with room for `capacity` chains (1 to 32768).
    #[pyo3(signature = (capacity = Int::new(64)), text_signature = "($self, capacity=64)")]
    fn batch(&self, py: Python<'_>, capacity: Int) -> Result<ChainBatch, Error> {
        let capacity = capacity.within("batch capacity", 1, 32768)?;
        let room = self.with(py, |open| Ok(open.queue.batch(capacity)))?;
        Ok(ChainBatch::new(self.shared.clone(), room))
    }

    /// Takes available chains, behind those that are in the batch; returns how many.
    fn pop_batch(&self, py: Python<'_>, batch: &Bound<'_, ChainBatch>) -> Result<usize, Error> {
        let batch = batch.get();
        batch.check(&self.shared)?;
        self.with(py, |open| batch.fill(py, open))
    }

    /// Gives back the batch's first `count` chains with the lengths in `used`, publishes, and notifies; returns how many.
    fn complete_batch(&self, py: Python<'_>, batch: &Bound<'_, ChainBatch>) -> Result<usize, Error> {
        let batch = batch.get();
        batch.check(&self.shared)?;
        self.with(py, |open| {
            let completed = batch.complete(py, open)?;
            open.publish(&self.shared.ring)?;
            Ok(completed)
        })
    }

    /// As `complete_burst`; then takes available chains and copies their readable bytes into slots; returns how many chains.
    fn pop_burst(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        burst.shared.check()?;
        self.with(py, |open| {
            open.bursts.bind(&open.queue, &burst.rows)?;
            let mut pool = lock_pool(py, burst.rows.pool());
            if open.bursts.complete(&mut open.queue, &mut pool, &burst.rows)? > 0 {
                open.publish(&self.shared.ring)?;
            }
            let popped = open.bursts.pop(&mut open.queue, &mut pool, &burst.rows)?;
            drop(pool);
            open.publish(&self.shared.ring)?; // dropped chains
            Ok(popped)
        })
    }

    /// Gives back what the burst holds; completes, with length 0, and publishes every chain whose slots came back; returns how many.
    fn complete_burst(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        burst.shared.check()?;
        self.with(py, |open| {
            open.bursts.bind(&open.queue, &burst.rows)?;
            let mut pool = lock_pool(py, burst.rows.pool());
            let completed = open.bursts.complete(&mut open.queue, &mut pool, &burst.rows)?;
            drop(pool);
            open.publish(&self.shared.ring)?;
            Ok(completed)
        })
    }

    /// Copies the burst's packets into writable chains, one each, completes, publishes, and notifies; returns how many were copied.
    fn fill_burst(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        burst.shared.check()?;
        self.with(py, |open| {
            let mut pool = lock_pool(py, burst.rows.pool());
            let filled = open.bursts.fill(&mut open.queue, &mut pool, &burst.rows)?;
            drop(pool);
            open.publish(&self.shared.ring)?;
            Ok(filled)
        })
    }

    /// Asks for a notification at the next available chain; True if there is something to look at already (2.7.10.2, 2.8.10).
    fn arm(&self, py: Python<'_>) -> Result<bool, Error> {
        self.with(py, |open| Ok(open.queue.arm()))
    }

    /// Asks for no notifications; the driver may send some nevertheless.
    fn disarm(&self, py: Python<'_>) -> Result<(), Error> {
        self.with(py, |open| {
            open.queue.disarm();
            Ok(())
        })
    }

    /// After a device or queue reset: forgets all chains in flight and closes the queue.
    fn reset(&self, py: Python<'_>) -> Result<(), Error> {
        self.shared.close(py)
    }

    /// For people: `ring_format`, `private` and `shared` numbers by name, the latter as they stand in shared memory.
    fn snapshot<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyDict>, Error> {
        let snapshot = self.with(py, |open| Ok(open.queue.snapshot()))?;
        Ok(self.shared.ring.snapshot(py, &snapshot)?)
    }

    /// Chains `popped`, `used` and `dropped`; publishes `notified` and `suppressed`.
    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyDict>, Error> {
        let state = self.shared.lock(py)?;
        let counters = state.open.as_ref().map_or(state.last.counters, |open| open.queue.counters());
        drop(state);
        let DeviceCounters { popped, used, notified, suppressed, dropped } = counters;
        let all = [("popped", popped), ("used", used), ("notified", notified), ("suppressed", suppressed), ("dropped", dropped)];
        Ok(ring::dict(py, all)?)
    }

    /// Chains popped and chains used since set-up.
    #[getter]
    fn progress(&self, py: Python<'_>) -> Result<(u64, u64), Error> {
        let state = self.shared.lock(py)?;
        let counters = state.open.as_ref().map_or(state.last.counters, |open| open.queue.counters());
        Ok((counters.popped, counters.used))
    }

    /// Ends the queue; again does nothing.
    fn close(&self, py: Python<'_>) -> Result<(), Error> {
        self.shared.close(py)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Chains, batches and pumps share the queue; this one owner visits for all of them, who never show what it keeps. Its traceback
        // knows the queue wherever somebody has caught it, and so often a chain too. Locked means in use, and so no garbage.
        match self.shared.mutex().try_lock() {
            Ok(state) => visit.call(&state.broken),
            Err(_) => Ok(()),
        }
    }

    fn __clear__(&self) {
        self.shared.forget();
    }
}

impl Drop for DeviceQueue {
    /// Chains may be left, and be known to the traceback of what `broken` keeps.
    fn drop(&mut self) {
        self.shared.unasked();
    }
}
