//! A ring pair with nothing but the ring: no check, no token table worth the name, no suppression, no payload. The limit that the shipped
//! rings are held against. Never shipped; the only code outside the memory crate and the binding's buffer file with `unsafe`.

use crate::pair::{Device, Driver};
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

/// Zeroed, aligned memory that both halves point into. Never given back: a benchmark's process is short.
fn area(bytes: usize) -> *mut u8 {
    let words: &'static mut [[u64; 8]] = Vec::leak(vec![[0u64; 8]; bytes.div_ceil(64) + 64]);
    let start = words.as_mut_ptr() as usize;
    (start.next_multiple_of(4096)) as *mut u8
}

/// Two words, as both formats have them.
#[derive(Clone, Copy)]
#[repr(C)]
struct Desc {
    address: u64,
    rest: u64,
}

/// Where the split ring's parts are.
#[derive(Clone, Copy)]
struct SplitParts {
    size: usize,
    desc: *mut Desc,
    avail_index: *const AtomicU16,
    avail: *mut u16,
    used_index: *const AtomicU16,
    used: *mut [u32; 2],
}
// SAFETY: the parts are leaked memory, shared by protocol.
unsafe impl Send for SplitParts {}

/// Driver's half of the bare split ring.
pub struct SplitDriver<const IN_ORDER: bool> {
    parts: SplitParts,
    next: u16,
    last: u16,
    free: Vec<u16>,
    tokens: Vec<u64>,
    sum: u64,
}

/// Device's half of the bare split ring.
pub struct SplitDevice<const IN_ORDER: bool> {
    parts: SplitParts,
    next: u16,
    seen: u16,
    sum: u64,
}

/// A bare split ring; `size` is a power of two.
pub fn split<const IN_ORDER: bool>(size: usize) -> (SplitDriver<IN_ORDER>, SplitDevice<IN_ORDER>) {
    let base = area(64 * size + 3 * 4096);
    // SAFETY: the offsets stay inside the area; each part is aligned for its type.
    let parts = unsafe {
        let avail = base.add(16 * size);
        let used = base.add((18 * size + 6).next_multiple_of(4096));
        SplitParts {
            size,
            desc: base.cast(),
            avail_index: avail.add(2).cast(),
            avail: avail.add(4).cast(),
            used_index: used.add(2).cast(),
            used: used.add(4).cast(),
        }
    };
    if IN_ORDER {
        for i in 0..size {
            // SAFETY: i is below size.
            unsafe { parts.avail.add(i).write(i as u16) };
        }
    }
    let driver = SplitDriver { parts, next: 0, last: 0, free: (0..size as u16).rev().collect(), tokens: vec![0; size], sum: 0 };
    (driver, SplitDevice { parts, next: 0, seen: 0, sum: 0 })
}

impl<const IN_ORDER: bool> Driver for SplitDriver<IN_ORDER> {
    fn room(&self) -> usize {
        if IN_ORDER { self.parts.size - usize::from(self.next.wrapping_sub(self.last)) } else { self.free.len() }
    }

    #[inline(always)]
    fn add(&mut self, count: usize) {
        let mask = self.parts.size - 1;
        // SAFETY: the caller asked for room first; every index is masked or from the free list.
        unsafe {
            let top = self.free.len().wrapping_sub(1);
            for k in 0..count {
                let place = (usize::from(self.next) + k) & mask;
                let id = if IN_ORDER { place } else { usize::from(*self.free.get_unchecked(top - k)) };
                *self.tokens.get_unchecked_mut(id) = k as u64;
                self.parts.desc.add(id).write(Desc { address: (id as u64) << 11, rest: 64 });
                if !IN_ORDER {
                    self.parts.avail.add(place).write(id as u16);
                }
            }
            if !IN_ORDER {
                self.free.set_len(top + 1 - count);
            }
            self.next = self.next.wrapping_add(count as u16);
            (*self.parts.avail_index).store(self.next, Ordering::Release);
        }
    }

