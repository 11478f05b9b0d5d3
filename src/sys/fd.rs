//! Descriptors: inherited ones, and descriptors that travel over a SEQPACKET socket.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};

/// Takes an inherited descriptor and makes it close-on-exec, so that no later program inherits it.
///
/// EBADF if no descriptor has that number. Call it once for each number, before anything else opens a
/// descriptor.
pub fn inherited(number: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: `number` is one of wire::bootstrap's, which the parent left open for this process alone;
    // nothing else here owns it. fcntl fails on a number that is not open, before the value is used.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    match fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(fd),
        Err(errno) => {
            std::mem::forget(fd);
            Err(errno)
        }
    }
}

/// Closes every descriptor above the standard streams that this program inherited. Call it before anything is
/// opened.
pub fn close_strays() -> Result<(), Errno> {
    // SAFETY: takes numbers only; nothing in this process owns a descriptor above 2 yet.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) }).map(drop)
}

/// The maximum number of descriptors in one packet: a process's stdin, stdout and stderr.
pub const FDS_MAX: usize = 3;

/// Sends one packet with descriptors over a SEQPACKET socket; never waits (EAGAIN) and never raises SIGPIPE.
pub fn send_fds(socket: impl AsFd, packet: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let numbers: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(packet)], control, flags, None)?;
    if sent == packet.len() { Ok(()) } else { Err(Errno::EMSGSIZE) }
}

/// Receives one packet and its descriptors; never waits (EAGAIN). 0 bytes: the other end is gone. If the
/// packet or its set of descriptors was truncated, all descriptors that came are closed, and the error is
/// EMSGSIZE, or EMFILE if this process has reached its limit of descriptors.
pub fn receive_fds(socket: impl AsFd, packet: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    receive(socket, packet, MsgFlags::empty())
}

/// Like [`receive_fds`], but the packet stays in the queue and the descriptors are duplicates.
pub fn peek_fds(socket: impl AsFd, packet: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    receive(socket, packet, MsgFlags::MSG_PEEK)
}

/// Copies the next packet without taking it from the queue, and without its descriptors; never waits
/// (EAGAIN). A packet longer than the buffer is truncated.
pub fn peek(socket: impl AsFd, packet: &mut [u8]) -> Result<usize, Errno> {
    let mut parts = [IoSliceMut::new(packet)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    Ok(recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, None, flags)?.bytes)
}

/// Receives one packet that must not carry descriptors; never waits (EAGAIN). 0 bytes: the other end is gone,
/// or the packet was empty. A packet that is too long gives EMSGSIZE. Descriptors are closed, and give
/// EBADMSG.
pub fn receive_bytes(socket: impl AsFd, packet: &mut [u8]) -> Result<usize, Errno> {
    receive_plain(socket, packet, MsgFlags::MSG_DONTWAIT)
}

/// Like [`receive_bytes`], but waits for a packet.
pub fn await_bytes(socket: impl AsFd, packet: &mut [u8]) -> Result<usize, Errno> {
    receive_plain(socket, packet, MsgFlags::empty())
}

/// Receives one packet; never waits (EAGAIN). A packet longer than the buffer is truncated, and descriptors
/// that come with it are closed. 0 bytes: the other end is gone, or the packet was empty.
pub fn receive_cut(socket: impl AsFd, packet: &mut [u8]) -> Result<usize, Errno> {
    let mut parts = [IoSliceMut::new(packet)];
    let socket = socket.as_fd().as_raw_fd();
    Ok(recvmsg::<()>(socket, &mut parts, None, MsgFlags::MSG_DONTWAIT)?.bytes)
}

fn receive_plain(socket: impl AsFd, packet: &mut [u8], flags: MsgFlags) -> Result<usize, Errno> {
    let mut parts = [IoSliceMut::new(packet)];
    // Without a control buffer the kernel drops the descriptors and sets MSG_CTRUNC.
    let received = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, None, flags)?;
    if received.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(Errno::EBADMSG);
    }
    if received.flags.contains(MsgFlags::MSG_TRUNC) {
        return Err(Errno::EMSGSIZE);
    }
    Ok(received.bytes)
}

/// The size of the control buffer in words of 8 bytes, which give it the alignment of its header: room for
/// the header and FDS_MAX descriptors.
const CONTROL: usize = 8;

/// Calls recvmsg(2) directly: nix does not return the descriptors of a truncated packet, so they would stay
/// open.
fn receive(socket: impl AsFd, packet: &mut [u8], flags: MsgFlags) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let flags = flags | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let mut control = [0u64; CONTROL];
    let mut part = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
    // SAFETY: an all-zero msghdr is a valid one, without address, data or control.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: `message` points at `packet` and `control` with their sizes, and both outlive the call.
    let received = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut message, flags.bits()) };
    let count = usize::try_from(Errno::result(received)?).map_err(|_| Errno::EINVAL)?;
    // SAFETY: the kernel has filled in `message`, whose control buffer is still there.
    let fds = unsafe { take_rights(&message) };
    let cut = MsgFlags::from_bits_retain(message.msg_flags);
    // Fewer descriptors came than the buffer has room for, so this process has reached its limit.
    // SAFETY: CMSG_LEN computes a number from a length; nothing is read.
    let room = size_of_val(&control) - unsafe { libc::CMSG_LEN(0) } as usize;
    if cut.contains(MsgFlags::MSG_CTRUNC) && size_of_val(fds.as_slice()) + size_of::<OwnedFd>() <= room {
        return Err(Errno::EMFILE);
    }
    if cut.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(Errno::EMSGSIZE);
    }
    Ok((count, fds))
}

/// The descriptors of a message, each owned.
///
/// # Safety
///
/// The message is as recvmsg left it, its control buffer still exists, and no other code has taken its
/// descriptors.
unsafe fn take_rights(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the message's control pointer and length are the kernel's.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: `next` is null or one of the headers that the kernel has written, aligned as `control` is.
    while let Some(header) = unsafe { next.as_ref() } {
        if (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: CMSG_LEN computes a number from a length; nothing is read.
            let empty = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = header.cmsg_len.saturating_sub(empty) / size_of::<RawFd>();
            // SAFETY: `next` is a header; its data follows it.
            let numbers = unsafe { libc::CMSG_DATA(next) }.cast::<RawFd>();
            for at in 0..count {
                // SAFETY: the header says that `count` numbers follow.
                let number = unsafe { numbers.add(at).read_unaligned() };
                // SAFETY: the kernel has just installed the descriptor for this process, and nothing else
                // knows its number.
                fds.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        // SAFETY: `next` is a header of `message`.
        next = unsafe { libc::CMSG_NXTHDR(message, next) };
    }
    fds
}
