//! Bursts: rows are checked one by one, slots are never lost.

use crate::memory;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use virtio_memory::{BufferPool, Burst, Column, Limit, MemoryError, RawRow, Row, RowError};

const SLOT: i64 = 256;

fn pool(slots: u32) -> Arc<BufferPool> {
    Arc::new(BufferPool::new(memory(slots as usize * SLOT as usize), 0, slots, SLOT as usize).unwrap())
}

fn filled(slots: u32, capacity: usize) -> (Arc<BufferPool>, Burst) {
    let pool = pool(slots);
    let burst = Burst::new(pool.clone(), capacity).unwrap();
    burst.fill(&mut pool.lock());
    (pool, burst)
}

fn validate(burst: &Burst) -> Result<Vec<Row>, RowError> {
    let mut rows = Vec::new();
    let count = burst.validate(&mut burst.pool().lock(), &mut rows)?;
    assert_eq!((count, rows.len()), (burst.count(), burst.count()));
    Ok(rows)
}

#[test]
fn a_filled_burst_has_the_room_after_the_headroom() {
    let (pool, burst) = filled(5, 4);
    assert_eq!((burst.count(), burst.capacity(), pool.lock().available()), (4, 4, 1));
    let rows = validate(&burst).unwrap();
    for (index, row) in rows.iter().enumerate() {
        assert_eq!((row.offset, row.length, row.more), (64, SLOT as u32 - 64, false));
        assert_eq!(burst.row(index), RawRow { slot: row.slot.into(), offset: 64, length: SLOT - 64, more: 0 });
        assert_eq!(pool.lock().owner(row.slot), Some(burst.owner()));
    }
    assert_eq!(burst.column(Column::Lengths).len(), 4);
    let other = Burst::new(pool.clone(), 4).unwrap();
    assert_eq!(other.fill(&mut pool.lock()), 1);
    assert_eq!(burst.fill(&mut pool.lock()), 4);
    assert!(Arc::ptr_eq(burst.pool(), &pool));
}

#[test]
fn legal_rows_are_read_as_they_stand() {
    let (_pool, burst) = filled(8, 5);
    let wanted: Vec<Row> = (0..5)
        .map(|index| Row {
            slot: burst.row(4 - index).slot as u32,
            offset: [0, 64, 255, 0, 1][index],
            length: [256, 192, 1, 1, 255][index],
            more: index == 0 || index == 3,
        })
        .collect();
    wanted.iter().enumerate().for_each(|(index, row)| burst.set_row(index, *row));
    assert_eq!(validate(&burst).unwrap(), wanted);
    burst.set_count(0).unwrap();
    assert_eq!(validate(&burst).unwrap(), []);
}

#[test]
fn each_row_that_is_not_legal_is_named() {
    let range = |min, max| Limit::Range { min, max };
    let cases = [
        (Column::Slots, -1, range(0, 7)),
        (Column::Slots, 8, range(0, 7)),
        (Column::Slots, i64::MIN, range(0, 7)),
        (Column::Slots, i64::MAX, range(0, 7)),
        (Column::Slots, (1 << 32) + 3, range(0, 7)),
        (Column::Offsets, -1, range(0, SLOT - 1)),
        (Column::Offsets, SLOT, range(0, SLOT - 1)),
        (Column::Offsets, i64::MIN, range(0, SLOT - 1)),
        (Column::Lengths, 0, range(1, SLOT - 64)),
        (Column::Lengths, -1, range(1, SLOT - 64)),
        (Column::Lengths, SLOT - 63, range(1, SLOT - 64)),
        (Column::Lengths, i64::MAX, range(1, SLOT - 64)),
        (Column::More, 2, range(0, 1)),
        (Column::More, -1, range(0, 1)),
    ];
    for (column, value, limit) in cases {
        for row in [0, 1, 3] {
            let (_pool, burst) = filled(8, 4);
            burst.column(column)[row].store(value, Relaxed);
            assert_eq!(validate(&burst).unwrap_err(), RowError { row, column, value, limit });
        }
    }
}

#[test]
fn a_slot_of_somebody_else_is_refused() {
    let (pool, burst) = filled(8, 4);
    let free = pool.lock().take(99).unwrap();
    for owner in [99, 0] {
        burst.column(Column::Slots)[2].store(free.into(), Relaxed);
        let error = RowError { row: 2, column: Column::Slots, value: free.into(), limit: Limit::NotOwned };
        assert_eq!(validate(&burst).unwrap_err(), error);
        pool.lock().release(free, 99).unwrap_or_else(|_| assert_eq!(owner, 0));
    }
}

#[test]
fn a_slot_stands_in_one_row_only() {
    let (_pool, burst) = filled(8, 4);
    let first = burst.row(0);
    burst.column(Column::Slots)[3].store(first.slot, Relaxed);
    for _ in 0..2 {
        let error = RowError { row: 3, column: Column::Slots, value: first.slot, limit: Limit::Twice };
        assert_eq!(validate(&burst).unwrap_err(), error);
    }
    burst.set_count(3).unwrap();
    validate(&burst).unwrap();
}

