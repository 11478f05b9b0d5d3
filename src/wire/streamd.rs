//! The edge between init and streamd, and the packets in which execd passes the processes' descriptors to
//! streamd.

use serde::{Deserialize, Serialize};

use crate::ids::StreamId;

use super::{Terms, WORK};

/// How often a request is sent if giving it up loses what a process wrote. While a host reads slowly, such a
/// request is under way for a long time, and a streamd that dies meanwhile hardly dies of the request.
pub(super) const TRIES_FOR_OUTPUT: u32 = 100;

/// What init asks of streamd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// The process has exited: read its output until it is empty, give surviving writers a short time, then
    /// write the EOF frame. `Drained` follows once that frame has been written to the port. An unknown stream
    /// (whose descriptors were lost with an earlier streamd) gets its EOF frame all the same.
    Finish {
        /// The process's stdio stream.
        stdio: StreamId,
        /// Answer only after a pause in which the host's own readers can catch up, because this host throws
        /// away what they have not read when it is told of the end.
        #[serde(default)]
        pause: bool,
    },
    /// Answer `Drained` when everything accepted so far has been written to the port.
    Flush,
    /// Answer `Alive` at once. This tells a slow host from a hanging streamd.
    Ping,
}

impl Request {
    /// See [`Terms`]. `Finish` and `Flush` have no limit: `Ping` finds out whether the host or streamd is
    /// what takes long.
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
    /// The EOF frame, or everything for `Flush`, has been written to the port.
    Drained,
    /// The answer to `Ping`.
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
    /// Whether it is sent again to a new streamd. What that streamd knows of the stream's end then stays as
    /// it is.
    pub again: bool,
}

/// The size of an encoded `Streams`, exactly.
pub const STREAMS_LEN: usize = 19;

/// The other message from execd to streamd: a process whose descriptors were passed on has never executed,
/// and will not. The execd that started it died before init knew the process, and the host was told that the
/// start failed.
pub fn forget(stdio: StreamId) -> [u8; 8] {
    stdio.get().to_be_bytes()
}

/// The stream in such a message; none if the packet is not one.
pub fn forgotten(packet: &[u8]) -> Option<StreamId> {
    StreamId::new(u64::from_be_bytes(packet.try_into().ok()?))
}

impl Streams {
    /// How many descriptors belong to the message.
    pub fn fds(&self) -> usize {
        1 + usize::from(self.stdin) + usize::from(self.stderr.is_some())
    }

    /// The encoded form: stdio and stderr (big-endian), then the three flags.
    pub fn encode(&self) -> [u8; STREAMS_LEN] {
        let mut out = [0; STREAMS_LEN];
        out[..8].copy_from_slice(&self.stdio.get().to_be_bytes());
        out[8..16].copy_from_slice(&self.stderr.map_or(0, StreamId::get).to_be_bytes());
        out[16] = u8::from(self.terminal);
        out[17] = u8::from(self.stdin);
        out[18] = u8::from(self.again);
        out
    }

    /// The message; none unless every byte of the packet has a meaning.
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
