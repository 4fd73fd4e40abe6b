//! Bursts between the chains of a virtqueue and the slots of a buffer pool: many packets in one call, no allocation once warm, no copy on
//! the driver's side and one on the device's.
//!
//! [`DriverBursts`] and [`DeviceBursts`] stand beside a [`virtqueue::DriverQueue`] and a [`virtqueue::DeviceQueue`]. Their calls want the
//! pool's lock held, and never split a packet. What a packet means is not known here.
#![forbid(unsafe_code)]

mod device;
mod driver;
mod error;

pub use device::DeviceBursts;
pub use driver::DriverBursts;
pub use error::BurstError;

use virtio_memory::{Burst, Row};

/// Leaves these rows, packets that did not fit, at the burst's front.
fn keep_rest(burst: &Burst, rest: &[Row]) {
    for (index, row) in rest.iter().enumerate() {
        burst.set_row(index, *row);
    }
    burst.set_count(rest.len()).expect("no more rows than there were");
    burst.set_unsent(rest.iter().filter(|row| !row.more).count() as u32);
}
