//! `GuestMemory`: what a device can reach.

use crate::args::Int;
use crate::buffer::Data;
use crate::errors::{Error, named};
use crate::lock::lock;
use crate::memory::{Memory, Use};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use virtio_memory::{DirtyBitmap, LoggedAt, Region, RegionTable};

/// What a device can reach: a table of regions, each a guest address range over part of a `Memory`.
#[pyclass(frozen, module = "virtio._core")]
pub struct GuestMemory {
    pub regions: virtio_memory::GuestMemory,
    /// By address: each region uses its memory. Changed together with the table.
    uses: Mutex<BTreeMap<u64, Use>>,
}

impl GuestMemory {
    fn table(&self) -> Arc<RegionTable> {
        self.regions.table()
    }
}

/// A region of a memory, `length` bytes or all that follow `offset`.
fn region(py: Python<'_>, address: &Int, memory: &Memory, offset: &Int, length: Option<&Int>) -> Result<(Region, Use), Error> {
    let address = address.address()?;
    let (mapping, user) = memory.used(py)?;
    let offset = offset.within("offset", 0, mapping.len() as i128 - 1)?;
    let rest = mapping.len() - offset;
    let length = length.map_or(Ok(rest as u64), |length| length.within("region length", 1, rest as i128))?;
    Ok((Region::new(address, length, mapping, offset)?, user))
}

#[pymethods]
impl GuestMemory {
    #[new]
    fn new() -> Self {
        GuestMemory { regions: virtio_memory::GuestMemory::new(), uses: Mutex::default() }
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        format!("<virtio.GuestMemory of {} regions>", lock(py, &self.uses).len())
    }

    /// Adds a region: `length` bytes (by default all) of `memory` from `offset`, which the device sees at `address`.
    #[pyo3(signature = (address, memory, *, offset = Int::new(0), length = None),
           text_signature = "($self, address, memory, *, offset=0, length=None)")]
    fn add(&self, py: Python<'_>, address: Int, memory: &Bound<'_, Memory>, offset: Int, length: Option<Int>) -> Result<(), Error> {
        let (region, user) = region(py, &address, memory.get(), &offset, length.as_ref())?;
        let mut uses = lock(py, &self.uses);
        let address = region.address();
        self.regions.add(region)?;
        uses.insert(address, user);
        Ok(())
    }

    /// Removes the region that starts at `address`.
    fn remove(&self, py: Python<'_>, address: Int) -> Result<(), Error> {
        let address = address.address()?;
        let mut uses = lock(py, &self.uses);
        self.regions.remove(address)?;
        uses.remove(&address);
        Ok(())
    }

    /// Puts these regions in the place of all others: (address, memory, offset, length) each.
    fn replace(&self, py: Python<'_>, regions: &Bound<'_, PyAny>) -> Result<(), Error> {
        let (mut table, mut users) = (Vec::new(), BTreeMap::new());
        let parsed = |item: &Bound<'_, PyAny>| {
            let (address, memory, offset, length): (Int, Bound<'_, Memory>, Int, Int) = item.extract()?;
            region(py, &address, memory.get(), &offset, Some(&length))
        };
        for (place, item) in regions.try_iter().map_err(|error| named("regions", error))?.enumerate() {
            let (region, user) = parsed(&item?).map_err(|error| error.of(&format!("regions, number {place}")))?;
            users.insert(region.address(), user);
            table.push(region);
        }
        let mut uses = lock(py, &self.uses);
        self.regions.replace(table)?;
        *uses = users;
        Ok(())
    }

    /// (address, length) of each region, by ascending address.
    #[getter]
    fn regions(&self) -> Vec<(u64, u64)> {
        self.table().regions().iter().map(|region| (region.address(), region.len())).collect()
    }

    /// A copy of `length` bytes, which may lie in several regions that follow each other.
    fn read<'py>(&self, py: Python<'py>, address: Int, length: Int) -> Result<Bound<'py, PyBytes>, Error> {
        let (address, length) = (address.address()?, length.bytes("length")?);
        let table = self.table();
        // Before the bytes are made, which may be many.
        table.check(address, length as u64)?;
        let copy = |to: &mut [u8]| table.read(address, to).map_err(|error| Error::from(error).into());
        Ok(PyBytes::new_with(py, length, copy)?)
    }

    /// Copies `data` in, and marks it dirty.
    fn write(&self, address: Int, data: Data) -> Result<(), Error> {
        Ok(self.table().write(address.address()?, data.of("data")?)?)
    }

    /// One atomic little-endian load of `width` bytes (1, 2, 4, 8).
    fn load(&self, address: Int, width: Int) -> Result<u64, Error> {
        Ok(self.table().load(address.address()?, width.within("width", 1, 8)?)?)
    }

    /// One atomic little-endian store, marked dirty.
    fn store(&self, address: Int, width: Int, value: Int) -> Result<(), Error> {
        let (address, width) = (address.address()?, width.within("width", 1, 8)?);
        Ok(self.table().store(address, width, value.within("value", 0, u64::MAX.into())?)?)
    }

    /// Marks what a device writes, in pages of 4096 bytes from address 0 on, up to `pages` (at most 2^30).
    fn start_dirty_log(&self, pages: Int) -> Result<(), Error> {
        let bitmap = DirtyBitmap::new(pages.within("dirty bitmap's pages", 1, 1 << 30)?)?;
        self.regions.set_dirty(Some(Arc::new(bitmap)));
        Ok(())
    }

    /// The marks since the last call, as words that have some, each behind its number: page p is bit p % 64 of word p // 64.
    fn take_dirty_log(&self) -> Result<Vec<(u64, u64)>, Error> {
        match self.table().dirty() {
            Some(bitmap) => Ok(bitmap.take()),
            None => Err(Error::Status("no dirty log was started".into())),
        }
    }

    /// Carries the marks since the last call over to `log`, by atomic ORs: others may write there too.
    #[pyo3(signature = (log, *, also = Vec::new()), text_signature = "($self, log, *, also=())")]
    fn merge_dirty_log(&self, py: Python<'_>, log: &Bound<'_, Memory>, also: Vec<(Int, Int, Int)>) -> Result<(), Error> {
        let mut moved = Vec::with_capacity(also.len());
        for (address, length, log) in also {
            let len = length.within("also: length", 1, u64::MAX.into())?;
            moved.push(LoggedAt { address: address.address()?, len, log: log.address()? });
        }
        let mapping = log.get().mapping(py)?;
        match self.table().dirty() {
            Some(bitmap) => {
                bitmap.merge_into(&mapping, &moved);
                Ok(())
            }
            None => Err(Error::Status("no dirty log was started".into())),
        }
    }

    /// Marks nothing any more.
    fn stop_dirty_log(&self) {
        self.regions.set_dirty(None);
    }
}
