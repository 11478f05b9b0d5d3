//! A non-blocking socket with a buffer for what it does not take at once.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;

/// The capacity in bytes that an emptied buffer keeps.
const KEEP: usize = 64 << 10;

/// A socket and the bytes that wait to be written to it.
#[derive(Debug)]
pub struct Line {
    socket: UnixStream,
    out: VecDeque<u8>,
    /// The socket was full at the last write.
    full: bool,
}

/// The outcome of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// This many bytes.
    Bytes(usize),
    /// No bytes for now.
    Nothing,
    /// The end: the peer has left.
    End,
}

impl Line {
    pub fn new(socket: UnixStream) -> io::Result<Line> {
        socket.set_nonblocking(true)?;
        Ok(Line { socket, out: VecDeque::new(), full: false })
    }

    /// Adds bytes to be written.
    pub fn push(&mut self, bytes: &[u8]) {
        self.out.extend(bytes);
    }

    /// How many bytes wait to be written.
    pub fn waiting(&self) -> usize {
        self.out.len()
    }

    /// The events to wait for in poll(2).
    pub fn interest(&self, reading: bool) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, reading);
        flags.set(PollFlags::POLLOUT, !self.out.is_empty());
        flags
    }

    /// Takes note of what poll(2) returned for this socket.
    pub fn told(&mut self, flags: PollFlags) {
        if flags.intersects(PollFlags::POLLOUT | PollFlags::POLLERR | PollFlags::POLLHUP) {
            self.full = false;
        }
    }

    /// Writes as much as the socket takes. An error means that the peer has left.
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.full && !self.out.is_empty() {
            match self.socket.write(self.out.as_slices().0) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.full = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.out.is_empty() && self.out.capacity() > KEEP {
            self.out.shrink_to(KEEP);
        }
        Ok(())
    }

    /// Reads what is there, up to the size of `chunk`. A broken connection counts as ended.
    pub fn read(&mut self, chunk: &mut [u8]) -> Came {
        loop {
            return match self.socket.read(chunk) {
                Ok(0) => Came::End,
                Ok(count) => Came::Bytes(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => Came::Nothing,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => Came::End,
            };
        }
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
