//! `DriverQueue`: the driver's side of one virtqueue.

use crate::args::{Int, Mask};
use crate::burst::Burst;
use crate::device_queue::base_of;
use crate::errors::{Error, named};
use crate::eventfd::EventFd;
use crate::lock::lock_pool;
use crate::memory::{Allocation, Memory};
use crate::queue::{Core, Side, State};
use crate::ring::{self, Ring};
use crate::tokens::Tokens;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::ops::Deref;
use std::sync::Arc;
use virtio_memory::{Doorbell, Region, RegionTable};
use virtio_net_path::DriverBursts;
use virtqueue::packed::{PackedDriver, PackedRing};
use virtqueue::split::{SplitDriver, SplitRing};
use virtqueue::{
    AnyDriver, Areas, Direction, DriverCounters, Form, Format, IndirectTables, RingError, Segment, Takeover, Used, layout, spans,
};

/// Entries of an indirect table, if nothing else is asked for.
const DEFAULT_INDIRECT: u16 = 16;
/// Areas start on cache lines of their own: the two sides write different ones.
const LINE: usize = 64;

/// What is there until reset or close.
pub struct Open {
    pub queue: virtqueue::DriverQueue<AnyDriver>,
    doorbell: Doorbell,
    tokens: Tokens,
    pub bursts: DriverBursts,
    /// The memory, at the addresses that the device sees.
    pub table: Arc<RegionTable>,
    used: Box<[Used]>,
    _places: Vec<Allocation>,
}

impl Open {
    /// Chains in bursts that did not come back.
    fn in_bursts(&self) -> usize {
        usize::from(self.queue.outstanding()).saturating_sub(self.tokens.len()) + self.bursts.ready()
    }

    /// Tokens and bursts do not mix.
    fn for_tokens(&mut self) -> Result<&mut Self, Error> {
        match self.in_bursts() {
            0 => Ok(self),
            chains => Err(Error::Value(format!("{chains} chains of bursts are outstanding: take them back by pop_used_burst first"))),
        }
    }

    #[inline]
    pub fn for_bursts(&mut self) -> Result<&mut Self, Error> {
        match self.tokens.len() {
            0 => Ok(self),
            chains => Err(Error::Value(format!("{chains} chains with tokens are outstanding: take them back by pop_used first"))),
        }
    }

    #[inline]
    pub fn publish(&mut self, ring: &Ring) -> Result<bool, Error> {
        let wanted = self.queue.publish();
        if wanted {
            self.doorbell.ring(self.notification(ring))?;
        }
        Ok(wanted)
    }

    /// Before sleeping on a full transmit queue: QEMU has been seen to forget to ask for the chains that it left there (packed, EVENT_IDX),
    /// and a notification too many does no harm (driver-10).
    pub fn ring_again(&self, ring: &Ring) -> Result<(), Error> {
        Ok(self.doorbell.ring(self.notification(ring))?)
    }

    fn notification(&self, ring: &Ring) -> u32 {
        if ring.notification_data { self.queue.notification_data(ring.index) } else { ring.index.into() }
    }
}

impl Side for Open {
    type Last = DriverCounters;

    #[inline]
    fn broken(&self) -> Option<&RingError> {
        self.queue.broken()
    }

    fn for_pump(&mut self) -> Result<&mut Self, Error> {
        self.queue.check_memory()?;
        self.for_bursts()
    }
}

impl State<Open> {
    /// Closes; what has to be dropped, and the tokens that were outstanding. The lock is to be released first.
    fn close(&mut self) -> Option<(Open, Vec<u64>)> {
        let mut open = self.open.take()?;
        self.last = open.queue.counters();
        let outstanding = open.queue.reset();
        self.tell();
        Some((open, outstanding))
    }
}

/// The driver's side of one virtqueue (2.7, 2.8): adds buffers, publishes them, takes back used ones.
#[pyclass(frozen, module = "virtio._core")]
pub struct DriverQueue {
    core: Core<Open>,
}

impl Deref for DriverQueue {
    type Target = Core<Open>;

    #[inline]
    fn deref(&self) -> &Core<Open> {
        &self.core
    }
}

impl DriverQueue {
    /// As [`Core::with`], for calls that look at the rings: a memory that was lost, before the call or in it, breaks the queue, and
    /// what the call found there is not told.
    #[inline]
    pub fn with_memory<T>(&self, py: Python<'_>, call: impl FnOnce(&mut Open) -> Result<T, Error>) -> Result<T, Error> {
        self.with(py, |open| {
            let sound = open.queue.broken().is_none();
            open.queue.check_memory()?;
            let result = call(open);
            match open.queue.broken() {
                Some(error) if sound => Err(error.clone().into()),
                _ => result,
            }
        })
    }

