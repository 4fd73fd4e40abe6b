//! `Burst`: rows of slots, and what can be done to all of them at once.

use crate::args::Int;
use crate::buffer::{Data, View, array};
use crate::errors::Error;
use crate::lock::{lock, lock_pool};
use crate::pool::{BufferPool, Shared};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyBytes;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use virtio_memory::{Column, PoolState, RawRow};

/// Rows of (slot, offset, length, more): the currency of every hot call.
#[pyclass(frozen, module = "virtio._core")]
pub struct Burst {
    pub rows: Arc<virtio_memory::Burst>,
    pub shared: Arc<Shared>,
    pool: Py<BufferPool>,
    columns: [PyOnceLock<Py<PyAny>>; 4],
    /// Room for the rows as a call read them; used under the pool's lock.
    once: Mutex<Vec<RawRow>>,
}

impl Drop for Burst {
    fn drop(&mut self) {
        // Arrays over the columns may live on; the slots come back now.
        if self.shared.pool.check_process().is_ok() {
            self.rows.give_back(&mut self.shared.pool.lock());
        }
    }
}

impl Burst {
    pub fn new(pool: Py<BufferPool>, shared: Arc<Shared>, capacity: usize) -> Result<Self, Error> {
        let rows = Arc::new(virtio_memory::Burst::new(shared.pool.clone(), capacity)?);
        let once = Mutex::new(Vec::with_capacity(capacity));
        Ok(Burst { rows, shared, pool, columns: [const { PyOnceLock::new() }; 4], once })
    }

    fn column(&self, py: Python<'_>, column: Column) -> PyResult<Py<PyAny>> {
        let made = self.columns[column as usize].get_or_try_init(py, || {
            let view = View::column(self.rows.clone(), |rows| rows.column(column));
            array(py, view, "int64").map(Bound::unbind)
        });
        Ok(made?.clone_ref(py))
    }

    /// Where a row's bytes start in the mapping and how many fit behind; the slot is the burst's own.
    #[inline]
    fn place(&self, state: &PoolState, row: usize, raw: &RawRow) -> Result<(usize, usize), Error> {
        let pool = &*self.shared.pool;
        let owned = u32::try_from(raw.slot).is_ok_and(|slot| state.owner(slot) == Some(self.rows.owner()));
        match usize::try_from(raw.offset) {
            Ok(offset) if owned && offset < pool.slot_size() => Ok((pool.slot_offset(raw.slot as u32) + offset, pool.slot_size() - offset)),
            _ => Err(no_place(row, raw, owned, pool.slot_size() - 1)),
        }
    }

    /// Runs `call` on all rows, each read once: other threads may change the columns at any time, so nothing is read there twice. `call` is
    /// run with the pool's lock held.
    fn rows_once<T>(&self, py: Python<'_>, call: impl FnOnce(&PoolState, &[RawRow]) -> Result<T, Error>) -> Result<T, Error> {
        self.shared.check()?;
        let state = lock_pool(py, &self.shared.pool);
        // Never waited for: whoever has it has the pool's lock too.
        let mut once = lock(py, &self.once);
        once.clear();
        once.extend((0..self.rows.count()).map(|row| self.rows.row(row)));
        call(&state, &once)
    }

    fn set(&self, column: Column, row: usize, value: usize) {
        self.rows.column(column)[row].store(value as i64, Relaxed);
    }

    /// Puts bytes before the first row of each packet: as many for each, or all of them for each.
    fn prepend(&self, py: Python<'_>, data: &[u8], each: bool) -> Result<(), Error> {
        let pool = &self.shared.pool;
        self.rows_once(py, |state, rows| {
            let starts = || rows.iter().enumerate().filter(|(row, _)| *row == 0 || rows[row - 1].more == 0);
            let mut size = data.len();
            if each {
                let packets = starts().count();
                if packets == 0 || !size.is_multiple_of(packets) {
                    return Err(Error::Value(format!("{size} bytes are not as many for each of {packets} packets")));
                }
                size /= packets;
            }
            for (row, raw) in starts() {
                let (_, room) = self.place(state, row, raw)?;
                if raw.offset < size as i64 {
                    let message = format!("burst row {row}: a header of {size} bytes does not fit before offset {}", raw.offset);
                    return Err(Error::Value(message));
                }
                length(row, raw, room)?;
            }
            for (packet, (row, raw)) in starts().enumerate() {
                let (at, room) = self.place(state, row, raw)?;
                let header = if each { &data[packet * size..][..size] } else { data };
                pool.mapping().write(at - size, header)?;
                self.set(Column::Offsets, row, raw.offset as usize - size);
                self.set(Column::Lengths, row, length(row, raw, room)? + size);
            }
            Ok(())
        })
    }
}

