//! Numbers that look random, from a seed.

use std::time::{SystemTime, UNIX_EPOCH};

/// splitmix64.
pub struct Random(pub u64);

/// A seed of the time.
pub fn seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64
}

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// One of these.
    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// True once in `many` times.
    pub fn once_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }

    /// A size: nothing, little, what a pipe holds, or much.
    pub fn size(&mut self) -> usize {
        let limit = self.one_of(&[1, 100, 5_000, 70_000, 400_000]);
        self.below(limit) as usize
    }

    /// Lets a moment pass that no clock can tell.
    pub fn spin(&mut self, limit: u64) {
        for turn in 0..self.below(limit) {
            std::hint::black_box(turn);
        }
    }
}
