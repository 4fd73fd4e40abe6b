//! Transmitted chains, judged before anything is done with them.

use crate::header::{Header, MAX_FRAME, Reason};
use crate::pieces::Pieces;
use crate::port::Rules;
use virtio_memory::{MemoryError, Place, RegionTable};
use virtqueue::{Chain, Segment};

/// A transmitted chain that is believed.
pub(crate) struct Incoming {
    pub header: Header,
    /// Bytes of the frame.
    pub length: usize,
}

/// Looks at a transmitted chain: its header is copied, then judged; all of its memory is there (device-11, device-13, device-14).
#[inline(always)]
pub(crate) fn judge(
    memory: &RegionTable,
    segments: &[Segment],
    chain: &Chain,
    rules: &Rules,
) -> Result<Result<Incoming, Reason>, MemoryError> {
    let length = match frame_length(chain, rules) {
        Ok(length) => length,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut bytes = [0; Header::SIZE];
    match segments {
        [first, ..] if first.len as usize >= Header::SIZE => memory.read(first.address, &mut bytes)?,
        _ => {
            let mut at = 0;
            Pieces::new(segments.iter()).each(Header::SIZE, |address, len| {
                memory.read(address, &mut bytes[at..at + len])?;
                at += len;
                Ok(())
            })?;
        }
    }
    for segment in segments {
        memory.check(segment.address, segment.len.into())?;
    }
    Ok(believe(&bytes, length, rules))
}

/// As [`judge`], where the whole chain is in one place.
#[inline(always)]
pub(crate) fn judge_place(place: &Place<'_>, chain: &Chain, rules: &Rules) -> Result<Result<Incoming, Reason>, MemoryError> {
    let length = match frame_length(chain, rules) {
        Ok(length) => length,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut bytes = [0; Header::SIZE];
    place.read(0, &mut bytes)?;
    Ok(believe(&bytes, length, rules))
}

/// Bytes behind the header.
#[inline(always)]
fn frame_length(chain: &Chain, rules: &Rules) -> Result<usize, Reason> {
    match (chain.readable as usize).checked_sub(rules.header) {
        None | Some(0) => Err(Reason::Short),
        Some(length) if length > MAX_FRAME => Err(Reason::Long),
        Some(length) => Ok(length),
    }
}

/// What is believed of a header that was copied.
#[inline(always)]
fn believe(bytes: &[u8; Header::SIZE], length: usize, rules: &Rules) -> Result<Incoming, Reason> {
    rules.incoming.incoming(Header::parse(bytes), length as u64).map(|header| Incoming { header, length })
}
