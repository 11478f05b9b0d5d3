//! The frames of both channels (protocol.md «Channels»), for the guest and for the host's client alike.
//!
//! A decoder is fed whatever a read returned and hands out whole frames. It checks a declared length before
//! it relies on it, and never allocates for bytes that have not come.

use std::fmt;
use std::marker::PhantomData;

/// The longest control frame in bytes, header included. Without a file, NEWCONTAINER is the largest command
/// (a few kilobytes). 16 MiB is what WRITEFILE and READFILE may carry at once, and what init can spare for
/// one frame.
pub const CONTROL_MAX: usize = 16 << 20;
/// The longest stream frame in bytes, header included. The C guest sends at most 512 payload bytes and runV
/// 16; 1 MiB leaves room for large writes and bounds how much of streamd's memory one frame can hold.
pub const STREAM_MAX: usize = 1 << 20;
/// The bytes before a control frame's payload: type and length.
pub const CONTROL_HEADER: usize = 8;
/// The bytes before a stream frame's payload: stream number and length.
pub const STREAM_HEADER: usize = 12;
/// A decoder without pending bytes frees its buffer above this size in bytes, so that a rare large frame does
/// not cost memory for good.
const KEEP: usize = 64 << 10;

/// The control messages that are in use (protocol.md «Control messages»).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[rustfmt::skip]
#[allow(missing_docs)] // protocol.md says what each is
pub enum Message {
    GetVersion = 0,
    StartPod = 1,
    DestroyPod = 4,
    ExecCmd = 6,
    Ready = 8,
    Ack = 9,
    Error = 10,
    WinSize = 11,
    Ping = 12,
    Next = 14,
    WriteFile = 15,
    ReadFile = 16,
    NewContainer = 17,
    KillContainer = 18,
    OnlineCpuMem = 19,
    SetupInterface = 20,
    SetupRoute = 21,
    RemoveContainer = 22,
    ProcessAsyncEvent = 23,
    SignalProcess = 24,
    DeleteInterface = 25,
}

impl Message {
    /// Every message, by id.
    pub const ALL: [Message; 21] = [
        Message::GetVersion,
        Message::StartPod,
        Message::DestroyPod,
        Message::ExecCmd,
        Message::Ready,
        Message::Ack,
        Message::Error,
        Message::WinSize,
        Message::Ping,
        Message::Next,
        Message::WriteFile,
        Message::ReadFile,
        Message::NewContainer,
        Message::KillContainer,
        Message::OnlineCpuMem,
        Message::SetupInterface,
        Message::SetupRoute,
        Message::RemoveContainer,
        Message::ProcessAsyncEvent,
        Message::SignalProcess,
        Message::DeleteInterface,
    ];

    /// The message of that id; none if it is unknown or deprecated (2, 3, 5, 7, 13).
    pub fn from_id(id: u32) -> Option<Message> {
        Message::ALL.into_iter().find(|message| message.id() == id)
    }

    /// The id of the message in a frame.
    pub fn id(self) -> u32 {
        self as u32
    }

    /// The name as protocol.md spells it.
    pub fn name(self) -> &'static str {
        match self {
            Message::GetVersion => "GETVERSION",
            Message::StartPod => "STARTPOD",
            Message::DestroyPod => "DESTROYPOD",
            Message::ExecCmd => "EXECCMD",
            Message::Ready => "READY",
            Message::Ack => "ACK",
            Message::Error => "ERROR",
            Message::WinSize => "WINSIZE",
            Message::Ping => "PING",
            Message::Next => "NEXT",
            Message::WriteFile => "WRITEFILE",
            Message::ReadFile => "READFILE",
            Message::NewContainer => "NEWCONTAINER",
            Message::KillContainer => "KILLCONTAINER",
            Message::OnlineCpuMem => "ONLINECPUMEM",
            Message::SetupInterface => "SETUPINTERFACE",
            Message::SetupRoute => "SETUPROUTE",
            Message::RemoveContainer => "REMOVECONTAINER",
            Message::ProcessAsyncEvent => "PROCESSASYNCEVENT",
            Message::SignalProcess => "SIGNALPROCESS",
            Message::DeleteInterface => "DELETEINTERFACE",
        }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl From<Message> for u32 {
    fn from(message: Message) -> u32 {
        message.id()
    }
}

/// A declared length that no correct peer sends. The connection cannot be used any longer, because the start
/// of the next frame is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation {
    /// The channel: `control` or `stream`.
    pub channel: &'static str,
    /// The declared length of the frame in bytes, header included. For a frame that is being encoded: its
    /// length, or `u32::MAX` if it does not fit.
    pub length: u32,
    /// The smallest frame of this channel, in bytes.
    pub min: usize,
    /// The largest frame of this channel, in bytes.
    pub max: usize,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Violation { channel, length, min, max } = self;
        write!(f, "a {channel} frame of {length} bytes (at least {min}, at most {max})")
    }
}

