//! Checksums in software, against a sum made by hand.

use virtio_net_path::checksum::complete;

const HEADER: [u8; 20] = [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];

#[test]
fn a_checksum_is_completed_in_its_place() {
    let mut frame = [&[0xff; 3][..], &HEADER[..]].concat();
    assert_eq!(complete(&mut frame, 3, 10), Some([0xb8, 0x61]));
    assert_eq!(frame[13..15], [0xb8, 0x61]);
}

#[test]
fn an_odd_byte_counts_as_the_upper_one_and_zero_becomes_all_ones() {
    assert_eq!(complete(&mut [0, 0, 0x12], 0, 0), Some([0xed, 0xff]));
    assert_eq!(complete(&mut [0xff, 0xff, 0, 0], 0, 2), Some([0xff, 0xff]));
}

#[test]
fn a_place_outside_the_frame_changes_nothing() {
    let mut frame = HEADER;
    for (start, offset) in [(19, 0), (0, 19), (usize::MAX, 1), (1, usize::MAX)] {
        assert_eq!(complete(&mut frame, start, offset), None);
    }
    assert_eq!(frame, HEADER);
}
