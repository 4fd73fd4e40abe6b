//! Numbers of the specification: flag bits, offsets and alignments, with their sections.

/// The largest ring (2.7, 2.8.10.1).
pub const MAX_SIZE: u32 = 32768;
/// Bytes of a descriptor in both formats (2.7.5, 2.8.13).
pub const DESCRIPTOR_SIZE: u64 = 16;
/// The longest indirect table that a device here can be asked to follow.
pub const MAX_CHAIN: u16 = 1024;

/// Descriptor flag: the buffer continues in the next descriptor (2.7.5, 2.8.6).
pub const DESC_F_NEXT: u16 = 1;
/// Descriptor flag: device-writable (2.7.5, 2.8.3).
pub const DESC_F_WRITE: u16 = 2;
/// Descriptor flag: the buffer holds a table of descriptors (2.7.5.3, 2.8.7).
pub const DESC_F_INDIRECT: u16 = 4;
/// Packed descriptor flag: available, against the wrap counter (2.8.1).
pub const DESC_F_AVAIL: u16 = 1 << 7;
/// Packed descriptor flag: used, against the wrap counter (2.8.1).
pub const DESC_F_USED: u16 = 1 << 15;

/// Available ring flag: no used-buffer notification, please (2.7.7).
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// Used ring flag: no available-buffer notification, please (2.7.10).
pub const USED_F_NO_NOTIFY: u16 = 1;

/// Packed event flags: notify (2.8.14).
pub const EVENT_FLAGS_ENABLE: u32 = 0;
/// Packed event flags: do not notify (2.8.14).
pub const EVENT_FLAGS_DISABLE: u32 = 1;
/// Packed event flags: notify at one descriptor (2.8.14); only with EVENT_IDX.
pub const EVENT_FLAGS_DESC: u32 = 2;

/// Feature bit INDIRECT_DESC (6).
pub const F_INDIRECT_DESC: u32 = 28;
/// Feature bit EVENT_IDX (6).
pub const F_EVENT_IDX: u32 = 29;
/// Feature bit RING_PACKED (6).
pub const F_RING_PACKED: u32 = 34;
/// Feature bit IN_ORDER (6).
pub const F_IN_ORDER: u32 = 35;
/// Feature bit NOTIFICATION_DATA (6).
pub const F_NOTIFICATION_DATA: u32 = 38;