    /// As [`DriverQueue::with_memory`], for bursts.
    pub fn open<T>(&self, py: Python<'_>, call: impl FnOnce(&mut Open) -> Result<T, Error>) -> Result<T, Error> {
        self.with_memory(py, |open| call(open.for_bursts()?))
    }

    #[inline]
    fn add_rows(&self, py: Python<'_>, burst: &Burst, length: Option<Int>, direction: Direction) -> Result<usize, Error> {
        burst.shared.check()?;
        let all = match length {
            Some(length) => Some(length.within::<u32>("length", 1, burst.rows.pool().slot_size() as i128)?),
            None => None,
        };
        self.with_memory(py, |open| {
            let open = open.for_bursts()?;
            open.bursts.bind(&burst.rows, open.queue.outstanding().into())?;
            let mut pool = lock_pool(py, burst.rows.pool());
            let added = open.bursts.add_as(&mut open.queue, &mut pool, &burst.rows, direction, all)?;
            drop(pool);
            open.publish(&self.ring)?;
            Ok(added)
        })
    }

    fn finish(&self, py: Python<'_>) -> Result<Vec<Py<PyAny>>, Error> {
        let closed = self.lock(py)?.close();
        let Some((mut open, outstanding)) = closed else { return Ok(Vec::new()) };
        let mut tokens: Vec<_> = outstanding.into_iter().filter_map(|token| open.tokens.take(token)).collect();
        // Chains that seemed used in a memory that was lost.
        tokens.extend(open.tokens.clear());
        Ok(tokens)
    }
}

/// Segments as Python gave them: (address, length).
fn segments(to: &mut Vec<Segment>, from: &Bound<'_, PyAny>, direction: Direction) -> Result<(), Error> {
    let what = if direction == Direction::Readable { "readable" } else { "writable" };
    let segment = |item: &Bound<'_, PyAny>| -> Result<Segment, Error> {
        let (address, len): (Int, Int) = item.extract()?;
        Ok(Segment { address: address.address()?, len: len.within("length", 1, u32::MAX.into())?, direction })
    };
    for (place, item) in from.try_iter().map_err(|error| named(what, error))?.enumerate() {
        to.push(segment(&item?).map_err(|error| error.of(&format!("{what} segment {place}")))?);
    }
    Ok(())
}

