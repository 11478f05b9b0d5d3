//! How a host begins that shares a port with others before it (src/host.rs «greeting»): on both channels it says a number that
//! nobody has used, and throws away what comes before the answer, for that was another's.
//!
//! A guest that does not answer may take the greeting for the rest of what another host has begun. Then it is greeted again,
//! by another number; then the ports are left for a while, which it is told, and on a serial line for as long as it takes there to be
//! believed to begin anew.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::TIMEOUT;
use crate::fault::{Fault, OrFault};
use crate::frame::{self, CONTROL_MAX, Channel, Control, Decoder, Message, Stream};
use crate::host::{self, LINE_PAUSE};
use crate::sys::socket::unsent;

/// The attempts, one connection each; the last ones again and again.
const ATTEMPTS: [(&[Duration], Duration); 3] = [
    // Where nothing was left half said, the answer comes at once.
    (&[Duration::from_millis(500)], Duration::ZERO),
    // QEMU tells the guest in no time that its ports were left; a busy guest may be slow to answer.
    (&[Duration::from_secs(1), Duration::from_secs(2)], Duration::from_millis(250)),
    (&[Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)], LINE_ANEW),
];
/// After so long a line's host is believed to begin anew.
const LINE_ANEW: Duration = LINE_PAUSE.saturating_add(Duration::from_secs(1));
/// How often it is looked whether the guest has taken what was written.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// More than a guest can have to say before the answer: what was on its way to another host.
const BEFORE_MAX: usize = 2 * CONTROL_MAX;

/// A socket, and what has come already that is for whoever has it now.
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) socket: UnixStream,
    pub(super) heard: Vec<u8>,
}

impl From<UnixStream> for Greeted {
    /// One that needs no greeting.
    fn from(socket: UnixStream) -> Greeted {
        Greeted { socket, heard: Vec::new() }
    }
}

/// One connection's patience.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// How long the answers to its greetings are waited for, each once the guest has taken it.
    pub(super) answers: &'static [Duration],
    /// Until when to wait for a guest that listens to others.
    pub(super) deadline: Instant,
}

/// Connects to both channels and greets until it is answered.
pub(super) fn until_answered(
    mut connect: impl FnMut(Instant) -> Result<(UnixStream, UnixStream), Fault>,
    mut greet: impl FnMut(UnixStream, UnixStream, Patience) -> Result<(Greeted, Greeted), Fault>,
) -> Result<(Greeted, Greeted), Fault> {
    let deadline = Instant::now() + TIMEOUT;
    let [.., last] = ATTEMPTS;
    let mut attempts = ATTEMPTS.into_iter().chain(std::iter::repeat(last));
    loop {
        let (answers, away) = attempts.next().unwrap_or(last);
        // The guest has to notice that the ports were left, and nothing tells when it has.
        std::thread::sleep(away);
        let (control, stream) = connect(deadline)?;
        let outcome = greet(control, stream, Patience { answers, deadline });
        if outcome.is_ok() || Instant::now() >= deadline {
            return outcome;
        }
    }
}

/// Greets on the control channel. READY and events are for anybody, and kept.
pub(super) fn control(socket: UnixStream, patience: Patience) -> Result<Greeted, Fault> {
    let ours = |id| matches!(Message::from_id(id), Some(Message::Ready | Message::ProcessAsyncEvent));
    greet::<Control>(
        socket,
        patience,
        |number| frame::control(Message::Ping, &host::greeting(number)),
        |number| frame::control(Message::Ack, &host::greeting(number)),
        |id, payload| if ours(id) { frame::control(id, payload) } else { Ok(Vec::new()) },
    )
}

/// Greets on the stream channel: a frame for a stream that nobody has is answered by its end. What comes for the streams that are
/// `known` is kept.
pub(super) fn streams(
    socket: UnixStream,
    known: &[(u64, u64)],
    patience: Patience,
) -> Result<Greeted, Fault> {
    let ours = |number| known.iter().any(|&(stdio, stderr)| number == stdio || number == stderr);
    greet::<Stream>(
        socket,
        patience,
        |number| frame::stream(number, b""),
        |number| frame::stream(number, b""),
        |number, payload| if ours(number) { frame::stream(number, payload) } else { Ok(Vec::new()) },
    )
}

type Encoded = Result<Vec<u8>, frame::Violation>;

fn greet<C: Channel>(
    mut socket: UnixStream,
    patience: Patience,
    greeting: impl Fn(u64) -> Encoded,
    answer: impl Fn(u64) -> Encoded,
    kept: impl Fn(C::Tag, &[u8]) -> Encoded,
) -> Result<Greeted, Fault> {
    let to = format!("the {} channel", C::NAME);
    let fault = |why: &str| Fault::new("greeting the guest on", &to, why);
    let bad = |violation: frame::Violation| fault(&violation.to_string());
    let mut heard = Vec::new();
    for &answered in patience.answers {
        // Each hasher has random keys of its own. With this bit no other stream of hyperctl's, or small number, is meant.
        let number = RandomState::new().build_hasher().finish() | 1 << 63;
        let answer = answer(number).map_err(bad)?;
        socket.write_all(&greeting(number).map_err(bad)?).fault("greeting the guest on", &to)?;
        let mut taken = None;
        let mut looked: usize = 0;
        while taken.is_none_or(|taken: Instant| taken.elapsed() < answered) {
            if let Some(at) = find(&heard, looked, &answer) {
                let rest = heard.split_off(at + answer.len());
                heard.truncate(at);
                let heard = [whole_frames::<C>(&heard, kept).map_err(bad)?, rest].concat();
                socket.set_read_timeout(None).fault("setting up", &to)?;
                return Ok(Greeted { socket, heard });
            }
            looked = heard.len().saturating_sub(answer.len());
            if heard.len() > BEFORE_MAX {
                return Err(fault("it says something else all the time"));
            }
            if taken.is_none() && unsent(&socket).fault("greeting the guest on", &to)? == 0 {
                taken = Some(Instant::now());
            }
            if taken.is_none() && Instant::now() >= patience.deadline {
                return Err(fault("it does not listen, or to another host"));
            }
            if !hear(&mut socket, &mut heard).fault("greeting the guest on", &to)? {
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

/// Where the answer is, from a place on.
fn find(heard: &[u8], from: usize, answer: &[u8]) -> Option<usize> {
    let at = heard.get(from..)?.windows(answer.len()).position(|window| window == answer)?;
    Some(from + at)
}

/// What is kept of the frames before the answer. If they do not begin with the first byte, that was the rest of another's frame; then where the
/// others begin could be guessed, but what is in a frame is a container's to say: nothing is kept.
fn whole_frames<C: Channel>(bytes: &[u8], kept: impl Fn(C::Tag, &[u8]) -> Encoded) -> Encoded {
    let mut decoder = Decoder::<C>::default();
    decoder.push(bytes);
    let mut whole = Vec::new();
    while let Ok(Some(frame)) = decoder.next_frame() {
        whole.extend(kept(frame.tag, frame.payload)?);
    }
    Ok(if decoder.is_between_frames() { whole } else { Vec::new() })
}
