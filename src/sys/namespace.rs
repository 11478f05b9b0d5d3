//! Namespaces as the kernel numbers them (ioctl_nsfs(2)).

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

/// linux/nsfs.h: `_IOR(0xb7, 5, __u64)`; libc does not name it.
const NS_GET_MNTNS_ID: libc::Ioctl = 0x8008_b705_u32 as libc::Ioctl;

/// The number of a mount namespace. ENOTTY: the kernel is older than 6.11 and does not tell.
pub fn mount_namespace_id(namespace: impl AsFd) -> Result<u64, Errno> {
    let mut id = 0u64;
    // SAFETY: NS_GET_MNTNS_ID writes one u64, which outlives the call.
    let result = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), NS_GET_MNTNS_ID, &raw mut id) };
    Errno::result(result).map(|_| id)
}