#[test]
fn the_last_row_ends_its_packet() {
    let (_pool, burst) = filled(8, 4);
    burst.column(Column::More)[3].store(1, Relaxed);
    let error = RowError { row: 3, column: Column::More, value: 1, limit: Limit::Unfinished };
    assert_eq!(validate(&burst).unwrap_err(), error);
    burst.column(Column::More)[2].store(1, Relaxed);
    burst.column(Column::More)[3].store(0, Relaxed);
    validate(&burst).unwrap();
    burst.set_count(3).unwrap();
    assert_eq!(validate(&burst).unwrap_err(), RowError { row: 2, ..error });
}

#[test]
fn errors_say_it_in_one_line() {
    let error = |column, value, limit| RowError { row: 3, column, value, limit }.to_string();
    assert_eq!(error(Column::Lengths, 5000, Limit::Range { min: 1, max: 1984 }), "burst row 3: length 5000 is not in 1 to 1984");
    assert_eq!(error(Column::Slots, 7, Limit::NotOwned), "burst row 3: slot 7 does not belong to this burst");
    assert_eq!(error(Column::Slots, 7, Limit::Twice), "burst row 3: slot 7 stands in an earlier row too");
    let unfinished = "burst row 3: more 1 in the last row continues a packet that has no more rows";
    assert_eq!(error(Column::More, 1, Limit::Unfinished), unfinished);
    assert_eq!(error(Column::Offsets, -1, Limit::Range { min: 0, max: 9 }), "burst row 3: offset -1 is not in 0 to 9");
}

#[test]
fn no_more_rows_than_there_is_room_for() {
    let (pool, burst) = filled(8, 4);
    assert_eq!(burst.set_count(5), Err(MemoryError::OutOfRange { offset: 0, len: 5, size: 4 }));
    assert_eq!(burst.count(), 4);
    for capacity in [0, 32769] {
        let error = Burst::new(pool.clone(), capacity).unwrap_err();
        let value = capacity as u64;
        assert_eq!(error, MemoryError::BadSize { what: "burst capacity", value, min: 1, max: 32768, multiple_of: 1 });
    }
}

#[test]
fn slots_come_back_whatever_the_columns_say() {
    let (pool, burst) = filled(8, 4);
    // As a filter in numpy does: the rows that stay are moved to the front, over those that go.
    burst.column(Column::Slots).iter().for_each(|slot| slot.store(i64::MAX, Relaxed));
    burst.set_count(1).unwrap();
    assert_eq!(burst.give_back(&mut pool.lock()), 4);
    assert_eq!((burst.count(), pool.lock().available()), (0, 8));
    assert_eq!(burst.give_back(&mut pool.lock()), 0);
}

#[test]
fn a_lost_burst_leaks_nothing() {
    let (pool, burst) = filled(8, 4);
    let (owner, queue) = (burst.owner(), 77);
    let sent = burst.row(0).slot as u32;
    pool.lock().transfer(sent, owner, queue).unwrap();
    drop(burst);
    assert_eq!(pool.lock().available(), 7);
    assert_eq!(pool.lock().owner(sent), Some(queue));
    let next = Burst::new(pool.clone(), 1).unwrap();
    assert_eq!(next.owner(), owner, "its number is used again");
}

#[test]
fn slots_are_adopted_up_to_the_capacity() {
    let (pool, burst) = filled(8, 3);
    let mut state = pool.lock();
    let queue = state.new_owner();
    let theirs: Vec<u32> = (0..3).map(|_| state.take(queue).unwrap()).collect();
    assert_eq!(burst.adopt(&mut state, theirs[0], queue), Err(MemoryError::OutOfRange { offset: 3, len: 1, size: 3 }));
    assert_eq!(burst.take(&mut state), None);
    // What is passed on makes room.
    for row in 0..2 {
        state.transfer(burst.row(row).slot as u32, burst.owner(), queue).unwrap();
    }
    burst.adopt(&mut state, theirs[0], queue).unwrap();
    assert_eq!(state.owner(theirs[0]), Some(burst.owner()));
    let wrong = MemoryError::NotOwned { slot: theirs[1], owner: queue, claimed: 88 };
    assert_eq!(burst.adopt(&mut state, theirs[1], 88), Err(wrong));
    assert_eq!(burst.adopt(&mut state, 8, queue), Err(MemoryError::BadSlot { slot: 8, slots: 8 }));
    assert!(burst.take(&mut state).is_some());
    assert_eq!(burst.take(&mut state), None);
    assert_eq!((burst.give_back(&mut state), state.available()), (3, 4));
}

#[test]
fn packets_left_unsent_count_as_dropped_when_they_are_given_back() {
    let (pool, burst) = filled(8, 4);
    burst.set_unsent(3);
    burst.set_unsent(2);
    assert_eq!(pool.lock().drops(), 0);
    burst.fill(&mut pool.lock());
    burst.fill(&mut pool.lock());
    assert_eq!(pool.lock().drops(), 2);
    burst.set_unsent(4);
    burst.set_unsent(0);
    drop(burst);
    assert_eq!(pool.lock().drops(), 2);
}
