//! `BufferPool`: equal buffers in one memory.

use crate::args::Int;
use crate::buffer::{View, array};
use crate::burst::Burst;
use crate::errors::Error;
use crate::lock::{lock, lock_pool};
use crate::memory::{Allocation, Memory};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use virtio_memory::HEADROOM;

/// What bursts, queues and views keep: the pool, and its place in memory until the last of them is gone.
pub struct Shared {
    pub pool: Arc<virtio_memory::BufferPool>,
    closed: AtomicBool,
    place: Mutex<Option<Allocation>>,
}

impl Shared {
    /// Refuses a pool that is closed, or another process's.
    #[inline]
    pub fn check(&self) -> Result<(), Error> {
        self.pool.check_process()?;
        if self.closed.load(Relaxed) {
            return Err(Error::closed("pool"));
        }
        Ok(())
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
        let shared = Arc::new(Shared { pool, closed: AtomicBool::new(false), place: Mutex::new(Some(place)) });
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
        self.shared.check()?;
        if let Some(frames) = &*lock(py, &self.frames) {
            return Ok(frames.clone_ref(py));
        }
        let pool = &self.shared.pool;
        let (slots, size) = (pool.slots() as usize, pool.slot_size());
        let view = View::mapped(pool.mapping(), pool.offset(), slots * size, self.shared.clone())?;
        let all = array(py, view, "uint8")?.call_method1("reshape", ((slots, size),))?;
        let columns = pyo3::types::PySlice::new(py, HEADROOM as isize, size as isize, 1);
        let frames = all.get_item((pyo3::types::PySlice::full(py), columns))?.unbind();
        let made = frames.clone_ref(py);
        let old = lock(py, &self.frames).replace(frames);
        drop(old);
        Ok(made)
    }

    /// A new, empty burst of this pool with room for `capacity` rows (1 to 32768).
    #[pyo3(signature = (capacity = Int::new(64)), text_signature = "($self, capacity=64)")]
    fn burst(slf: &Bound<'_, Self>, capacity: Int) -> Result<Burst, Error> {
        let this = slf.get();
        this.shared.check()?;
        Burst::new(slf.clone().unbind(), this.shared.clone(), capacity.within("burst capacity", 1, 32768)?)
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
        self.shared.closed.store(true, Relaxed);
        let frames = lock(py, &self.frames).take();
        drop(frames);
        // Bursts and views have `shared`, bursts and queues `pool`: with neither, only this object is left, which needs no place any more.
        if Arc::strong_count(&self.shared) == 1 && Arc::strong_count(&self.shared.pool) == 1 {
            let place = lock(py, &self.shared.place).take();
            drop(place);
        }
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.memory)
    }
}
