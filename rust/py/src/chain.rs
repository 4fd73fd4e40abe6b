//! `Chain`: one buffer that the driver made available, with its bytes.

use crate::args::Int;
use crate::buffer::Data;
use crate::device_queue::{Open, Shared};
use crate::errors::Error;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::Arc;
use virtio_memory::{MemoryError, RegionTable};
use virtqueue::{Completion, Direction, RingError, Segment};

/// Takes one piece: its segment, where it starts in there and in the caller's bytes, and its length.
type Step<'a> = dyn FnMut(&Segment, u64, usize, usize) -> Result<(), MemoryError> + 'a;

/// One buffer that the driver made available: readable bytes first, then writable ones (2.7.4.2).
#[pyclass(frozen, module = "virtio._core")]
pub struct Chain {
    pub queue: Arc<Shared>,
    /// Its name in the ring, with a used length of 0.
    pub name: Completion,
    readable: u32,
    pub writable: u32,
    /// Readable ones first.
    segments: Box<[Segment]>,
}

impl Chain {
    pub fn new(queue: &Arc<Shared>, chain: &virtqueue::Chain, segments: &[Segment]) -> Self {
        let name = Completion { head: chain.head, serial: chain.serial, len: 0 };
        Chain { queue: queue.clone(), name, readable: chain.readable, writable: chain.writable, segments: segments.into() }
    }

    /// Runs `step` with each piece of `len` bytes from `offset` of one direction: address, place in the bytes, length. They are there;
    /// their segments are mapped from end to end before the first one moves. A buffer outside memory is the driver's mistake and breaks the queue.
    fn pieces(
        &self,
        open: &mut Open,
        direction: Direction,
        offset: usize,
        len: usize,
        mut step: impl FnMut(&RegionTable, u64, usize, usize) -> Result<(), MemoryError>,
    ) -> Result<(), Error> {
        if open.queue.check(&self.name).is_err() {
            return Err(Error::Status(format!("chain {} is not in flight any more: its bytes are the driver's", self.name.head)));
        }
        let table = open.queue.refresh();
        let each = |step: &mut Step<'_>| {
            let (mut skip, mut done) = (offset as u64, 0);
            for segment in self.segments.iter().filter(|segment| segment.direction == direction) {
                let start = skip.min(segment.len.into());
                skip -= start;
                let count = (len - done).min(segment.len as usize - start as usize);
                if count > 0 {
                    step(segment, start, done, count)?;
                    done += count;
                }
            }
            Ok(())
        };
        let mapped = each(&mut |segment, _, _, _| table.check(segment.address, segment.len.into()));
        let moved = mapped.and_then(|()| each(&mut |segment, start, at, n| step(table, segment.address.wrapping_add(start), at, n)));
        let lost = table.poisoned().is_some();
        open.queue.check_memory()?; // zeros stand where the bytes were
        let error = match moved {
            Ok(()) if !lost => return Ok(()),
            Ok(()) => RingError::Broken,
            Err(error) => RingError::BufferUnmapped(error),
        };
        if open.queue.broken().is_some() {
            return Err(RingError::Broken.into()); // the first mistake was told
        }
        open.queue.break_with(error.clone());
        Err(error.into())
    }

    /// A span inside `total` bytes.
    fn within(&self, what: &str, offset: usize, len: usize, total: u32) -> Result<(), Error> {
        if offset > total as usize || len > total as usize - offset {
            return Err(Error::Value(format!("{len} bytes at offset {offset} are not in the chain's {total} {what} bytes")));
        }
        Ok(())
    }
}

#[pymethods]
impl Chain {
    /// The ring's name for it while it is in flight.
    #[getter]
    fn head(&self) -> u16 {
        self.name.head
    }

    /// How many bytes the device may read.
    #[getter]
    fn readable(&self) -> u32 {
        self.readable
    }

    /// How many bytes the device may write.
    #[getter]
    fn writable(&self) -> u32 {
        self.writable
    }

    /// (address, length, writable) of each segment that is not empty.
    #[getter]
    fn segments(&self) -> Vec<(u64, u32, bool)> {
        self.segments.iter().map(|segment| (segment.address, segment.len, segment.direction == Direction::Writable)).collect()
    }

    /// Whether it is not in flight any more.
    #[getter]
    fn completed(&self, py: Python<'_>) -> Result<bool, Error> {
        self.queue.is_done(py, &self.name)
    }

    /// A copy of readable bytes: `length` of them (by default all) from `offset`.
    #[pyo3(signature = (length = None, *, offset = Int::new(0)), text_signature = "($self, length=None, *, offset=0)")]
    fn read<'py>(&self, py: Python<'py>, length: Option<Int>, offset: Int) -> Result<Bound<'py, PyBytes>, Error> {
        let offset = offset.within("offset", 0, self.readable.into())?;
        let rest = self.readable as usize - offset;
        let length = length.map_or(Ok(rest), |length| length.bytes("length"))?;
        self.within("readable", offset, length, self.readable)?;
        // All of it is there before the bytes are made, which may be many.
        self.queue.with(py, |open| self.pieces(open, Direction::Readable, offset, length, |_, _, _, _| Ok(())))?;
        Ok(PyBytes::new_with(py, length, |to| {
            let copy = |table: &RegionTable, address: u64, at: usize, count: usize| table.read(address, &mut to[at..at + count]);
            Ok(self.queue.with(py, |open| self.pieces(open, Direction::Readable, offset, length, copy))?)
        })?)
    }

    /// Copies `data` to the writable bytes from `offset`; returns its length.
    #[pyo3(signature = (data, *, offset = Int::new(0)), text_signature = "($self, data, *, offset=0)")]
    fn write(&self, py: Python<'_>, data: Data, offset: Int) -> Result<usize, Error> {
        let (data, offset) = (data.of("data")?, offset.within("offset", 0, self.writable.into())?);
        self.within("writable", offset, data.len(), self.writable)?;
        let copy = |table: &RegionTable, address: u64, at: usize, count: usize| table.write(address, &data[at..at + count]);
        self.queue.with(py, |open| self.pieces(open, Direction::Writable, offset, data.len(), copy))?;
        Ok(data.len())
    }
}
