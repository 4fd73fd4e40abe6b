//! Frames between a queue and a TAP descriptor (IFF_VNET_HDR), by `readv` and `writev` straight between the kernel and the ring's buffers.
//!
//! Each pump moves one burst a step, publishes nothing itself, and sleeps nowhere: the caller holds the queue's lock for the step, publishes
//! once, and waits when no pump moved anything ([`runner`]). Headers go through private bytes: copied first, judged, and only then passed on.

mod device_receive;
mod device_transmit;
mod driver_receive;
mod driver_transmit;
pub mod runner;

pub use device_receive::DeviceReceive;
pub use device_transmit::DeviceTransmit;
pub use driver_receive::DriverReceive;
pub use driver_transmit::DriverTransmit;

use crate::error::BurstError;
use crate::header::Reason;
use crate::port::Traffic;
use virtio_memory::MemoryError;
use virtqueue::{DeviceQueue, DeviceRing, DriverQueue, DriverRing, RingError, Segment};

/// Frames of one step, at most.
const BURST: usize = 64;
/// A step ends after the frame that reaches so many bytes: the other end finds them in the cache.
const BURST_BYTES: usize = 256 << 10;
/// Pieces of one `readv` or `writev`, at most.
const ALL_PIECES: usize = 1024;
/// The longest header there is (5.1.6).
const MAX_HEADER: usize = 32;

const EIO: i32 = 5;
const E2BIG: i32 = 7;
const EAGAIN: i32 = 11;
const ENOMEM: i32 = 12;
const EFAULT: i32 = 14;
const EINVAL: i32 = 22;
/// The TAP answers this when its device is gone.
const EBADFD: i32 = 77;
const EMSGSIZE: i32 = 90;
const ENOBUFS: i32 = 105;

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Chains or frames that were moved or dropped: 0 if there was nothing to do.
    pub moved: usize,
    /// It waits for buffers of the queue, not for the TAP.
    pub starved: bool,
    /// Beside that, it waits for something that nobody tells it of (slots of the pool, more buffers than there are): it looks again soon.
    pub soon: bool,
}

/// What a pump has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PumpCounters {
    /// Frames that went, and those that were dropped for what they are.
    pub traffic: Traffic,
    /// Frames that the TAP did not take: it is down, short of memory, or knows better about the header.
    pub refused: u64,
}

/// What the TAP's answer to a write means.
enum Written {
    Taken,
    Refused,
    /// Memory that its owner took away is behind the pieces (device-24).
    Lost,
}

fn written(result: Result<usize, MemoryError>) -> Result<Result<Written, Reason>, BurstError> {
    match result {
        Ok(_) => Ok(Ok(Written::Taken)),
        Err(MemoryError::Os { errno: EIO | E2BIG | EAGAIN | ENOMEM | EINVAL | EMSGSIZE | ENOBUFS, .. }) => Ok(Ok(Written::Refused)),
        Err(MemoryError::Os { errno: EFAULT, .. }) => Ok(Ok(Written::Lost)),
        Err(MemoryError::TooManySegments { .. }) => Ok(Err(Reason::Long)),
        Err(error) => Err(error.into()),
    }
}

/// The memory behind this was taken away while the kernel used it (device-24).
#[cold]
fn driver_memory_lost<R: DriverRing>(queue: &mut DriverQueue<R>, address: u64, len: u64) -> BurstError {
    let error = RingError::MemoryLost { address, len };
    queue.break_with(error.clone());
    error.into()
}

/// As [`driver_memory_lost`], at the other end.
#[cold]
fn device_memory_lost<R: DeviceRing>(queue: &mut DeviceQueue<R>, first: Option<&Segment>) -> BurstError {
    let (address, len) = first.map_or((0, 0), |segment| (segment.address, segment.len.into()));
    let error = RingError::MemoryLost { address, len };
    queue.break_with(error.clone());
    error.into()
}

/// The TAP has come to its end without saying so.
fn gone() -> BurstError {
    BurstError::Memory(MemoryError::Os { operation: "poll", errno: EBADFD })
}

/// A list of segments without its first bytes.
fn behind(segments: impl Iterator<Item = (u64, u32)>, skip: usize) -> impl Iterator<Item = (u64, u32)> {
    let mut left = skip as u32;
    segments.filter_map(move |(address, len)| {
        let cut = left.min(len);
        left -= cut;
        (len > cut).then(|| (address.wrapping_add(cut.into()), len - cut))
    })
}