/// A row's bytes, if its slot has room for them.
fn length(row: usize, raw: &RawRow, room: usize) -> Result<usize, Error> {
    match usize::try_from(raw.length) {
        Ok(length) if length <= room => Ok(length),
        _ => Err(Error::Value(format!("burst row {row}: length {} is not in 0 to {room}", raw.length))),
    }
}

/// Why a row has no place in its slot.
#[cold]
fn no_place(row: usize, raw: &RawRow, owned: bool, last: usize) -> Error {
    if owned {
        return Error::Value(format!("burst row {row}: offset {} is not in 0 to {last}", raw.offset));
    }
    Error::Value(format!("burst row {row}: slot {} does not belong to this burst", raw.slot))
}

#[pymethods]
impl Burst {
    /// Whose slots the rows name.
    #[getter]
    fn pool(&self, py: Python<'_>) -> Py<BufferPool> {
        self.pool.clone_ref(py)
    }

    /// How many rows there is room for.
    #[getter]
    fn capacity(&self) -> usize {
        self.rows.capacity()
    }

    /// How many rows are valid.
    #[getter]
    fn count(&self) -> usize {
        self.rows.count()
    }

    #[setter]
    fn set_count(&self, count: Int) -> Result<(), Error> {
        self.shared.check()?;
        let count = count.within("burst count", 0, self.rows.capacity() as i128)?;
        Ok(self.rows.set_count(count)?)
    }

    /// Slot numbers; shape (capacity,), as of all columns.
    #[getter]
    fn slots(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, Column::Slots)
    }

    /// Where the bytes start, from the slot's start.
    #[getter]
    fn offsets(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, Column::Offsets)
    }

    /// Bytes.
    #[getter]
    fn lengths(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, Column::Lengths)
    }

    /// 1 where the packet continues in the next row, else 0.
    #[getter]
    fn more(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, Column::More)
    }

    fn __len__(&self) -> usize {
        self.rows.count()
    }

    /// Copies `data` to every row's offset, and makes it the row's length.
    fn write(&self, py: Python<'_>, data: Data) -> Result<(), Error> {
        let data = data.of("data")?;
        self.rows_once(py, |state, rows| {
            if data.is_empty() {
                return Err(Error::Value("a packet needs at least one byte".into()));
            }
            for (row, raw) in rows.iter().enumerate() {
                let (_, room) = self.place(state, row, raw)?;
                if data.len() > room {
                    return Err(Error::Value(format!("burst row {row}: {} bytes do not fit into the slot's {room}", data.len())));
                }
            }
            for (row, raw) in rows.iter().enumerate() {
                // Found legal just now.
                let at = self.shared.pool.slot_offset(raw.slot as u32) + raw.offset as usize;
                self.shared.pool.mapping().write(at, data)?;
                self.set(Column::Lengths, row, data.len());
            }
            Ok(())
        })
    }

    /// Puts `data` before the first row of each packet: its offset shrinks and its length grows by as much.
    fn header(&self, py: Python<'_>, data: Data) -> Result<(), Error> {
        self.prepend(py, data.of("data")?, false)
    }

    /// As `header`, with as many bytes for each packet, one after the other.
    fn scatter(&self, py: Python<'_>, headers: Data) -> Result<(), Error> {
        self.prepend(py, headers.of("headers")?, true)
    }

    /// A copy of a row's bytes.
    fn tobytes<'py>(&self, py: Python<'py>, row: Int) -> Result<Bound<'py, PyBytes>, Error> {
        self.shared.check()?;
        let (row, count) = (row.bytes("burst row")?, self.rows.count());
        if row >= count {
            return Err(Error::Value(format!("burst row {row} is not below the burst's count, {count}")));
        }
        let raw = self.rows.row(row);
        let (at, room) = self.place(&lock_pool(py, &self.shared.pool), row, &raw)?;
        let read = |to: &mut [u8]| self.shared.pool.mapping().read(at, to).map_err(|error| Error::from(error).into());
        Ok(PyBytes::new_with(py, length(row, &raw, room)?, read)?)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.pool)
    }
}
