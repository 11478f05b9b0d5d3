//! Keeps the accepted connection for a successor, in the queue of a socket pair that every streamd inherits.
//! Peeking at the queue (MSG_PEEK) returns a duplicate of the descriptor in it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hyperinit::sys::fd::{peek_fds, receive_fds, send_fds};
use nix::errno::Errno;

/// The socket pair that holds the connection.
pub struct ConnectionStore {
    put: OwnedFd,
    take: OwnedFd,
}

impl ConnectionStore {
    /// The store of these inherited descriptors.
    pub fn new(put: OwnedFd, take: OwnedFd) -> ConnectionStore {
        ConnectionStore { put, take }
    }

    /// The connection that a predecessor kept, if any.
    pub fn find(&self) -> Option<OwnedFd> {
        peek_fds(self.take.as_fd(), &mut [0; 1]).ok().and_then(|(_, fds)| fds.into_iter().next())
    }

    /// Keeps a connection in place of any other. Errors are those of sendmsg(2).
    pub fn keep(&self, connection: BorrowedFd<'_>) -> Result<(), Errno> {
        self.clear();
        send_fds(self.put.as_fd(), &[1], &[connection])
    }

    /// Drops the kept connection: the duplicate in the queue would keep it open.
    pub fn clear(&self) {
        while receive_fds(self.take.as_fd(), &mut [0; 1]).is_ok_and(|(count, _)| count > 0) {}
    }
}
