//! `ChainBatch`: chains of one queue without an object each.

use crate::args::Int;
use crate::buffer::{View, array};
use crate::device_queue::{Open, Shared};
use crate::errors::Error;
use crate::lock::lock;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use virtqueue::{AnyDevice, Completion, DeviceQueue};

/// Open to Python: read once, and checked.
struct Columns {
    readable: Box<[AtomicI64]>,
    writable: Box<[AtomicI64]>,
    used: Box<[AtomicI64]>,
}

/// What the columns are checked against.
struct Held {
    /// Chains that an earlier call left, in front: their names, with their writable bytes. Most often none.
    kept: Vec<(Completion, u32)>,
    /// Chains popped since, behind them.
    popped: virtqueue::ChainBatch,
    completions: Vec<Completion>,
    /// The queue's rewinds when it was last made sure that all chains are in flight.
    rewinds: u64,
    /// How many chains the next `complete_batch` means.
    count: usize,
}

impl Held {
    fn len(&self) -> usize {
        self.kept.len() + self.popped.chains().len()
    }

    /// Leaves the chains behind the first `done`, as kept ones.
    #[inline]
    fn keep_from(&mut self, done: usize) {
        let old = self.kept.len();
        self.kept.drain(..done.min(old));
        let rest = self.popped.chains().iter().skip(done.saturating_sub(old));
        self.kept.extend(rest.map(|chain| (Completion { head: chain.head, serial: chain.serial, len: 0 }, chain.writable)));
        self.popped.clear();
        self.count = self.kept.len();
    }
}

/// Chains of one queue without an object each: columns `readable`, `writable`, `used` (int64 numpy views, bytes).
#[pyclass(frozen, module = "virtio._core")]
pub struct ChainBatch {
    queue: Arc<Shared>,
    capacity: usize,
    columns: Arc<Columns>,
    held: Mutex<Held>,
    arrays: [PyOnceLock<Py<PyAny>>; 3],
}

impl ChainBatch {
    pub fn new(queue: Arc<Shared>, room: virtqueue::ChainBatch) -> Self {
        let capacity = room.capacity();
        let column = || (0..capacity).map(|_| AtomicI64::new(0)).collect();
        let columns = Arc::new(Columns { readable: column(), writable: column(), used: column() });
        let held =
            Held { kept: Vec::with_capacity(capacity), popped: room, completions: Vec::with_capacity(capacity), rewinds: 0, count: 0 };
        ChainBatch { queue, capacity, columns, held: Mutex::new(held), arrays: [const { PyOnceLock::new() }; 3] }
    }

    /// Refuses another queue's batch.
    #[inline]
    pub fn check(&self, queue: &Arc<Shared>) -> Result<(), Error> {
        if !Arc::ptr_eq(&self.queue, queue) {
            return Err(Error::Value("the batch is another queue's".into()));
        }
        Ok(())
    }

    /// Pops chains behind those that are in.
    #[inline]
    pub fn fill(&self, py: Python<'_>, open: &mut Open) -> Result<usize, Error> {
        let held = &mut *lock(py, &self.held);
        self.forget_rewound(held, open);
        let queue = &mut open.queue;
        if !held.popped.chains().is_empty() {
            held.keep_from(0);
        }
        let first = held.kept.len();
        held.popped.clear_for(self.capacity - first);
        let popped = queue.pop_batch(&mut held.popped)?;
        let Columns { readable, writable, used } = &*self.columns;
        let cells = readable[first..].iter().zip(&writable[first..]).zip(&used[first..]);
        for (chain, ((readable, writable), used)) in held.popped.chains().iter().zip(cells) {
            readable.store(chain.readable.into(), Relaxed);
            writable.store(chain.writable.into(), Relaxed);
            used.store(0, Relaxed);
        }
        held.count = first + popped;
        Ok(popped)
    }

