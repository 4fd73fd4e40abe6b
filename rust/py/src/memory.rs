//! `Memory`: a mapping, an allocator for it, and a count of who uses it.

use crate::args::Int;
use crate::buffer::Data;
use crate::errors::Error;
use crate::lock::lock;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use virtio_memory::{Allocator, BoundToProcess, HugePages, Mapping, MemoryError, duplicate};

/// What outlives the Python object, because queues, pools, regions and views use it.
pub struct Shared {
    places: Mutex<Places>,
    uses: AtomicUsize,
    process: BoundToProcess,
}

/// What is allocated.
struct Places {
    allocator: Allocator,
    /// Offsets of what is not the caller's, with whose it is.
    owners: BTreeMap<usize, &'static str>,
}

/// One user of a memory; `close` waits for none of them, it refuses while there are any.
pub struct Use(Arc<Shared>);

impl Drop for Use {
    fn drop(&mut self) {
        self.0.uses.fetch_sub(1, Relaxed);
    }
}

/// A piece of a memory, given back when it is dropped.
pub struct Allocation {
    pub offset: usize,
    user: Use,
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let shared = &self.user.0;
        // A forked child has a copy of the allocator's lock, perhaps one that is never released.
        if shared.process.check().is_ok() {
            let mut places = shared.places.lock().unwrap_or_else(PoisonError::into_inner);
            places.owners.remove(&self.offset);
            let _ = places.allocator.free(self.offset);
        }
    }
}

/// Memory that this process maps and may share: one memfd, or a descriptor that somebody passed.
#[pyclass(frozen, subclass, module = "virtio._core")]
pub struct Memory {
    /// `None` once it is closed.
    mapping: Mutex<Option<Arc<Mapping>>>,
    shared: Arc<Shared>,
    size: usize,
    foreign: bool,
}

impl Memory {
    fn over(mapping: Mapping) -> Self {
        let (size, foreign) = (mapping.len(), mapping.foreign());
        let places = Places { allocator: Allocator::new(size), owners: BTreeMap::new() };
        let shared = Shared { places: Mutex::new(places), uses: AtomicUsize::new(0), process: BoundToProcess::new() };
        Memory { mapping: Mutex::new(Some(Arc::new(mapping))), shared: Arc::new(shared), size, foreign }
    }

    /// An offset into it, or its end.
    fn offset(&self, offset: &Int) -> Result<usize, Error> {
        offset.within("offset", 0, self.size as i128)
    }

    /// The mapping, unless it is closed.
    pub fn mapping(&self, py: Python<'_>) -> Result<Arc<Mapping>, Error> {
        lock(py, &self.mapping).clone().ok_or_else(|| Error::closed("memory"))
    }

    /// The mapping with one more user.
    pub fn used(&self, py: Python<'_>) -> Result<(Arc<Mapping>, Use), Error> {
        // Counted under the lock that `close` holds while it looks.
        let mapping = lock(py, &self.mapping);
        let found = mapping.clone().ok_or_else(|| Error::closed("memory"))?;
        self.shared.uses.fetch_add(1, Relaxed);
        Ok((found, Use(self.shared.clone())))
    }

    /// The mapping for Python to look into, with one more user.
    pub fn export(&self) -> Result<(Arc<Mapping>, Use), Error> {
        if self.foreign {
            let message = "memory that a peer passed has no buffer: use read and write";
            return Err(Error::Python(pyo3::exceptions::PyBufferError::new_err(message)));
        }
        Python::attach(|py| self.used(py))
    }

    /// Takes a piece for `owner`, with the mapping that it is in. `free` refuses it.
    pub fn take(&self, py: Python<'_>, owner: &'static str, size: usize, align: usize) -> Result<(Arc<Mapping>, Allocation), Error> {
        self.shared.process.check()?;
        let (mapping, user) = self.used(py)?;
        let mut places = lock(py, &self.shared.places);
        let offset = places.allocator.allocate(size, align)?;
        places.owners.insert(offset, owner);
        drop(places);
        Ok((mapping, Allocation { offset, user }))
    }
}

/// Bytes of one access.
fn word(width: &Int) -> Result<usize, Error> {
    match width.bytes("width")? {
        width @ (1 | 2 | 4 | 8) => Ok(width),
        width => Err(MemoryError::BadWidth { width }.into()),
    }
}

#[pymethods]
impl Memory {
    #[new]
    #[pyo3(signature = (size, *, name = "virtio", huge_page_size = None))]
    fn new(size: Int, name: &str, huge_page_size: Option<Int>) -> Result<Self, Error> {
        let size = size.within("memory size", 1, i64::MAX.into())?;
        let huge: Option<usize> = huge_page_size.map(|page| page.within("huge page size", 1, i64::MAX.into())).transpose()?;
        if let Some(page) = huge.filter(|page| !page.is_power_of_two() || *page < 4096) {
            return Err(Error::Value(format!("huge page size {page} is not a power of two from 4096 on")));
        }
        if name.len() > 249 || name.contains('\0') {
            return Err(Error::Value(format!("memory name {name:?} is longer than 249 bytes, or has a NUL")));
        }
        let mapping = Mapping::memfd(size, name, HugePages::from(huge));
        Ok(Memory::over(mapping.map_err(|error| Error::from(error).of_system(&format!("memory of {size} bytes")))?))
    }

