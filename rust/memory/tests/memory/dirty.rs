//! The dirty bitmap marks exactly the pages written.

use crate::memory;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;
use virtio_memory::{DirtyBitmap, MemoryError, PAGE_SIZE, Region, RegionTable};

fn pages(words: &[(u64, u64)]) -> BTreeSet<u64> {
    words.iter().flat_map(|(number, word)| (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| 64 * number + bit)).collect()
}

#[test]
fn each_kind_of_write_marks_its_pages_and_no_read_does() {
    let bitmap = Arc::new(DirtyBitmap::new(20).unwrap());
    let regions = vec![
        Region::new(0, 5 * PAGE_SIZE, memory(5 * 4096), 0).unwrap(),
        Region::new(5 * PAGE_SIZE, 15 * PAGE_SIZE, memory(15 * 4096), 0).unwrap(),
    ];
    let table = RegionTable::new(regions, Some(bitmap.clone())).unwrap();
    let slots = memory(16384);
    let taken = || pages(&bitmap.take());

    table.write(4095, &[1, 2]).unwrap();
    assert_eq!(taken(), BTreeSet::from([0, 1]));
    table.write(5 * PAGE_SIZE - 1, &[1; 4097]).unwrap();
    assert_eq!(taken(), BTreeSet::from([4, 5]));
    table.store(7 * PAGE_SIZE + 8, 8, 1).unwrap();
    assert_eq!(taken(), BTreeSet::from([7]));
    table.copy_in(9 * PAGE_SIZE, 8193, &slots, 0).unwrap();
    assert_eq!(taken(), BTreeSet::from([9, 10, 11]));
    let place = table.place(12 * PAGE_SIZE, 16384).unwrap();
    place.write(4095, &[1, 2]).unwrap();
    place.copy_in(3 * 4096, 4096, &slots, 0).unwrap();
    assert_eq!(taken(), BTreeSet::from([12, 13, 15]));
    table.mark(19 * PAGE_SIZE, 4096);
    assert_eq!(taken(), BTreeSet::from([19]));

    table.read(0, &mut [0; 100]).unwrap();
    table.load(0, 8).unwrap();
    table.copy_out(0, 100, &slots, 0).unwrap();
    table.place(0, 100).unwrap().read(0, &mut [0; 100]).unwrap();
    table.span(0, 100).unwrap();
    table.write(0, &[]).unwrap();
    assert!(table.write(20 * PAGE_SIZE - 1, &[1, 2]).is_err());
    assert!(table.store(0, 1, 256).is_err());
    assert_eq!(taken(), BTreeSet::new());
}

#[test]
fn pages_beyond_the_bitmap_are_left_out() {
    let bitmap = DirtyBitmap::new(9).unwrap();
    assert_eq!(bitmap.pages(), 9);
    bitmap.mark(8 * PAGE_SIZE, u64::MAX);
    bitmap.mark(9 * PAGE_SIZE, 1);
    bitmap.mark(u64::MAX, 1);
    bitmap.mark(u64::MAX, u64::MAX);
    bitmap.mark(0, 0);
    assert_eq!(bitmap.take(), [(0, 0x100)]);
    bitmap.mark(0, u64::MAX);
    assert_eq!(bitmap.take(), [(0, 0x1ff)]);
}

#[test]
fn marks_far_apart_are_told_by_their_words_alone() {
    let bitmap = DirtyBitmap::new(1 << 30).unwrap();
    let edge = (1 << 15) * PAGE_SIZE;
    bitmap.mark((1 << 42) - 1, 1);
    bitmap.mark(edge - 1, 2);
    assert_eq!(bitmap.take(), [(511, 1 << 63), (512, 1), ((1 << 24) - 1, 1 << 63)]);
    assert_eq!(bitmap.take(), []);
}

#[test]
fn a_bitmap_of_no_or_too_many_pages_is_refused() {
    for value in [0, (1 << 30) + 1, u64::MAX] {
        let error = MemoryError::BadSize { what: "dirty bitmap's pages", value, min: 1, max: 1 << 30, multiple_of: 1 };
        assert_eq!(DirtyBitmap::new(value).unwrap_err(), error);
    }
}

proptest! {
    #[test]
    fn marks_agree_with_a_set_of_pages(marks in prop::collection::vec((0..1_200_000u64, 0..300_000u64), 0..8)) {
        let bitmap = DirtyBitmap::new(257).unwrap();
        let mut model = BTreeSet::new();
        for (address, len) in marks {
            bitmap.mark(address, len);
            if len > 0 {
                model.extend((address / PAGE_SIZE..=(address + len - 1) / PAGE_SIZE).filter(|page| *page < 257));
            }
        }
        let words = bitmap.take();
        prop_assert!(words.iter().all(|(_, word)| *word != 0));
        prop_assert_eq!(pages(&words), model);
        prop_assert_eq!(bitmap.take(), []);
    }
}

/// Nobody's mark is lost: a log in which another side sets bits of the same bytes meanwhile.
#[test]
fn marks_are_merged_into_a_log_that_others_write() {
    const PAGES: u64 = 512;
    let (bitmap, log) = (DirtyBitmap::new(PAGES).unwrap(), memory(PAGES as usize / 8));
    for _ in 0..100 {
        log.zero(0, log.len()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for place in 0..4 * log.len() {
                    log.fetch_or(place / 4, 2 << (place % 4 * 2)).unwrap();
                }
            });
            for page in (0..PAGES).step_by(2) {
                bitmap.mark(page * PAGE_SIZE, 1);
                bitmap.merge_into(&log, &[]);
            }
        });
        let mut bytes = vec![0; log.len()];
        log.read(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0xff));
    }
    assert_eq!(bitmap.take(), []);
}
