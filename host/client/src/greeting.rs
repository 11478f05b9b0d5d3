//! How a host begins that shares a port with others before it (src/host.rs «greeting»): on both channels it
//! says a number that nobody has used, and throws away what comes before the answer, for that was another's.
//!
//! A guest that does not answer may take the greeting for the rest of what another host has begun. Then it is
//! greeted again, by another number; then the ports are left for a while, which it is told, and on a serial
//! line for as long as it takes there to be believed to begin anew. What it has said meanwhile that is for
//! this host it does not say again: that goes to the next attempt.

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

/// What the attempts that failed may leave of what they heard, of both channels.
const KEPT_MAX: usize = 4 * BEFORE_MAX;
/// How long a guest that is left may take to notice and to hang up. What it says until then is still heard.
const FAREWELL: Duration = Duration::from_millis(250);

/// A socket, and what has come already that is for whoever has it now.
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) socket: UnixStream,
    /// Whole frames that came over earlier connections.
    pub(super) before: Vec<u8>,
    /// What came over this one.
    pub(super) heard: Vec<u8>,
}

impl From<UnixStream> for Greeted {
    /// One that needs no greeting, or has not been greeted yet.
    fn from(socket: UnixStream) -> Greeted {
        Greeted { socket, before: Vec::new(), heard: Vec::new() }
    }
}

impl Greeted {
    /// Hangs up, and takes what the guest says until it does so too. What is `ours` of the whole frames is
    /// for the next attempt; half a frame comes again.
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

/// One connection's patience.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// How long the answers to its greetings are waited for, each once the guest has taken it.
    pub(super) answers: &'static [Duration],
    /// Until when to wait for a guest that listens to others.
    pub(super) deadline: Instant,
}

/// Connects to both channels and greets until it is answered. What comes for the streams that are `known` is
/// kept; without that the stream channel is not greeted.
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
        // The guest has to notice that the ports were left, and nothing tells when it has.
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

/// Greets on the control channel. READY and events are for anybody, and kept.
pub(super) fn control(greeted: &mut Greeted, patience: Patience) -> Result<(), Fault> {
    greet::<Control>(
        greeted,
        patience,
        |number| frame::control(Message::Ping, &host::greeting(number)),
        |number| frame::control(Message::Ack, &host::greeting(number)),
        is_anybodys,
    )
}

/// Greets on the stream channel: a frame for a stream that nobody has is answered by its end. What comes for
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
        // Each hasher has random keys of its own. With this bit no other stream of hyperctl's, or small
        // number, is meant.
        let number = RandomState::new().build_hasher().finish() | 1 << 63;
        let answer = answer(number).map_err(bad)?;
        socket.write_all(&greeting(number).map_err(bad)?).fault("greeting the guest on", &to)?;
        let mut taken = None;
        let mut looked: usize = 0;
        while taken.is_none_or(|taken: Instant| taken.elapsed() < answered) {
            if let Some(at) = find(heard, looked, &answer) {
                let rest = heard.split_off(at + answer.len());
                heard.truncate(at);
                // If they do not begin with the first byte, that was the rest of another's frame; then where
                // the others begin could be guessed, but what is in a frame is a container's to say: nothing
                // is kept.
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

/// Where the answer is, from a place on.
fn find(heard: &[u8], from: usize, answer: &[u8]) -> Option<usize> {
    let at = heard.get(from..)?.windows(answer.len()).position(|window| window == answer)?;
    Some(from + at)
}

/// Those of the whole frames that are `ours`, and how many bytes are left behind them. Of bytes that are no
/// frames nothing is kept.
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
