//! init ⇄ streamd, and the packets by which execd hands streamd the processes' descriptors.

use serde::{Deserialize, Serialize};

use crate::ids::StreamId;

use super::{Terms, WORK};

/// How often a request is sent where giving up loses what a process wrote. While a host reads slowly, the end
/// of a stream is under way for as long as it takes, and deaths of streamd meanwhile are hardly the request's
/// doing.
pub(super) const TRIES_FOR_OUTPUT: u32 = 100;

/// What init asks of streamd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The process has exited: read its output until empty, give survivors a short time, write the EOF frame.
    /// Answered with `Drained` once that frame has been written to the port. A stream that is not known
    /// (its process's descriptors went with an earlier streamd) gets its EOF frame all the same.
    Finish {
        /// The process's stdio stream.
        stdio: StreamId,
        /// Answer only after a pause in which the host's own readers can catch up: when it hears of the end,
        /// it throws away what they have not read.
        #[serde(default)]
        pause: bool,
    },
    /// Answer `Drained` when everything accepted so far has been written to the port.
    Flush,
    /// Answer `Alive` at once: whether it is the host that takes its time, or this helper.
    Ping,
}

impl Request {
    /// See [`Terms`]. Whether it is the host or streamd that takes long, `Ping` tells.
    pub fn terms(&self) -> Terms {
        match self {
            Request::Finish { .. } | Request::Flush => {
                Terms { tries: TRIES_FOR_OUTPUT, limit: None, may_fail: false }
            }
            Request::Ping => Terms::once(WORK),
        }
    }
}

/// What streamd answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The EOF frame, or everything, is on the port.
    Drained,
    /// It is there.
    Alive,
}

/// One SEQPACKET message from execd to streamd: the streams of a process. Its descriptors follow in
/// `SCM_RIGHTS` in the order stdin (if `stdin`), stdout or tty, stderr (if `stderr` is not 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Streams {
    /// The process's stdio stream.
    pub stdio: StreamId,
    /// Its stderr stream, if it has one.
    pub stderr: Option<StreamId>,
    /// Whether the descriptor of stdio is a pty master: read, written, and never closed by an empty stdin
    /// frame.
    pub terminal: bool,
    /// Whether a write end for stdin comes first; never with a tty, and not when sent again to a new streamd.
    pub stdin: bool,
    /// Sent again to a new streamd: what is known of the stream's end stays known.
    pub again: bool,
}

/// The size of an encoded `Streams`, exactly.
pub const STREAMS_LEN: usize = 19;

/// The other message from execd to streamd: a process that was handed over has never run, and will not.
/// Whoever started it died before init heard of it, and the host was told that it failed.
pub fn forget(stdio: StreamId) -> [u8; 8] {
    stdio.get().to_be_bytes()
}

/// The stream of such a message, if it is one.
pub fn forgotten(packet: &[u8]) -> Option<StreamId> {
    StreamId::new(u64::from_be_bytes(packet.try_into().ok()?))
}

impl Streams {
    /// How many descriptors belong to the message.
    pub fn fds(&self) -> usize {
        1 + usize::from(self.stdin) + usize::from(self.stderr.is_some())
    }

    /// As it travels: stdio, stderr (big-endian), the three flags.
    pub fn encode(&self) -> [u8; STREAMS_LEN] {
        let mut out = [0; STREAMS_LEN];
        out[..8].copy_from_slice(&self.stdio.get().to_be_bytes());
        out[8..16].copy_from_slice(&self.stderr.map_or(0, StreamId::get).to_be_bytes());
        out[16] = u8::from(self.terminal);
        out[17] = u8::from(self.stdin);
        out[18] = u8::from(self.again);
        out
    }

    /// The message, if every byte of it has a meaning.
    pub fn decode(packet: &[u8]) -> Option<Streams> {
        let packet: &[u8; STREAMS_LEN] = packet.try_into().ok()?;
        let number = |at: usize| u64::from_be_bytes(packet[at..at + 8].try_into().expect("8 bytes"));
        let flag = |byte: u8| match byte {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        };
        let streams = Streams {
            stdio: StreamId::new(number(0))?,
            stderr: StreamId::new(number(8)),
            terminal: flag(packet[16])?,
            stdin: flag(packet[17])?,
            again: flag(packet[18])?,
        };
        let honest =
            !(streams.stdin && (streams.terminal || streams.again)) && streams.stderr != Some(streams.stdio);
        honest.then_some(streams)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_packet_has_a_meaning() {
        let id = |number| StreamId::new(number).unwrap();
        let streams =
            Streams { stdio: id(1 << 40), stderr: Some(id(2)), terminal: false, stdin: true, again: false };
        assert_eq!(Streams::decode(&streams.encode()), Some(streams));
        assert_eq!(streams.fds(), 3);
        let packet = streams.encode();
        for end in 0..STREAMS_LEN {
            assert_eq!(Streams::decode(&packet[..end]), None);
        }
        for (at, byte) in [(16, 2), (17, 255), (18, 3), (16, 1), (18, 1)] {
            let mut bad = packet;
            bad[at] = byte;
            assert_eq!(Streams::decode(&bad), None, "byte {at} = {byte}");
        }
        assert_eq!(Streams::decode(&[0; STREAMS_LEN]), None, "stream 0");
        assert_eq!(forgotten(&forget(id(1 << 40))), Some(id(1 << 40)));
        assert_eq!((forgotten(&packet), forgotten(&[0; 8])), (None, None));
    }
}
