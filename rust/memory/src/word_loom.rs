//! The word arrays as the model checker sees them: the same interface over loom's atomics.

use loom::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

macro_rules! word_array {
    ($name:ident, $ring:ident, $atomic:ty, $int:ty, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Debug)]
        pub struct $name(Arc<Vec<$atomic>>);

        impl $name {
            /// An array of `len` zeros; clones share it.
            pub fn zeroed(len: usize) -> Self {
                Self(Arc::new((0..len).map(|_| <$atomic>::new(0)).collect()))
            }

            /// `len` words (a power of two) from `first` on, as a ring. `None` if they do not lie in the array.
            pub fn ring(&self, first: usize, len: usize) -> Option<$ring> {
                let inside = len.is_power_of_two() && first.checked_add(len.max(2))? <= self.len();
                inside.then(|| $ring { words: self.clone(), first, mask: len - 1 })
            }

            /// The words, for a loop.
            pub fn cells(&self) -> &Self {
                self
            }

            /// How many words there are.
            pub fn len(&self) -> usize {
                self.0.len()
            }

            /// Whether there is no word at all.
            pub fn is_empty(&self) -> bool {
                self.0.is_empty()
            }

            /// Relaxed stores of the words 2 x `pair` and 2 x `pair` + 1.
            pub fn store_pair(&self, pair: usize, values: [$int; 2]) {
                self.store(2 * pair, values[0]);
                self.store(2 * pair + 1, values[1]);
            }

            /// A relaxed load.
            pub fn load(&self, index: usize) -> $int {
                self.0[index].load(Relaxed)
            }

            /// An acquire load.
            pub fn load_acquire(&self, index: usize) -> $int {
                self.0[index].load(Acquire)
            }

            /// A relaxed store.
            pub fn store(&self, index: usize, value: $int) {
                self.0[index].store(value, Relaxed);
            }

            /// A release store.
            pub fn store_release(&self, index: usize, value: $int) {
                self.0[index].store(value, Release);
            }
        }

        /// A power of two of words, indexed round and round.
        #[derive(Clone, Debug)]
        pub struct $ring {
            words: $name,
            first: usize,
            mask: usize,
        }

        impl $ring {
            /// The words, for a loop.
            pub fn cells(&self) -> &Self {
                self
            }

            /// A relaxed load.
            pub fn load(&self, index: usize) -> $int {
                self.words.load(self.first + (index & self.mask))
            }

            /// A relaxed store.
            pub fn store(&self, index: usize, value: $int) {
                self.words.store(self.first + (index & self.mask), value);
            }

            /// Relaxed loads from `first` on, to where the ring begins again.
            pub fn loads(&self, first: usize) -> impl ExactSizeIterator<Item = $int> {
                let first = first & self.mask;
                (first..self.mask + 1).map(|index| self.load(index))
            }

            /// Relaxed loads of the words 2 x `pair` and the one after it.
            pub fn load_pair(&self, pair: usize) -> [$int; 2] {
                [self.load(2 * pair), self.load(2 * pair + 1)]
            }

            /// Relaxed stores of the words 2 x `pair` and the one after it.
            pub fn store_pair(&self, pair: usize, values: [$int; 2]) {
                self.store(2 * pair, values[0]);
                self.store(2 * pair + 1, values[1]);
            }
        }
    };
}

word_array!(U16Array, U16Ring, AtomicU16, u16, "16-bit words: available ring, flags, indexes.");
word_array!(U32Array, U32Ring, AtomicU32, u32, "32-bit words: used elements, packed event suppression structures.");
word_array!(U64Array, U64Ring, AtomicU64, u64, "64-bit words: descriptors of both formats, two words each.");
