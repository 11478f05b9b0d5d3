//! How a host begins on a port that other hosts have used before (protocol/src/greeting.rs): on both channels
//! it sends a number that no host has used, and discards what comes before the answer, because that was for
//! another host.
//!
//! A guest that does not answer may take the greeting for the rest of a frame that another host began. Then
//! it is greeted again, with another number. After that the host closes the ports for a while. QEMU tells the
//! guest of that, except on a serial line, where the host stays away until the guest expects a new frame. The
//! guest does not repeat what it has sent to this host in the meantime, so that is passed on to the next
//! attempt.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::TIMEOUT;
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_protocol::frame::{self, CONTROL_MAX, Channel, Control, Decoder, Message, Stream};
use hyperinit_protocol::greeting::{self as host, LINE_PAUSE};
use hyperinit_sys::socket::unsent;

/// The attempts, each a new connection: how long to wait for the answer to each greeting, and how long to
/// stay away first. The last one is repeated.
const ATTEMPTS: [(&[Duration], Duration); 3] = [
    // If no frame was left half sent, the answer comes at once.
    (&[Duration::from_millis(500)], Duration::ZERO),
    // QEMU tells the guest at once that its ports were closed, but a busy guest may answer slowly.
    (&[Duration::from_secs(1), Duration::from_secs(2)], Duration::from_millis(250)),
    (&[Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)], LINE_ANEW),
];
/// After this much silence a guest on a serial line expects a new frame.
const LINE_ANEW: Duration = LINE_PAUSE.saturating_add(Duration::from_secs(1));
/// How often to check whether the guest has taken the greeting.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// More bytes than a guest can send before the answer: those that were on their way to another host.
const BEFORE_MAX: usize = 2 * CONTROL_MAX;

/// How many received bytes the failed attempts may pass on, of both channels together.
const KEPT_MAX: usize = 4 * BEFORE_MAX;
/// How long a guest may take to notice that the host has left, and to close the connection. What it sends
/// until then is still read.
const FAREWELL: Duration = Duration::from_millis(250);

/// A socket, and bytes already received that are for its new owner.
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) socket: UnixStream,
    /// Whole frames that came over earlier connections.
    pub(super) before: Vec<u8>,
    /// Bytes that came over this connection.
    pub(super) heard: Vec<u8>,
}

impl From<UnixStream> for Greeted {
    /// A socket that needs no greeting, or has not been greeted yet.
    fn from(socket: UnixStream) -> Greeted {
        Greeted { socket, before: Vec::new(), heard: Vec::new() }
    }
}

impl Greeted {
    /// Closes the connection, and reads what the guest sends until it closes it too. Returns the whole frames
    /// that are `ours`, for the next attempt; the guest sends an incomplete frame again.
    fn leave<C: Channel>(mut self, ours: impl Fn(C::Tag) -> bool) -> Vec<u8> {
        // The guest may have hung up before.
        let _ = self.socket.shutdown(Shutdown::Write);
        let until = Instant::now() + FAREWELL;
        while Instant::now() < until
            && self.heard.len() <= BEFORE_MAX
            && hear(&mut self.socket, &mut self.heard).unwrap_or(false)
        {}
        let (whole, _) = whole_frames::<C>(&self.heard, ours);
        self.before.extend(whole);
        self.before
    }
}

/// How patient one connection is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// How long to wait for the answer to each greeting, counted from when the guest has taken it.
    pub(super) answers: &'static [Duration],
    /// When to stop waiting for a guest that listens to other hosts.
    pub(super) deadline: Instant,
}

/// Connects to both channels and greets until an answer comes. Data for the streams that are `known` is kept.
/// If `known` is `None`, the stream channel is not greeted.
pub(super) fn until_answered(
    mut connect: impl FnMut(Instant) -> Result<(UnixStream, UnixStream), Fault>,
    known: Option<&[(u64, u64)]>,
) -> Result<(Greeted, Greeted), Fault> {
    let deadline = Instant::now() + TIMEOUT;
    let [.., last] = ATTEMPTS;
    let mut attempts = ATTEMPTS.into_iter().chain(std::iter::repeat(last));
    let (mut control_before, mut stream_before) = (Vec::new(), Vec::new());
    loop {
        let (answers, away) = attempts.next().unwrap_or(last);
        // The guest has to notice that the ports were closed, and nothing reports when it has.
        std::thread::sleep(away);
        let (control, stream) = connect(deadline)?;
        let mut control = Greeted { before: control_before, ..control.into() };
        let mut stream = Greeted { before: stream_before, ..stream.into() };
        let patience = Patience { answers, deadline };
        let outcome = self::control(&mut control, patience).and_then(|()| match known {
            Some(known) => streams(&mut stream, known, patience),
            None => Ok(()),
        });
        match outcome {
            Ok(()) => return Ok((control, stream)),
            Err(fault) if Instant::now() >= deadline => return Err(fault),
            Err(fault) => {
                control_before = control.leave::<Control>(is_anybodys);
                stream_before = stream.leave::<Stream>(|number| is_of(number, known.unwrap_or_default()));
                if control_before.len() + stream_before.len() > KEPT_MAX {
                    return Err(fault);
                }
            }
        }
    }
}