    /// Completes the first `count` chains with the lengths in `used`; later ones move to the front.
    #[inline]
    pub fn complete(&self, py: Python<'_>, open: &mut Open) -> Result<usize, Error> {
        if open.queue.broken().is_some() {
            return Ok(0);
        }
        let held = &mut *lock(py, &self.held);
        self.forget_rewound(held, open);
        let queue = &mut open.queue;
        let count = held.count;
        let mut completions = std::mem::take(&mut held.completions);
        completions.clear();
        let result = self.completions(held, &mut completions).and_then(|()| Ok(queue.complete_batch(&completions[..])?));
        held.completions = completions;
        result?;
        held.keep_from(count);
        for row in 0..held.count {
            for column in [&self.columns.readable, &self.columns.writable, &self.columns.used] {
                column[row].store(column[row + count].load(Relaxed), Relaxed);
            }
        }
        Ok(count)
    }

    /// Takes out what is not in flight any more, since chains were handed back to the ring; rows behind move up.
    #[inline]
    fn forget_rewound(&self, held: &mut Held, open: &Open) {
        if held.rewinds != open.rewinds {
            held.rewinds = open.rewinds;
            self.forget(held, &open.queue);
        }
    }

    #[cold]
    fn forget(&self, held: &mut Held, queue: &DeviceQueue<AnyDevice>) {
        let count = held.count;
        held.keep_from(0);
        let (mut row, mut to, mut meant) = (0, 0, 0);
        held.kept.retain(|(name, _)| {
            let stays = queue.check(name).is_ok();
            if stays {
                for column in [&self.columns.readable, &self.columns.writable, &self.columns.used] {
                    column[to].store(column[row].load(Relaxed), Relaxed);
                }
                to += 1;
                meant += usize::from(row < count);
            }
            row += 1;
            stays
        });
        held.count = meant;
    }

    /// The first `count` chains with the lengths in `used`, each read once.
    #[inline]
    fn completions(&self, held: &Held, to: &mut Vec<Completion>) -> Result<(), Error> {
        let used = &self.columns.used[..held.count];
        let (kept, popped) = used.split_at(held.kept.len().min(used.len()));
        for (row, ((name, writable), used)) in held.kept.iter().zip(kept).enumerate() {
            to.push(Completion { len: used_length(row, used, *writable)?, ..*name });
        }
        for (row, (chain, used)) in held.popped.chains().iter().zip(popped).enumerate() {
            let len = used_length(kept.len() + row, used, chain.writable)?;
            to.push(Completion { head: chain.head, serial: chain.serial, len });
        }
        Ok(())
    }

    fn column(&self, py: Python<'_>, index: usize, column: impl FnOnce(&Columns) -> &[AtomicI64]) -> PyResult<Py<PyAny>> {
        let made = self.arrays[index].get_or_try_init(py, || {
            let view = View::column(self.columns.clone(), column);
            array(py, view, "int64").map(Bound::unbind)
        });
        Ok(made?.clone_ref(py))
    }
}

/// A used length as it stands in its column, if the chain has as many writable bytes.
#[inline(always)]
fn used_length(row: usize, used: &AtomicI64, writable: u32) -> Result<u32, Error> {
    let used = used.load(Relaxed);
    if used as u64 > u64::from(writable) {
        return Err(Error::Value(format!("batch row {row}: used length {used} is not in 0 to {writable}")));
    }
    Ok(used as u32)
}

#[pymethods]
impl ChainBatch {
    /// How many chains there is room for.
    #[getter]
    fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many chains are in; if set lower, how many the next `complete_batch` means.
    #[getter]
    fn count(&self, py: Python<'_>) -> usize {
        lock(py, &self.held).count
    }

    #[setter]
    fn set_count(&self, py: Python<'_>, count: Int) -> Result<(), Error> {
        let mut held = lock(py, &self.held);
        held.count = count.within("batch count", 0, held.len() as i128)?;
        Ok(())
    }

    /// Readable bytes of each chain; shape (capacity,), as of all columns.
    #[getter]
    fn readable(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, 0, |columns| &columns.readable)
    }

    /// Writable bytes of each chain.
    #[getter]
    fn writable(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, 1, |columns| &columns.writable)
    }

    /// Bytes written to each chain: 0 after `pop_batch`, for the caller to set, read by `complete_batch`.
    #[getter]
    fn used(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, 2, |columns| &columns.used)
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        lock(py, &self.held).count
    }
}
