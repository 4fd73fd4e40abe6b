//! Either format behind one type: matched once per burst, which is free; per item it would not be.

use crate::batch::ChainBatch;
use crate::chain::Segment;
use crate::error::RingError;
use crate::packed::{PackedDevice, PackedDriver};
use crate::ring::{Buffer, Completion, Completions, DeviceRing, DriverRing, Fill, Filled, Form, RingState, Snapshot, Takeover, Used};
use crate::split::{SplitDevice, SplitDriver};
use crate::tracking::{Footprint, Resubmission};
use virtio_memory::RegionTable;

/// A driver's ring of either format.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum AnyDriver {
    Split(SplitDriver),
    Packed(PackedDriver),
}

/// A device's ring of either format.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum AnyDevice {
    Split(SplitDevice),
    Packed(PackedDevice),
}

macro_rules! delegate {
    ($any:ident: $ring:ident { $(fn $name:ident$(<$generic:ident: $bound:ident>)?($self:ident: $receiver:ty, ($($arg:ident: $type:ty),*)) -> $out:ty;)* }) => {
        impl $ring for $any {
            $(#[inline(always)]
            fn $name$(<$generic: $bound>)?($self: $receiver, $($arg: $type),*) -> $out {
                match $self {
                    $any::Split(ring) => ring.$name($($arg),*),
                    $any::Packed(ring) => ring.$name($($arg),*),
                }
            })*
        }
    };
}

delegate! { AnyDriver: DriverRing {
    fn size(self: &Self, ()) -> u16;
    fn free(self: &Self, ()) -> u16;
    fn outstanding(self: &Self, ()) -> u16;
    fn add(self: &mut Self, (token: u64, segments: &[Segment], form: Form)) -> Result<(), RingError>;
    fn add_batch(self: &mut Self, (buffers: &[Buffer])) -> Result<usize, RingError>;
    fn publish(self: &mut Self, ()) -> ();
    fn should_notify(self: &mut Self, ()) -> Option<bool>;
    fn pop_used_batch(self: &mut Self, (out: &mut [Used], clamped: &mut u64)) -> Result<usize, RingError>;
    fn arm(self: &mut Self, ()) -> bool;
    fn disarm(self: &mut Self, ()) -> ();
    fn notification_position(self: &Self, ()) -> u16;
    fn take_outstanding(self: &mut Self, ()) -> Vec<u64>;
    fn resume(self: &mut Self, (how: Takeover)) -> Result<RingState, RingError>;
    fn snapshot(self: &Self, ()) -> Snapshot;
} }

delegate! { AnyDevice: DeviceRing {
    fn size(self: &Self, ()) -> u16;
    fn outstanding(self: &Self, ()) -> u16;
    fn chain_limit(self: &Self, ()) -> u16;
    fn pop_batch(self: &mut Self, (memory: &RegionTable, out: &mut ChainBatch)) -> Result<usize, RingError>;
    fn fill_batch<F: Fill>(self: &mut Self, (memory: &RegionTable, most: usize, filler: &mut F)) -> (usize, Filled);
    fn check(self: &Self, (completion: &Completion)) -> Result<(), RingError>;
    fn complete_batch<C: Completions>(self: &mut Self, (completions: C)) -> Result<(), RingError>;
    fn rewind(self: &mut Self, (count: usize)) -> Result<(), RingError>;
    fn publish(self: &mut Self, (memory: &RegionTable)) -> u32;
    fn should_notify(self: &mut Self, ()) -> Option<bool>;
    fn arm(self: &mut Self, (memory: &RegionTable)) -> bool;
    fn disarm(self: &mut Self, (memory: &RegionTable)) -> ();
    fn observe(self: &mut Self, ()) -> ();
    fn told(self: &Self, ()) -> &[u16];
    fn clear_told(self: &mut Self, ()) -> ();
    fn footprint(self: &Self, (head: u16)) -> Footprint;
    fn newest(self: &Self, (count: usize, out: &mut Vec<(u16, u32)>)) -> Result<(), RingError>;
    fn resubmit(self: &mut Self, (memory: &RegionTable, again: &Resubmission, out: &mut ChainBatch)) -> Result<(), RingError>;
    fn skip(self: &mut Self, (chains: u16, slots: u16)) -> ();
    fn state(self: &Self, ()) -> RingState;
    fn snapshot(self: &Self, ()) -> Snapshot;
} }