impl std::error::Error for Violation {}

/// What differs between the two channels: the field in front of the length.
pub trait Channel {
    /// The field in front of the length: the message's id, or the stream's number.
    type Tag: Copy + fmt::Debug + PartialEq;
    /// The channel's name in error messages.
    const NAME: &'static str;
    /// The header's size in bytes; its last four bytes are the length.
    const HEADER: usize;
    /// The largest frame in bytes, header included.
    const MAX: usize;
    /// Reads the tag from the header's first bytes.
    fn tag(header: &[u8]) -> Self::Tag;
}

/// The control channel: commands, replies and events.
#[derive(Debug)]
pub enum Control {}

/// The stream channel: the input and output of processes.
#[derive(Debug)]
pub enum Stream {}

impl Channel for Control {
    type Tag = u32;
    const NAME: &'static str = "control";
    const HEADER: usize = CONTROL_HEADER;
    const MAX: usize = CONTROL_MAX;

    fn tag(header: &[u8]) -> u32 {
        header.iter().take(4).fold(0, |tag, &byte| tag << 8 | u32::from(byte))
    }
}

impl Channel for Stream {
    type Tag = u64;
    const NAME: &'static str = "stream";
    const HEADER: usize = STREAM_HEADER;
    const MAX: usize = STREAM_MAX;

    fn tag(header: &[u8]) -> u64 {
        header.iter().take(8).fold(0, |tag, &byte| tag << 8 | u64::from(byte))
    }
}

/// One whole frame, borrowed from the decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a, T> {
    /// The message's id, or the stream's number.
    pub tag: T,
    /// The bytes after the header.
    pub payload: &'a [u8],
}

/// Decodes bytes into whole frames.
///
/// ```
/// # use hyperinit_protocol::frame::{self, ControlDecoder, Message};
/// let mut decoder = ControlDecoder::default();
/// decoder.push(&frame::control(Message::Ping, b"null").unwrap());
/// while let Some(frame) = decoder.next_frame().unwrap() {
///     assert_eq!((frame.tag, frame.payload), (12, &b"null"[..]));
/// }
/// ```
#[derive(Debug)]
pub struct Decoder<C> {
    buffer: Vec<u8>,
    /// Where the next frame begins in `buffer`; the bytes before it have been handed out.
    start: usize,
    /// Set by the first violation, and kept until `reset`.
    violation: Option<Violation>,
    channel: PhantomData<C>,
}

/// The control channel's decoder.
pub type ControlDecoder = Decoder<Control>;
/// The stream channel's decoder.
pub type StreamDecoder = Decoder<Stream>;

impl<C> Default for Decoder<C> {
    fn default() -> Decoder<C> {
        Decoder { buffer: Vec::new(), start: 0, violation: None, channel: PhantomData }
    }
}

