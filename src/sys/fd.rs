//! Descriptors: inherited ones, and descriptors that travel over a SEQPACKET socket.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Takes an inherited descriptor, and makes it close-on-exec so that it goes no further.
///
/// EBADF if there is none of that number. Call it once for each number, before anything else opens a descriptor.
pub fn inherited(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: `number` is one of wire::bootstrap's, that the parent left for this process alone; nothing else here
    // owns it. fcntl fails on a number that is not open, before the value is used.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    match fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(fd),
        Err(errno) => {
            std::mem::forget(fd);
            Err(errno)
        }
    }
}