    #[inline(always)]
    fn reclaim(&mut self) -> usize {
        let mask = self.parts.size - 1;
        // SAFETY: as in add; the other half is trusted here.
        unsafe {
            let index = (*self.parts.used_index).load(Ordering::Acquire);
            let ready = usize::from(index.wrapping_sub(self.last));
            let len = self.free.len();
            for k in 0..ready {
                let place = (usize::from(self.last) + k) & mask;
                if IN_ORDER {
                    self.sum = self.sum.wrapping_add(*self.tokens.get_unchecked(place));
                } else {
                    let [id, used] = self.parts.used.add(place).read();
                    self.sum = self.sum.wrapping_add(*self.tokens.get_unchecked(id as usize & mask) + u64::from(used));
                    self.free.as_mut_ptr().add(len + k).write(id as u16);
                }
            }
            if !IN_ORDER {
                self.free.set_len(len + ready);
            }
            self.last = index;
            ready
        }
    }

    fn sum(&self) -> u64 {
        self.sum
    }
}

impl<const IN_ORDER: bool> Device for SplitDevice<IN_ORDER> {
    #[inline(always)]
    fn serve(&mut self, limit: usize) -> usize {
        let mask = self.parts.size - 1;
        // SAFETY: every index is masked; the parts live for ever.
        unsafe {
            if self.seen == self.next {
                self.seen = (*self.parts.avail_index).load(Ordering::Acquire);
            }
            let count = usize::from(self.seen.wrapping_sub(self.next)).min(limit);
            if count == 0 {
                return 0;
            }
            let mut id = 0;
            for k in 0..count {
                let place = (usize::from(self.next) + k) & mask;
                id = if IN_ORDER { place } else { usize::from(self.parts.avail.add(place).read()) };
                let desc = self.parts.desc.add(id & mask).read();
                self.sum = self.sum.wrapping_add(desc.address).wrapping_add(desc.rest);
                if !IN_ORDER {
                    self.parts.used.add(place).write([id as u32, 64]);
                }
            }
            if IN_ORDER {
                self.parts.used.add(usize::from(self.next) & mask).write([id as u32, 64]);
            }
            self.next = self.next.wrapping_add(count as u16);
            (*self.parts.used_index).store(self.next, Ordering::Release);
            count
        }
    }

    fn sum(&self) -> u64 {
        self.sum
    }
}

const AVAIL: u64 = 1 << 55;
const USED: u64 = 1 << 63;

#[derive(Clone, Copy)]
struct PackedParts {
    size: usize,
    desc: *mut Desc,
}
// SAFETY: as for SplitParts.
unsafe impl Send for PackedParts {}

impl PackedParts {
    #[inline(always)]
    fn rest(&self, at: usize) -> &AtomicU64 {
        // SAFETY: `at` is below size.
        unsafe { &*(&raw const (*self.desc.add(at)).rest).cast() }
    }

    #[inline(always)]
    fn step(&self, at: &mut usize, wrap: &mut bool, count: usize) {
        *at += count;
        if *at >= self.size {
            *at -= self.size;
            *wrap = !*wrap;
        }
    }
}

/// Driver's half of the bare packed ring.
pub struct PackedDriver<const IN_ORDER: bool> {
    parts: PackedParts,
    at: usize,
    wrap: bool,
    used_at: usize,
    used_wrap: bool,
    free: usize,
    ids: Vec<u16>,
    tokens: Vec<u64>,
    sum: u64,
}

/// Device's half of the bare packed ring.
pub struct PackedDevice<const IN_ORDER: bool> {
    parts: PackedParts,
    at: usize,
    wrap: bool,
    sum: u64,
}

