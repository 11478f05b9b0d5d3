//! The frames that wait to be written to the host.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::unistd::write;

use crate::frame::{self, Message};

/// How much is written at once, in bytes: whole frames, unless one frame is longer.
pub(super) const TOGETHER: usize = 16 << 10;
/// While more bytes than this wait for a host that does not read, nothing more is read from the host.
pub(super) const OUT_MAX: usize = 1 << 20;

/// A frame that waits to be written.
struct Out {
    message: Message,
    bytes: Vec<u8>,
}

/// The frames, in order.
#[derive(Default)]
pub(super) struct Outbox {
    frames: VecDeque<Out>,
    /// How much of the first frame has been written, in bytes.
    sent: usize,
    /// The length of all frames, in bytes.
    waiting: usize,
}

impl Outbox {
    /// The length of all frames that wait, in bytes.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Whether everything has been written.
    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Adds a frame. READY goes before all others that have not been begun.
    pub(super) fn push(&mut self, message: Message, payload: &[u8]) {
        let bytes = match frame::control(message, payload) {
            Ok(bytes) => bytes,
            Err(violation) => {
                log::error!("{} is too large to send: {violation}", message.name());
                return;
            }
        };
        self.waiting += bytes.len();
        let out = Out { message, bytes };
        if message == Message::Ready && self.sent == 0 {
            self.frames.push_front(out);
        } else {
            self.frames.push_back(out);
        }
    }

    /// Rewinds the first frame: the next host gets the whole frame of which the last host got a part.
    pub(super) fn rewind(&mut self) {
        self.sent = 0;
    }

    /// Drops everything but events, because a connection ended and only events are for the next host.
    pub(super) fn start_over(&mut self) {
        self.rewind();
        self.frames.retain(|out| out.message == Message::ProcessAsyncEvent);
        self.count_waiting();
    }

    /// Drops the replies, because a device has another host. Events stay, and so does a READY that was not
    /// heard. The rest of a frame that was written in part has to follow.
    pub(super) fn forget_replies(&mut self) {
        let mut begun = self.sent > 0;
        self.frames.retain(|out| {
            std::mem::take(&mut begun) || matches!(out.message, Message::ProcessAsyncEvent | Message::Ready)
        });
        self.count_waiting();
    }

    fn count_waiting(&mut self) {
        self.waiting = self.frames.iter().map(|out| out.bytes.len()).sum();
    }

    /// Writes what can be written. Returns true if that is everything, false if the port takes no more. Small
    /// frames are written together, because each write to a device is work for the host and wakes init again.
    pub(super) fn write(&mut self, to: &OwnedFd) -> Result<bool, Errno> {
        while let Some(first) = self.frames.front() {
            let rest = first.bytes.get(self.sent..).unwrap_or_default();
            let wrote = if rest.len() >= TOGETHER || self.frames.len() == 1 {
                write(to, rest)
            } else {
                write(to, &self.together())
            };
            match wrote {
                Ok(count) => self.wrote(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(false),
                Err(errno) => return Err(errno),
            }
        }
        Ok(true)
    }

    /// The rest of the first frame, and the frames behind it that fit into the same write.
    fn together(&self) -> Vec<u8> {
        let mut together = Vec::with_capacity(TOGETHER);
        let mut sent = self.sent;
        for out in &self.frames {
            let rest = out.bytes.get(sent..).unwrap_or_default();
            if together.len() + rest.len() > TOGETHER {
                break;
            }
            together.extend_from_slice(rest);
            sent = 0;
        }
        together
    }

    /// The port took this many bytes.
    fn wrote(&mut self, mut count: usize) {
        while let Some(first) = self.frames.front() {
            let rest = first.bytes.len().saturating_sub(self.sent);
            if count < rest {
                self.sent += count;
                return;
            }
            count -= rest;
            self.waiting = self.waiting.saturating_sub(first.bytes.len());
            self.sent = 0;
            self.frames.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::unistd::read;

    use super::*;

    fn sockets(kind: SockType) -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC).unwrap()
    }

    /// On this socket each message is one write.
    #[test]
    fn small_frames_leave_together_and_in_order() {
        let (host, guest) = sockets(SockType::SeqPacket);
        let mut outbox = Outbox::default();
        let payloads = [10, 5000, 8, 7000, 9000, TOGETHER, 3, TOGETHER * 2, 1].map(|len| vec![b'x'; len]);
        let mut all = Vec::new();
        for payload in &payloads {
            all.extend(frame::control(Message::Ack, payload).unwrap());
            outbox.push(Message::Ack, payload);
        }
        assert_eq!(outbox.write(&guest), Ok(true));
        assert!(outbox.is_empty() && outbox.waiting() == 0);
        let (mut said, mut sizes) = (Vec::new(), Vec::new());
        let mut chunk = vec![0; 4 * TOGETHER];
        while let Ok(count) = read(&host, &mut chunk) {
            sizes.push(count);
            said.extend_from_slice(&chunk[..count]);
        }
        assert!(said == all);
        let header = 8;
        let expected = [12_018 + 4 * header, 9000 + header, TOGETHER + header, 3 + header];
        assert_eq!(sizes[..4], expected);
        assert_eq!(sizes.len(), 6);
    }

    #[test]
    fn a_write_may_end_anywhere() {
        let lengths = [0, 5, 1];
        let all: usize = lengths.iter().map(|len| len + 8).sum();
        for first in 0..=all {
            let mut outbox = Outbox::default();
            for len in lengths {
                outbox.push(Message::Ack, &vec![b'y'; len]);
            }
            let whole = outbox.together();
            outbox.wrote(first);
            assert_eq!(outbox.together(), whole[first..]);
            outbox.wrote(all - first);
            assert!(outbox.is_empty() && outbox.waiting() == 0 && outbox.sent == 0);
        }
    }
}
