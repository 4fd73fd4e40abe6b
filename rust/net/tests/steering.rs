//! A flow is one in both directions and under any tags, flows spread over the pairs, and what is learned wins.

mod common;

use common::{BOTH, link, packet, write};
use virtio_net_path::{Dealer, Steering};

/// An Ethernet frame of this type from one machine to another, `back` the other way round.
fn ethernet(kind: u16, tags: &[u16], back: bool) -> Vec<u8> {
    let (mut near, mut far) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    if back {
        std::mem::swap(&mut near, &mut far);
    }
    let mut frame = [far, near].concat();
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 7]);
    }
    frame.extend(kind.to_be_bytes());
    frame
}

fn ports(near: u16, far: u16, back: bool) -> Vec<u8> {
    let (from, to) = if back { (far, near) } else { (near, far) };
    [from.to_be_bytes(), to.to_be_bytes()].concat()
}

fn ipv4(protocol: u8, near: u16, options: usize, fragment: u16, tags: &[u16], back: bool) -> Vec<u8> {
    let mut frame = ethernet(0x0800, tags, back);
    let (mut from, mut to) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    if back {
        std::mem::swap(&mut from, &mut to);
    }
    frame.extend([0x45 + options as u8, 0, 0, 40, 0, 0]);
    frame.extend(fragment.to_be_bytes());
    frame.extend([64, protocol, 0, 0]);
    frame.extend(from);
    frame.extend(to);
    frame.extend(vec![0; 4 * options]);
    frame.extend(ports(near, 80, back));
    frame
}

fn ipv6(protocol: u8, near: u16, tags: &[u16], back: bool) -> Vec<u8> {
    let mut frame = ethernet(0x86dd, tags, back);
    let (mut from, mut to) = ([0x20; 16], [0x21; 16]);
    (from[15], to[15]) = (1, 2);
    if back {
        std::mem::swap(&mut from, &mut to);
    }
    frame.extend([0x60, 0, 0, 0, 0, 20, protocol, 64]);
    frame.extend(from);
    frame.extend(to);
    frame.extend(ports(near, 80, back));
    frame
}

type Make = Box<dyn Fn(u16, bool) -> Vec<u8>>;

/// Kinds of frames, each by a port's number and direction; and whether the port tells flows apart.
fn kinds() -> Vec<(Make, bool)> {
    vec![
        (Box::new(|port, back| ipv4(6, port, 0, 0, &[], back)), true),
        (Box::new(|port, back| ipv4(17, port, 3, 0x4000, &[0x8100], back)), true),
        (Box::new(|port, back| ipv4(132, port, 0, 0, &[0x88a8, 0x8100], back)), true),
        (Box::new(|port, back| ipv6(6, port, &[], back)), true),
        (Box::new(|port, back| ipv6(17, port, &[0x88a8, 0x8100], back)), true),
        (Box::new(|port, back| ipv4(1, port, 0, 0, &[], back)), false),
        (Box::new(|port, back| ipv4(17, port, 0, 0x2000, &[], back)), false),
        (Box::new(|port, back| ipv4(17, port, 0, 100, &[], back)), false),
        (Box::new(|port, back| [ethernet(0x0806, &[], back), ports(port, 80, back)].concat()), false),
    ]
}

#[test]
fn both_directions_are_one_flow_and_flows_spread() {
    let steering = Steering::default();
    for (number, (make, told)) in kinds().iter().enumerate() {
        let mut seen = [0; 4];
        for port in 0..1000 {
            let pair = steering.choose(&make(port, false), 4);
            assert_eq!(pair, steering.choose(&make(port, true), 4), "kind {number}");
            seen[usize::from(pair)] += 1;
        }
        if *told {
            assert!(seen.iter().all(|flows| (150..350).contains(flows)), "kind {number}: {seen:?}");
        } else {
            assert!(seen.contains(&1000), "kind {number}: {seen:?}");
        }
    }
}

#[test]
fn what_came_from_a_pair_goes_back_there_while_there_is_that_pair() {
    for (make, told) in kinds() {
        let steering = Steering::default();
        for pair in [3, 1, 2, 0] {
            steering.learn(&make(9, false), pair);
            assert_eq!(steering.choose(&make(9, true), 4), pair);
            assert!(steering.choose(&make(9, true), 1) == 0 && steering.choose(&make(9, true), pair + 1) == pair);
        }
        let before = Steering::default().choose(&make(10, false), 4);
        assert!(!told || steering.choose(&make(10, false), 4) == before, "others stay where they were");
    }
}

#[test]
fn any_bytes_have_a_pair() {
    let steering = Steering::default();
    for (make, _) in kinds() {
        let frame = make(1, false);
        for len in 0..frame.len() {
            assert!(steering.choose(&frame[..len], 3) < 3);
        }
    }
    assert_eq!(steering.choose(&[0xff; 66], 1), 0);
    steering.learn(&[], 0xfffe);
    assert!(steering.choose(&[], 0x8000) < 0x8000);
}

#[test]
fn a_burst_is_dealt_and_what_is_left_stands_in_it() {
    for format in BOTH {
        let link = link(format, 8, 32, false);
        let burst = link.near_burst(16);
        let steering = Steering::default();
        let packets: Vec<_> = (0..6).map(|number| packet(60, number)).collect();
        for (number, each) in packets.iter().enumerate() {
            steering.learn(&each[..60], [1, 0, 1, 2, 0, 1][number]);
        }
        write(&burst, &packets.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let mut dealer = Dealer::default();
        dealer.read(&mut burst.pool().lock(), &burst, &steering, 3).unwrap();
        assert_eq!(dealer.only(), None);
        let mut counts = Vec::new();
        let result = dealer.deal(&burst, 3, |pair| {
            counts.push((pair, burst.count()));
            match pair {
                0 => burst.set_count(0).map(|()| 2), // all sent
                1 => {
                    // The first one is sent: the others move to the front.
                    for row in 1..3 {
                        let raw = burst.row(row);
                        let moved = virtio_memory::Row { slot: raw.slot as u32, offset: raw.offset as u32, length: 60, more: false };
                        burst.set_row(row - 1, moved);
                    }
                    burst.set_count(2).map(|()| 1)
                }
                _ => Err(virtio_memory::MemoryError::Closed),
            }
        });
        assert_eq!(result, Err(virtio_memory::MemoryError::Closed));
        assert_eq!(counts, [(0, 2), (1, 3), (2, 1)]);
        let left = [packets[2].clone(), packets[5].clone(), packets[3].clone()];
        assert_eq!(common::read(&burst), left);
    }
}
