//! Bursts between the chains of a virtqueue and the slots of a buffer pool: many packets in one call, no allocation once warm, no copy on
//! the driver's side and one on the device's.
//!
//! [`DriverBursts`] and [`DeviceBursts`] stand beside a [`virtqueue::DriverQueue`] and a [`virtqueue::DeviceQueue`]. Their calls want the
//! pool's lock held, and never split a packet.
//!
//! Upon them stand the two ends of a network device's queues (5.1.6), in the same types: `send` and `receive` on bursts, `send_frames` and
//! `receive_frames` on bytes, with the header ([`header`]) read, checked and written in the slots' headroom.
#![forbid(unsafe_code)]

pub mod checksum;
mod device;
mod device_fill;
mod device_port;
mod driver;
mod driver_port;
mod driver_receive;
mod error;
pub mod header;
mod incoming;
mod pieces;
mod port;
pub mod pump;
mod steering;

pub use device::DeviceBursts;
pub use driver::DriverBursts;
pub use driver_port::fill_clean;
pub use driver_receive::ReceiveBuffers;
pub use error::BurstError;
pub use port::{Frames, Rules, Traffic};
pub use steering::{Dealer, Steering};

use virtio_memory::{Burst, Row};

/// Leaves these rows, packets that did not fit, at the burst's front.
fn keep_rest(burst: &Burst, rest: &[Row]) {
    for (index, row) in rest.iter().enumerate() {
        burst.set_row(index, *row);
    }
    burst.set_count(rest.len()).expect("no more rows than there were");
    burst.set_unsent(rest.iter().filter(|row| !row.more).count() as u32);
}
