//! Bad rows change nothing; a driver's bad buffer breaks its queue, after what was before it; a reset brings every slot home.

mod common;

use common::{BASE, BOTH, PAYLOAD, link, packet, read, write};
use std::sync::atomic::Ordering::Relaxed;
use virtio_memory::{Burst, Column, MemoryError};
use virtio_net_path::BurstError;
use virtqueue::{Buffer, Completion, Direction, Format, RingError};

/// Breaks one cell of the burst.
fn set(burst: &Burst, column: Column, row: usize, value: i64) {
    burst.column(column)[row].store(value, Relaxed);
}

#[test]
fn a_bad_row_refuses_the_call_and_changes_nothing() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let (tx, other) = (link.near_burst(8), link.near_burst(8));
        write(&other, &[&[1]]);
        let foreign = other.row(0).slot;
        for (column, row, value) in [
            (Column::Slots, 1, -1),
            (Column::Slots, 2, 32),
            (Column::Slots, 0, foreign),
            (Column::Offsets, 1, -1),
            (Column::Offsets, 1, 256),
            (Column::Lengths, 2, 0),
            (Column::Lengths, 0, PAYLOAD as i64 + 1),
            (Column::Lengths, 0, i64::MAX),
            (Column::More, 0, 2),
            (Column::More, 2, 1),
        ] {
            write(&tx, &[&[1, 2, 3], &[4], &[5, 6]]);
            let before = read(&tx);
            let kept = tx.column(column)[row].load(Relaxed);
            set(&tx, column, row, value);
            let available = link.pool.lock().available();
            for result in [link.add(&tx, Direction::Readable), link.fill(&tx)] {
                let Err(BurstError::Row(error)) = result else { panic!("{column} {value} was accepted: {result:?}") };
                assert_eq!((error.row, error.column, error.value), (row, column, value));
            }
            assert_eq!((link.driver.free(), link.driver.outstanding(), link.pool.lock().available()), (8, 0, available));
            set(&tx, column, row, kept);
            assert_eq!((read(&tx), tx.count()), (before, 3));
        }
        write(&tx, &[&[1], &[2]]);
        set(&tx, Column::Slots, 1, tx.row(0).slot);
        assert!(matches!(link.add(&tx, Direction::Readable), Err(BurstError::Row(_))), "one slot twice");
        write(&tx, &[&[1], &[2]]);
        assert_eq!(link.add(&tx, Direction::Readable), Ok(2), "and the burst is as good as before");
    }
}

#[test]
fn a_packet_that_never_fits_is_refused() {
    for format in BOTH {
        let mut link = link(format, 2, 32, true);
        let tx = link.near_burst(8);
        write(&tx, &[&[1], &packet(3 * PAYLOAD, 1)]);
        let refused = BurstError::TooManyRows { row: 3, rows: 3, size: 2 };
        assert_eq!(link.add(&tx, Direction::Readable), Err(refused));
        assert_eq!((tx.count(), link.driver.outstanding()), (4, 0));
    }
}

#[test]
fn slots_of_another_pool_or_memory_are_refused() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let far = link.far_burst(4);
        write(&far, &[&[1]]);
        assert_eq!(link.add(&far, Direction::Readable), Err(BurstError::OtherMemory));

        let (tx, rx, near) = (link.near_burst(4), link.far_burst(4), link.near_burst(4));
        write(&tx, &[&[1], &[2]]);
        assert_eq!((link.add(&tx, Direction::Readable), link.pop(&rx)), (Ok(2), Ok(2)));
        assert_eq!(link.pop(&near), Err(BurstError::OtherPool { chains: 2 }));
        assert_eq!((link.complete(&rx), link.pop(&near)), (Ok(2), Ok(0)), "with nothing lent, another pool will do");
    }
}

#[test]
fn a_packet_longer_than_its_buffer_is_dropped_and_the_others_are_sent() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let (free, tx) = (link.near_burst(3), link.far_burst(8));
        free.fill(&mut link.pool.lock());
        set(&free, Column::Lengths, 1, 10);
        link.add(&free, Direction::Writable).unwrap();
        let sent = [packet(10, 1), packet(11, 2), packet(5, 3)];
        write(&tx, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let pool = |link: &common::Link| {
            let state = link.far.lock();
            (state.available(), state.drops())
        };
        let (available, drops) = pool(&link);
        assert_eq!((link.fill(&tx), tx.count(), link.device.outstanding()), (Ok(2), 0, 0));
        let counters = link.device.counters();
        assert_eq!((counters.used, counters.dropped), (3, 1));
        assert_eq!(pool(&link), (available + 3, drops + 1));
        let back = link.near_burst(8);
        assert_eq!(link.pop_used(&back), Ok(3));
        assert_eq!([0, 1, 2].map(|row| back.row(row).length), [10, 0, 5]);
    }
}

