//! What a ring is set up with: format, size, areas, negotiated features (2.7, 2.8.10.1).

use crate::error::RingError;
use crate::spec;
#[cfg(not(loom))]
use virtio_memory::{RegionTable, Span};

/// The ring's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// 2.7
    Split,
    /// 2.8
    Packed,
}

/// The negotiated features that change a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingFeatures {
    /// EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// IN_ORDER was negotiated.
    pub in_order: bool,
}

impl RingFeatures {
    /// Takes what concerns a ring out of the accepted feature bits; the format comes with it.
    pub fn from_bits(bits: u128) -> (Format, RingFeatures) {
        let has = |bit: u32| bits >> bit & 1 == 1;
        let format = if has(spec::F_RING_PACKED) { Format::Packed } else { Format::Split };
        let features =
            RingFeatures { event_idx: has(spec::F_EVENT_IDX), indirect: has(spec::F_INDIRECT_DESC), in_order: has(spec::F_IN_ORDER) };
        (format, features)
    }
}

/// Addresses of the three areas, as the device sees them (2.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Areas {
    /// Descriptor area: descriptor table, or the packed ring.
    pub descriptor: u64,
    /// Driver area: available ring, or driver event suppression.
    pub driver: u64,
    /// Device area: used ring, or device event suppression.
    pub device: u64,
}

/// (bytes, alignment) of the descriptor, driver and device area (2.7, 2.8.10.1).
pub fn layout(format: Format, size: u16) -> [(u64, u64); 3] {
    let n = u64::from(size);
    match format {
        Format::Split => [(16 * n, 16), (6 + 2 * n, 2), (6 + 8 * n, 4)],
        Format::Packed => [(16 * n, 16), (4, 4), (4, 4)],
    }
}

/// Checks a ring's size at full width, before it is narrowed (2.7, 2.8.10.1).
pub fn check_size(format: Format, size: u64, max: u64) -> Result<u16, RingError> {
    let max = max.min(u64::from(spec::MAX_SIZE));
    if size == 0 || size > max {
        return Err(RingError::BadSize { size, max });
    }
    if format == Format::Split && !size.is_power_of_two() {
        return Err(RingError::SizeNotPowerOfTwo { size });
    }
    Ok(size as u16)
}

/// Checks the bound on a chain's descriptors (device-07): by default the ring's size; longer indirect tables on request.
pub fn check_chain_limit(size: u16, limit: Option<u64>) -> Result<u16, RingError> {
    let max = u64::from(size.max(spec::MAX_CHAIN));
    match limit {
        None => Ok(size),
        Some(limit) if limit == 0 || limit > max => Err(RingError::BadChainLimit { limit, max }),
        Some(limit) => Ok(limit as u16),
    }
}

/// Finds the three areas in mapped memory: aligned as the format wants, the whole extent inside one region (2.6, device-02).
#[cfg(not(loom))]
pub fn spans(memory: &RegionTable, format: Format, size: u16, areas: Areas) -> Result<[Span; 3], RingError> {
    let [descriptor, driver, device] = layout(format, size);
    let find = |area: &'static str, address: u64, (len, align): (u64, u64)| {
        if !address.is_multiple_of(align) {
            return Err(RingError::AreaUnaligned { area, address, align });
        }
        if address.checked_add(len).is_none() {
            return Err(RingError::AreaOverflow { area, address, len });
        }
        memory.span(address, len).map_err(|_| RingError::AreaUnmapped { area, address, len })
    };
    Ok([find("descriptor", areas.descriptor, descriptor)?, find("driver", areas.driver, driver)?, find("device", areas.device, device)?])
}
