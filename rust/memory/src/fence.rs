//! The full fences of the ring protocol, each by its name.
//!
//! Every "publish, then look whether to notify" and "arm, then look whether more came" needs a full fence between a store and a load of
//! different words (2.7.13.3.1, 2.7.7.1, 2.8.21.3.1). Naming them lets the model checker take each one away in turn and see a lost wake-up.

/// Where a full fence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FencePoint {
    /// Driver: between making buffers available and reading the device's suppression fields.
    DriverDecide,
    /// Driver: between asking for used-buffer notifications and looking for used buffers once more.
    DriverArm,
    /// Device: between using buffers and reading the driver's suppression fields.
    DeviceDecide,
    /// Device: between asking for available-buffer notifications and looking for available buffers once more.
    DeviceArm,
}

/// A sequentially consistent fence.
#[cfg(not(loom))]
#[inline(always)]
pub fn full_fence(_at: FencePoint) {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

/// A sequentially consistent fence, unless the model took this one away.
#[cfg(loom)]
pub fn full_fence(at: FencePoint) {
    if removed::get() != Some(at) {
        loom::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }
}

/// Which fence the model leaves out.
#[cfg(loom)]
pub mod removed {
    use super::FencePoint;
    use std::sync::Mutex;

    static REMOVED: Mutex<Option<FencePoint>> = Mutex::new(None);

    /// Leaves one fence out from here on; `None` puts it back.
    pub fn set(point: Option<FencePoint>) {
        *REMOVED.lock().unwrap() = point;
    }

    pub(super) fn get() -> Option<FencePoint> {
        *REMOVED.lock().unwrap()
    }
}
