//! Headers as two words, and as fields.

use virtio_net_path::header::{Fields, GSO_TCPV4, Header};

const BYTES: [u8; 12] = [3, 1, 0x22, 0x11, 0x44, 0x33, 0x66, 0x55, 0x88, 0x77, 0xaa, 0x99];
const FIELDS: Fields = Fields {
    flags: 3,
    gso_type: GSO_TCPV4,
    hdr_len: 0x1122,
    gso_size: 0x3344,
    csum_start: 0x5566,
    csum_offset: 0x7788,
    num_buffers: 0x99aa,
};

#[test]
fn every_field_has_its_place() {
    let header = Header::parse(&BYTES);
    assert_eq!(header.fields(), FIELDS);
    assert_eq!(Header::from(FIELDS), header);
    assert_eq!(header.bytes(), BYTES);
}

#[test]
fn the_number_of_buffers_changes_nothing_else() {
    let header = Header::parse(&BYTES).with_num_buffers(7);
    assert_eq!(header.num_buffers(), 7);
    assert_eq!(header.fields(), Fields { num_buffers: 7, ..FIELDS });
}

#[test]
fn a_flag_or_a_segmentation_type_is_a_claim_and_nothing_else_is() {
    for (at, byte) in BYTES.into_iter().enumerate() {
        let mut bytes = [0; 12];
        bytes[at] = byte;
        assert_eq!(Header::parse(&bytes).is_plain(), at > 1);
    }
}
