//! First fit, aligned, coalescing.

use proptest::prelude::*;
use virtio_memory::{Allocator, MemoryError};

#[test]
fn the_lowest_gap_with_room_is_taken() {
    let mut allocator = Allocator::new(1000);
    assert_eq!(allocator.allocate(10, 1), Ok(0));
    assert_eq!(allocator.allocate(100, 64), Ok(64));
    assert_eq!(allocator.allocate(20, 16), Ok(16));
    assert_eq!(allocator.allocate(4, 4), Ok(12));
    assert_eq!(allocator.allocations(), 4);
    assert_eq!(allocator.free(64), Ok(100));
    assert_eq!(allocator.allocate(964, 4), Ok(36));
    assert_eq!(allocator.largest(), 2, "the two bytes that the alignment skipped");
}

#[test]
fn what_does_not_fit_is_refused_with_the_largest_gap() {
    let mut allocator = Allocator::new(256);
    assert_eq!(allocator.allocate(100, 128), Ok(0));
    assert_eq!(allocator.allocate(157, 1), Err(MemoryError::OutOfMemory { requested: 157, largest: 156 }));
    assert_eq!(allocator.allocate(129, 128), Err(MemoryError::OutOfMemory { requested: 129, largest: 156 }));
    assert_eq!(allocator.allocate(1, 1 << 63), Err(MemoryError::OutOfMemory { requested: 1, largest: 156 }));
    for align in [0, 3, 48] {
        assert_eq!(allocator.allocate(1, align), Err(MemoryError::BadAlignment { align: align as u64 }));
    }
    for value in [0, 257, u64::MAX] {
        let error = MemoryError::BadSize { what: "allocation", value, min: 1, max: 256, multiple_of: 1 };
        assert_eq!(allocator.allocate(value as usize, 1), Err(error));
    }
    assert_eq!(allocator.free(1), Err(MemoryError::NotAllocated { offset: 1 }));
    assert_eq!(allocator.free(0), Ok(100));
    assert_eq!(allocator.free(0), Err(MemoryError::NotAllocated { offset: 0 }));
    assert_eq!(Allocator::new(0).largest(), 0);
}

proptest! {
    #[test]
    fn pieces_never_overlap_and_all_comes_back(steps in prop::collection::vec((1..120usize, 0..7u32, any::<prop::sample::Index>(), any::<bool>()), 1..80)) {
        const SIZE: usize = 1500;
        let mut allocator = Allocator::new(SIZE);
        let mut taken: Vec<(usize, usize)> = Vec::new();
        for (size, align, which, free) in steps {
            if free && !taken.is_empty() {
                let (offset, size) = taken.swap_remove(which.index(taken.len()));
                prop_assert_eq!(allocator.free(offset), Ok(size));
            } else {
                let align = 1 << align;
                let fits = |offset: usize| offset + size <= SIZE && taken.iter().all(|(at, len)| offset + size <= *at || at + len <= offset);
                let lowest = (0..SIZE).step_by(align).find(|offset| fits(*offset));
                let outcome = allocator.allocate(size, align);
                prop_assert_eq!(outcome.as_ref().ok().copied(), lowest);
                taken.extend(outcome.ok().map(|offset| (offset, size)));
            }
            prop_assert_eq!(allocator.allocations(), taken.len());
        }
        for (offset, _) in taken {
            allocator.free(offset).unwrap();
        }
        prop_assert_eq!(allocator.largest(), SIZE);
    }
}
