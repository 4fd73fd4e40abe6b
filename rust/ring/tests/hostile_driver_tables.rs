//! The driver is hostile in what a chain is made of: indirect tables (device-08, and device-07 in them), order and lengths of segments
//! (device-09).

mod common;

use common::raw::{Desc, desc};
use common::*;
use virtio_memory::MemoryError;
use virtqueue::spec::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE};
use virtqueue::{Fault, Format, RingError, RingFeatures, Segment, check_chain_limit};

/// Writes a table of descriptors as this format lays them out, where `tag` is `next` or the id.
fn write_table(rig: &Rig, address: u64, entries: &[Desc]) {
    for (k, d) in entries.iter().enumerate() {
        let (low, high) = if rig.format == Format::Split { (d.flags, d.tag) } else { (d.tag, d.flags) };
        let rest = u64::from(d.len) | u64::from(low) << 32 | u64::from(high) << 48;
        let bytes = [d.address.to_le_bytes(), rest.to_le_bytes()].concat();
        rig.write(address + 16 * k as u64, &bytes);
    }
}

/// The error that a chain meets on a fresh device.
fn refused(rig: &Rig, chain: &[Desc]) -> RingError {
    let mut device = rig.device();
    rig.raw_driver().offer(chain);
    let error = pop_error(&mut device);
    assert_device_broken(&mut device, &error);
    error
}

/// The segments of a chain on a fresh device, and what they add up to.
fn accepted(rig: &Rig, chain: &[Desc]) -> (Vec<Segment>, (u32, u32)) {
    let mut device = rig.device();
    rig.raw_driver().offer(chain);
    let (chain, segments) = pop_with_segments(&mut device, 1).remove(0);
    (segments, (chain.readable, chain.writable))
}

/// Entries that follow each other: `next` and NEXT as the split ring wants them.
fn in_a_row(entries: &[Desc]) -> Vec<Desc> {
    let last = entries.len() - 1;
    let link = |(k, d): (usize, &Desc)| if k < last { Desc { flags: d.flags | DESC_F_NEXT, tag: k as u16 + 1, ..*d } } else { *d };
    entries.iter().enumerate().map(link).collect()
}

#[test]
fn device_08_not_negotiated() {
    each(PLAIN, |rig| {
        write_table(&rig, rig.data, &[desc(rig.data, 1, 0)]);
        assert_eq!(refused(&rig, &[desc(rig.data, 16, DESC_F_INDIRECT)]), RingError::IndirectNotNegotiated);
    });
}

#[test]
fn device_08_table_length() {
    for len in [0, 1, 15, 17, 31, 0x1_0001, u32::MAX] {
        each(INDIRECT, |rig| assert_eq!(refused(&rig, &[desc(rig.data, len, DESC_F_INDIRECT)]), RingError::IndirectLength { len }));
    }
    // Bounded before it is narrowed: 2^16 + 1 entries are not one entry.
    for entries in [9, 0x1_0001, 0x0fff_ffff] {
        let error = RingError::IndirectTooLong { entries, limit: 8 };
        each(INDIRECT, |rig| assert_eq!(refused(&rig, &[desc(rig.data, entries * 16, DESC_F_INDIRECT)]), error));
    }
}

#[test]
fn device_08_table_outside_memory() {
    each(INDIRECT, |rig| {
        let end = BASE + rig.mapping.len() as u64;
        for address in [0, end, end - 16, BASE - 16] {
            let error = RingError::IndirectUnmapped(MemoryError::Unmapped { address, len: 32 });
            assert_eq!(refused(&rig, &[desc(address, 32, DESC_F_INDIRECT)]), error);
        }
        let address = u64::MAX - 14;
        let error = RingError::IndirectUnmapped(MemoryError::Overflow { address, len: 16 });
        assert_eq!(refused(&rig, &[desc(address, 16, DESC_F_INDIRECT)]), error);
    });
}

/// A table may stand at any address, WRITE on the descriptor that points to it means nothing, and it counts as one slot.
#[test]
fn device_08_an_unaligned_table_with_write() {
    each(INDIRECT, |rig| {
        let entries = in_a_row(&[desc(rig.data + 512, 5, 0), desc(rig.data + 600, 6, DESC_F_WRITE), desc(rig.data + 700, 7, DESC_F_WRITE)]);
        for shift in 0..16 {
            write_table(&rig, rig.data + shift, &entries);
            let (segments, sums) = accepted(&rig, &[desc(rig.data + shift, 48, DESC_F_INDIRECT | DESC_F_WRITE)]);
            let [a, b, c] = [512, 600, 700].map(|at| rig.data + at);
            assert_eq!(segments, [Segment::readable(a, 5), Segment::writable(b, 6), Segment::writable(c, 7)]);
            assert_eq!(sums, (5, 13));
        }
        let (mut driver, mut device) = (rig.raw_driver(), rig.device());
        (0..8).for_each(|_| driver.offer(&[desc(rig.data + 15, 48, DESC_F_INDIRECT)]));
        (0..8).for_each(|_| assert_eq!(pop(&mut device, 1).len(), 1));
        assert_eq!(device.outstanding(), 8);
    });
}

