//! Regions come and go while somebody uses them.

use crate::memory;
use std::sync::Arc;
use virtio_memory::{DirtyBitmap, GuestMemory, MemoryError, Region};

fn region(address: u64, len: u64) -> Region {
    Region::new(address, len, memory(len as usize), 0).unwrap()
}

fn shape(guest: &GuestMemory) -> Vec<(u64, u64)> {
    guest.table().regions().iter().map(|region| (region.address(), region.len())).collect()
}

#[test]
fn regions_are_added_removed_and_replaced() {
    let guest = GuestMemory::new();
    assert!(shape(&guest).is_empty());
    guest.add(region(0x4000, 0x1000)).unwrap();
    guest.add(region(0x1000, 0x1000)).unwrap();
    assert_eq!(shape(&guest), [(0x1000, 0x1000), (0x4000, 0x1000)]);
    assert_eq!(guest.remove(0x2000).unwrap_err(), MemoryError::NoRegion { address: 0x2000 });
    assert_eq!(guest.remove(0x1001).unwrap_err(), MemoryError::NoRegion { address: 0x1001 });
    guest.remove(0x1000).unwrap();
    assert_eq!(shape(&guest), [(0x4000, 0x1000)]);
    guest.replace(vec![region(0x9000, 0x100), region(0, 0x100)]).unwrap();
    assert_eq!(shape(&guest), [(0, 0x100), (0x9000, 0x100)]);
}

#[test]
fn an_overlapping_region_is_refused_and_nothing_changes() {
    let guest = GuestMemory::new();
    guest.add(region(0x2000, 0x1000)).unwrap();
    guest.add(region(u64::MAX - 0xfff, 0x1000)).unwrap();
    let generation = guest.generation();
    for (address, len) in [(0x2000, 0x1000), (0x1fff, 2), (0x2fff, 1), (0x1000, 0x3000), (0x2800, 0x10)] {
        let error = MemoryError::Overlap { address, len, other_address: 0x2000, other_len: 0x1000 };
        assert_eq!(guest.add(region(address, len)).unwrap_err(), error);
    }
    assert!(matches!(guest.add(region(u64::MAX, 1)), Err(MemoryError::Overlap { other_len: 0x1000, .. })));
    assert!(guest.replace(vec![region(0, 2), region(1, 2)]).is_err());
    assert_eq!(shape(&guest), [(0x2000, 0x1000), (u64::MAX - 0xfff, 0x1000)]);
    assert_eq!(guest.generation(), generation);
    guest.add(region(0x1000, 0x1000)).unwrap();
    guest.add(region(0x3000, 0x1000)).unwrap();
}

#[test]
fn a_view_changes_when_it_is_refreshed() {
    let guest = GuestMemory::new();
    guest.add(region(0x1000, 0x1000)).unwrap();
    let mut view = guest.view();
    assert!(!view.refresh());
    guest.clone().add(region(0x2000, 0x1000)).unwrap();
    guest.remove(0x1000).unwrap();
    view.check(0x1000, 0x1000).unwrap();
    assert!(view.check(0x2000, 1).is_err());
    assert!(view.refresh());
    assert!(!view.refresh());
    assert_eq!(view.check(0x1000, 1), Err(MemoryError::Unmapped { address: 0x1000, len: 1 }));
    view.check(0x2000, 0x1000).unwrap();
    assert_eq!((view.generation(), view.memory().generation()), (3, 3));
}

#[test]
fn a_removed_region_stays_mapped_until_its_last_user_lets_go() {
    let guest = GuestMemory::new();
    let mapping = memory(0x1000);
    let watched = Arc::downgrade(&mapping);
    guest.add(Region::new(0x1000, 0x1000, mapping, 0).unwrap()).unwrap();
    assert_eq!(guest.uses(&watched.upgrade().unwrap()), 1);
    let mut view = guest.view();
    let span = view.span(0x1800, 16).unwrap();
    let words = span.u16s(0, 8).unwrap();
    guest.remove(0x1000).unwrap();
    assert_eq!(guest.uses(&watched.upgrade().unwrap()), 0);
    view.write(0x1800, &[1, 2]).unwrap();
    assert!(view.refresh());
    span.write(2, &[3, 4]).unwrap();
    drop(span);
    assert_eq!((words.load(0), words.load(1)), (0x0201, 0x0403));
    assert!(watched.upgrade().is_some());
    drop(words);
    assert!(watched.upgrade().is_none());
}

#[test]
fn the_dirty_bitmap_comes_and_goes_with_the_table() {
    let guest = GuestMemory::new();
    guest.add(region(0x1000, 0x3000)).unwrap();
    let mut view = guest.view();
    let bitmap = Arc::new(DirtyBitmap::new(16).unwrap());
    guest.set_dirty(Some(bitmap.clone()));
    view.write(0x1000, &[1]).unwrap();
    assert_eq!(bitmap.take(), []);
    assert!(view.refresh());
    view.write(0x1000, &[1]).unwrap();
    // Regions that come later are marked too.
    guest.add(region(0x8000, 0x1000)).unwrap();
    assert!(view.refresh());
    view.write(0x8fff, &[1]).unwrap();
    assert_eq!(bitmap.take(), [(0, 0b1_0000_0010)]);
    guest.set_dirty(None);
    assert!(view.refresh());
    view.write(0x1000, &[1]).unwrap();
    assert_eq!(bitmap.take(), []);
}

#[test]
fn regions_change_while_other_threads_use_their_views() {
    let guest = GuestMemory::new();
    guest.add(region(0x1000, 0x1000)).unwrap();
    std::thread::scope(|scope| {
        let users: Vec<_> = (0..3u64)
            .map(|user| {
                let mut view = guest.view();
                scope.spawn(move || {
                    for round in 0..3000 {
                        view.refresh();
                        view.write(0x1000 + user * 8, &[round as u8; 8]).unwrap();
                        // Both regions or the first alone, never a half of anything.
                        if view.check(0x1000, 0x2000).is_ok() {
                            view.write(0x1ffe, &[7; 4]).unwrap();
                        }
                    }
                })
            })
            .collect();
        while users.iter().any(|user| !user.is_finished()) {
            guest.add(region(0x2000, 0x1000)).unwrap();
            guest.remove(0x2000).unwrap();
        }
    });
}