/// A bare packed ring; `size` is a power of two.
pub fn packed<const IN_ORDER: bool>(size: usize) -> (PackedDriver<IN_ORDER>, PackedDevice<IN_ORDER>) {
    let parts = PackedParts { size, desc: area(16 * size).cast() };
    let driver = PackedDriver {
        parts,
        at: 0,
        wrap: true,
        used_at: 0,
        used_wrap: true,
        free: size,
        ids: (0..size as u16).rev().collect(),
        tokens: vec![0; size],
        sum: 0,
    };
    (driver, PackedDevice { parts, at: 0, wrap: true, sum: 0 })
}

impl<const IN_ORDER: bool> Driver for PackedDriver<IN_ORDER> {
    fn room(&self) -> usize {
        self.free
    }

    #[inline(always)]
    fn add(&mut self, count: usize) {
        let (head, mut first) = (self.at, 0);
        for k in 0..count {
            // SAFETY: the caller asked for room first, so count ids are free; `at` stays below size.
            unsafe {
                let id = if IN_ORDER { self.at as u16 } else { *self.ids.get_unchecked(self.free - 1 - k) };
                *self.tokens.get_unchecked_mut(usize::from(id)) = k as u64;
                (*self.parts.desc.add(self.at)).address = u64::from(id) << 11;
                let rest = 64 | u64::from(id) << 32 | if self.wrap { AVAIL } else { USED };
                if k == 0 {
                    first = rest;
                } else {
                    self.parts.rest(self.at).store(rest, Ordering::Relaxed);
                }
            }
            self.parts.step(&mut self.at, &mut self.wrap, 1);
        }
        self.free -= count;
        self.parts.rest(head).store(first, Ordering::Release);
    }

    #[inline(always)]
    fn reclaim(&mut self) -> usize {
        let before = self.free;
        while self.free < self.parts.size {
            let word = self.parts.rest(self.used_at).load(Ordering::Acquire);
            if word & (AVAIL | USED) != if self.used_wrap { AVAIL | USED } else { 0 } {
                break;
            }
            let id = usize::from((word >> 32) as u16) & (self.parts.size - 1);
            let run = if IN_ORDER { ((id + self.parts.size - self.used_at) & (self.parts.size - 1)) + 1 } else { 1 };
            for k in 0..run {
                let token = if IN_ORDER { (self.used_at + k) & (self.parts.size - 1) } else { id };
                // SAFETY: masked.
                self.sum = self.sum.wrapping_add(unsafe { *self.tokens.get_unchecked(token) });
            }
            if !IN_ORDER {
                // SAFETY: free is below size here.
                unsafe { *self.ids.get_unchecked_mut(self.free) = id as u16 };
            }
            self.free += run;
            self.parts.step(&mut self.used_at, &mut self.used_wrap, run);
        }
        self.free - before
    }

    fn sum(&self) -> u64 {
        self.sum
    }
}

impl<const IN_ORDER: bool> Device for PackedDevice<IN_ORDER> {
    #[inline(always)]
    fn serve(&mut self, limit: usize) -> usize {
        let (head, head_wrap) = (self.at, self.wrap);
        let (mut id, mut count) = (0, 0);
        while count < limit {
            let word = self.parts.rest(self.at).load(Ordering::Acquire);
            if word & (AVAIL | USED) != if self.wrap { AVAIL } else { USED } {
                break;
            }
            // SAFETY: `at` is below size.
            let address = unsafe { (*self.parts.desc.add(self.at)).address };
            self.sum = self.sum.wrapping_add(address).wrapping_add(word as u32 as u64);
            let flags = if self.wrap { AVAIL | USED } else { 0 };
            if count == 0 || IN_ORDER {
                id = word & 0xffff << 32;
            } else {
                self.parts.rest(self.at).store(64 | word & 0xffff << 32 | flags, Ordering::Relaxed);
            }
            self.parts.step(&mut self.at, &mut self.wrap, 1);
            count += 1;
        }
        if count > 0 {
            self.parts.rest(head).store(64 | id | if head_wrap { AVAIL | USED } else { 0 }, Ordering::Release);
        }
        count
    }

    fn sum(&self) -> u64 {
        self.sum
    }
}