#[test]
fn device_08_split_direct_descriptors_before_a_table() {
    let rig = Rig::new(Format::Split, 8, INDIRECT);
    write_table(&rig, rig.data, &in_a_row(&[desc(rig.data + 64, 3, DESC_F_WRITE), desc(rig.data + 72, 4, DESC_F_WRITE)]));
    let table = desc(rig.data, 32, DESC_F_INDIRECT);
    let (segments, sums) = accepted(&rig, &[desc(rig.data + 32, 1, 0), desc(rig.data + 33, 2, DESC_F_WRITE), table]);
    assert_eq!(segments.len(), 4);
    assert_eq!(sums, (1, 9));
    // All of them together stay within the limit.
    let seven = [desc(rig.data + 32, 1, 0); 7];
    let error = RingError::IndirectTooLong { entries: 2, limit: 1 };
    assert_eq!(refused(&rig, &[&seven[..], &[table]].concat()), error);
    // And readable ones still come first.
    write_table(&rig, rig.data, &[desc(rig.data + 64, 3, 0)]);
    let error = RingError::ReadableAfterWritable { position: 1 };
    assert_eq!(refused(&rig, &[desc(rig.data + 33, 2, DESC_F_WRITE), desc(rig.data, 16, DESC_F_INDIRECT)]), error);
}

#[test]
fn device_08_indirect_with_next() {
    let rig = Rig::new(Format::Split, 8, INDIRECT);
    write_table(&rig, rig.data, &[desc(rig.data + 64, 3, 0)]);
    let table = desc(rig.data, 16, DESC_F_INDIRECT);
    assert_eq!(refused(&rig, &[table, desc(rig.data, 1, 0)]), RingError::IndirectWithNext);
    assert_eq!(refused(&rig, &[desc(rig.data, 1, 0), table, desc(rig.data, 1, 0)]), RingError::IndirectWithNext);
}

#[test]
fn device_08_packed_indirect_inside_a_list() {
    let rig = Rig::new(Format::Packed, 8, INDIRECT);
    write_table(&rig, rig.data, &[desc(rig.data + 64, 3, 0)]);
    let table = desc(rig.data, 16, DESC_F_INDIRECT);
    assert_eq!(refused(&rig, &[table, desc(rig.data, 1, 0)]), RingError::IndirectInList);
    assert_eq!(refused(&rig, &[desc(rig.data, 1, 0), table]), RingError::IndirectInList);
    assert_eq!(refused(&rig, &[desc(rig.data, 1, 0), table, table]), RingError::IndirectInList);
}

#[test]
fn device_08_split_table_inside_a_table() {
    let rig = Rig::new(Format::Split, 8, INDIRECT);
    for position in 0..3 {
        let mut entries = in_a_row(&[desc(rig.data + 64, 1, 0); 3]);
        entries[position].flags |= DESC_F_INDIRECT;
        write_table(&rig, rig.data, &entries);
        assert_eq!(refused(&rig, &[desc(rig.data, 48, DESC_F_INDIRECT)]), RingError::IndirectNested);
    }
}

/// In a packed table all entries are used in order; of their flags only WRITE counts, and ids mean nothing.
#[test]
fn device_08_packed_table_ignores_other_flags() {
    let rig = Rig::new(Format::Packed, 8, INDIRECT);
    let entries = [(0, 0), (DESC_F_NEXT | DESC_F_INDIRECT, 7), (0xffff, 0xffff), (0x8080 | DESC_F_WRITE, 0)]
        .map(|(flags, tag)| Desc { tag, ..desc(rig.data + 64, 2, flags) });
    write_table(&rig, rig.data, &entries);
    let (segments, sums) = accepted(&rig, &[desc(rig.data, 64, DESC_F_INDIRECT)]);
    let (r, w) = (Segment::readable(rig.data + 64, 2), Segment::writable(rig.data + 64, 2));
    assert_eq!((segments, sums), (vec![r, r, w, w], (4, 4)));
}

/// A split table is followed by `next` from entry 0: what is not reached is not there.
#[test]
fn device_07_split_table_is_followed_by_next() {
    let rig = Rig::new(Format::Split, 8, INDIRECT);
    let link = |len, next| Desc { tag: next, ..desc(rig.data + 64, len, DESC_F_NEXT) };
    write_table(&rig, rig.data, &[link(1, 3), link(9, 9), desc(rig.data + 64, 3, 0), link(2, 2)]);
    let (segments, _) = accepted(&rig, &[desc(rig.data, 64, DESC_F_INDIRECT)]);
    assert_eq!(segments, [1, 2, 3].map(|len| Segment::readable(rig.data + 64, len)));
    for next in [4, 7, 0xffff] {
        write_table(&rig, rig.data, &[link(1, next)]);
        let error = RingError::NextOutOfRange { next, limit: 4 };
        assert_eq!(refused(&rig, &[desc(rig.data, 64, DESC_F_INDIRECT)]), error);
    }
    write_table(&rig, rig.data, &[link(1, 1), link(1, 0)]);
    assert_eq!(refused(&rig, &[desc(rig.data, 32, DESC_F_INDIRECT)]), RingError::ChainTooLong { limit: 8 });
}

