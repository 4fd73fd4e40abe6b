//! Region tables: translation, straddling, and every refusal.

use crate::{counting, memory};
use std::sync::Arc;
use virtio_memory::{MemoryError, Region, RegionTable};

fn table(regions: &[(u64, u64)]) -> RegionTable {
    let make = |(address, len): &(u64, u64)| Region::new(*address, *len, memory(*len as usize), 0).unwrap();
    RegionTable::new(regions.iter().map(make).collect(), None).unwrap()
}

#[test]
fn an_access_may_straddle_regions_that_touch() {
    let table = table(&[(0x3000, 0x1000), (0x1000, 0x1000), (0x2000, 0x1000)]);
    let bytes = counting(3, 0x1800);
    table.write(0x1c00, &bytes).unwrap();
    let mut back = vec![0; 0x1800];
    table.read(0x1c00, &mut back).unwrap();
    assert_eq!(back, bytes);
    let mut piece = [0; 4];
    for (region, address) in [(0, 0x1c00), (1, 0x2000), (1, 0x2ffc), (2, 0x3000)] {
        let region = &table.regions()[region];
        region.mapping().read((address - region.address()) as usize, &mut piece).unwrap();
        assert_eq!(piece[..], bytes[(address - 0x1c00) as usize..][..4]);
    }
    table.check(0x1000, 0x3000).unwrap();
    assert_eq!(table.span(0x1fff, 2).unwrap_err(), MemoryError::Straddles { address: 0x1fff, len: 2 });
    assert_eq!(table.span(0x1fff, 1).unwrap().len(), 1);
}

#[test]
fn nothing_moves_unless_the_whole_span_is_mapped() {
    let table = table(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x4000, 0x1000)]);
    for (address, len) in [(0xfff, 2), (0x2fff, 2), (0x2800, 0x2000), (0x5000, 1), (0, 1), (0x3fff, 2)] {
        let error = MemoryError::Unmapped { address, len };
        assert_eq!(table.check(address, len), Err(error.clone()));
        assert_eq!(table.write(address, &vec![0xff; len as usize]), Err(error.clone()));
        let mut untouched = vec![0x55; len as usize];
        assert_eq!(table.read(address, &mut untouched), Err(error.clone()));
        assert!(untouched.iter().all(|byte| *byte == 0x55));
        assert_eq!(table.span(address, len).unwrap_err(), error);
    }
    let mut all = vec![0; 0x2000];
    table.read(0x1000, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
}

#[test]
fn bytes_are_asked_for_ahead_wherever_they_are_said_to_be() {
    let table = table(&[(0x1000, 0x1000), (0x2000, 0x1000)]);
    for (address, len) in [(0x1000, 0), (0x1ff0, 16), (0x1ff0, 64), (0x2fff, 1), (0x2fff, 2), (0x3000, 1), (0, 1), (u64::MAX, usize::MAX)] {
        table.prefetch_write(address, len);
    }
    let mut all = vec![0xff; 0x2000];
    table.read(0x1000, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0));
}

#[test]
fn a_place_is_in_one_region_and_nothing_leaves_it() {
    let table = table(&[(0x1000, 0x1000), (0x2000, 0x1000)]);
    assert!(
        [(0xfff, 1), (0x1fff, 2), (0x3000, 1), (0x2000, 0x1001), (u64::MAX, 2)].iter().all(|(at, len)| table.place(*at, *len).is_none())
    );
    let (place, slots) = (table.place(0x2ff0, 16).unwrap(), memory(4096));
    place.write(0, &[1; 12]).unwrap();
    slots.write(100, &[2; 4]).unwrap();
    place.copy_in(12, 4, &slots, 100).unwrap();
    place.write(16, &[]).unwrap();
    let outside = |offset, len| MemoryError::OutOfRange { offset, len, size: 16 };
    assert_eq!(place.write(13, &[3; 4]), Err(outside(13, 4)));
    assert_eq!(place.write(usize::MAX, &[3; 4]), Err(outside(u64::MAX, 4)));
    assert_eq!(place.copy_in(12, 5, &slots, 0), Err(outside(12, 5)));
    assert!(place.copy_in(0, 16, &slots, 4090).is_err());
    let mut bytes = [0; 16];
    place.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]);
    assert_eq!(place.read(1, &mut bytes), Err(outside(1, 16)));
}

#[test]
fn the_last_address_is_usable_and_beyond_it_overflows() {
    let top = u64::MAX - 0xfff;
    let table = table(&[(top, 0x1000), (top - 0x1000, 0x1000)]);
    table.write(u64::MAX, &[9]).unwrap();
    table.write(top - 2, &counting(1, 0x1002)).unwrap();
    let mut last = [0; 1];
    table.read(u64::MAX, &mut last).unwrap();
    assert_eq!(last, [0x1002u64 as u8]);
    table.check(top - 0x1000, 0x2000).unwrap();
    assert_eq!(table.span(top, 0x1000).unwrap().len(), 0x1000);
    for (address, len) in [(u64::MAX, 2), (top, 0x1001), (1, u64::MAX), (u64::MAX, u64::MAX)] {
        let error = if address == 1 { MemoryError::Unmapped { address, len } } else { MemoryError::Overflow { address, len } };
        assert_eq!(table.check(address, len), Err(error.clone()));
        assert_eq!(table.span(address, len).unwrap_err(), error);
    }
    assert_eq!(table.read(u64::MAX, &mut [0; 2]), Err(MemoryError::Overflow { address: u64::MAX, len: 2 }));
}

