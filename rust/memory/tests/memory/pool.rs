//! Who owns a slot, and who is told when it comes back.

use crate::{foreign, memory};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::sync::Arc;
use virtio_memory::{BufferPool, HEADROOM, MemoryError};

fn pool(slots: u32) -> BufferPool {
    BufferPool::new(memory(slots as usize * 128), 0, slots, 128).unwrap()
}

#[test]
fn a_slot_is_taken_once_passed_on_and_given_back() {
    let pool = pool(3);
    let mut state = pool.lock();
    let (burst, queue) = (state.new_owner(), state.new_owner());
    assert!(burst != queue && burst != 0 && queue != 0);
    let taken: BTreeSet<_> = std::iter::from_fn(|| state.take(burst)).collect();
    assert_eq!(taken, BTreeSet::from([0, 1, 2]));
    assert_eq!((state.available(), state.take(queue)), (0, None));
    state.transfer(1, burst, queue).unwrap();
    assert_eq!((state.owner(0), state.owner(1), state.owner(3)), (Some(burst), Some(queue), None));
    state.release(1, queue).unwrap();
    assert_eq!((state.owner(1), state.take(queue)), (Some(0), Some(1)));
}

#[test]
fn whoever_does_not_own_a_slot_can_do_nothing_with_it() {
    let pool = pool(3);
    let mut state = pool.lock();
    let (burst, queue) = (state.new_owner(), state.new_owner());
    let slot = state.take(burst).unwrap();
    let wrong = MemoryError::NotOwned { slot, owner: burst, claimed: queue };
    assert_eq!(state.transfer(slot, queue, queue), Err(wrong.clone()));
    assert_eq!(state.release(slot, queue), Err(wrong.clone()));
    assert_eq!(state.lend(slot, queue, 1), Err(wrong));
    state.release(slot, burst).unwrap();
    let free = MemoryError::NotOwned { slot, owner: 0, claimed: burst };
    assert_eq!(state.release(slot, burst), Err(free));
    // Nobody can pose as the pool itself and free a slot twice.
    assert_eq!(state.release(slot, 0), Err(MemoryError::NotOwned { slot, owner: 0, claimed: 0 }));
    assert_eq!(state.transfer(slot, 0, burst), Err(MemoryError::NotOwned { slot, owner: 0, claimed: 0 }));
    let beyond = MemoryError::BadSlot { slot: 3, slots: 3 };
    assert_eq!((state.release(3, burst), state.transfer(3, burst, queue)), (Err(beyond.clone()), Err(beyond)));
    assert_eq!(state.available(), 3);
}

#[test]
fn a_lender_is_told_once_when_its_slot_comes_back() {
    let pool = pool(4);
    let mut state = pool.lock();
    let (burst, other) = (state.new_owner(), state.new_owner());
    let (first, second) = (state.register_lender().unwrap(), state.register_lender().unwrap());
    let slots: Vec<u32> = (0..4).map(|_| state.take(burst).unwrap()).collect();
    state.lend(slots[0], burst, first).unwrap();
    state.lend(slots[1], burst, first).unwrap();
    state.lend(slots[2], burst, second).unwrap();
    assert_eq!(state.next_returned(first), None);
    // Passed on, it still is the lender's.
    state.transfer(slots[0], burst, other).unwrap();
    state.release(slots[0], other).unwrap();
    state.release(slots[2], burst).unwrap();
    state.release(slots[3], burst).unwrap();
    assert_eq!((state.next_returned(first), state.next_returned(first)), (Some(slots[0]), None));
    assert_eq!((state.next_returned(second), state.next_returned(second)), (Some(slots[2]), None));
    // Taken and released again, it is nobody's news.
    let again: Vec<u32> = std::iter::from_fn(|| state.take(burst)).collect();
    assert_eq!(again.len(), 3);
    again.into_iter().for_each(|slot| state.release(slot, burst).unwrap());
    assert_eq!((state.next_returned(first), state.next_returned(second)), (None, None));
    assert_eq!((state.next_returned(0), state.next_returned(9)), (None, None));
}

#[test]
fn a_lender_that_ended_is_told_nothing() {
    let pool = pool(2);
    let mut state = pool.lock();
    let owner = state.new_owner();
    let lender = state.register_lender().unwrap();
    let slot = state.take(owner).unwrap();
    state.lend(slot, owner, lender).unwrap();
    state.unregister_lender(lender);
    let again = state.register_lender().unwrap();
    assert_eq!(again, lender, "numbers are used again");
    state.release(slot, owner).unwrap();
    assert_eq!(state.next_returned(again), None);
    state.unregister_lender(0);
    state.unregister_lender(77);
}

