//! The header before every frame (5.1.6): its size, its fields, and which of its claims are believed (device-14, device-15, driver-12).

/// Feature bits that decide about headers (5.1.3); the names are the specification's.
pub mod feature {
    #![allow(missing_docs)]
    pub const CSUM: u32 = 0;
    pub const GUEST_CSUM: u32 = 1;
    pub const GUEST_TSO4: u32 = 7;
    pub const GUEST_TSO6: u32 = 8;
    pub const GUEST_ECN: u32 = 9;
    pub const GUEST_UFO: u32 = 10;
    pub const HOST_TSO4: u32 = 11;
    pub const HOST_TSO6: u32 = 12;
    pub const HOST_ECN: u32 = 13;
    pub const HOST_UFO: u32 = 14;
    pub const MRG_RXBUF: u32 = 15;
    pub const VERSION_1: u32 = 32;
    pub const GUEST_USO4: u32 = 54;
    pub const GUEST_USO6: u32 = 55;
    pub const HOST_USO: u32 = 56;
    pub const HASH_REPORT: u32 = 57;
    pub const GUEST_UDP_TUNNEL_GSO: u32 = 65;
    pub const HOST_UDP_TUNNEL_GSO: u32 = 67;
    pub const OUT_NET_HEADER: u32 = 69;
    pub const IPSEC: u32 = 70;
}

/// Header flag: the checksum at `csum_start + csum_offset` is not complete (5.1.6).
pub const F_NEEDS_CSUM: u8 = 1;
/// Header flag, towards the driver: the checksum was checked (5.1.6.4.1).
pub const F_DATA_VALID: u8 = 2;

/// No segmentation (5.1.6).
pub const GSO_NONE: u8 = 0;
/// TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// UDP fragmentation.
pub const GSO_UDP: u8 = 3;
/// TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// UDP segmentation.
pub const GSO_UDP_L4: u8 = 5;
/// Beside a TCP type: ECN bits are set.
pub const GSO_ECN: u8 = 0x80;

/// Bytes of the longest frame that either end moves: 65535 of payload and 54 of headers (5.1.6.3).
pub const MAX_FRAME: usize = 65589;

/// Whether one of these bits is in the set.
const fn has(features: u128, bit: u32) -> bool {
    features >> bit & 1 == 1
}

/// Bytes of the header under these features, for both sides and both directions (5.1.6, device-15).
pub const fn header_size(features: u128) -> usize {
    if has(features, feature::OUT_NET_HEADER) || has(features, feature::IPSEC) {
        32
    } else if has(features, feature::GUEST_UDP_TUNNEL_GSO) || has(features, feature::HOST_UDP_TUNNEL_GSO) {
        24
    } else if has(features, feature::HASH_REPORT) {
        20
    } else if has(features, feature::VERSION_1) || has(features, feature::MRG_RXBUF) {
        12
    } else {
        10
    }
}

/// Why a packet was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing behind the header, or an empty piece.
    Short,
    /// More than a burst, a pool or the other end's buffer holds, or than any frame has.
    Long,
    /// NEEDS_CSUM that was not negotiated, or whose place is outside the packet.
    Checksum,
    /// A segmentation type that was not negotiated, or without what belongs to it.
    Gso,
    /// `num_buffers` is 0, or more than there can be.
    NumBuffers,
    /// The later buffers of a merged packet were not there.
    Missing,
    /// Outgoing: the other end did not accept this kind of segmentation.
    Offload,
}

impl Reason {
    /// All of them, in the order of their numbers.
    pub const ALL: [(Reason, &'static str); 7] = [
        (Reason::Short, "short"),
        (Reason::Long, "long"),
        (Reason::Checksum, "checksum"),
        (Reason::Gso, "gso"),
        (Reason::NumBuffers, "num_buffers"),
        (Reason::Missing, "missing"),
        (Reason::Offload, "offload"),
    ];
}

/// The first twelve bytes of a header, in two words: headers pass through registers, since one that was stored byte by byte and is loaded in
/// words again waits for every store before it, the frame's bytes in the other end's memory among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// `flags` to `csum_start`.
    first: u64,
    /// `csum_offset` and `num_buffers`.
    last: u32,
}

