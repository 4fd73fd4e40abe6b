//! `BufferPool`: equal buffers in one memory.

use crate::args::Int;
use crate::buffer::{View, array};
use crate::burst::Burst;
use crate::errors::Error;
use crate::lock::{lock, lock_pool};
use crate::memory::{Allocation, Memory};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::sync::{Arc, Mutex};
use virtio_memory::{HEADROOM, Tenancy};

/// What bursts, queues and views keep: the pool, and its place in memory until the last of them is gone.
pub struct Shared {
    pub pool: Arc<virtio_memory::BufferPool>,
    place: Tenancy<Allocation>,
}

impl Shared {
    /// Refuses a pool that is closed, or another process's.
    #[inline]
    pub fn check(&self) -> Result<(), Error> {
        self.pool.check_process()?;
        if self.place.closed() {
            return Err(Error::closed("pool"));
        }
        Ok(())
    }

    /// For whoever begins to use the pool: its place is theirs until they have dropped this, and the `pool` that they took from it. The lock
    /// is held for a few instructions.
    pub fn join(self: &Arc<Self>) -> Result<Arc<Self>, Error> {
        self.pool.check_process()?;
        self.place.join(self).ok_or_else(|| Error::closed("pool"))
    }
}

/// `slots` equal buffers in one `Memory`, each with `HEADROOM` bytes before the frame.
#[pyclass(frozen, subclass, module = "virtio._core")]
pub struct BufferPool {
    pub shared: Arc<Shared>,
    memory: Py<Memory>,
    /// Made when it is first asked for.
    frames: Mutex<Option<Py<PyAny>>>,
}

impl BufferPool {
    /// Refuses a burst of another pool.
    fn check(&self, burst: &Burst) -> Result<(), Error> {
        self.shared.check()?;
        if !Arc::ptr_eq(&self.shared, &burst.shared) {
            return Err(Error::Value("the burst is of another pool".into()));
        }
        Ok(())
    }
}

#[pymethods]
impl BufferPool {
    /// Bytes before the frame in each slot: 64.
    #[classattr]
    const HEADROOM: usize = HEADROOM;

    #[new]
    #[pyo3(signature = (memory, slots, *, slot_size = Int::new(2048)), text_signature = "(memory, slots, *, slot_size=2048)")]
    fn new(py: Python<'_>, memory: Bound<'_, Memory>, slots: Int, slot_size: Int) -> Result<Self, Error> {
        let slots: u32 = slots.within("number of slots", 1, 1 << 20)?;
        let slot_size: usize = slot_size.within("slot size", 128, 1 << 17)?;
        if !slot_size.is_multiple_of(64) {
            return Err(Error::Value(format!("slot size {slot_size} is not a multiple of 64 in 128 to 131072")));
        }
        let taken = memory.get().take(py, "buffer pool", slots as usize * slot_size, 64);
        let (mapping, place) = taken.map_err(|error| error.of(&format!("{slots} slots of {slot_size} bytes")))?;
        let pool = Arc::new(virtio_memory::BufferPool::new(mapping, place.offset, slots, slot_size)?);
        let shared = Arc::new(Shared { pool, place: Tenancy::new(place) });
        Ok(BufferPool { shared, memory: memory.unbind(), frames: Mutex::new(None) })
    }

    /// Where the slots are.
    #[getter]
    fn memory(&self, py: Python<'_>) -> Py<Memory> {
        self.memory.clone_ref(py)
    }

    /// How many slots there are.
    #[getter]
    fn slots(&self) -> u32 {
        self.shared.pool.slots()
    }

    /// Bytes of a slot, headroom included.
    #[getter]
    fn slot_size(&self) -> usize {
        self.shared.pool.slot_size()
    }

    /// Where slot 0 starts in `memory`; slot n starts at `offset + n * slot_size`.
    #[getter]
    fn offset(&self) -> usize {
        self.shared.pool.offset()
    }

    /// How many slots are free.
    #[getter]
    fn available(&self, py: Python<'_>) -> Result<usize, Error> {
        self.shared.check()?;
        Ok(lock_pool(py, &self.shared.pool).available())
    }

    /// Packets that were given back while they waited to be sent or met too short a chain, and chains that no burst could hold.
    #[getter]
    fn drops(&self, py: Python<'_>) -> Result<u64, Error> {
        self.shared.check()?;
        Ok(lock_pool(py, &self.shared.pool).drops())
    }

    /// The slots without their headroom: shape (slots, slot_size - HEADROOM), column 0 the first byte of a frame.
    #[getter]
    fn frames(&self, py: Python<'_>) -> Result<Py<PyAny>, Error> {
        let shared = self.shared.join()?;
        if let Some(frames) = &*lock(py, &self.frames) {
            return Ok(frames.clone_ref(py));
        }
        let pool = &shared.pool;
        let (slots, size) = (pool.slots() as usize, pool.slot_size());
        let view = View::mapped(pool.mapping(), pool.offset(), slots * size, shared.clone())?;
        let all = array(py, view, "uint8")?.call_method1("reshape", ((slots, size),))?;
        let columns = pyo3::types::PySlice::new(py, HEADROOM as isize, size as isize, 1);
        let frames = all.get_item((pyo3::types::PySlice::full(py), columns))?.unbind();
        let made = frames.clone_ref(py);
        let mut kept = lock(py, &self.frames);
        // One that was closed meanwhile keeps nothing.
        let old = if shared.place.closed() { Some(frames) } else { kept.replace(frames) };
        drop(kept);
        drop(old);
        Ok(made)
    }

    /// A new, empty burst of this pool with room for `capacity` rows (1 to 32768).
    #[pyo3(signature = (capacity = Int::new(64)), text_signature = "($self, capacity=64)")]
    fn burst(slf: &Bound<'_, Self>, capacity: Int) -> Result<Burst, Error> {
        let shared = slf.get().shared.join()?;
        Burst::new(slf.clone().unbind(), shared, capacity.within("burst capacity", 1, 32768)?)
    }

    /// Takes back what the burst holds, and fills it with free slots; returns how many, 0 to its capacity.
    fn take(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<usize, Error> {
        let burst = burst.get();
        self.check(burst)?;
        Ok(burst.rows.fill(&mut lock_pool(py, &self.shared.pool)))
    }

    /// Takes back what the burst holds; it has no rows then.
    fn give(&self, py: Python<'_>, burst: &Bound<'_, Burst>) -> Result<(), Error> {
        let burst = burst.get();
        self.check(burst)?;
        burst.rows.give_back(&mut lock_pool(py, &self.shared.pool));
        Ok(())
    }

    /// Ends the use of the pool and its bursts.
    fn close(&self, py: Python<'_>) -> Result<(), Error> {
        self.shared.pool.check_process()?;
        // Bursts and views have `shared`, bursts and queues `pool`: with neither, only this object is left, which needs no place any more.
        let close = || self.shared.place.close(|| Arc::strong_count(&self.shared) == 1 && Arc::strong_count(&self.shared.pool) == 1);
        let place = close();
        let frames = lock(py, &self.frames).take();
        drop(frames);
        drop(place.or_else(close)); // that view was the last user, perhaps
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.memory)
    }
}