#[test]
fn all_slots_of_an_owner_come_back_at_its_end() {
    let pool = pool(10);
    let mut state = pool.lock();
    let (gone, stays) = (state.new_owner(), state.new_owner());
    let lender = state.register_lender().unwrap();
    for round in 0..8 {
        let slot = state.take(if round % 2 == 0 { gone } else { stays }).unwrap();
        if round == 2 {
            state.lend(slot, gone, lender).unwrap();
        }
    }
    assert_eq!((state.release_all(gone), state.available()), (4, 6));
    assert!(state.next_returned(lender).is_some());
    assert_eq!((state.release_all(gone), state.release_all(0), state.available()), (0, 0, 6));
    state.retire_owner(gone);
    assert_eq!(state.new_owner(), gone);
    state.add_drops(3);
    assert_eq!(state.drops(), 3);
}

#[test]
fn slots_lie_one_after_the_other() {
    let mapping = memory(64 + 3 * 192);
    let pool = BufferPool::new(mapping.clone(), 64, 3, 192).unwrap();
    assert_eq!((pool.offset(), pool.slots(), pool.slot_size(), pool.slot_offset(2)), (64, 3, 192, 448));
    assert!(Arc::ptr_eq(pool.mapping(), &mapping) && HEADROOM == 64);
    pool.check_process().unwrap();
}

#[test]
fn shapes_that_no_pool_has_are_refused() {
    let mapping = memory(1 << 20);
    let make = |offset, slots, size| BufferPool::new(mapping.clone(), offset, slots, size).map(|pool| pool.slots()).unwrap_err();
    for size in [0, 64, 129, 127, (1 << 17) + 64] {
        let (value, min, max) = (size as u64, 128, 1 << 17);
        assert_eq!(make(0, 1, size), MemoryError::BadSize { what: "slot size", value, min, max, multiple_of: 64 });
    }
    for slots in [0, (1 << 20) + 1, u32::MAX] {
        let error = MemoryError::BadSize { what: "number of slots", value: slots.into(), min: 1, max: 1 << 20, multiple_of: 1 };
        assert_eq!(make(0, slots, 128), error);
    }
    assert_eq!(make(32, 1, 128), MemoryError::Misaligned { address: 32, align: 64 });
    assert_eq!(make(64, 512, 2048), MemoryError::OutOfRange { offset: 64, len: 1 << 20, size: 1 << 20 });
    assert_eq!(make(!63usize, 1, 128), MemoryError::OutOfRange { offset: !63, len: 128, size: 1 << 20 });
    let (_file, theirs) = foreign(4096);
    assert_eq!(BufferPool::new(theirs, 0, 1, 128).unwrap_err(), MemoryError::Foreign);
}

#[test]
fn the_lock_is_tried_without_waiting() {
    let pool = pool(1);
    let held = pool.lock();
    std::thread::scope(|scope| {
        scope.spawn(|| assert!(pool.try_lock().is_none()));
    });
    drop(held);
    assert!(pool.try_lock().is_some());
    // A panic elsewhere does not lock everybody out.
    let poisoner = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _held = pool.lock();
        std::panic::resume_unwind(Box::new(()));
    }));
    assert!(poisoner.is_err() && pool.try_lock().is_some());
    assert_eq!(pool.lock().available(), 1);
}

proptest! {
    #[test]
    fn every_slot_has_one_owner_always(steps in prop::collection::vec((0..5u8, 0..6u32, 1..4u32, 1..4u32), 0..200)) {
        let pool = pool(6);
        let mut state = pool.lock();
        let mut model = [0; 6];
        for _ in 0..3 {
            state.new_owner();
        }
        for (kind, slot, one, other) in steps {
            let at = slot as usize;
            match kind {
                0 | 1 => match state.take(one) {
                    Some(slot) => {
                        prop_assert_eq!(model[slot as usize], 0);
                        model[slot as usize] = one;
                    }
                    None => prop_assert!(model.iter().all(|owner| *owner != 0)),
                },
                2 => {
                    prop_assert_eq!(state.transfer(slot, one, other).is_ok(), model[at] == one);
                    model[at] = if model[at] == one { other } else { model[at] };
                }
                3 => {
                    prop_assert_eq!(state.release(slot, one).is_ok(), model[at] == one);
                    model[at] = if model[at] == one { 0 } else { model[at] };
                }
                _ => {
                    prop_assert_eq!(state.release_all(one), model.iter().filter(|owner| **owner == one).count());
                    model.iter_mut().filter(|owner| **owner == one).for_each(|owner| *owner = 0);
                }
            }
            prop_assert_eq!(state.available(), model.iter().filter(|owner| **owner == 0).count());
            for (slot, owner) in model.iter().enumerate() {
                prop_assert_eq!(state.owner(slot as u32), Some(*owner));
            }
        }
    }
}