impl<C: Channel> Decoder<C> {
    /// Takes what was read, in portions of any size. Call [`Decoder::next_frame`] until it returns none
    /// before the next `push`; then the buffer never holds more than one frame and one portion. After a
    /// violation all bytes are dropped.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.violation.is_some() {
            return;
        }
        self.discard();
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, none if more bytes are needed. A violation is final: see [`Decoder::reset`].
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_, C::Tag>>, Violation> {
        if let Some(violation) = self.violation {
            return Err(violation);
        }
        let rest = self.pending();
        if rest == 0 {
            self.discard();
        }
        if rest < C::HEADER {
            return Ok(None);
        }
        let header = &self.buffer[self.start..self.start + C::HEADER];
        let declared = header[C::HEADER - 4..].iter().fold(0, |length, &byte| length << 8 | u32::from(byte));
        let length = match check::<C>(declared) {
            Ok(length) => length,
            Err(violation) => {
                *self = Decoder { violation: Some(violation), ..Decoder::default() };
                return Err(violation);
            }
        };
        if rest < length {
            return Ok(None);
        }
        let tag = C::tag(header);
        let frame = self.start..self.start + length;
        self.start = frame.end;
        Ok(Some(Frame { tag, payload: &self.buffer[frame.start + C::HEADER..frame.end] }))
    }

    /// Drops the bytes that have been handed out.
    fn discard(&mut self) {
        self.buffer.drain(..self.start);
        self.start = 0;
        if self.buffer.len() < KEEP && self.buffer.capacity() > KEEP {
            self.buffer.shrink_to(KEEP);
        }
    }

    /// How many bytes wait for the rest of their frame.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.start
    }

    /// Whether everything that was pushed has been handed out as whole frames.
    pub fn is_between_frames(&self) -> bool {
        self.violation.is_none() && self.pending() == 0
    }

    /// Starts again for a new connection. Half a frame of the old one is dropped.
    pub fn reset(&mut self) {
        *self = Decoder::default();
    }
}

/// The length as a size, if a frame of this channel can have it.
fn check<C: Channel>(length: u32) -> Result<usize, Violation> {
    let violation = Violation { channel: C::NAME, length, min: C::HEADER, max: C::MAX };
    usize::try_from(length).ok().filter(|length| (C::HEADER..=C::MAX).contains(length)).ok_or(violation)
}

/// The length field of a frame with a payload of `payload` bytes.
fn length<C: Channel>(payload: usize) -> Result<u32, Violation> {
    let length = u32::try_from(payload.saturating_add(C::HEADER)).unwrap_or(u32::MAX);
    check::<C>(length).map(|_| length)
}

