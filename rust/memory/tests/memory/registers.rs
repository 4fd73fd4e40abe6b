//! Device registers at exactly their width.

use crate::memory;
use virtio_memory::{MemoryError, Registers};

#[test]
fn each_width_touches_its_own_bytes_only() {
    let device = memory(4096);
    let registers = Registers::new(device.span(256, 64).unwrap());
    assert!(registers.len() == 64 && !registers.is_empty());
    let around = |width: usize| {
        let mut bytes = [0; 24];
        device.read(256, &mut bytes).unwrap();
        bytes[..8].iter().chain(&bytes[8 + width..]).all(|byte| *byte == 0xee)
    };
    let fill = || device.write(256, &[0xee; 24]).unwrap();
    fill();
    registers.write8(8, 0x12).unwrap();
    assert!(around(1) && registers.read8(8) == Ok(0x12));
    fill();
    registers.write16(8, 0x1234).unwrap();
    assert!(around(2) && registers.read16(8) == Ok(0x1234) && registers.read8(9) == Ok(0x12));
    fill();
    registers.write32(8, 0x1234_5678).unwrap();
    assert!(around(4) && registers.read32(8) == Ok(0x1234_5678) && registers.read16(8) == Ok(0x5678));
    fill();
    registers.write64(8, 0x0123_4567_89ab_cdef).unwrap();
    assert!(around(8) && registers.read64(8) == Ok(0x0123_4567_89ab_cdef) && registers.read32(12) == Ok(0x0123_4567));
}

#[test]
fn places_beyond_the_end_or_not_aligned_are_refused() {
    let registers = Registers::new(memory(4096).span(0, 10).unwrap());
    assert_eq!(registers.read16(8), Ok(0));
    assert_eq!(registers.read32(8), Err(MemoryError::OutOfRange { offset: 8, len: 4, size: 10 }));
    assert_eq!(registers.write8(10, 1), Err(MemoryError::OutOfRange { offset: 10, len: 1, size: 10 }));
    assert_eq!(registers.write64(usize::MAX, 1), Err(MemoryError::OutOfRange { offset: u64::MAX, len: 8, size: 10 }));
    assert_eq!(registers.read16(1), Err(MemoryError::Misaligned { address: 1, align: 2 }));
    assert_eq!(registers.write32(2, 1), Err(MemoryError::Misaligned { address: 2, align: 4 }));
    assert_eq!(registers.read64(1), Err(MemoryError::Misaligned { address: 1, align: 8 }));
    assert_eq!(registers.read64(0), Ok(0));
}
