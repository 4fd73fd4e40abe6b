//! Chains of one descriptor go through loops of their own: what may come between them, and what a refused batch leaves behind.

mod common;

use common::*;
use virtqueue::{Buffer, Direction, Form, Format, RingError, Segment};

/// Every format, in order and not.
fn rings() -> impl Iterator<Item = Rig> {
    BOTH.into_iter().flat_map(|format| [PLAIN, IN_ORDER].map(|features| Rig::new(format, 16, features)))
}

#[test]
fn chains_of_both_directions_and_of_several_segments_come_in_one_batch_as_they_were_added() {
    use Direction::{Readable, Writable};
    // One direction for long, alternating, and with chains of two segments between: R, W and B (both).
    let patterns = ["RRRRRRRR", "RWRWRWRW", "WWWRRRWW", "RBRBWB", "BBBB", "WBBWRB", "RWWWWWWB"];
    for rig in rings() {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        let mut batch = device.batch(16);
        for round in 0..40u64 {
            let pattern = patterns[round as usize % patterns.len()];
            let mut wanted = Vec::new();
            for (place, kind) in pattern.chars().enumerate() {
                let (address, len) = (rig.data + 64 * place as u64, 1 + place as u32 + round as u32);
                let segment = |direction| Segment { address, len, direction };
                let segments = match kind {
                    'R' => vec![segment(Readable)],
                    'W' => vec![segment(Writable)],
                    _ => vec![segment(Readable), segment(Writable)],
                };
                let token = 100 * round + place as u64;
                if let [Segment { direction, .. }] = segments[..] {
                    assert_eq!(driver.add_batch(&[Buffer { token, address, len, direction }]), Ok(1));
                } else {
                    driver.add(token, &segments, Form::Direct).expect("added");
                }
                wanted.push((token, segments));
            }
            driver.publish();
            batch.clear();
            assert_eq!(device.pop_batch(&mut batch), Ok(wanted.len()), "{pattern}");
            let side_by_side: Vec<Vec<Segment>> = batch.iter().map(|(_, segments)| segments.to_vec()).collect();
            for ((chain, (_, segments)), also) in batch.chains().iter().zip(&wanted).zip(&side_by_side) {
                assert_eq!((batch.segments(chain), also), (&segments[..], segments), "{pattern}");
                let bytes = |direction| segments.iter().filter(|s| s.direction == direction).map(|s| s.len).sum::<u32>();
                assert_eq!((chain.readable, chain.writable), (bytes(Readable), bytes(Writable)));
            }
            let chains = batch.chains().to_vec();
            complete(&mut device, &chains);
            let used: Vec<(u64, u32)> = wanted.iter().zip(&chains).map(|((token, _), chain)| (*token, chain.writable)).collect();
            assert_eq!(reclaim(&mut driver), used, "{pattern}");
            assert_eq!((driver.free(), device.outstanding()), (16, 0));
        }
    }
}

#[test]
fn a_batch_with_an_empty_buffer_anywhere_is_refused_and_leaves_nothing() {
    for rig in rings() {
        let (mut driver, mut device) = (rig.driver(), rig.device());
        for (round, at) in (0..8).cycle().take(40).enumerate() {
            let mut buffers: Vec<Buffer> = (0..8).map(|token| buffer(token, 16, Direction::Writable)).collect();
            buffers[at].len = 0;
            let free = driver.free();
            assert!(matches!(driver.add_batch(&buffers), Err(RingError::EmptySegment { .. })), "at {at}");
            assert_eq!(driver.free(), free);
            driver.publish();
            assert_eq!(pop(&mut device, 16), [], "nothing of it is seen");
            publish(&mut driver, 50 + round as u64, 3);
            let chains = pop(&mut device, 16);
            complete(&mut device, &chains);
            assert_eq!(reclaim(&mut driver), [0, 1, 2].map(|k| (50 + round as u64 + k, 16)));
        }
    }
}

#[test]
fn in_order_heads_are_right_again_after_a_chain_of_several_descriptors_moved_them() {
    let rig = Rig::new(Format::Split, 8, IN_ORDER);
    let (mut driver, mut device) = (rig.driver(), rig.device());
    for round in 0..100u64 {
        // Some rounds long enough to fill the ring with heads that need no store, then one chain that shifts all heads by one.
        if round % 7 == 6 {
            publish_chain(&mut driver, round, &[Segment::readable(rig.data, 4), Segment::writable(rig.data, 4)], Form::Direct);
        } else {
            publish(&mut driver, round, 4);
        }
        let chains = pop(&mut device, 8);
        let heads: Vec<u16> = chains.iter().map(|chain| chain.head).collect();
        assert!(heads.windows(2).all(|pair| pair[1] == (pair[0] + 1) % 8), "{heads:?}");
        complete(&mut device, &chains);
        assert_eq!(reclaim(&mut driver).len(), chains.len());
    }
}
