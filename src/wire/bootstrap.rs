//! What a helper inherits when it is started.
//!
//! The warden makes the sockets of both directions, so that no helper ever holds init's ends. A process that
//! held one could fill it and so block PID 1, or add control messages to what PID 1 receives. A helper
//! inherits its ends, like everything else, at the fixed numbers below; all other descriptors are closed.

use std::os::fd::OwnedFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType};

use crate::fault::{Fault, OrFault};

/// execd and streamd: their end of the SEQPACKET socket on which descriptors travel (src/wire/streamd.rs).
pub const FD_SOCKET: i32 = 3;
/// execd: one end of a socket pair in which it keeps duplicates of the processes' outputs for its successors.
pub const FD_OUTPUTS_IN: i32 = 4;
/// execd: the other end.
pub const FD_OUTPUTS_OUT: i32 = 5;
/// streamd: the output buffer, a memfd; its file offset is where the next byte from a process goes.
pub const FD_BUFFER_IN: i32 = 4;
/// streamd: the same memfd opened a second time; its file offset is the next byte for the port.
pub const FD_BUFFER_OUT: i32 = 5;
/// streamd: the read end of a pipe through which a tty's bytes are spliced into the buffer.
pub const FD_PIPE_OUT: i32 = 6;
/// streamd: the write end of that pipe.
pub const FD_PIPE_IN: i32 = 7;
/// streamd: the stream port: a device, or a listening socket when `--listen` is given.
pub const FD_PORT: i32 = 8;
/// streamd: one end of a socket pair in which the accepted connection is kept for a successor.
pub const FD_CONNECTION_IN: i32 = 9;
/// streamd: the other end.
pub const FD_CONNECTION_OUT: i32 = 10;
/// Every helper with `--ipc`: the socket on which it receives init's requests.
pub const FD_REQUESTS: i32 = 11;
/// Every helper with `--ipc`: the socket on which it sends its replies.
pub const FD_REPLIES: i32 = 12;

/// netd, mountd and execd with `--ipc`: the network namespace of the pod, which they enter. Not inherited if
/// the guest has no network namespace of its own.
pub const FD_NETWORK: i32 = 13;

/// A pair of connected sockets of the kind that ipc-channel uses.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), Fault> {
    nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .fault("making", "a pair of sockets")
}
