//! Input from the host: its position in its frames, and a bounded queue of stdin for each process.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use hyperinit::frame::{STREAM_HEADER, STREAM_MAX};
use nix::errno::Errno;
use nix::unistd::write;

/// While a process has this many bytes of unread stdin, nothing more is read from the host, so it slows down
/// and nothing is lost. This exceeds the size of a pipe, so that a process that reads in bursts keeps the
/// host busy.
pub const QUEUE_MAX: usize = 256 << 10;
/// The limit like QUEUE_MAX for all processes together, in bytes.
pub const QUEUES_MAX: usize = 4 << 20;
/// A payload of at least this many bytes is written at once. Smaller ones are collected, because a host may
/// send frames of 16 bytes.
const DIRECT: usize = 1 << 10;
/// The capacity that an empty queue keeps, in bytes.
const KEEP: usize = 4 << 10;

/// The bytes that wait for one process's stdin.
#[derive(Default)]
pub struct Queue {
    bytes: VecDeque<u8>,
    /// The host closed stdin: it ends after the waiting bytes.
    closing: bool,
    /// The kernel had no memory for the waiting bytes, and no event reports when it has.
    pub starved: bool,
}

/// Whether a call failed for lack of memory, which may pass: nothing was written, and the other end still
/// exists.
pub fn is_want(errno: Errno) -> bool {
    matches!(errno, Errno::ENOMEM | Errno::ENOBUFS | Errno::ENOSPC)
}

/// The state of a queue after a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    /// No bytes wait.
    All,
    /// Some bytes wait.
    Blocked,
    /// No bytes wait and none will come: stdin is to be closed.
    Done,
    /// The process no longer reads its stdin.
    Broken,
}

impl Queue {
    /// The number of waiting bytes.
    pub fn waiting(&self) -> usize {
        self.bytes.len()
    }

    /// Appends bytes from the host. A small portion is written by the next [`Queue::flush`].
    pub fn push(&mut self, bytes: &[u8], to: BorrowedFd<'_>) -> Flushed {
        if self.closing {
            // Bytes after the end are dropped.
            return self.flush(to);
        }
        let mut rest = bytes;
        while self.bytes.is_empty() && rest.len() >= DIRECT {
            match write(to, rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => break,
                Err(errno) if is_want(errno) => {
                    self.starved = true;
                    break;
                }
                Err(_) => return Flushed::Broken,
            }
        }
        self.bytes.extend(rest);
        if self.bytes.is_empty() { Flushed::All } else { Flushed::Blocked }
    }

    /// Closes stdin after the waiting bytes, because the host closed it.
    pub fn close(&mut self) -> Flushed {
        self.closing = true;
        if self.bytes.is_empty() { Flushed::Done } else { Flushed::Blocked }
    }

    /// Writes waiting bytes until the process's stdin is full.
    pub fn flush(&mut self, to: BorrowedFd<'_>) -> Flushed {
        self.starved = false;
        while !self.bytes.is_empty() {
            match write(to, self.bytes.as_slices().0) {
                Ok(count) => drop(self.bytes.drain(..count)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Flushed::Blocked,
                Err(errno) if is_want(errno) => {
                    self.starved = true;
                    return Flushed::Blocked;
                }
                Err(_) => return Flushed::Broken,
            }
        }
        self.bytes.shrink_to(KEEP);
        if self.closing { Flushed::Done } else { Flushed::All }
    }
}

/// The host's position in its frames, in enough detail for a successor to continue at the next frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Place {
    /// The first bytes of a header.
    header: [u8; STREAM_HEADER],
    /// How many bytes of the header have arrived.
    have: usize,
    /// The bytes left of the frame's payload. If there are any, the header is complete.
    rest: usize,
}

