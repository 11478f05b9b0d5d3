//! Sockets: what nix hands out as a bare number, or without its address.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// The host's address on vsock (vsock(7)).
pub const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// Takes the next connection of a non-blocking listening socket, close-on-exec and non-blocking, and on vsock
/// the CID of who connected; EAGAIN if there is none.
pub fn accept(listener: &OwnedFd) -> Result<(OwnedFd, Option<u32>), Errno> {
    let mut address =
        libc::sockaddr_vm { svm_family: 0, svm_reserved1: 0, svm_port: 0, svm_cid: 0, svm_zero: [0; 4] };
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes at most `length` bytes at `address`, whose size that is, and the address's
    // true length at `length`; both outlive the call. Any bytes are a valid sockaddr_vm.
    let number = Errno::result(unsafe {
        libc::accept4(listener.as_raw_fd(), (&raw mut address).cast(), &raw mut length, flags)
    })?;
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    let connection = unsafe { OwnedFd::from_raw_fd(number) };
    let cid = (libc::c_int::from(address.svm_family) == libc::AF_VSOCK).then_some(address.svm_cid);
    Ok((connection, cid))
}

/// How many bytes that were written have not left yet: of a tty, of a vsock connection (Linux 6.12 and
/// later).
pub fn unsent(fd: impl AsFd) -> Result<usize, Errno> {
    let mut count: libc::c_int = 0;
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ's number too, writes one int, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or_default())
}

/// Has a netlink socket hear the kernel's answers of yes and no (NLMSG_ERROR, netlink(7)) and nothing else,
/// for good: a filter for it (socket(7), SO_ATTACH_FILTER), which SO_LOCK_FILTER keeps from being taken off
/// or replaced. What else comes is thrown away.
pub fn hear_only_answers(netlink: impl AsFd) -> Result<(), Errno> {
    // Where nlmsghdr has its type. It is in the machine's own order, and the filter reads as networks do.
    const TYPE: u32 = 4;
    let answer = u32::from(u16::from_be_bytes((libc::NLMSG_ERROR as u16).to_ne_bytes()));
    let step = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let mut filter = [
        step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, TYPE),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, answer),
        step(libc::BPF_RET | libc::BPF_K, 0, u32::MAX),
        step(libc::BPF_RET | libc::BPF_K, 0, 0),
    ];
    let program = libc::sock_fprog { len: filter.len() as libc::c_ushort, filter: filter.as_mut_ptr() };
    set(&netlink, libc::SO_ATTACH_FILTER, &program)?;
    set(&netlink, libc::SO_LOCK_FILTER, &libc::c_int::from(true))
}

/// Sets an option of SOL_SOCKET that nix does not know. `T` is what the kernel reads for it.
fn set<T>(socket: impl AsFd, option: libc::c_int, value: &T) -> Result<(), Errno> {
    let (fd, size) = (socket.as_fd().as_raw_fd(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the kernel reads `size` bytes at `value`, which is what a T has; what a sock_fprog points at is
    // its caller's, and outlives the call.
    let result =
        unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, std::ptr::from_ref(value).cast(), size) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

    /// The filter is of the socket and looks at bytes, so any kind of socket will do.
    #[test]
    fn only_answers_are_heard_for_good() {
        let (from, to) =
            socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_NONBLOCK).unwrap();
        hear_only_answers(&to).unwrap();
        let message = |kind: libc::c_int| {
            let mut bytes = [0; 16];
            bytes[4..6].copy_from_slice(&(kind as u16).to_ne_bytes());
            bytes
        };
        // NFLOG's packet, NFQUEUE's, a rule of nf_tables.
        for kind in [0, libc::NLMSG_NOOP, libc::NLMSG_DONE, 4 << 8, 3 << 8, 10 << 8 | 6, libc::NLMSG_ERROR] {
            send(from.as_raw_fd(), &message(kind), MsgFlags::empty()).unwrap();
        }
        let mut bytes = [0; 16];
        assert_eq!(recv(to.as_raw_fd(), &mut bytes, MsgFlags::empty()), Ok(16));
        assert_eq!(bytes, message(libc::NLMSG_ERROR));
        assert_eq!(recv(to.as_raw_fd(), &mut bytes, MsgFlags::empty()), Err(Errno::EAGAIN));
        let nothing: libc::c_int = 0;
        assert_eq!(set(&to, libc::SO_DETACH_FILTER, &nothing), Err(Errno::EPERM));
        assert_eq!(hear_only_answers(&to), Err(Errno::EPERM));
    }
}