/// Longer tables on request, up to 1024 descriptors, on a ring of any size.
#[test]
fn device_07_longer_tables_on_request() {
    for format in BOTH {
        for (size, limit) in [(1, 1024), (8, 1024), (8, 9), (256, 257)] {
            let rig = Rig::new(format, size, INDIRECT).with_chain_limit(limit);
            let entries = in_a_row(&vec![desc(rig.data, 1, DESC_F_WRITE); limit as usize]);
            write_table(&rig, rig.data, &entries);
            let (segments, sums) = accepted(&rig, &[desc(rig.data, 16 * limit as u32, DESC_F_INDIRECT)]);
            assert_eq!((segments.len() as u64, sums), (limit, (0, limit as u32)));
            let entries = limit as u32 + 1;
            let error = RingError::IndirectTooLong { entries, limit: limit as u16 };
            assert_eq!(refused(&rig, &[desc(rig.data, 16 * entries, DESC_F_INDIRECT)]), error);
        }
    }
    assert_eq!(check_chain_limit(8, None), Ok(8));
    assert_eq!(check_chain_limit(2048, Some(2048)), Ok(2048));
    for (size, limit, max) in [(8, 0, 1024), (8, 1025, 1024), (8, 65536 + 8, 1024), (2048, 2049, 2048)] {
        let error = RingError::BadChainLimit { limit, max };
        assert_eq!(check_chain_limit(size, Some(limit)), Err(error.clone()));
        assert_eq!(error.fault(), Fault::Caller);
    }
}

#[test]
fn device_09_readable_after_writable() {
    each(INDIRECT, |rig| {
        let (r, w) = (desc(rig.data, 1, 0), desc(rig.data, 1, DESC_F_WRITE));
        for (chain, position) in [(vec![w, r], 1), (vec![r, w, r], 2), (vec![w, w, w, r, w], 3)] {
            let error = RingError::ReadableAfterWritable { position };
            assert_eq!(refused(&rig, &chain), error);
            write_table(&rig, rig.data, &in_a_row(&chain));
            assert_eq!(refused(&rig, &[desc(rig.data, 16 * chain.len() as u32, DESC_F_INDIRECT)]), error, "in a table");
        }
    });
}

#[test]
fn device_09_total_length() {
    each(INDIRECT, |rig| {
        let long = |len, flags| desc(rig.data, len, flags);
        let exact = [long(u32::MAX - 1, 0), long(1, DESC_F_WRITE)];
        assert_eq!(accepted(&rig, &exact).1, (u32::MAX - 1, 1));
        assert_eq!(accepted(&rig, &[long(u32::MAX, 0)]).1, (u32::MAX, 0));
        assert_eq!(accepted(&rig, &[long(u32::MAX, DESC_F_WRITE)]).1, (0, u32::MAX));
        // One byte more, as the specification would allow, and a sum that 32 bits would cut off.
        for chain in [[long(u32::MAX, 0), long(1, DESC_F_WRITE)], [long(1, DESC_F_WRITE), long(u32::MAX, DESC_F_WRITE)]] {
            assert_eq!(refused(&rig, &chain), RingError::ChainTooManyBytes { bytes: 1 << 32 });
            write_table(&rig, rig.data, &in_a_row(&chain));
            assert_eq!(refused(&rig, &[desc(rig.data, 32, DESC_F_INDIRECT)]), RingError::ChainTooManyBytes { bytes: 1 << 32 });
        }
    });
}

/// Segments of no bytes are accepted and skipped, though they count towards the limit; our own driver refuses to make them.
#[test]
fn device_09_segments_of_no_bytes() {
    each(RingFeatures { in_order: true, ..INDIRECT }, |rig| {
        let (none, some) = (desc(rig.data, 0, 0), desc(rig.data, 3, DESC_F_WRITE));
        let only = Segment::writable(rig.data, 3);
        assert_eq!(accepted(&rig, &[none]), (vec![], (0, 0)));
        assert_eq!(accepted(&rig, &[none, some, desc(0, 0, DESC_F_WRITE)]), (vec![only], (0, 3)));
        write_table(&rig, rig.data + 64, &in_a_row(&[none, some, desc(0, 0, DESC_F_WRITE)]));
        assert_eq!(accepted(&rig, &[desc(rig.data + 64, 48, DESC_F_INDIRECT)]), (vec![only], (0, 3)));
        // A chain without a byte comes back as any other.
        let (mut driver, mut device) = (rig.raw_driver(), rig.device());
        driver.offer(&[none, none]);
        let chains = pop(&mut device, 1);
        assert_eq!(give_back(&mut device, &[done(&chains[0], 1)]), Err(RingError::UsedTooLong { len: 1, writable: 0 }));
        complete(&mut device, &chains);
        assert_eq!(device.outstanding(), 0);
        let limited = Rig::new(rig.format, 8, rig.features).with_chain_limit(2);
        assert_eq!(refused(&limited, &[none, none, none]), RingError::ChainTooLong { limit: 2 });
    });
}
