//! Arrays of atomic little-endian words in shared memory: the only way ring code touches a ring.
//!
//! Each array has one width, so that one word is never accessed at two widths by one process. An array keeps its mapping alive. Every
//! access to an array is bounds-checked; an index out of bounds is a fault of the caller's own arithmetic and panics as a slice does (no
//! peer's value reaches an index unchecked). An index into a ring is masked instead.
//!
//! Loops take `cells()` first: pointer and bound as plain values. A relaxed access makes the compiler forget every field that it has read
//! through a reference, so a loop over the array itself would read them again for each word.

use crate::mapping::Mapping;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

#[cold]
#[inline(never)]
fn out_of_bounds(index: usize, len: usize) -> ! {
    panic!("word {index} of {len}");
}

/// Every store of a word goes through here, so that a debug build can keep what was stored.
macro_rules! store {
    ($cell:expr, $value:expr, $order:ident) => {
        match ($cell, $value) {
            (cell, value) => {
                #[cfg(debug_assertions)]
                crate::record::note(cell.as_ptr() as usize, size_of_val(cell), value.into());
                cell.store(value.to_le(), $order);
            }
        }
    };
}

macro_rules! word_array {
    ($name:ident, $ring:ident, $cells:ident, $ring_cells:ident, $atomic:ty, $int:ty, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Debug)]
        pub struct $name {
            base: NonNull<$atomic>,
            len: usize,
            keep: Arc<Mapping>,
        }

        // SAFETY: the pointee is shared memory accessed through atomics only, and `keep` holds it mapped.
        unsafe impl Send for $name {}
        // SAFETY: as for Send; every access is atomic.
        unsafe impl Sync for $name {}

        impl $name {
            /// # Safety
            /// `base` is aligned for the word and `len` words from it lie inside `keep`'s mapping.
            pub(crate) unsafe fn new(base: NonNull<u8>, len: usize, keep: Arc<Mapping>) -> Self {
                Self { base: base.cast(), len, keep }
            }

            /// `len` words (a power of two) from `first` on, as a ring. `None` if they (or two words, for a ring of one) do not lie in the
            /// array.
            pub fn ring(&self, first: usize, len: usize) -> Option<$ring> {
                if !len.is_power_of_two() || first.checked_add(len.max(2))? > self.len {
                    return None;
                }
                // SAFETY: first is below the array's length.
                let base = unsafe { self.base.add(first) };
                Some($ring { base, mask: len - 1, _keep: self.keep.clone() })
            }

            /// How many words there are.
            pub fn len(&self) -> usize {
                self.len
            }

            /// Whether there is no word at all.
            pub fn is_empty(&self) -> bool {
                self.len == 0
            }

            /// The words, for a loop.
            #[inline(always)]
            pub fn cells(&self) -> $cells<'_> {
                $cells { base: self.base, len: self.len, array: PhantomData }
            }

            /// A relaxed load.
            #[inline(always)]
            pub fn load(&self, index: usize) -> $int {
                <$int>::from_le(self.cells().at(index).load(Relaxed))
            }

            /// An acquire load.
            #[inline(always)]
            pub fn load_acquire(&self, index: usize) -> $int {
                self.cells().load_acquire(index)
            }

            /// A relaxed store.
            #[inline(always)]
            pub fn store(&self, index: usize, value: $int) {
                self.cells().store(index, value);
            }

            /// A release store.
            #[inline(always)]
            pub fn store_release(&self, index: usize, value: $int) {
                store!(self.cells().at(index), value, Release);
            }
        }

        /// The words of an array, as plain values.
        #[derive(Clone, Copy, Debug)]
        pub struct $cells<'a> {
            base: NonNull<$atomic>,
            len: usize,
            array: PhantomData<&'a $name>,
        }

        impl $cells<'_> {
            #[inline(always)]
            fn at(&self, index: usize) -> &$atomic {
                if index >= self.len {
                    out_of_bounds(index, self.len);
                }
                // SAFETY: index is below len, and the array that is borrowed holds the words mapped (its constructor's contract).
                unsafe { self.base.add(index).as_ref() }
            }

            /// An acquire load.
            #[inline(always)]
            pub fn load_acquire(&self, index: usize) -> $int {
                <$int>::from_le(self.at(index).load(Acquire))
            }

            /// A relaxed load.
            #[inline(always)]
            pub fn load(&self, index: usize) -> $int {
                <$int>::from_le(self.at(index).load(Relaxed))
            }

            /// A relaxed store.
            #[inline(always)]
            pub fn store(&self, index: usize, value: $int) {
                store!(self.at(index), value, Relaxed);
            }

            /// Relaxed stores of the words 2 x `pair` and the one after it: two accesses, checked once.
            #[inline(always)]
            pub fn store_pair(&self, pair: usize, values: [$int; 2]) {
                if pair >= self.len / 2 {
                    out_of_bounds(2 * pair + 1, self.len);
                }
                // SAFETY: both indexes are below len; as in `at`.
                unsafe {
                    store!(self.base.add(2 * pair).as_ref(), values[0], Relaxed);
                    store!(self.base.add(2 * pair + 1).as_ref(), values[1], Relaxed);
                }
            }
        }

        /// A power of two of words, indexed round and round: an index is masked, so that no access needs a check.
        #[derive(Clone, Debug)]
        pub struct $ring {
            base: NonNull<$atomic>,
            mask: usize,
            _keep: Arc<Mapping>,
        }

        // SAFETY: as for the array.
        unsafe impl Send for $ring {}
        // SAFETY: as for the array.
        unsafe impl Sync for $ring {}

        impl $ring {
            /// The words, for a loop.
            #[inline(always)]
            pub fn cells(&self) -> $ring_cells<'_> {
                $ring_cells { base: self.base, mask: self.mask, ring: PhantomData }
            }
        }

        /// The words of a ring, as plain values.
        #[derive(Clone, Copy, Debug)]
        pub struct $ring_cells<'a> {
            base: NonNull<$atomic>,
            mask: usize,
            ring: PhantomData<&'a $ring>,
        }

        impl $ring_cells<'_> {
            #[inline(always)]
            fn at(&self, index: usize) -> &$atomic {
                // SAFETY: the masked index is below the ring's length, which lies in the array (`ring`'s check); the ring holds it mapped.
                unsafe { self.base.add(index & self.mask).as_ref() }
            }

            #[inline(always)]
            fn pair_at(&self, pair: usize) -> [&$atomic; 2] {
                let first = 2 * (pair & (self.mask >> 1));
                // SAFETY: first is even and at most the mask, which is odd but for a ring of one word; that one has a word behind it.
                unsafe { [self.base.add(first).as_ref(), self.base.add(first + 1).as_ref()] }
            }

            /// A relaxed load.
            #[inline(always)]
            pub fn load(&self, index: usize) -> $int {
                <$int>::from_le(self.at(index).load(Relaxed))
            }

            /// Relaxed loads from `first` on, to where the ring begins again.
            #[inline(always)]
            pub fn loads(&self, first: usize) -> impl ExactSizeIterator<Item = $int> {
                let first = first & self.mask;
                // SAFETY: the words from the masked index to the mask lie in the array, as in `at`; atomics may be shared.
                let words = unsafe { std::slice::from_raw_parts(self.base.add(first).as_ptr(), self.mask + 1 - first) };
                words.iter().map(|word| <$int>::from_le(word.load(Relaxed)))
            }

            /// A relaxed store.
            #[inline(always)]
            pub fn store(&self, index: usize, value: $int) {
                store!(self.at(index), value, Relaxed);
            }

            /// Relaxed loads of the words 2 x `pair` and the one after it: two accesses.
            #[inline(always)]
            pub fn load_pair(&self, pair: usize) -> [$int; 2] {
                self.pair_at(pair).map(|word| <$int>::from_le(word.load(Relaxed)))
            }

            /// Relaxed stores of the words 2 x `pair` and the one after it: two accesses.
            #[inline(always)]
            pub fn store_pair(&self, pair: usize, values: [$int; 2]) {
                let [first, second] = self.pair_at(pair);
                store!(first, values[0], Relaxed);
                store!(second, values[1], Relaxed);
            }
        }
    };
}

word_array!(U16Array, U16Ring, U16Cells, U16RingCells, AtomicU16, u16, "16-bit words: available ring, flags, indexes.");
word_array!(U32Array, U32Ring, U32Cells, U32RingCells, AtomicU32, u32, "32-bit words: used elements, packed event suppression structures.");
word_array!(U64Array, U64Ring, U64Cells, U64RingCells, AtomicU64, u64, "64-bit words: descriptors of both formats, two words each.");