#[test]
fn no_bytes_are_everywhere() {
    let table = table(&[(0x1000, 0x1000)]);
    for address in [0, 0x1000, 0x2000, u64::MAX] {
        table.check(address, 0).unwrap();
        table.read(address, &mut []).unwrap();
        table.write(address, &[]).unwrap();
    }
    assert!(table.span(0x1000, 0).unwrap().is_empty());
    assert_eq!(table.span(0x2000, 0).unwrap_err(), MemoryError::Unmapped { address: 0x2000, len: 0 });
    assert_eq!(RegionTable::new(Vec::new(), None).unwrap().check(0, 1), Err(MemoryError::Unmapped { address: 0, len: 1 }));
}

#[test]
fn regions_that_no_table_can_have_are_refused() {
    let mapping = memory(0x1000);
    let make = |address, len, offset| Region::new(address, len, mapping.clone(), offset).map(|region| region.len());
    assert_eq!(make(u64::MAX - 0xfff, 0x1000, 0), Ok(0x1000));
    assert_eq!(make(u64::MAX - 0xffe, 0x1000, 0), Err(MemoryError::Overflow { address: u64::MAX - 0xffe, len: 0x1000 }));
    assert_eq!(make(0, 0x1001, 0), Err(MemoryError::OutOfRange { offset: 0, len: 0x1001, size: 0x1000 }));
    assert_eq!(make(0, 1, 0x1000), Err(MemoryError::OutOfRange { offset: 0x1000, len: 1, size: 0x1000 }));
    assert_eq!(make(0, u64::MAX, 1), Err(MemoryError::OutOfRange { offset: 1, len: u64::MAX, size: 0x1000 }));
    let empty = MemoryError::BadSize { what: "region length", value: 0, min: 1, max: 0x1000, multiple_of: 1 };
    assert_eq!(make(0, 0, 0), Err(empty));
}

#[test]
fn a_table_of_regions_that_overlap_is_refused() {
    let mapping = memory(0x3000);
    let make = |address, len| Region::new(address, len, mapping.clone(), 0).unwrap();
    let error = RegionTable::new(vec![make(0x5000, 0x1000), make(0x3000, 0x2001)], None).unwrap_err();
    let expected = MemoryError::Overlap { address: 0x5000, len: 0x1000, other_address: 0x3000, other_len: 0x2001 };
    assert_eq!(error, expected);
    RegionTable::new(vec![make(0x5000, 0x1000), make(0x3000, 0x2000)], None).unwrap();
}

#[test]
fn words_are_loaded_and_stored_in_one_piece() {
    let table = table(&[(0x1002, 0xffe), (0x2000, 0x1000)]);
    table.store(0x2008, 8, 0x0123_4567_89ab_cdef).unwrap();
    assert_eq!(table.load(0x2008, 4), Ok(0x89ab_cdef));
    assert_eq!(table.load(0x200c, 2), Ok(0x4567));
    assert_eq!(table.load(0x1fff, 2), Err(MemoryError::Straddles { address: 0x1fff, len: 2 }));
    assert_eq!(table.load(0x2001, 2), Err(MemoryError::Misaligned { address: 0x2001, align: 2 }));
    assert_eq!(table.load(0x2000, 3), Err(MemoryError::BadWidth { width: 3 }));
    assert_eq!(table.store(0x3000, 1, 0), Err(MemoryError::Unmapped { address: 0x3000, len: 1 }));
    assert!(matches!(table.store(0x2000, 1, 256), Err(MemoryError::BadSize { value: 256, max: 255, .. })));
    // The place in memory counts, here 0x1002 is a mapping's first byte.
    assert_eq!(table.load(0x1006, 4), Ok(0));
}

#[test]
fn bytes_go_between_a_guest_and_a_mapping() {
    let table = table(&[(0x1000, 0x1000), (0x2000, 0x1000)]);
    let slots = memory(4096);
    table.write(0x1ff0, &counting(0, 64)).unwrap();
    table.copy_out(0x1ff0, 64, &slots, 100).unwrap();
    let mut bytes = [0; 64];
    slots.read(100, &mut bytes).unwrap();
    assert_eq!(bytes[..], counting(0, 64));
    table.copy_in(0x1fc1, 64, &slots, 100).unwrap();
    table.read(0x1fc1, &mut bytes).unwrap();
    assert_eq!(bytes[..], counting(0, 64));
    let beyond = MemoryError::OutOfRange { offset: 4090, len: 7, size: 4096 };
    assert_eq!(table.copy_out(0x1000, 7, &slots, 4090), Err(beyond.clone()));
    assert_eq!(table.copy_in(0x1000, 7, &slots, 4090), Err(beyond));
    let unmapped = MemoryError::Unmapped { address: 0x2ffa, len: 7 };
    assert_eq!(table.copy_out(0x2ffa, 7, &slots, 0), Err(unmapped.clone()));
    assert_eq!(table.copy_in(0x2ffa, 7, &slots, 0), Err(unmapped));
}

#[test]
fn many_regions_are_found_by_several_threads() {
    let mapping = memory(256 * 64);
    let regions = (0..256).map(|index| Region::new(index * 0x1000, 64, mapping.clone(), index as usize * 64).unwrap());
    let table = Arc::new(RegionTable::new(regions.collect(), None).unwrap());
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let table = &table;
            scope.spawn(move || {
                for round in 0..2000u64 {
                    let region = (round * 37 + thread * 11) % 256;
                    let address = region * 0x1000 + thread * 16;
                    table.store(address, 8, region << 8 | thread).unwrap();
                    assert_eq!(table.load(address, 8), Ok(region << 8 | thread));
                    assert!(table.check(region * 0x1000 + 63, 2).is_err());
                }
            });
        }
    });
}