/// Encodes a control frame. The only error is a payload that no decoder would accept.
pub fn control(message: impl Into<u32>, payload: &[u8]) -> Result<Vec<u8>, Violation> {
    let length = length::<Control>(payload.len())?;
    let mut frame = Vec::with_capacity(CONTROL_HEADER + payload.len());
    frame.extend_from_slice(&message.into().to_be_bytes());
    frame.extend_from_slice(&length.to_be_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// Encodes a stream frame. The only error is a payload that no decoder would accept.
pub fn stream(number: u64, payload: &[u8]) -> Result<Vec<u8>, Violation> {
    let mut frame = stream_header(number, payload.len())?.to_vec();
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// The header of a stream frame with a payload of `payload` bytes, for a caller that keeps the payload
/// elsewhere.
pub fn stream_header(number: u64, payload: usize) -> Result<[u8; STREAM_HEADER], Violation> {
    let length = length::<Stream>(payload)?;
    let mut header = [0; STREAM_HEADER];
    header[..8].copy_from_slice(&number.to_be_bytes());
    header[8..].copy_from_slice(&length.to_be_bytes());
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `portions` and collects every frame, or the violation.
    fn decode<C: Channel>(portions: &[&[u8]]) -> Result<Vec<(C::Tag, Vec<u8>)>, Violation> {
        let mut decoder = Decoder::<C>::default();
        let mut frames = Vec::new();
        for portion in portions {
            decoder.push(portion);
            while let Some(frame) = decoder.next_frame()? {
                frames.push((frame.tag, frame.payload.to_vec()));
            }
        }
        assert_eq!(decoder.pending(), 0);
        Ok(frames)
    }

    #[test]
    fn the_bytes_are_the_protocols() {
        assert_eq!(control(Message::Ping, b"null").unwrap(), b"\0\0\0\x0c\0\0\0\x0cnull");
        assert_eq!(control(0x0102_0304_u32, b"").unwrap(), b"\x01\x02\x03\x04\0\0\0\x08");
        assert_eq!(
            stream(0x0102_0304_0506_0708, b"hi").unwrap(),
            b"\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x0ehi"
        );
        assert_eq!(stream(1, b"").unwrap(), stream_header(1, 0).unwrap());
    }

    #[test]
    fn a_frame_may_be_split_at_every_byte() {
        let frames = vec![(1, b"{}".to_vec()), (12, Vec::new()), (9, vec![7; 300]), (0, b"null".to_vec())];
        let bytes: Vec<u8> = frames.iter().flat_map(|(id, payload)| control(*id, payload).unwrap()).collect();
        for first in 0..=bytes.len() {
            let (a, b) = bytes.split_at(first);
            assert_eq!(decode::<Control>(&[a, b]).unwrap(), frames, "split at {first}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(decode::<Control>(&single).unwrap(), frames);

        let frames = vec![(1, b"x".to_vec()), (u64::MAX, Vec::new()), (0, vec![9; 40])];
        let bytes: Vec<u8> =
            frames.iter().flat_map(|(seq, payload)| stream(*seq, payload).unwrap()).collect();
        for first in 0..=bytes.len() {
            for second in first..=bytes.len() {
                let portions = [&bytes[..first], &bytes[first..second], &bytes[second..]];
                assert_eq!(decode::<Stream>(&portions).unwrap(), frames, "split at {first} and {second}");
            }
        }
    }

    #[test]
    fn every_bad_length_is_a_violation_before_its_payload() {
        let header = |length: u32| [&7_u32.to_be_bytes()[..], &length.to_be_bytes()].concat();
        let over = CONTROL_MAX as u32 + 1;
        for length in (0..8).chain([over, 1 << 31, u32::MAX]) {
            let expected = Violation { channel: "control", length, min: 8, max: CONTROL_MAX };
            assert_eq!(decode::<Control>(&[&header(length)]), Err(expected), "{length}");
        }
        let header = |length: u32| [&7_u64.to_be_bytes()[..], &length.to_be_bytes()].concat();
        let over = STREAM_MAX as u32 + 1;
        for length in (0..12).chain([over, 1 << 31, u32::MAX]) {
            let expected = Violation { channel: "stream", length, min: 12, max: STREAM_MAX };
            assert_eq!(decode::<Stream>(&[&header(length)]), Err(expected), "{length}");
        }
    }

    #[test]
    fn the_caps_themselves_are_legal_and_nothing_longer_is_sent() {
        let payload = vec![1; STREAM_MAX - STREAM_HEADER];
        let frame = stream(5, &payload).unwrap();
        assert_eq!(decode::<Stream>(&[&frame]).unwrap(), [(5, payload)]);
        assert!(stream(5, &vec![1; STREAM_MAX - STREAM_HEADER + 1]).is_err());
        let payload = vec![1; CONTROL_MAX - CONTROL_HEADER];
        let frame = control(15_u32, &payload).unwrap();
        assert_eq!(decode::<Control>(&[&frame]).unwrap(), [(15, payload)]);
        assert!(control(15_u32, &vec![1; CONTROL_MAX - CONTROL_HEADER + 1]).is_err());
    }

    #[test]
    fn a_declared_length_allocates_nothing() {
        let mut decoder = ControlDecoder::default();
        decoder.push(&[0, 0, 0, 15]);
        decoder.push(&(CONTROL_MAX as u32).to_be_bytes());
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(decoder.buffer.capacity() < 1024, "{}", decoder.buffer.capacity());
    }

    #[test]
    fn a_large_frame_is_given_back() {
        let mut decoder = ControlDecoder::default();
        decoder.push(&control(15_u32, &vec![0; 1 << 20]).unwrap());
        assert!(decoder.next_frame().unwrap().is_some());
        assert!(decoder.next_frame().unwrap().is_none());
        assert!(decoder.buffer.capacity() <= KEEP);
    }

    #[test]
    fn a_violation_is_final_until_the_peer_connects_again() {
        let mut decoder = ControlDecoder::default();
        decoder.push(&[0; 8]);
        assert!(decoder.next_frame().is_err());
        decoder.push(&control(Message::Ping, b"").unwrap());
        assert!(decoder.next_frame().is_err());
        assert_eq!(decoder.pending(), 0);
        decoder.reset();
        decoder.push(&control(Message::Ping, b"").unwrap());
        assert_eq!(decoder.next_frame(), Ok(Some(Frame { tag: 12, payload: b"" })));
    }

    #[test]
    fn ids_and_names_are_one_to_one() {
        for message in Message::ALL {
            assert_eq!(Message::from_id(message.id()), Some(message));
        }
        for id in [2, 3, 5, 7, 13, 26, u32::MAX] {
            assert_eq!(Message::from_id(id), None, "{id}");
        }
    }
}