#[pymethods]
impl DriverQueue {
    #[new]
    #[pyo3(signature = (memory, size, *, features = Mask::NONE, address = Int::new(0), index = Int::new(0), indirect_limit = Int::new(0),
                        resumable = false),
           text_signature = "(memory, size, *, features=0, address=0, index=0, indirect_limit=0, resumable=False)")]
    #[allow(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        py: Python<'_>,
        memory: &Bound<'_, Memory>,
        size: Int,
        features: Mask,
        address: Int,
        index: Int,
        indirect_limit: Int,
        resumable: bool,
    ) -> Result<Self, Error> {
        let mut ring = Ring::new(&size, &features, &index, virtqueue::spec::MAX_SIZE.into())?;
        let base = address.address()?;
        let entries = match indirect_limit.within("indirect limit", 0, ring.size.into())? {
            0 if ring.features.indirect => DEFAULT_INDIRECT.min(ring.size),
            0 => 0,
            _ if !ring.features.indirect => return Err(RingError::IndirectRefused.into()),
            limit => limit,
        };
        let memory = memory.get();
        let mapping = memory.mapping(py)?;
        let table = Arc::new(RegionTable::new(vec![Region::new(base, mapping.len() as u64, mapping.clone(), 0)?], None)?);
        let mut places = Vec::new();
        let mut place = |bytes: usize| -> Result<usize, Error> {
            let taken = memory.take(py, "queue", bytes.next_multiple_of(LINE), LINE);
            let (mapping, place) = taken.map_err(|error| error.of(&format!("a queue of {} entries", ring.size)))?;
            let offset = place.offset;
            places.push(place);
            mapping.zero(offset, bytes)?;
            Ok(offset)
        };
        let mut offsets = [0; 3];
        for (offset, (bytes, _)) in offsets.iter_mut().zip(layout(ring.format, ring.size)) {
            *offset = place(bytes as usize)?;
        }
        let at = |offset: usize| base + offset as u64;
        ring.areas = Areas { descriptor: at(offsets[0]), driver: at(offsets[1]), device: at(offsets[2]) };
        let areas = spans(&table, ring.format, ring.size, ring.areas)?;
        let tables = match entries {
            0 => None,
            entries => {
                let words = IndirectTables::words(ring.size, entries);
                let offset = place(8 * words)?;
                Some(IndirectTables::new(mapping.span(offset, 8 * words)?.u64s(0, words)?, at(offset), entries))
            }
        };
        let any = match ring.format {
            Format::Split => AnyDriver::Split(SplitDriver::new(SplitRing::new(ring.size, &areas)?, ring.features, tables)),
            Format::Packed => {
                let made = PackedDriver::new(PackedRing::new(ring.size, &areas)?, ring.features, tables);
                AnyDriver::Packed(if resumable { made.resumable() } else { made })
            }
        };
        let open = Open {
            queue: virtqueue::DriverQueue::guarded(any, table.clone()),
            doorbell: Doorbell::None,
            tokens: Tokens::new(ring.size),
            bursts: DriverBursts::new(mapping, base, entries.into()),
            table,
            used: vec![Used::default(); ring.size.into()].into(),
            _places: places,
        };
        Ok(DriverQueue { core: Core::new(ring, open) })
    }

    fn __repr__(&self) -> String {
        self.ring.shown("DriverQueue")
    }

    /// How many entries there are.
    #[getter]
    fn size(&self) -> u16 {
        self.ring.size
    }

    /// The queue's number.
    #[getter]
    fn index(&self) -> u16 {
        self.ring.index
    }

    /// Which format it is.
    #[getter]
    fn ring_format(&self) -> &'static str {
        self.ring.name()
    }

    /// Addresses of the descriptor, driver and device area (2.6).
    #[getter]
    fn areas(&self) -> (u64, u64, u64) {
        self.ring.addresses()
    }

    /// How many ring descriptors are free.
    #[getter]
    fn free(&self, py: Python<'_>) -> Result<u16, Error> {
        self.with(py, |open| Ok(open.queue.free()))
    }

    /// How many chains were added and not popped.
    #[getter]
    fn outstanding(&self, py: Python<'_>) -> Result<usize, Error> {
        self.with(py, |open| Ok(open.tokens.len() + open.in_bursts()))
    }

    /// The device's first mistake, or that the memory was lost (its file was truncated), once a call raised it.
    #[getter]
    fn broken(&self, py: Python<'_>) -> Result<Option<Py<PyAny>>, Error> {
        self.core.broken(py)
    }

    /// What an available-buffer notification carries now: the index, with NOTIFICATION_DATA also the next position (2.9).
    #[getter]
    fn notification_value(&self, py: Python<'_>) -> Result<u32, Error> {
        self.with(py, |open| Ok(open.notification(&self.ring)))
    }

    /// Where another device takes the ring over, once the one before is gone for good: vhost-user's vring base (both positions).
    #[pyo3(signature = (*, tracked), text_signature = "($self, *, tracked)")]
    fn resume(&self, py: Python<'_>, tracked: bool) -> Result<u32, Error> {
        let how = if tracked { Takeover::Tracked } else { Takeover::Again };
        self.with_memory(py, |open| Ok(base_of(self.ring.format, open.queue.resume(how)?)))
    }

    /// What `publish` and burst calls signal when the device wants to know; None for nothing.
    fn connect(&self, py: Python<'_>, doorbell: Option<&Bound<'_, EventFd>>) -> Result<(), Error> {
        let doorbell = match doorbell {
            Some(event) => Doorbell::EventFd(event.get().event(py)?),
            None => Doorbell::None,
        };
        let old = self.with(py, |open| Ok(std::mem::replace(&mut open.doorbell, doorbell)))?;
        drop(old);
        Ok(())
    }

    /// Adds one chain: (address, length) of each segment (2.7.13, 2.8.21).
    #[pyo3(signature = (token, *, readable = None, writable = None, indirect = false),
           text_signature = "($self, token, *, readable=(), writable=(), indirect=False)")]
    fn add(
        &self,
        py: Python<'_>,
        token: Py<PyAny>,
        readable: Option<&Bound<'_, PyAny>>,
        writable: Option<&Bound<'_, PyAny>>,
        indirect: bool,
    ) -> Result<(), Error> {
        let mut buffer = Vec::new();
        for (given, direction) in [(readable, Direction::Readable), (writable, Direction::Writable)] {
            if let Some(given) = given {
                segments(&mut buffer, given, direction)?;
            }
        }
        let mut token = Some(token);
        let form = if indirect { Form::Indirect } else { Form::Direct };
        let result = self.with_memory(py, |open| {
            let open = open.for_tokens()?;
            for segment in &buffer {
                open.table.check(segment.address, segment.len.into())?;
            }
            let name = open.tokens.next();
            open.queue.add(name, &buffer, form)?;
            open.tokens.put(token.take());
            Ok(())
        });
        drop(token); // not under the lock
        result
    }

    /// Makes all added chains visible with one store, and notifies the device if it wants it (2.7.13.3, 2.7.10); returns whether.
    fn publish(&self, py: Python<'_>) -> Result<bool, Error> {
        self.with_memory(py, |open| open.publish(&self.ring))
    }

    /// Takes used chains, at most `limit`: (token, bytes that the device wrote, at most those posted) (2.7.14, 2.8.22).
    #[pyo3(signature = (limit = None))]
    fn pop_used<'py>(&self, py: Python<'py>, limit: Option<Int>) -> Result<Bound<'py, PyList>, Error> {
        let limit = ring::limit(limit, self.ring.size)?;
        let chains = self.with_memory(py, |open| {
            let open = open.for_tokens()?;
            let n = open.queue.pop_used_batch(&mut open.used[..limit])?;
            Ok(open.used[..n].iter().map(|used| (open.tokens.take(used.token), used.len)).collect::<Vec<_>>())
        })?;
        Ok(PyList::new(py, chains)?)
    }

    /// Adds the burst's packets as readable chains, publishes, and notifies; returns how many chains.
    #[pyo3(signature = (burst, length = None))]
    fn add_burst(&self, py: Python<'_>, burst: &Bound<'_, Burst>, length: Option<Int>) -> Result<usize, Error> {
        self.add_rows(py, burst.get(), length, Direction::Readable)
    }

    /// As `add_burst`, with chains for the device to write: `lengths` are the bytes posted.
    #[pyo3(signature = (burst, length = None))]
    fn add_writable_burst(&self, py: Python<'_>, burst: &Bound<'_, Burst>, length: Option<Int>) -> Result<usize, Error> {
        self.add_rows(py, burst.get(), length, Direction::Writable)
    }

    /// Gives back what the burst holds, and fills it with slots of used chains; returns how many chains.
    fn pop_used_burst(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        burst.shared.check()?;
        self.with_memory(py, |open| {
            let open = open.for_bursts()?;
            open.bursts.bind(&burst.rows, open.queue.outstanding().into())?;
            let mut pool = lock_pool(py, burst.rows.pool());
            Ok(open.bursts.pop_used(&mut open.queue, &mut pool, &burst.rows)?)
        })
    }

    /// Asks for a notification at the next used chain; True if there is something to look at already (2.7.7.1, 2.8.10).
    fn arm(&self, py: Python<'_>) -> Result<bool, Error> {
        self.with_memory(py, |open| Ok(open.queue.arm() || open.bursts.ready() > 0))
    }

    /// Asks for no notifications; the device may send some nevertheless.
    fn disarm(&self, py: Python<'_>) -> Result<(), Error> {
        self.with(py, |open| {
            open.queue.disarm();
            Ok(())
        })
    }

    /// After a device or queue reset: closes the queue and returns the outstanding tokens.
    fn reset<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyList>, Error> {
        Ok(PyList::new(py, self.finish(py)?)?)
    }

    /// For people: `ring_format`, `private` and `shared` numbers by name, the latter as they stand in shared memory.
    fn snapshot<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyDict>, Error> {
        let snapshot = self.with(py, |open| Ok(open.queue.snapshot()))?;
        Ok(self.ring.snapshot(py, &snapshot)?)
    }

    /// Chains `added` and `used`; publishes `notified` and `suppressed`; used lengths `clamped`.
    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> Result<Bound<'py, PyDict>, Error> {
        let state = self.lock(py)?;
        let counters = state.open.as_ref().map_or(state.last, |open| open.queue.counters());
        drop(state);
        let DriverCounters { added, used, notified, suppressed, clamped } = counters;
        let all = [("added", added), ("used", used), ("notified", notified), ("suppressed", suppressed), ("clamped", clamped)];
        Ok(ring::dict(py, all)?)
    }

    /// Ends the queue, frees its areas, and forgets tokens; again does nothing.
    fn close(&self, py: Python<'_>) -> Result<(), Error> {
        self.finish(py)?;
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Locked means in use, and so no garbage.
        if let Ok(state) = self.mutex().try_lock() {
            visit.call(&state.broken)?;
            if let Some(open) = &state.open {
                open.tokens.all().try_for_each(|token| visit.call(token))?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let Ok(mut state) = self.mutex().try_lock() else { return };
        let garbage = (state.broken.take(), state.open.as_mut().map(|open| open.tokens.clear()));
        drop(state);
        drop(garbage);
    }
}
