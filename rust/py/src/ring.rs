//! What both ends of a virtqueue are asked alike: size, format, features, addresses.

use crate::args::{Int, Mask};
use crate::errors::Error;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use virtqueue::{Areas, Format, RingFeatures, Snapshot, check_size};

/// What stays the same from set-up on.
pub struct Ring {
    pub size: u16,
    pub index: u16,
    pub format: Format,
    pub features: RingFeatures,
    pub notification_data: bool,
    pub areas: Areas,
}

impl Ring {
    /// Checks size, features and index; the areas are still to come.
    pub fn new(size: &Int, features: &Mask, index: &Int, max_size: u64) -> Result<Self, Error> {
        let bits = features.bits()?;
        let (format, features) = RingFeatures::from_bits(bits);
        let size = check_size(format, size.within("queue size", 1, max_size.into())?, max_size)?;
        let index = index.within("queue index", 0, u16::MAX.into())?;
        let notification_data = bits >> virtqueue::spec::F_NOTIFICATION_DATA & 1 == 1;
        Ok(Ring { size, index, format, features, notification_data, areas: Areas::default() })
    }

    /// The format's name.
    pub fn name(&self) -> &'static str {
        match self.format {
            Format::Split => "split",
            Format::Packed => "packed",
        }
    }

    /// A queue of this class, as Python shows it.
    pub fn shown(&self, class: &str) -> String {
        format!("<virtio.{class} {}: {}, {} entries>", self.index, self.name(), self.size)
    }

    /// Descriptor, driver and device area.
    pub fn addresses(&self) -> (u64, u64, u64) {
        (self.areas.descriptor, self.areas.driver, self.areas.device)
    }

    /// A ring's shadows beside its shared state.
    pub fn snapshot<'py>(&self, py: Python<'py>, snapshot: &Snapshot) -> PyResult<Bound<'py, PyDict>> {
        let all = PyDict::new(py);
        all.set_item("ring_format", self.name())?;
        all.set_item("private", dict(py, snapshot.private.iter().copied())?)?;
        all.set_item("shared", dict(py, snapshot.shared.iter().copied())?)?;
        Ok(all)
    }
}

/// Numbers by name.
pub fn dict<'py>(py: Python<'py>, numbers: impl IntoIterator<Item = (&'static str, u64)>) -> PyResult<Bound<'py, PyDict>> {
    let all = PyDict::new(py);
    for (name, number) in numbers {
        all.set_item(name, number)?;
    }
    Ok(all)
}

/// How many chains a call may give: all that there can be, or the limit.
pub fn limit(limit: Option<Int>, size: u16) -> Result<usize, Error> {
    let size = size.into();
    Ok(limit.map_or(Ok(size), |limit| limit.bytes("limit"))?.min(size))
}
