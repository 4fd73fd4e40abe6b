//! The Internet checksum in software, for an other end that does not complete it (5.1.6.2).

/// Completes a checksum: sums up from `start` to the end of `frame`, the pseudo header's part that stands at `start + offset` included, and
/// puts the result there. Tells the two bytes; `None` if they are not inside the frame, which is not changed then.
pub fn complete(frame: &mut [u8], start: usize, offset: usize) -> Option<[u8; 2]> {
    let at = start.checked_add(offset)?;
    if frame.len() < at.checked_add(2)? {
        return None;
    }
    let sum = fold(frame[start..].chunks(2).map(|pair| u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum());
    // A checksum of 0 would mean "none" in UDP, and both zeros are the same number.
    let result = match !sum {
        0 => u16::MAX,
        other => other,
    };
    frame[at..at + 2].copy_from_slice(&result.to_be_bytes());
    Some(result.to_be_bytes())
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
