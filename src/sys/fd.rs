//! Descriptors: inherited ones, and descriptors that travel over a SEQPACKET socket.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

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

/// The most descriptors that travel in one packet: a process's stdin, stdout and stderr.
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

/// Receives one packet and its descriptors; never waits (EAGAIN). 0 bytes: the other end is gone. A packet or a set
/// of descriptors that was cut is EMSGSIZE; whatever came is closed.
pub fn receive_fds(socket: impl AsFd, packet: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    receive(socket, packet, MsgFlags::empty())
}

/// As [`receive_fds`], but the packet stays in the queue, and the descriptors are duplicates.
pub fn peek_fds(socket: impl AsFd, packet: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    receive(socket, packet, MsgFlags::MSG_PEEK)
}

/// Looks at the next packet, without its descriptors; never waits (EAGAIN). A longer one is cut.
pub fn peek(socket: impl AsFd, packet: &mut [u8]) -> Result<usize, Errno> {
    let mut parts = [IoSliceMut::new(packet)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    Ok(recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, None, flags)?.bytes)
}

fn receive(socket: impl AsFd, packet: &mut [u8], flags: MsgFlags) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut control = nix::cmsg_space!([RawFd; FDS_MAX]);
    let mut parts = [IoSliceMut::new(packet)];
    let flags = flags | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    // A control buffer that was too small is told by MSG_CTRUNC below; what did fit is owned, and closed, all the same.
    for control in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just installed these descriptors for this process and nobody else knows them.
            fds.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    if message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(Errno::EMSGSIZE);
    }
    Ok((message.bytes, fds))
}
