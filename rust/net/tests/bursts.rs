//! Packets go from slots through chains into slots, and everything comes back, in both formats.

mod common;

use common::{BOTH, PAYLOAD, link, packet, read, write};
use virtio_memory::Row;
use virtqueue::Direction;

#[test]
fn packets_arrive_as_they_were_sent_and_slots_come_home() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let (tx, rx, reclaimed) = (link.near_burst(8), link.far_burst(8), link.near_burst(8));
        for lap in 0..100 {
            let sent: Vec<_> = (0..1 + lap % 5).map(|i| packet(1 + (lap * 13 + i) % PAYLOAD, i)).collect();
            write(&tx, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
            assert_eq!(link.add(&tx, Direction::Readable), Ok(sent.len()));
            assert_eq!((tx.count(), link.pop(&rx)), (0, Ok(sent.len())));
            assert_eq!(read(&rx), sent);
            assert_eq!(link.pop_used(&reclaimed), Ok(0), "the device has them still");
            assert_eq!(link.complete(&rx), Ok(sent.len()));
            assert_eq!(link.pop_used(&reclaimed), Ok(sent.len()));
            assert!((0..sent.len()).all(|row| reclaimed.row(row).length == 0), "nothing was written to them");
        }
        drop((tx, rx, reclaimed));
        assert_eq!((link.pool.lock().available(), link.far.lock().available()), (32, 32));
        assert_eq!((link.pool.lock().drops(), link.far.lock().drops()), (0, 0));
    }
}

#[test]
fn a_packet_of_several_rows_is_one_chain() {
    for format in BOTH {
        for indirect in [false, true] {
            let mut link = link(format, 8, 32, indirect);
            let (tx, rx, reclaimed) = (link.near_burst(8), link.far_burst(8), link.near_burst(8));
            let sent = [packet(2 * PAYLOAD + 1, 1), packet(5, 2), packet(3 * PAYLOAD, 3)];
            write(&tx, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
            assert_eq!(link.add(&tx, Direction::Readable), Ok(3));
            assert_eq!(link.driver.free(), if indirect { 5 } else { 1 });
            assert_eq!(link.pop(&rx), Ok(3));
            assert_eq!((read(&rx).as_slice(), rx.count()), (sent.as_slice(), 7));
            assert_eq!((link.complete(&rx), link.pop_used(&reclaimed)), (Ok(3), Ok(3)));
            let more: Vec<_> = (0..7).map(|row| reclaimed.row(row).more).collect();
            assert_eq!(more, [1, 1, 0, 0, 1, 1, 0]);
        }
    }
}

#[test]
fn what_does_not_fit_stays_at_the_front_whole() {
    for format in BOTH {
        let mut link = link(format, 4, 32, false);
        let (tx, rx, reclaimed) = (link.near_burst(16), link.far_burst(16), link.near_burst(16));
        let sent = [packet(9, 1), packet(2 * PAYLOAD, 2), packet(2 * PAYLOAD, 3), packet(7, 4)];
        write(&tx, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
        assert_eq!(link.add(&tx, Direction::Readable), Ok(2), "three of four descriptors: the next packet needs two");
        assert_eq!((tx.count(), read(&tx).as_slice()), (3, &sent[2..]));
        assert_eq!((link.pop(&rx), link.complete(&rx), link.pop_used(&reclaimed)), (Ok(2), Ok(2), Ok(2)));
        assert_eq!(link.add(&tx, Direction::Readable), Ok(2), "the same call again sends the rest");
        assert_eq!((link.pop(&rx), read(&rx).as_slice()), (Ok(2), &sent[2..]));

        write(&tx, &[&[1], &[2], &[3], &[4], &[5]]);
        assert_eq!(link.add(&tx, Direction::Readable), Ok(1));
        assert_eq!(link.pool.lock().drops(), 0);
        tx.fill(&mut link.pool.lock());
        assert_eq!(link.pool.lock().drops(), 4, "nobody sent them");
    }
}

#[test]
fn received_packets_fill_the_buffers_that_were_posted() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let (free, rx, tx) = (link.near_burst(6), link.near_burst(8), link.far_burst(8));
        assert_eq!(free.fill(&mut link.pool.lock()), 6);
        for row in [0, 2] {
            // Two buffers of two slots and two of one.
            let raw = free.row(row);
            free.set_row(row, Row { slot: raw.slot as u32, offset: 64, length: PAYLOAD as u32, more: true });
        }
        assert_eq!(link.add(&free, Direction::Writable), Ok(4));
        let sent = [packet(PAYLOAD + 10, 1), packet(20, 2), packet(PAYLOAD, 3)];
        write(&tx, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
        assert_eq!(link.fill(&tx), Ok(3));
        assert_eq!((tx.count(), link.far.lock().available()), (0, 32));
        assert_eq!(link.pop_used(&rx), Ok(3));
        let lengths: Vec<_> = (0..rx.count()).map(|row| (rx.row(row).length as usize, rx.row(row).more)).collect();
        assert_eq!(lengths, [(PAYLOAD, 1), (10, 0), (20, 1), (0, 0), (PAYLOAD, 0)]);
        assert_eq!(read(&rx), sent);
        assert_eq!((link.driver.outstanding(), link.driver.counters().clamped), (1, 0));
    }
}

#[test]
fn packets_without_a_buffer_stay_in_the_burst() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let (free, tx) = (link.near_burst(2), link.far_burst(8));
        free.fill(&mut link.pool.lock());
        link.add(&free, Direction::Writable).unwrap();
        let sent = [packet(1, 1), packet(2, 2), packet(3, 3)];
        write(&tx, &sent.iter().map(Vec::as_slice).collect::<Vec<_>>());
        assert_eq!(link.fill(&tx), Ok(2));
        assert_eq!(read(&tx).as_slice(), &sent[2..]);
        assert_eq!(link.fill(&tx), Ok(0));
        assert_eq!(read(&tx).as_slice(), &sent[2..]);
    }
}