/// The fields that every header has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fields {
    /// `F_*` bits.
    pub flags: u8,
    /// One of `GSO_*`, perhaps with `GSO_ECN`.
    pub gso_type: u8,
    /// A hint: how many bytes of headers a segmented packet has.
    pub hdr_len: u16,
    /// Bytes of payload in a segment.
    pub gso_size: u16,
    /// Where the checksum begins, from the frame's first byte.
    pub csum_start: u16,
    /// Where it is put, from `csum_start`.
    pub csum_offset: u16,
    /// Towards the driver: the buffers of this packet. Else 0.
    pub num_buffers: u16,
}

impl Header {
    /// Bytes of these fields.
    pub const SIZE: usize = 12;

    /// The header in these bytes.
    #[inline]
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        let [a, b, c, d, e, f, g, h, last @ ..] = *bytes;
        Header { first: u64::from_le_bytes([a, b, c, d, e, f, g, h]), last: u32::from_le_bytes(last) }
    }

    /// Its bytes.
    #[inline]
    pub fn bytes(&self) -> [u8; Self::SIZE] {
        let [a, b, c, d, e, f, g, h] = self.first.to_le_bytes();
        let [i, j, k, l] = self.last.to_le_bytes();
        [a, b, c, d, e, f, g, h, i, j, k, l]
    }

    /// Its fields.
    pub fn fields(&self) -> Fields {
        let word = |at: u32| (self.first >> at) as u16;
        Fields {
            flags: self.first as u8,
            gso_type: (self.first >> 8) as u8,
            hdr_len: word(16),
            gso_size: word(32),
            csum_start: word(48),
            csum_offset: self.last as u16,
            num_buffers: self.num_buffers(),
        }
    }

    /// Towards the driver: the buffers of this packet. Else 0.
    #[inline]
    pub fn num_buffers(&self) -> u16 {
        (self.last >> 16) as u16
    }

    /// The same, with another number of buffers.
    #[inline]
    #[must_use]
    pub fn with_num_buffers(self, count: u16) -> Self {
        Header { last: self.last & 0xffff | u32::from(count) << 16, ..self }
    }

    /// Whether it claims nothing: no flag, no segmentation.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.first & 0xffff == 0
    }
}

impl From<Fields> for Header {
    fn from(fields: Fields) -> Self {
        let bytes = [fields.flags, fields.gso_type];
        let words = [u16::from_le_bytes(bytes), fields.hdr_len, fields.gso_size, fields.csum_start];
        let first = words.iter().rev().fold(0, |all, word| all << 16 | u64::from(*word));
        Header { first, last: u32::from(fields.csum_offset) | u32::from(fields.num_buffers) << 16 }
    }
}

impl Fields {
    /// Whether the checksum's two bytes lie inside a packet of this length.
    fn checksum_is_inside(&self, length: u64) -> bool {
        u64::from(self.csum_start) + u64::from(self.csum_offset) + 2 <= length
    }
}

/// What may be claimed of packets in one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    csum: bool,
    /// DATA_VALID may be set: towards the driver only.
    valid: bool,
    tso4: bool,
    tso6: bool,
    ecn: bool,
    ufo: bool,
    uso: bool,
}

impl Offloads {
    /// From the driver to the device.
    pub const fn towards_device(features: u128) -> Self {
        Offloads {
            csum: has(features, feature::CSUM),
            valid: false,
            tso4: has(features, feature::HOST_TSO4),
            tso6: has(features, feature::HOST_TSO6),
            ecn: has(features, feature::HOST_ECN),
            ufo: has(features, feature::HOST_UFO),
            uso: has(features, feature::HOST_USO),
        }
    }

    /// From the device to the driver.
    pub const fn towards_driver(features: u128) -> Self {
        Offloads {
            csum: has(features, feature::GUEST_CSUM),
            valid: has(features, feature::GUEST_CSUM),
            tso4: has(features, feature::GUEST_TSO4),
            tso6: has(features, feature::GUEST_TSO6),
            ecn: has(features, feature::GUEST_ECN),
            ufo: has(features, feature::GUEST_UFO),
            uso: has(features, feature::GUEST_USO4) || has(features, feature::GUEST_USO6),
        }
    }

