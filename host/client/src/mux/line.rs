//! A socket that is never waited for: what it does not take is kept.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use nix::poll::PollFlags;

/// What an emptied buffer keeps, in bytes.
const KEEP: usize = 64 << 10;

/// A socket and what waits to be written to it.
#[derive(Debug)]
pub struct Line {
    socket: UnixStream,
    out: VecDeque<u8>,
    /// It has taken no more when it was last written to.
    full: bool,
}

/// What a read came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// So many bytes.
    Bytes(usize),
    /// Nothing for now.
    Nothing,
    /// The end: the other one has left.
    End,
}

impl Line {
    pub fn new(socket: UnixStream) -> io::Result<Line> {
        socket.set_nonblocking(true)?;
        Ok(Line { socket, out: VecDeque::new(), full: false })
    }

    /// Keeps bytes to be written.
    pub fn push(&mut self, bytes: &[u8]) {
        self.out.extend(bytes);
    }

    /// How much waits to be written, in bytes.
    pub fn waiting(&self) -> usize {
        self.out.len()
    }

    /// What to wait for.
    pub fn interest(&self, reading: bool) -> PollFlags {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::POLLIN, reading);
        flags.set(PollFlags::POLLOUT, !self.out.is_empty());
        flags
    }

    /// Takes what poll(2) said of it.
    pub fn told(&mut self, flags: PollFlags) {
        if flags.intersects(PollFlags::POLLOUT | PollFlags::POLLERR | PollFlags::POLLHUP) {
            self.full = false;
        }
    }

    /// Writes what it takes. An error: the other one has left.
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

    /// Reads what is there, up to the size of `chunk`. A connection that broke has ended.
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
