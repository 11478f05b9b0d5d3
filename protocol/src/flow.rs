//! Flow control of single streams, for a host that asks for it (docs/streams.md «Flow control»).
//!
//! hyperstart has none: a host that does not read one process's output has to leave that of all, and one
//! process that does not read its stdin keeps the host from writing to any. So the two have words of their
//! own, in frames of a stream that no process can have. A host that does not begin (runV) hears none of them,
//! and a guest that does not know them answers the first with the end of an unknown stream.

use crate::frame;

/// The stream of the words.
pub const STREAM: u64 = u64::MAX;

/// What the host says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// To be told from now on what becomes of stdin; the answer is [`BEGUN`].
    Begin,
    /// To take nothing from the process that writes to this stream, as if its pipe was full, as long as it
    /// runs.
    Hold(u64),
    /// To take from it again.
    Go(u64),
}

/// What the guest says: so many bytes of what the host has sent for this stdin wait no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credit {
    /// The stream.
    pub stdio: u64,
    /// How many, in bytes.
    pub bytes: u32,
}

/// The answer to [`Ask::Begin`].
pub const BEGUN: Credit = Credit { stdio: 0, bytes: 0 };

/// A word's length in bytes.
const LENGTH: usize = 12;

impl Ask {
    /// As a whole frame.
    pub fn frame(self) -> Vec<u8> {
        whole(match self {
            Ask::Go(stream) => word(stream, 0),
            Ask::Hold(stream) => word(stream, 1),
            Ask::Begin => word(0, 2),
        })
    }

    /// A frame's payload; none if it is no such word.
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
    /// As a frame's payload.
    pub fn encode(self) -> [u8; LENGTH] {
        word(self.stdio, self.bytes)
    }

    /// A frame's payload; none if it is no such word.
    pub fn decode(payload: &[u8]) -> Option<Credit> {
        numbers(payload).map(|(stdio, bytes)| Credit { stdio, bytes })
    }
}

fn whole(word: [u8; LENGTH]) -> Vec<u8> {
    // It is short.
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