    /// Bytes of the longest frame: with segmentation, or of Ethernet with a VLAN tag.
    pub(crate) fn longest(&self) -> usize {
        if self.tso4 || self.tso6 || self.ufo || self.uso { MAX_FRAME } else { 1518 }
    }

    fn allows(&self, gso_type: u8) -> bool {
        let tcp = match gso_type & !GSO_ECN {
            GSO_TCPV4 => self.tso4,
            GSO_TCPV6 => self.tso6,
            _ if gso_type & GSO_ECN != 0 => false,
            GSO_UDP => return self.ufo,
            GSO_UDP_L4 => return self.uso,
            _ => false,
        };
        tcp && (gso_type & GSO_ECN == 0 || self.ecn)
    }

    /// The flags and fields that mean something; unknown flags are ignored (5.1.6.2.2, 5.1.6.4.2).
    fn known(&self, header: Fields, length: u64) -> Fields {
        let mut known = Fields { flags: header.flags & F_NEEDS_CSUM, num_buffers: header.num_buffers, ..Fields::default() };
        if self.valid {
            known.flags |= header.flags & F_DATA_VALID;
        }
        if known.flags & F_NEEDS_CSUM != 0 {
            (known.csum_start, known.csum_offset) = (header.csum_start, header.csum_offset);
        }
        if header.gso_type != GSO_NONE {
            known.gso_type = header.gso_type;
            known.gso_size = header.gso_size;
            known.hdr_len = header.hdr_len.min(length.min(u16::MAX.into()) as u16);
        }
        known
    }

    /// What is believed of a header from the other end, before a packet of `length` bytes.
    ///
    /// # Errors
    /// `Checksum`, `Gso`: it claims what was not negotiated, or what cannot be (device-14, driver-12).
    #[inline]
    pub fn incoming(&self, header: Header, length: u64) -> Result<Header, Reason> {
        if header.is_plain() {
            return Ok(Header::default().with_num_buffers(header.num_buffers()));
        }
        self.incoming_claims(header.fields(), length).map(Header::from)
    }

    fn incoming_claims(&self, header: Fields, length: u64) -> Result<Fields, Reason> {
        let known = self.known(header, length);
        let needs = known.flags & F_NEEDS_CSUM != 0;
        if needs && !(self.csum && known.checksum_is_inside(length)) {
            return Err(Reason::Checksum);
        }
        if known.gso_type != GSO_NONE && !(needs && self.allows(known.gso_type) && known.gso_size != 0) {
            return Err(Reason::Gso);
        }
        Ok(known)
    }

    /// What goes before a packet of `length` bytes to the other end, and whether its checksum has to be completed first, because the other
    /// end would not.
    ///
    /// # Errors
    /// `Checksum`, `Gso`: the header cannot be right. `Offload`: the other end does not take this kind of segmentation.
    #[inline]
    pub fn outgoing(&self, header: Header, length: u64) -> Result<(Header, bool), Reason> {
        if header.is_plain() {
            return Ok((Header::default(), false));
        }
        self.outgoing_claims(header.fields(), length).map(|(known, complete)| (known.into(), complete))
    }

    fn outgoing_claims(&self, header: Fields, length: u64) -> Result<(Fields, bool), Reason> {
        let known = Fields { num_buffers: 0, ..self.known(header, length) };
        let needs = known.flags & F_NEEDS_CSUM != 0;
        if needs && !known.checksum_is_inside(length) {
            return Err(Reason::Checksum);
        }
        if known.gso_type != GSO_NONE {
            if !needs || known.gso_size == 0 {
                return Err(Reason::Gso);
            }
            if !self.csum || !self.allows(known.gso_type) {
                return Err(Reason::Offload);
            }
        }
        if needs && !self.csum {
            return Ok((Fields::default(), true));
        }
        Ok((known, false))
    }
}
