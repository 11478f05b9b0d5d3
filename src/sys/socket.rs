//! Sockets: what nix hands out as a bare number, or without its address.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// The host's address on vsock (vsock(7)).
pub const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// Takes the next connection of a non-blocking listening socket, close-on-exec and non-blocking, and on vsock the CID of who
/// connected; EAGAIN if there is none.
pub fn accept(listener: &OwnedFd) -> Result<(OwnedFd, Option<u32>), Errno> {
    let mut address =
        libc::sockaddr_vm { svm_family: 0, svm_reserved1: 0, svm_port: 0, svm_cid: 0, svm_zero: [0; 4] };
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes at most `length` bytes at `address`, whose size that is, and the address's true length at
    // `length`; both outlive the call. Any bytes are a valid sockaddr_vm.
    let number = Errno::result(unsafe {
        libc::accept4(listener.as_raw_fd(), (&raw mut address).cast(), &raw mut length, flags)
    })?;
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    let connection = unsafe { OwnedFd::from_raw_fd(number) };
    let cid = (libc::c_int::from(address.svm_family) == libc::AF_VSOCK).then_some(address.svm_cid);
    Ok((connection, cid))
}

/// How many bytes that were written have not left yet: of a tty, of a vsock connection (Linux 6.12 and later).
pub fn unsent(fd: impl AsFd) -> Result<usize, Errno> {
    let mut count: libc::c_int = 0;
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ's number too, writes one int, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or_default())
}
