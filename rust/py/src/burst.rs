//! `Burst`: rows of slots, and what can be done to all of them at once.

use crate::args::Int;
use crate::buffer::{Bytes, View, array};
use crate::errors::Error;
use crate::lock::lock_pool;
use crate::pool::{BufferPool, Shared};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyBytes;
use std::sync::Arc;
use virtio_memory::{Column, PoolState};

#[pyclass(frozen, module = "virtio._core")]
pub struct Burst {
    pub rows: Arc<virtio_memory::Burst>,
    pub shared: Arc<Shared>,
    pool: Py<BufferPool>,
    columns: [PyOnceLock<Py<PyAny>>; 4],
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
        Ok(Burst { rows, shared, pool, columns: [const { PyOnceLock::new() }; 4] })
    }

    fn column(&self, py: Python<'_>, column: Column) -> PyResult<Py<PyAny>> {
        let made = self.columns[column as usize].get_or_try_init(py, || {
            let view = View::column(self.rows.clone(), |rows| rows.column(column));
            array(py, view, "int64").map(Bound::unbind)
        });
        Ok(made?.clone_ref(py))
    }

    /// Where a row's bytes start in the mapping and how many fit behind; the slot is the burst's own.
    fn place(&self, state: &PoolState, row: usize) -> Result<(usize, usize), Error> {
        let (pool, raw) = (&self.shared.pool, self.rows.row(row));
        let owned = u32::try_from(raw.slot).is_ok_and(|slot| state.owner(slot) == Some(self.rows.owner()));
        if !owned {
            return Err(Error::Value(format!("burst row {row}: slot {} does not belong to this burst", raw.slot)));
        }
        let last = pool.slot_size() - 1;
        match usize::try_from(raw.offset) {
            Ok(offset) if offset <= last => Ok((pool.slot_offset(raw.slot as u32) + offset, pool.slot_size() - offset)),
            _ => Err(Error::Value(format!("burst row {row}: offset {} is not in 0 to {last}", raw.offset))),
        }
    }

    /// Puts bytes before the first row of each packet: `header(n)` gives those of the nth. Each has `size` bytes.
    fn prepend<'a>(&self, py: Python<'_>, size: usize, count: Option<usize>, header: impl Fn(usize) -> &'a [u8]) -> Result<(), Error> {
        self.shared.check()?;
        let state = lock_pool(py, &self.shared.pool);
        let rows = &self.rows;
        let starts = || (0..rows.count()).filter(|row| *row == 0 || rows.row(row - 1).more == 0);
        let packets = starts().count();
        if let Some(count) = count.filter(|count| *count != packets) {
            return Err(Error::Value(format!("{count} headers for {packets} packets")));
        }
        for row in starts() {
            self.place(&state, row)?;
            let (offset, length) = (rows.row(row).offset, rows.row(row).length);
            if offset < size as i64 {
                return Err(Error::Value(format!("burst row {row}: a header of {size} bytes does not fit before offset {offset}")));
            }
            if !(0..=self.shared.pool.slot_size() as i64 - offset).contains(&length) {
                let most = self.shared.pool.slot_size() as i64 - offset;
                return Err(Error::Value(format!("burst row {row}: length {length} is not in 0 to {most}")));
            }
        }
        for (packet, row) in starts().enumerate() {
            let (at, _) = self.place(&state, row)?;
            self.shared.pool.mapping().write(at - size, header(packet))?;
            let cells = |column| &rows.column(column)[row];
            cells(Column::Offsets).fetch_sub(size as i64, std::sync::atomic::Ordering::Relaxed);
            cells(Column::Lengths).fetch_add(size as i64, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(())
    }
}

#[pymethods]
impl Burst {
    #[getter]
    fn pool(&self, py: Python<'_>) -> Py<BufferPool> {
        self.pool.clone_ref(py)
    }

    #[getter]
    fn capacity(&self) -> usize {
        self.rows.capacity()
    }

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

    #[getter]
    fn slots(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, Column::Slots)
    }

    #[getter]
    fn offsets(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, Column::Offsets)
    }

    #[getter]
    fn lengths(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, Column::Lengths)
    }

    #[getter]
    fn more(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        self.column(py, Column::More)
    }

    fn __len__(&self) -> usize {
        self.rows.count()
    }

    fn write(&self, py: Python<'_>, data: Bytes) -> Result<(), Error> {
        self.shared.check()?;
        let (pool, data) = (&self.shared.pool, data.as_slice());
        let state = lock_pool(py, pool);
        let count = self.rows.count();
        if data.is_empty() {
            return Err(Error::Value("a packet needs at least one byte".into()));
        }
        for row in 0..count {
            let (_, room) = self.place(&state, row)?;
            if data.len() > room {
                return Err(Error::Value(format!("burst row {row}: {} bytes do not fit into the slot's {room}", data.len())));
            }
        }
        for row in 0..count {
            let (at, _) = self.place(&state, row)?;
            pool.mapping().write(at, data)?;
            self.rows.column(Column::Lengths)[row].store(data.len() as i64, std::sync::atomic::Ordering::Relaxed);
        }
        Ok(())
    }

    fn header(&self, py: Python<'_>, data: Bytes) -> Result<(), Error> {
        let data = data.as_slice();
        self.prepend(py, data.len(), None, |_| data)
    }

    fn scatter(&self, py: Python<'_>, headers: Bytes) -> Result<(), Error> {
        let headers = headers.as_slice();
        let packets = (0..self.rows.count()).filter(|row| *row == 0 || self.rows.row(row - 1).more == 0).count();
        if packets == 0 || !headers.len().is_multiple_of(packets) {
            return Err(Error::Value(format!("{} bytes are not as many for each of {packets} packets", headers.len())));
        }
        let size = headers.len() / packets;
        self.prepend(py, size, Some(packets), |packet| &headers[packet * size..][..size])
    }

    fn tobytes<'py>(&self, py: Python<'py>, row: Int) -> Result<Bound<'py, PyBytes>, Error> {
        self.shared.check()?;
        let row = row.within("burst row", 0, self.rows.count() as i128 - 1)?;
        let copy = |state: &PoolState| -> Result<(usize, usize), Error> {
            let (at, room) = self.place(state, row)?;
            let length = self.rows.row(row).length;
            match usize::try_from(length) {
                Ok(length) if length <= room => Ok((at, length)),
                _ => Err(Error::Value(format!("burst row {row}: length {length} is not in 0 to {room}"))),
            }
        };
        let (at, length) = copy(&lock_pool(py, &self.shared.pool))?;
        let read = |to: &mut [u8]| self.shared.pool.mapping().read(at, to).map_err(|error| Error::from(error).into());
        Ok(PyBytes::new_with(py, length, read)?)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.pool)
    }
}