    /// Maps `size` bytes of a file that somebody passed, from `offset` on (no alignment needed).
    #[classmethod]
    #[pyo3(signature = (fd, size, *, offset = Int::new(0)), text_signature = "($cls, fd, size, *, offset=0)")]
    fn from_fd(_cls: &Bound<'_, pyo3::types::PyType>, fd: Int, size: Int, offset: Int) -> Result<Self, Error> {
        let fd = fd.within("fd", 0, RawFd::MAX.into())?;
        let size = size.within("memory size", 1, i64::MAX.into())?;
        let offset = offset.within("offset", 0, i64::MAX.into())?;
        Ok(Memory::over(Mapping::from_fd(duplicate(fd)?, offset, size)?))
    }

    /// Bytes.
    #[getter]
    fn size(&self) -> usize {
        self.size
    }

    /// Whether a peer passed it.
    #[getter]
    fn foreign(&self) -> bool {
        self.foreign
    }

    /// Whether its owner truncated the file under it.
    #[getter]
    fn poisoned(&self, py: Python<'_>) -> Result<bool, Error> {
        Ok(self.mapping(py)?.poisoned())
    }

    /// Whether `close` was called.
    #[getter]
    fn closed(&self, py: Python<'_>) -> bool {
        lock(py, &self.mapping).is_none()
    }

    /// The descriptor to pass on; it stays this memory's.
    fn fileno(&self, py: Python<'_>) -> Result<RawFd, Error> {
        Ok(self.mapping(py)?.fd().as_raw_fd())
    }

    /// Takes `size` bytes at a multiple of `align` (a power of two); returns their offset.
    #[pyo3(signature = (size, align = Int::new(16)), text_signature = "($self, size, align=16)")]
    fn allocate(&self, py: Python<'_>, size: Int, align: Int) -> Result<usize, Error> {
        let size = size.within("allocation size", 1, self.size as i128)?;
        let align = align.within("alignment", 1, 1 << 62)?;
        self.shared.process.check()?;
        self.mapping(py)?;
        Ok(lock(py, &self.shared.places).allocator.allocate(size, align)?)
    }

    /// Gives back what `allocate` returned.
    fn free(&self, py: Python<'_>, offset: Int) -> Result<(), Error> {
        let offset = offset.within("offset", 0, self.size as i128 - 1)?;
        self.shared.process.check()?;
        self.mapping(py)?;
        let mut places = lock(py, &self.shared.places);
        if let Some(owner) = places.owners.get(&offset) {
            return Err(Error::Value(format!("offset {offset} belongs to a {owner}, which frees it when it is closed")));
        }
        places.allocator.free(offset)?;
        Ok(())
    }

    /// A copy of `length` bytes.
    fn read<'py>(&self, py: Python<'py>, offset: Int, length: Int) -> Result<Bound<'py, PyBytes>, Error> {
        let (offset, length) = (self.offset(&offset)?, length.bytes("length")?);
        let mapping = self.mapping(py)?;
        // Before the bytes are made, which may be many.
        mapping.span(offset, length)?;
        let copy = |to: &mut [u8]| mapping.read(offset, to).map_err(|error| Error::from(error).into());
        Ok(PyBytes::new_with(py, length, copy)?)
    }

    /// Copies `data` in.
    fn write(&self, py: Python<'_>, offset: Int, data: Data) -> Result<(), Error> {
        let offset = self.offset(&offset)?;
        Ok(self.mapping(py)?.write(offset, data.of("data")?)?)
    }

    /// One atomic little-endian load of `width` bytes (1, 2, 4, 8), with acquire.
    fn load(&self, py: Python<'_>, offset: Int, width: Int) -> Result<u64, Error> {
        let (offset, width) = (self.offset(&offset)?, word(&width)?);
        Ok(self.mapping(py)?.load(offset, width)?)
    }

    /// One atomic little-endian store, with release.
    fn store(&self, py: Python<'_>, offset: Int, width: Int, value: Int) -> Result<(), Error> {
        let (offset, width) = (self.offset(&offset)?, word(&width)?);
        let value = value.within("value", 0, (1 << (8 * width)) - 1)?;
        Ok(self.mapping(py)?.store(offset, width, value)?)
    }

    /// Unmaps the memory and closes its descriptor; again does nothing.
    fn close(&self, py: Python<'_>) -> Result<(), Error> {
        let mut mapping = lock(py, &self.mapping);
        let exports = self.shared.uses.load(Relaxed);
        if mapping.is_some() && exports > 0 {
            return Err(MemoryError::InUse { exports }.into());
        }
        let last = mapping.take();
        drop(mapping);
        drop(last); // unmaps outside the lock
        Ok(())
    }

    /// The memory itself.
    fn __enter__(slf: Bound<'_, Self>) -> Result<Bound<'_, Self>, Error> {
        slf.get().mapping(slf.py())?;
        Ok(slf)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<virtio.Memory of {} bytes{}>", self.size, if self.closed(py) { ", closed" } else { "" })
    }

    /// As `close`.
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        _error: &Bound<'_, PyAny>,
        _trace: &Bound<'_, PyAny>,
    ) -> Result<(), Error> {
        self.close(py)
    }
}