/// Two good chains and one outside memory, behind the burst's back.
fn add_unmapped(link: &mut common::Link, direction: Direction) {
    let buffer = |address| Buffer { token: 0, address, len: 64, direction };
    link.driver.add_batch(&[buffer(BASE), buffer(BASE + 64), buffer(BASE - 32)]).unwrap();
    link.driver.publish();
}

#[test]
fn device_11_a_buffer_outside_memory_breaks_the_queue_after_those_before_it() {
    for format in BOTH {
        let error = RingError::BufferUnmapped(MemoryError::Unmapped { address: BASE - 32, len: 64 });
        let mut first = link(format, 8, 32, false);
        add_unmapped(&mut first, Direction::Readable);
        let rx = first.far_burst(8);
        assert_eq!((first.pop(&rx), rx.count()), (Ok(2), 2));
        assert_eq!(first.pop(&rx), Err(error.clone().into()));
        assert_eq!((first.pop(&rx), rx.count()), (Ok(0), 0), "told once");
        assert_eq!(first.device.broken(), Some(&error));
        assert_eq!(first.far.lock().available(), 32);

        let mut second = link(format, 8, 32, false);
        add_unmapped(&mut second, Direction::Writable);
        let tx = second.far_burst(8);
        write(&tx, &[&[1], &[2], &[3]]);
        assert_eq!((second.fill(&tx), tx.count()), (Ok(2), 1));
        assert_eq!(second.fill(&tx), Err(error.clone().into()));
        assert_eq!((second.fill(&tx), read(&tx)), (Ok(0), vec![vec![3]]));
    }
}

#[test]
fn driver_05_a_reset_brings_the_slots_home() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let (tx, rx) = (link.near_burst(8), link.far_burst(8));
        write(&tx, &[&packet(2 * PAYLOAD, 1), &[2], &[3]]);
        link.add(&tx, Direction::Readable).unwrap();
        assert_eq!((link.pop(&rx), link.pool.lock().available()), (Ok(3), 28));
        link.driver.reset();
        link.from_driver.reset();
        link.to_device.reset();
        assert_eq!(link.pool.lock().available(), 32);
        drop(rx);
        assert_eq!(link.far.lock().available(), 32, "lent slots come back without a lender");
    }
}

#[test]
fn a_broken_queue_keeps_still() {
    let mut link = link(Format::Split, 8, 32, false);
    let (tx, rx) = (link.near_burst(8), link.near_burst(8));
    link.driver.break_with(RingError::UsedIdNotOutstanding { id: 3 });
    write(&tx, &[&[1], &packet(2 * PAYLOAD, 1)]);
    assert_eq!((link.add(&tx, Direction::Readable), tx.count()), (Ok(0), 3));
    write(&tx, &[&[1]]);
    assert_eq!((link.add(&tx, Direction::Readable), link.pop_used(&rx), tx.count()), (Ok(0), Ok(0), 1));
}

#[test]
fn a_chain_completed_under_another_name_does_not_lose_the_others() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let (tx, far) = (link.near_burst(8), link.far_burst(8));
        write(&tx, &[&[1], &[2], &[3]]);
        assert_eq!(link.add(&tx, Direction::Readable), Ok(3));
        assert_eq!(link.pop(&far), Ok(3));
        let mut names = (0..8).flat_map(|head| (1..9).map(move |serial| Completion { head, serial, len: 0 }));
        let second = names.by_ref().filter(|name| link.device.check(name).is_ok()).nth(1).unwrap();
        link.device.complete_batch(&[second][..]).unwrap();
        assert_eq!(link.complete(&far), Ok(2));
        assert_eq!((link.device.outstanding(), link.to_device.lent(), link.far.lock().available()), (0, 0, 32));
        assert_eq!(link.pop_used(&tx), Ok(3));
    }
}