/// Greets on the control channel. READY and events are for every host, and are kept.
pub(super) fn control(greeted: &mut Greeted, patience: Patience) -> Result<(), Fault> {
    greet::<Control>(
        greeted,
        patience,
        |number| frame::control(Message::Ping, &host::greeting(number)),
        |number| frame::control(Message::Ack, &host::greeting(number)),
        is_anybodys,
    )
}

/// Greets on the stream channel: a frame for an unknown stream is answered with that stream's end. Data for
/// the streams that are `known` is kept.
pub(super) fn streams(greeted: &mut Greeted, known: &[(u64, u64)], patience: Patience) -> Result<(), Fault> {
    let empty = |number| frame::stream(number, b"");
    greet::<Stream>(greeted, patience, empty, empty, |number| is_of(number, known))
}

fn is_anybodys(id: u32) -> bool {
    matches!(Message::from_id(id), Some(Message::Ready | Message::ProcessAsyncEvent))
}

fn is_of(number: u64, known: &[(u64, u64)]) -> bool {
    known.iter().any(|&(stdio, stderr)| number == stdio || number == stderr)
}

type Encoded = Result<Vec<u8>, frame::Violation>;

fn greet<C: Channel>(
    Greeted { socket, heard, .. }: &mut Greeted,
    patience: Patience,
    greeting: impl Fn(u64) -> Encoded,
    answer: impl Fn(u64) -> Encoded,
    ours: impl Fn(C::Tag) -> bool,
) -> Result<(), Fault> {
    let to = format!("the {} channel", C::NAME);
    let fault = |why: &str| Fault::new("greeting the guest on", &to, why);
    let bad = |violation: frame::Violation| fault(&violation.to_string());
    for &answered in patience.answers {
        // Each hasher has random keys of its own. The top bit keeps the number apart from other streams of
        // hyperctl and from small numbers.
        let number = RandomState::new().build_hasher().finish() | 1 << 63;
        let answer = answer(number).map_err(bad)?;
        socket.write_all(&greeting(number).map_err(bad)?).fault("greeting the guest on", &to)?;
        let mut taken = None;
        let mut looked: usize = 0;
        while taken.is_none_or(|taken: Instant| taken.elapsed() < answered) {
            if let Some(at) = find(heard, looked, &answer) {
                let rest = heard.split_off(at + answer.len());
                heard.truncate(at);
                // If the bytes before the answer do not begin with a whole frame, the first ones are the rest
                // of a frame for another host. Where the next frame begins could only be guessed, and a
                // frame's content is under a container's control. So nothing is kept.
                let (whole, half) = whole_frames::<C>(heard, ours);
                *heard = if half == 0 { [whole, rest].concat() } else { rest };
                return socket.set_read_timeout(None).fault("setting up", &to);
            }
            looked = heard.len().saturating_sub(answer.len());
            if heard.len() > BEFORE_MAX {
                return Err(fault("it says something else all the time"));
            }
            if taken.is_none() && unsent(&*socket).fault("greeting the guest on", &to)? == 0 {
                taken = Some(Instant::now());
            }
            if taken.is_none() && Instant::now() >= patience.deadline {
                return Err(fault("it does not listen, or to another host"));
            }
            if !hear(socket, heard).fault("greeting the guest on", &to)? {
                return Err(fault("it hung up"));
            }
        }
    }
    Err(fault("no answer"))
}

/// Reads what comes within a moment; false at the end.
fn hear(socket: &mut UnixStream, heard: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut chunk = [0; 16 << 10];
    socket.set_read_timeout(Some(LOOK_AGAIN))?;
    match socket.read(&mut chunk) {
        Ok(0) => Ok(false),
        Ok(count) => {
            heard.extend_from_slice(chunk.get(..count).unwrap_or_default());
            Ok(true)
        }
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
            ) =>
        {
            Ok(true)
        }
        Err(error) => Err(error),
    }
}

/// The position of the answer, at `from` or later.
fn find(heard: &[u8], from: usize, answer: &[u8]) -> Option<usize> {
    let at = heard.get(from..)?.windows(answer.len()).position(|window| window == answer)?;
    Some(from + at)
}

/// The whole frames that are `ours`, and how many bytes follow the last whole frame. If the bytes are not
/// frames, no frame is kept.
fn whole_frames<C: Channel>(bytes: &[u8], ours: impl Fn(C::Tag) -> bool) -> (Vec<u8>, usize) {
    let mut decoder = Decoder::<C>::default();
    decoder.push(bytes);
    let (mut whole, mut at) = (Vec::new(), 0);
    loop {
        match decoder.next_frame() {
            Ok(Some(frame)) => {
                let end = at + C::HEADER + frame.payload.len();
                if ours(frame.tag) {
                    whole.extend_from_slice(bytes.get(at..end).unwrap_or_default());
                }
                at = end;
            }
            Ok(None) => return (whole, bytes.len() - at),
            Err(_) => return (Vec::new(), bytes.len() - at),
        }
    }
}
