//! Both ends of a virtqueue (VIRTIO 1.4, 2.6 to 2.9), split and packed, one buffer or a batch at a time.
//!
//! No I/O, no packets, no unsafe code, and no allocation after set-up. What the peer can write is never trusted and never read twice:
//! every shared structure has a private shadow here. A caller's mistake and a peer's mistake are both a [`RingError`]; a peer's is latched
//! by [`DriverQueue`] and [`DeviceQueue`], which then stand still until they are reset.
#![forbid(unsafe_code)]

mod any;
mod batch;
mod chain;
mod device;
mod driver;
mod error;
pub mod event;
mod fill;
mod indirect;
mod inflight;
mod options;
mod outstanding;
pub mod packed;
mod ring;
pub mod spec;
pub mod split;
mod tracking;

pub use any::{AnyDevice, AnyDriver};
pub use batch::ChainBatch;
pub use chain::{Chain, Direction, Segment};
pub use device::{DeviceCounters, DeviceQueue};
pub use driver::{DriverCounters, DriverQueue};
pub use error::{Fault, RingError};
pub use indirect::IndirectTables;
#[cfg(not(loom))]
pub use options::spans;
pub use options::{Areas, Format, RingFeatures, check_chain_limit, check_size, layout};
pub use ring::{
    Buffer, Completion, Completions, DeviceRing, DriverRing, Fill, Filled, Form, RingState, Snapshot, Takeover, Unwritten, Used,
};
pub use tracking::{Footprint, InFlightObserver, Opened, Resubmission};
#[cfg(not(loom))]
pub use tracking::{PackedArea, SplitArea, region_size};
