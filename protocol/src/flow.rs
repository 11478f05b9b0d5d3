//! Flow control of single streams, for a host that asks for it (docs/streams.md «Flow control»).
//!
//! hyperstart has none: a host that does not want the output of one process has to stop reading the output of
//! all, and one process that does not read its stdin keeps the host from writing to any. So host and guest
//! have messages of their own, in frames of a stream number that no process can have. A host that does not
//! start flow control (runV) gets none of these messages, and a guest that does not support them answers the
//! first one with the end of an unknown stream.

use crate::frame;

/// The stream number that carries these messages.
pub const STREAM: u64 = u64::MAX;

/// A message of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// Report from now on how much of the stdin data is used up; the answer is [`BEGUN`].
    Begin,
    /// Read nothing from the process that writes to this stream, as if its pipe were full, while the process
    /// runs.
    Hold(u64),
    /// Read from that process again.
    Go(u64),
}

/// A message of the guest: this many bytes of what the host has sent for this stdin do not wait any longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credit {
    /// The stdio stream of the process.
    pub stdio: u64,
    /// The number of bytes.
    pub bytes: u32,
}

/// The answer to [`Ask::Begin`].
pub const BEGUN: Credit = Credit { stdio: 0, bytes: 0 };

/// The length of a message in bytes.
const LENGTH: usize = 12;

impl Ask {
    /// The message as a whole frame.
    pub fn frame(self) -> Vec<u8> {
        whole(match self {
            Ask::Go(stream) => word(stream, 0),
            Ask::Hold(stream) => word(stream, 1),
            Ask::Begin => word(0, 2),
        })
    }

    /// Decodes a frame's payload; none if it is not a message of the host.
    pub fn decode(payload: &[u8]) -> Option<Ask> {
        match numbers(payload)? {
            (stream, 0) => Some(Ask::Go(stream)),
            (stream, 1) => Some(Ask::Hold(stream)),
            (0, 2) => Some(Ask::Begin),
            _ => None,
        }
    }
}

impl Credit {
    /// The message as the payload of a frame.
    pub fn encode(self) -> [u8; LENGTH] {
        word(self.stdio, self.bytes)
    }

    /// Decodes a frame's payload; none if it is not a message of the guest.
    pub fn decode(payload: &[u8]) -> Option<Credit> {
        numbers(payload).map(|(stdio, bytes)| Credit { stdio, bytes })
    }
}

fn whole(word: [u8; LENGTH]) -> Vec<u8> {
    // The encoding cannot fail, because the payload is short.
    frame::stream(STREAM, &word).unwrap_or_default()
}

fn word(stream: u64, value: u32) -> [u8; LENGTH] {
    let mut word = [0; LENGTH];
    word[..8].copy_from_slice(&stream.to_be_bytes());
    word[8..].copy_from_slice(&value.to_be_bytes());
    word
}

fn numbers(payload: &[u8]) -> Option<(u64, u32)> {
    let (stream, value) = payload.split_first_chunk()?;
    Some((u64::from_be_bytes(*stream), u32::from_be_bytes(value.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::StreamDecoder;

    #[test]
    fn what_is_said_is_heard() {
        for ask in [Ask::Begin, Ask::Hold(7), Ask::Go(u64::MAX - 1), Ask::Hold(0)] {
            let mut decoder = StreamDecoder::default();
            decoder.push(&ask.frame());
            let frame = decoder.next_frame().unwrap().unwrap();
            assert_eq!((frame.tag, Ask::decode(frame.payload)), (STREAM, Some(ask)));
        }
        for credit in [BEGUN, Credit { stdio: 1 << 40, bytes: u32::MAX }] {
            assert_eq!(Credit::decode(&credit.encode()), Some(credit));
        }
        for bad in [&[][..], &[0; 11], &[0; 13], &word(1, 2), &word(0, 3)] {
            assert_eq!(Ask::decode(bad), None, "{bad:?}");
        }
    }
}