impl Place {
    /// Advances over bytes that were read; returns false if they contain a length that no frame can have.
    pub fn pass(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let skip = self.rest.min(bytes.len());
            self.rest -= skip;
            bytes = bytes.get(skip..).unwrap_or_default();
            let want = (STREAM_HEADER - self.have).min(bytes.len());
            let (head, others) = bytes.split_at(want);
            if let Some(part) = self.header.get_mut(self.have..self.have + want) {
                part.copy_from_slice(head);
            }
            (self.have, bytes) = (self.have + want, others);
            if self.have == STREAM_HEADER {
                let (_, length) = numbers(&self.header);
                if !(STREAM_HEADER..=STREAM_MAX).contains(&length) {
                    return false;
                }
                (self.have, self.rest) = (0, length - STREAM_HEADER);
            }
        }
        true
    }

    /// The position as three numbers, for the page.
    pub fn note(&self) -> [u64; 3] {
        let number = |bytes: &[u8]| bytes.iter().fold(0, |number: u64, &byte| number << 8 | u64::from(byte));
        let (stream, length) = self.header.split_at(8);
        [number(stream), number(length) << 8 | self.have as u64, self.rest as u64]
    }

    /// The position that a predecessor recorded; none if the numbers do not describe one.
    pub fn of_note([stream, length, rest]: [u64; 3]) -> Option<Place> {
        let mut header = [0; STREAM_HEADER];
        header[..8].copy_from_slice(&stream.to_be_bytes());
        header[8..].copy_from_slice(&u32::try_from(length >> 8).ok()?.to_be_bytes());
        let have = usize::try_from(length & 0xff).ok().filter(|&have| have < STREAM_HEADER)?;
        let rest = usize::try_from(rest).ok().filter(|&rest| rest <= STREAM_MAX)?;
        Some(Place { header, have, rest })
    }

    /// Whether the position is in a header, or in a payload for an unknown stream.
    pub fn is_inside_nobodys(&self, known: impl Fn(u64) -> bool) -> bool {
        self.have > 0 || self.rest > 0 && !known(numbers(&self.header).0)
    }

    /// The part of the header that has arrived.
    pub fn half_header(&self) -> &[u8] {
        self.header.get(..self.have).unwrap_or_default()
    }

    /// The bytes left of the frame's payload.
    pub fn rest(&self) -> usize {
        self.rest
    }
}

/// The stream's number and the frame's length.
fn numbers(header: &[u8; STREAM_HEADER]) -> (u64, usize) {
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number: u64, &byte| number << 8 | u64::from(byte));
    let (stream, length) = header.split_at(8);
    (number(stream), usize::try_from(number(length)).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperinit::frame;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::unistd::{pipe, read};
    use std::os::fd::AsFd;

    #[test]
    fn nothing_is_lost_behind_a_slow_reader() {
        let (reader, writer) = pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut queue = Queue::default();
        let sent: Vec<u8> = (0..600_000u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
        for (at, chunk) in sent.chunks(7919).enumerate() {
            // Large and small portions in turn.
            let portions = chunk.chunks(if at % 2 == 0 { 16 } else { 5000 });
            portions.for_each(|portion| assert_ne!(queue.push(portion, writer.as_fd()), Flushed::Broken));
        }
        assert!(queue.waiting() >= QUEUE_MAX);
        assert_eq!(queue.close(), Flushed::Blocked);
        let mut got = Vec::new();
        let mut chunk = [0; 4096];
        let _ = queue.flush(writer.as_fd());
        while got.len() < sent.len() {
            let count = read(&reader, &mut chunk).unwrap();
            got.extend_from_slice(&chunk[..count]);
            let _ = queue.flush(writer.as_fd());
        }
        assert_eq!(queue.flush(writer.as_fd()), Flushed::Done);
        assert!(got == sent);
        assert!(queue.bytes.capacity() <= 2 * KEEP, "{}", queue.bytes.capacity());
    }

    #[test]
    fn a_reader_that_left_releases_what_waited() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let mut queue = Queue::default();
        assert_eq!(queue.push(b"x", writer.as_fd()), Flushed::Blocked);
        assert_eq!(queue.flush(writer.as_fd()), Flushed::Broken);
        assert_eq!(Queue::default().push(&[0; DIRECT], writer.as_fd()), Flushed::Broken);
    }

    #[test]
    fn a_place_survives_at_every_byte() {
        let frames: Vec<u8> = [(7, 0), (u64::MAX, 1), (1 << 40, 300), (9, 0)].iter().fold(
            Vec::new(),
            |mut all, &(id, size)| {
                all.extend(frame::stream(id, &vec![0xff; size]).unwrap());
                all
            },
        );
        for cut in 0..=frames.len() {
            let (first, second) = frames.split_at(cut);
            let mut place = Place::default();
            assert!(place.pass(first));
            let mut next = Place::of_note(place.note()).unwrap();
            assert_eq!(next, place, "cut at {cut}");
            assert!(next.pass(second));
            assert_eq!((next.half_header(), next.rest()), (&b""[..], 0), "cut at {cut}");
        }
    }

    #[test]
    fn a_place_refuses_every_bad_length() {
        for length in [0, 1, 11, STREAM_MAX as u32 + 1, u32::MAX] {
            let header = [&7_u64.to_be_bytes()[..], &length.to_be_bytes()].concat();
            assert!(!Place::default().pass(&header), "{length}");
        }
        assert_eq!(Place::of_note([0, 12, 0]), None);
        assert_eq!(Place::of_note([0, 0, u64::MAX]), None);
    }
}
