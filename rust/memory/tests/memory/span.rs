//! Spans and the word arrays taken from them.

use crate::memory;
use virtio_memory::{FencePoint, MemoryError, full_fence};

#[test]
fn word_arrays_are_little_endian_and_share_the_bytes() {
    let ours = memory(4096);
    let span = ours.span(16, 64).unwrap();
    let (half, word, double) = (span.u16s(0, 32).unwrap(), span.u32s(4, 3).unwrap(), span.u64s(8, 7).unwrap());
    assert_eq!((half.len(), word.len(), double.len()), (32, 3, 7));
    double.store_release(0, 0x0807_0605_0403_0201);
    let mut bytes = [0; 8];
    span.read(8, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
    ours.read(24, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
    span.write(0, &[0xaa, 0xbb]).unwrap();
    assert_eq!(half.load_acquire(0), 0xbbaa);
    half.store(0, 0x1234);
    word.store(2, 0xdead_beef);
    full_fence(FencePoint::DeviceArm);
    ours.read(16, &mut bytes[..2]).unwrap();
    assert_eq!(bytes[..2], [0x34, 0x12]);
    span.read(12, &mut bytes[..4]).unwrap();
    assert_eq!(bytes[..4], [0xef, 0xbe, 0xad, 0xde]);
}

#[test]
fn arrays_beyond_the_span_or_not_aligned_are_refused() {
    let ours = memory(4096);
    let span = ours.span(4, 32).unwrap();
    assert_eq!(span.u16s(0, 16).unwrap().len(), 16);
    assert_eq!(span.u16s(0, 17).unwrap_err(), MemoryError::OutOfRange { offset: 0, len: 34, size: 32 });
    assert_eq!(span.u32s(32, 1).unwrap_err(), MemoryError::OutOfRange { offset: 32, len: 4, size: 32 });
    assert!(span.u64s(4, usize::MAX).is_err());
    assert!(span.u64s(usize::MAX, 1).is_err());
    assert_eq!(span.u16s(1, 1).unwrap_err(), MemoryError::Misaligned { address: 1, align: 2 });
    assert_eq!(span.u64s(0, 1).unwrap_err(), MemoryError::Misaligned { address: 0, align: 8 });
    assert_eq!(span.u64s(4, 1).unwrap().len(), 1);
    assert!(span.u16s(32, 0).unwrap().is_empty());
    let error = MemoryError::OutOfRange { offset: 30, len: 3, size: 32 };
    assert_eq!((span.read(30, &mut [0; 3]), span.write(30, &[0; 3])), (Err(error.clone()), Err(error)));
}

#[test]
#[should_panic(expected = "word 4 of 4")]
fn an_index_beyond_an_array_is_our_own_fault_and_panics() {
    memory(4096).span(0, 16).unwrap().u32s(0, 4).unwrap().load(4);
}
