//! The kernel's random pool: the ioctls of random(4).

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// `_IOW('R', 0x03, int [2])` and `_IO('R', 0x07)` of linux/random.h, which libc does not have.
/// policy/mountd.json names them by number.
const RNDADDENTROPY: u32 = 0x4008_5203;
const RNDRESEEDCRNG: u32 = 0x5207;
/// The size of a seed in bytes, which is all that is added at once.
pub const SEED: usize = 32;

/// `struct rand_pool_info`, with room for a seed.
#[repr(C)]
struct PoolInfo {
    /// How many bits of the seed the kernel is to count as entropy.
    entropy_count: libc::c_int,
    /// The size of `buf` in bytes.
    buf_size: libc::c_int,
    buf: [u8; SEED],
}

/// Adds secret random bytes to the pool and makes the kernel count all their bits. Needs CAP_SYS_ADMIN.
pub fn add_entropy(pool: impl AsFd, seed: &[u8; SEED]) -> Result<(), Errno> {
    const BYTES: libc::c_int = SEED as libc::c_int;
    let info = PoolInfo { entropy_count: 8 * BYTES, buf_size: BYTES, buf: *seed };
    // SAFETY: RNDADDENTROPY reads a rand_pool_info and the buf_size bytes behind it, which are in `info` and
    // outlive the call.
    Errno::result(unsafe { libc::ioctl(pool.as_fd().as_raw_fd(), RNDADDENTROPY as _, &raw const info) })
        .map(drop)
}

/// Reseeds the kernel's generators from the pool, so that their output no longer follows from what they gave
/// before. Needs CAP_SYS_ADMIN.
pub fn reseed(pool: impl AsFd) -> Result<(), Errno> {
    // SAFETY: RNDRESEEDCRNG takes no argument.
    Errno::result(unsafe { libc::ioctl(pool.as_fd().as_raw_fd(), RNDRESEEDCRNG as _, 0) }).map(drop)
}
