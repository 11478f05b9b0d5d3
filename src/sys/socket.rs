//! Socket calls for which nix returns a bare number, or no address.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// The host's address on vsock (vsock(7)).
pub const HOST_CID: u32 = libc::VMADDR_CID_HOST;

/// Accepts the next connection of a non-blocking listening socket, close-on-exec and non-blocking. On vsock
/// it also returns the peer's CID. EAGAIN if there is no connection.
pub fn accept(listener: &OwnedFd) -> Result<(OwnedFd, Option<u32>), Errno> {
    let mut address =
        libc::sockaddr_vm { svm_family: 0, svm_reserved1: 0, svm_port: 0, svm_cid: 0, svm_zero: [0; 4] };
    let mut length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: the kernel writes at most `length` bytes at `address`, which is the size of `address`, and the
    // true length of the peer's address at `length`; both outlive the call. Any bytes are a valid
    // sockaddr_vm.
    let number = Errno::result(unsafe {
        libc::accept4(listener.as_raw_fd(), (&raw mut address).cast(), &raw mut length, flags)
    })?;
    // SAFETY: the kernel has just made this descriptor, and nothing else knows its number.
    let connection = unsafe { OwnedFd::from_raw_fd(number) };
    let cid = (libc::c_int::from(address.svm_family) == libc::AF_VSOCK).then_some(address.svm_cid);
    Ok((connection, cid))
}

/// The number of written bytes that have not been sent yet, for a tty or (from Linux 6.12 on) a vsock
/// connection.
pub fn unsent(fd: impl AsFd) -> Result<usize, Errno> {
    let mut count: libc::c_int = 0;
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ's number too, writes one int, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut count) })?;
    Ok(usize::try_from(count).unwrap_or_default())
}

/// Limits a netlink socket for good to the kernel's acknowledgements and errors (NLMSG_ERROR, netlink(7)).
/// All other messages are discarded. It attaches a filter (socket(7), SO_ATTACH_FILTER), and SO_LOCK_FILTER
/// keeps the filter from being removed or replaced.
pub fn hear_only_answers(netlink: impl AsFd) -> Result<(), Errno> {
    // The offset of the type in nlmsghdr. The type is in the machine's byte order, and the filter loads it in
    // network order.
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

/// Sets a SOL_SOCKET option that nix does not have. `T` is the type that the kernel reads for it.
fn set<T>(socket: impl AsFd, option: libc::c_int, value: &T) -> Result<(), Errno> {
    let (fd, size) = (socket.as_fd().as_raw_fd(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the kernel reads `size` bytes at `value`, which is the size of a T. What a sock_fprog points at
    // belongs to the caller and outlives the call.
    let result =
        unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option, std::ptr::from_ref(value).cast(), size) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

    /// The filter belongs to the socket and looks only at bytes, so any kind of socket will do.
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
        // A packet of NFLOG, a packet of NFQUEUE, and an nf_tables rule are among these.
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
