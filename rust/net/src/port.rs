//! What both ends of a network device's queues share: which header and claims, what was counted, and frames on their way to Python.

use crate::checksum;
use crate::error::BurstError;
use crate::header::{Header, Offloads, Reason, feature, header_size};
use virtio_memory::{BufferPool, MemoryError, Row};

/// What was negotiated, as far as packets are concerned.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Bytes of the header.
    pub header: usize,
    /// MRG_RXBUF: a packet may take several receive buffers.
    pub mergeable: bool,
    /// What packets from the other end may claim.
    pub incoming: Offloads,
    /// What packets to the other end may claim.
    pub outgoing: Offloads,
}

impl Rules {
    /// For the driver's side.
    pub fn driver(features: u128) -> Self {
        Rules {
            header: header_size(features),
            mergeable: features >> feature::MRG_RXBUF & 1 == 1,
            incoming: Offloads::towards_driver(features),
            outgoing: Offloads::towards_device(features),
        }
    }

    /// For the device's side.
    pub fn device(features: u128) -> Self {
        let driver = Self::driver(features);
        Rules { incoming: driver.outgoing, outgoing: driver.incoming, ..driver }
    }
}

impl Rules {
    /// Bytes of the longest frame that may come in: a buffer for a whole packet holds that (5.1.6.3.1).
    pub fn longest_incoming(&self) -> usize {
        self.incoming.longest()
    }

    /// Bytes of the longest frame that may go out, unless the MTU is above 1500.
    pub fn longest_outgoing(&self) -> usize {
        self.outgoing.longest()
    }
}

/// What went one way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Packets.
    pub frames: u64,
    /// Their bytes, headers not counted.
    pub bytes: u64,
    /// Packets dropped, by [`Reason`].
    pub drops: [u64; Reason::ALL.len()],
}

impl Traffic {
    /// Counts a dropped packet.
    #[inline]
    pub fn drop(&mut self, reason: Reason) {
        self.drops[reason as usize] += 1;
    }

    /// Counts packets that went.
    #[inline]
    pub fn count(&mut self, frames: u64, bytes: u64) {
        self.frames += frames;
        self.bytes += bytes;
    }
}

/// Copies of frames, one behind the other; made once and used again.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
    used: usize,
    ends: Vec<usize>,
}

impl Frames {
    /// Forgets all frames.
    pub fn clear(&mut self) {
        self.used = 0;
        self.ends.clear();
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Each of them.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        (0..self.ends.len()).map(|index| {
            let start = if index == 0 { 0 } else { self.ends[index - 1] };
            &self.bytes[start..self.ends[index]]
        })
    }

    /// Room for one more frame, which `fill` copies there; it counts only if that went well.
    #[inline]
    pub(crate) fn push(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), MemoryError>) -> Result<(), MemoryError> {
        let end = self.used + len;
        if self.bytes.len() < end {
            self.bytes.resize(end.next_power_of_two(), 0);
        }
        fill(&mut self.bytes[self.used..end])?;
        self.used = end;
        self.ends.push(end);
        Ok(())
    }
}

/// The first row of each packet has room for the header before its bytes.
pub(crate) fn check_headroom(rows: &[Row], header: usize) -> Result<(), BurstError> {
    let mut first = true;
    for (row, each) in rows.iter().enumerate() {
        if first && (each.offset as usize) < header {
            return Err(BurstError::NoHeadroom { row, offset: each.offset, header });
        }
        first = !each.more;
    }
    Ok(())
}

/// The header that stands before a row's bytes, where there is room for it, copied before anything is made of it (device-10).
#[inline(always)]
pub(crate) fn read_header(pool: &BufferPool, row: &Row, rules: &Rules) -> Result<Header, MemoryError> {
    let mut bytes = [0; Header::SIZE];
    pool.mapping().read(pool.slot_offset(row.slot) + row.offset as usize - rules.header, &mut bytes)?;
    Ok(Header::parse(&bytes))
}

/// Puts a header before a row's bytes; what is longer than the known fields stays zero.
#[inline(always)]
pub(crate) fn write_header(pool: &BufferPool, row: &Row, rules: &Rules, header: &Header) -> Result<(), MemoryError> {
    let at = pool.slot_offset(row.slot) + row.offset as usize - rules.header;
    pool.mapping().write(at, &header.bytes())?;
    if rules.header > Header::SIZE {
        pool.mapping().write(at + Header::SIZE, &[0; 64][..rules.header - Header::SIZE])?;
    }
    Ok(())
}

/// Makes one packet's header fit for the other end, in place, and completes its checksum if the other end would not; `Some` if the packet
/// has to be dropped. The first row has room for a header.
#[inline(always)]
pub(crate) fn prepare(
    pool: &BufferPool,
    rows: &[Row],
    rules: &Rules,
    scratch: &mut Vec<u8>,
) -> Result<Result<Header, Reason>, MemoryError> {
    let found = read_header(pool, &rows[0], rules)?;
    if found == Header::default() && rules.header == Header::SIZE {
        return Ok(Ok(found));
    }
    prepare_claims(pool, rows, rules, scratch, found)
}

#[cold]
fn prepare_claims(
    pool: &BufferPool,
    rows: &[Row],
    rules: &Rules,
    scratch: &mut Vec<u8>,
    found: Header,
) -> Result<Result<Header, Reason>, MemoryError> {
    let length: u64 = rows.iter().map(|row| u64::from(row.length)).sum();
    let (header, complete) = match rules.outgoing.outgoing(found, length) {
        Ok(outgoing) => outgoing,
        Err(reason) => return Ok(Err(reason)),
    };
    if complete {
        complete_checksum(pool, rows, &found, scratch)?;
    }
    write_header(pool, &rows[0], rules, &header)?;
    Ok(Ok(header))
}

/// Completes the checksum of a packet in slots; its place was checked.
fn complete_checksum(pool: &BufferPool, rows: &[Row], header: &Header, scratch: &mut Vec<u8>) -> Result<(), MemoryError> {
    scratch.clear();
    for row in rows {
        let start = scratch.len();
        scratch.resize(start + row.length as usize, 0);
        pool.mapping().read(pool.slot_offset(row.slot) + row.offset as usize, &mut scratch[start..])?;
    }
    let fields = header.fields();
    let (start, offset) = (usize::from(fields.csum_start), usize::from(fields.csum_offset));
    let Some(bytes) = checksum::complete(scratch, start, offset) else { return Ok(()) };
    // The two bytes may stand in two rows.
    for (index, byte) in bytes.iter().enumerate() {
        let mut at = start + offset + index;
        for row in rows {
            if at < row.length as usize {
                pool.mapping().write(pool.slot_offset(row.slot) + row.offset as usize + at, &[*byte])?;
                break;
            }
            at -= row.length as usize;
        }
    }
    Ok(())
}
