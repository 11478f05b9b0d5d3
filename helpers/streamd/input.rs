//! What the host sends: stdin, queued for each process up to a bound.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::unistd::write;

/// While a process has this much unread, in bytes, nothing more is read from the host: it is slowed down, and nothing
/// is lost. More than a pipe holds, so that a reader in bursts keeps the host busy.
pub const QUEUE_MAX: usize = 256 << 10;

/// What waits for one process's stdin.
#[derive(Default)]
pub struct Queue {
    parts: VecDeque<Vec<u8>>,
    /// How much of the first part has been written.
    written: usize,
    waiting: usize,
    /// The host closed stdin: it ends behind what waits.
    closing: bool,
}

/// What a write came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    /// Nothing waits.
    All,
    /// The process reads too slowly.
    Blocked,
    /// Nothing waits, and nothing will come: close it.
    Done,
    /// The process does not read any more.
    Broken,
}

impl Queue {
    /// Whether the host has to wait for this process.
    pub fn is_full(&self) -> bool {
        self.waiting >= QUEUE_MAX
    }

    /// Appends what the host sent, after writing what goes at once.
    pub fn push(&mut self, bytes: &[u8], to: BorrowedFd<'_>) -> Flushed {
        if self.closing {
            // After the end there is nothing.
            return self.flush(to);
        }
        let mut rest = bytes;
        if self.waiting == 0 {
            while !rest.is_empty() {
                match write(to, rest) {
                    Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                    Err(Errno::EINTR) => {}
                    Err(Errno::EAGAIN) => break,
                    Err(_) => return Flushed::Broken,
                }
            }
        }
        if rest.is_empty() {
            return Flushed::All;
        }
        self.waiting += rest.len();
        self.parts.push_back(rest.to_vec());
        Flushed::Blocked
    }

    /// The host closed stdin.
    pub fn close(&mut self, to: BorrowedFd<'_>) -> Flushed {
        self.closing = true;
        self.flush(to)
    }

    /// Writes what can be written.
    pub fn flush(&mut self, to: BorrowedFd<'_>) -> Flushed {
        while let Some(part) = self.parts.front() {
            match write(to, part.get(self.written..).unwrap_or_default()) {
                Ok(count) => {
                    self.written += count;
                    self.waiting = self.waiting.saturating_sub(count);
                    if self.written >= part.len() {
                        self.written = 0;
                        self.parts.pop_front();
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Flushed::Blocked,
                Err(_) => return Flushed::Broken,
            }
        }
        if self.closing { Flushed::Done } else { Flushed::All }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::unistd::{pipe, read};
    use std::os::fd::AsFd;

    #[test]
    fn nothing_is_lost_behind_a_slow_reader() {
        let (reader, writer) = pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut queue = Queue::default();
        let sent: Vec<u8> = (0..600_000u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
        for chunk in sent.chunks(7919) {
            assert_ne!(queue.push(chunk, writer.as_fd()), Flushed::Broken);
        }
        assert!(queue.is_full());
        assert_eq!(queue.close(writer.as_fd()), Flushed::Blocked);
        let mut got = Vec::new();
        let mut chunk = [0; 4096];
        while got.len() < sent.len() {
            let count = read(&reader, &mut chunk).unwrap();
            got.extend_from_slice(&chunk[..count]);
            let _ = queue.flush(writer.as_fd());
        }
        assert_eq!(queue.flush(writer.as_fd()), Flushed::Done);
        assert!(got == sent);
    }

    #[test]
    fn a_reader_that_left_releases_what_waited() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        assert_eq!(Queue::default().push(b"x", writer.as_fd()), Flushed::Broken);
    }
}