#[test]
fn a_used_chain_that_is_longer_than_what_is_left_comes_with_the_next_call() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let (tx, rx, small) = (link.near_burst(8), link.far_burst(8), link.near_burst(3));
        write(&tx, &[&packet(2 * PAYLOAD, 1), &packet(2 * PAYLOAD, 2), &packet(4 * PAYLOAD, 3)]);
        assert_eq!((link.add(&tx, Direction::Readable), link.pop(&rx), link.complete(&rx)), (Ok(3), Ok(3), Ok(3)));
        assert_eq!((link.pop_used(&small), small.count(), link.from_driver.ready()), (Ok(1), 2, 2));
        assert_eq!((link.pop_used(&small), small.count()), (Ok(1), 2));
        assert_eq!((link.pop_used(&small), small.count(), link.from_driver.ready()), (Ok(0), 0, 0), "four slots never fit into three rows");
        drop((tx, rx, small));
        let state = link.pool.lock();
        assert_eq!((state.available(), state.drops()), (32, 1));
    }
}

#[test]
fn a_chain_is_completed_when_the_last_of_its_slots_comes_back_from_wherever() {
    for format in BOTH {
        let mut link = link(format, 8, 32, false);
        let (tx, rx, other) = (link.near_burst(8), link.far_burst(8), link.far_burst(8));
        write(&tx, &[&packet(2 * PAYLOAD, 1), &packet(3, 2)]);
        assert_eq!((link.add(&tx, Direction::Readable), link.pop(&rx)), (Ok(2), Ok(2)));
        let pool = link.far.clone();
        let slots: Vec<_> = (0..3).map(|row| rx.row(row).slot as u32).collect();
        other.adopt(&mut pool.lock(), slots[0], rx.owner()).unwrap();
        assert_eq!(link.complete(&rx), Ok(1), "the short one; the long one's first slot is elsewhere");
        assert_eq!(link.to_device.lent(), 1);
        assert_eq!(link.complete(&other), Ok(1));
        assert_eq!((link.to_device.lent(), link.device.outstanding()), (0, 0));
    }
}

#[test]
fn what_no_burst_can_carry_is_completed_and_counted() {
    for format in BOTH {
        let mut link = link(format, 8, 4, false);
        let (tx, rx, reclaimed) = (link.near_burst(4), link.far_burst(2), link.near_burst(8));
        write(&tx, &[&packet(3 * PAYLOAD, 1), &packet(9, 2)]);
        assert_eq!((link.add(&tx, Direction::Readable), link.pop(&rx)), (Ok(2), Ok(1)), "three rows do not fit into two");
        assert_eq!((read(&rx), link.device.counters().dropped), (vec![packet(9, 2)], 1));
        assert_eq!(link.pop_used(&reclaimed), Ok(1), "it is used already");
        assert_eq!((link.complete(&rx), link.pop_used(&reclaimed)), (Ok(1), Ok(1)));

        reclaimed.fill(&mut link.pool.lock());
        assert_eq!(link.add(&reclaimed, Direction::Writable), Ok(4));
        assert_eq!((link.pop(&rx), link.device.counters().dropped), (Ok(0), 5), "nothing to read in four buffers");
    }
}

#[test]
fn chains_wait_in_the_ring_while_the_pool_is_empty() {
    for format in BOTH {
        let mut link = link(format, 8, 4, false);
        let (tx, rx, second) = (link.near_burst(4), link.far_burst(3), link.far_burst(4));
        write(&tx, &[&[1], &[2], &[3], &[4]]);
        link.add(&tx, Direction::Readable).unwrap();
        assert_eq!((link.pop(&rx), link.pop(&second)), (Ok(3), Ok(1)));
        assert_eq!((link.device.outstanding(), link.pop(&second)), (4, Ok(0)));
        assert_eq!(link.device.outstanding(), 3);
    }
}

#[test]
fn forwarding_tells_the_lender_when_the_other_queue_is_done() {
    for format in BOTH {
        // Two links whose middle is one pool: what the first device receives, the second sends into a driver's buffers.
        let (mut left, mut right) = (link(format, 8, 32, false), link(format, 8, 32, false));
        let (tx, middle, free, rx) = (left.near_burst(8), left.far_burst(8), right.near_burst(4), right.near_burst(8));
        write(&tx, &[&packet(50, 1), &packet(60, 2)]);
        left.add(&tx, Direction::Readable).unwrap();
        free.fill(&mut right.pool.lock());
        right.add(&free, Direction::Writable).unwrap();
        assert_eq!((left.pop(&middle), right.fill(&middle), right.pop_used(&rx)), (Ok(2), Ok(2), Ok(2)));
        assert_eq!(read(&rx), [packet(50, 1), packet(60, 2)]);
        assert_eq!(left.complete(&middle), Ok(2));
    }
}
