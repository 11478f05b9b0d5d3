//! The control channel: bytes in, frames out, and the flow control that runV counts on (protocol.md «Flow control»).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::unistd::{read, write};

use super::ports::Port;
use crate::fault::{Fault, OrFault};
use crate::frame::{self, Commands, Message, Seam};
use crate::host::{self, Caller, Silence};
use crate::sys::socket;

/// How much is read at once; runV writes at most 512 bytes before it waits for their NEXT.
const CHUNK: usize = 64 << 10;
/// As much as is written at once, in bytes: whole frames, but for one that is longer.
const TOGETHER: usize = 16 << 10;
/// While more than this waits for a host that does not read, nothing more is read from it: in bytes.
const OUT_MAX: usize = 1 << 20;
/// How long a connection waits that could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);
/// A host that has just said that it is new keeps what it is owed: that the one before has left may be told so much later than its
/// first bytes came.
const LATE: Duration = Duration::from_secs(1);

/// For the log.
const LEFT: &str = "the host has left the control port";

/// Something from the host.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// A new connection: it is owed a READY, and no reply to what an earlier one asked.
    Connected,
    /// The host of a device left: nobody waits for the replies to what it asked. [`Control::left`] is to follow.
    Left,
    /// A new host has greeted by a PING with this payload, and the one before has left: [`Control::left`] is to follow, then an ACK with the payload.
    Greeted(Vec<u8>),
    /// A whole frame: type and payload.
    Frame(u32, Vec<u8>),
}

/// A frame on its way out.
struct Out {
    message: Message,
    bytes: Vec<u8>,
}

impl Out {
    /// How much a NEXT credits, in bytes; none if it is something else.
    fn credit(&self) -> Option<usize> {
        let count = self.bytes.get(frame::CONTROL_HEADER..)?.try_into().ok().map(u32::from_be_bytes)?;
        usize::try_from(count).ok().filter(|_| self.message == Message::Next)
    }
}

/// The channel and what waits in it.
pub struct Control {
    port: Port,
    connection: Option<OwnedFd>,
    decoder: Commands,
    /// After a violation: nothing is understood until the host connects again.
    deaf: bool,
    /// Edge-triggered readiness that has not been used up.
    readable: bool,
    /// The port takes no more until an event says that it does.
    blocked: bool,
    /// The connection takes nothing any more. What its host has written is read to its end.
    broken: bool,
    /// The decoder may have whole frames, which nobody had room for.
    whole: bool,
    /// The same of the listening socket: a stranger was refused, and others may wait behind it.
    callers: bool,
    /// When accepting a connection is tried again: there was no memory or descriptor for it, and nothing will say when there is.
    short: Option<Instant>,
    /// The host of a device is away.
    away: bool,
    /// It has left, and what it has sent is still being read. Nothing is written meanwhile: it may be for nobody.
    leaving: bool,
    /// It may be the one before that has left, and this one only just come.
    late: bool,
    /// That it has left has been said; nothing is written until [`Control::left`].
    parting: bool,
    /// When a host last said by itself that it is new.
    came: Option<Instant>,
    /// The credit for what waits in the decoder, in bytes: thrown away, but owed if that is of the host that is there.
    half: usize,
    /// The credit for what the new host has sent.
    own: usize,
    silence: Silence,
    out: VecDeque<Out>,
    /// How much of the first frame in `out` has left.
    sent: usize,
    /// Bytes in `out`.
    waiting: usize,
    token: u64,
    /// What is read arrives here: made once, for to clear it each time would cost more than the read.
    chunk: Vec<u8>,
}

impl Control {
    /// The channel over `port`; its events carry `token`.
    pub fn new(port: Port, token: u64) -> Control {
        let shared = matches!(port, Port::Device(_) | Port::Line(_));
        Control {
            port,
            connection: None,
            decoder: Commands::new(shared),
            deaf: false,
            readable: false,
            blocked: false,
            broken: false,
            whole: false,
            callers: false,
            short: None,
            away: false,
            leaving: false,
            late: false,
            parting: false,
            came: None,
            half: 0,
            own: 0,
            silence: Silence::default(),
            out: VecDeque::new(),
            sent: 0,
            waiting: 0,
            token,
            chunk: vec![0; CHUNK],
        }
    }

    /// Joins the epoll set, edge-triggered: a device whose host is away shows EPOLLHUP for as long as it is.
    /// A device counts as connected from the start, for nothing announces its host.
    pub fn open(&mut self, epoll: &Epoll) -> Result<Vec<Input>, Fault> {
        let (fd, inputs) = match &self.port {
            Port::Device(fd) | Port::Line(fd) => (fd, vec![Input::Connected]),
            Port::Listener(fd) | Port::Vsock(fd) => (fd, Vec::new()),
        };
        epoll.add(fd, edges(self.token)).fault("watching", "the control port")?;
        self.readable = true;
        Ok(inputs)
    }

    /// Whether [`Control::turn`] has something to do without a new event, with room for so many frames. Who calls needs none.
    pub fn wants_turn(&self, room: usize) -> bool {
        self.callers || room > 0 && (self.leaving || ((self.readable || self.whole) && self.has_room()))
    }

    /// Whether so little waits to be written that more is read: for a broken connection that is events only.
    fn has_room(&self) -> bool {
        self.waiting < if self.broken { 2 * OUT_MAX } else { OUT_MAX }
    }

    /// After how long [`Control::turn`] has something to do without a new event.
    pub fn due(&self) -> Option<Duration> {
        self.short.map(|until| until.saturating_duration_since(Instant::now()))
    }

    /// An event of the token came. That a host on a line begins anew is only guessed.
    pub fn ready(&mut self, events: EpollFlags) {
        if matches!(self.port, Port::Device(_)) {
            match events.contains(EpollFlags::EPOLLHUP) {
                true => self.host_left(),
                false => self.away = false,
            }
        }
        let speaks = events.contains(EpollFlags::EPOLLIN) && self.silence.ends(Instant::now());
        // If frames wait for room, then it is us who were silent.
        if speaks && !self.whole && matches!(self.port, Port::Line(_)) {
            self.decoder.reset();
            self.deaf = false;
        }
        // Not by EPOLLOUT alone, which tells of each frame that the host of a device has taken.
        self.readable |= events.intersects(!EpollFlags::EPOLLOUT);
        self.blocked &= events == EpollFlags::EPOLLIN;
    }

    /// Writes what waits, takes at most `room` frames, of what was read before or else of one portion more, takes a new
    /// connection if there is none, and says what came. Call again while [`Control::wants_turn`].
    pub fn turn(&mut self, epoll: &Epoll, room: usize) -> Vec<Input> {
        let mut inputs = Vec::new();
        if self.parting {
            self.left();
        }
        self.flush();
        if self.broken && !self.has_room() {
            // It still writes, and has processes started: the next host is to hear of their ends.
            self.host_left();
        }
        if room > 0 && self.has_room() {
            if self.whole {
                self.decode(&[], room, &mut inputs);
            } else if self.readable {
                self.read(room, &mut inputs);
            }
        }
        // What can be read when a host has left was its own, or was sent by the next one before anything told: whose it was is
        // unknown, and a reply too few is better than another's.
        let read = !self.readable && !self.whole || self.waiting >= OUT_MAX;
        if self.leaving && read && !self.parting {
            inputs.extend(self.part());
        }
        if self.connection.is_none() && self.accept(epoll, inputs.is_empty()) {
            inputs.push(Input::Connected);
        }
        inputs
    }

    /// All that the host has sent that left has been read. Whether the next one is there already, and half a command its own, the next
    /// bytes say.
    fn part(&mut self) -> Option<Input> {
        log::info!("{LEFT}");
        let pending = self.decoder.left();
        self.deaf = false;
        if std::mem::take(&mut self.late) {
            self.leaving = false;
            self.flush();
            return None;
        }
        self.half = self.credits().min(pending);
        self.sent = 0;
        self.parting = true;
        Some(Input::Left)
    }

    /// The host before has left: what was for it is thrown away. To be called when all that it asked has been acted on.
    pub fn left(&mut self) {
        self.forget_replies();
        (self.leaving, self.late, self.parting) = (false, false, false);
        let own = std::mem::take(&mut self.own);
        self.credit(own);
        self.flush();
    }

    /// Takes the next connection in the queue, if there is one: only one is served at a time. `now`: nothing of the one before is still
    /// to be answered, which the next one would hear.
    fn accept(&mut self, epoll: &Epoll, now: bool) -> bool {
        let (Port::Listener(listener) | Port::Vsock(listener)) = &self.port else { return false };
        if !now {
            self.callers = true;
            return false;
        }
        if self.short.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        self.short = None;
        // One that cannot be watched is hung up on, and has to come again.
        let accepted = host::accept(listener).and_then(|caller| {
            if let Caller::Host(connection) = &caller {
                epoll.add(connection, edges(self.token))?;
            }
            Ok(caller)
        });
        self.callers = false;
        match accepted {
            Ok(Caller::Host(connection)) => self.connection = Some(connection),
            Ok(Caller::Stranger) => {
                // The next one in another round: whoever calls all the time must not keep the pod waiting.
                self.callers = true;
                return false;
            }
            Err(Errno::EAGAIN) => return false,
            Err(errno) => {
                log::warn!("{}", Fault::errno("accepting", "a connection", errno));
                self.short = Some(Instant::now() + PAUSE);
                return false;
            }
        }
        self.start_over();
        true
    }

    /// Queues a frame; [`Control::flush`] writes it. READY goes before all else, also before what an earlier
    /// connection left.
    pub fn send(&mut self, message: Message, payload: &[u8]) {
        if self.broken && message != Message::ProcessAsyncEvent {
            return;
        }
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
            self.out.push_front(out);
        } else {
            self.out.push_back(out);
        }
    }

    /// Whether everything sent so far has left: written, and for a device also taken by the host.
    pub fn drained(&mut self) -> bool {
        if !self.out.is_empty() {
            return false;
        }
        match &self.port {
            // What was written to a unix socket outlives its writer.
            Port::Listener(_) => true,
            // It does not on vsock: it has to have been taken. Older kernels do not say; then a host that hangs up has.
            Port::Vsock(_) => {
                self.connection.as_ref().is_none_or(|connection| socket::unsent(connection) == Ok(0))
            }
            Port::Line(fd) => socket::unsent(fd).is_ok_and(|unsent| unsent == 0),
            Port::Device(fd) => {
                // virtio_console is writable again when the host has taken the last buffer. To look whether there is something to
                // read, it takes what has come out of the queue, and the interrupt for that finds nothing then and tells nobody:
                // who asks must heed the answer.
                let mut poll_fd = [PollFd::new(fd.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
                let ready = poll(&mut poll_fd, PollTimeout::ZERO).ok().and_then(|_| poll_fd[0].revents());
                let ready = ready.unwrap_or(PollFlags::empty());
                self.readable |= ready.contains(PollFlags::POLLIN);
                ready.contains(PollFlags::POLLOUT)
            }
        }
    }

    /// Whether everything sent so far has been written.
    pub fn wrote_all(&self) -> bool {
        self.out.is_empty()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.port {
            Port::Device(fd) | Port::Line(fd) => Some(fd.as_fd()),
            Port::Listener(_) | Port::Vsock(_) => self.connection.as_ref().map(AsFd::as_fd),
        }
    }

    fn read(&mut self, room: usize, inputs: &mut Vec<Input>) {
        let mut chunk = std::mem::take(&mut self.chunk);
        let got = self.fd().map(|fd| read(fd, &mut chunk));
        match got {
            None => self.readable = false,
            Some(Ok(0)) => {
                self.readable = false;
                self.host_left();
            }
            Some(Ok(count)) => {
                if !self.deaf {
                    self.credit(count);
                }
                self.decode(chunk.get(..count).unwrap_or_default(), room, inputs);
            }
            Some(Err(Errno::EINTR)) => {}
            Some(Err(Errno::EAGAIN)) => {
                self.readable = false;
                self.silence.goes_on(Instant::now());
            }
            Some(Err(errno)) => {
                log::warn!("{}", Fault::errno("reading", "the control port", errno));
                self.readable = false;
                self.host_left();
            }
        }
        self.chunk = chunk;
    }

    /// Says how much was read, at once: runV waits for it before it writes on.
    fn credit(&mut self, count: usize) {
        if count > 0 {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            self.send(Message::Next, &count.to_be_bytes());
            self.flush();
        }
    }

    /// The credit that has not left, in bytes.
    fn credits(&self) -> usize {
        self.out.iter().filter_map(Out::credit).sum()
    }

    /// Takes back the credit for the last portion, if it has not begun to leave; in bytes.
    fn take_credit(&mut self) -> usize {
        let begun = usize::from(self.sent > 0);
        let last = self.out.iter().rposition(|out| out.credit().is_some()).filter(|&at| at >= begun);
        last.and_then(|at| self.out.remove(at)).and_then(|out| out.credit()).unwrap_or(0)
    }

    fn decode(&mut self, bytes: &[u8], room: usize, inputs: &mut Vec<Input>) {
        self.whole = false;
        if self.deaf {
            return;
        }
        self.decoder.push(bytes);
        while inputs.len() < room {
            match self.decoder.seam() {
                Some(Seam::Anew) => {
                    log::info!("another host speaks on the control port");
                    self.own = self.take_credit();
                    return self.other_host(Input::Left, inputs);
                }
                Some(Seam::GoesOn) => {
                    let half = std::mem::take(&mut self.half);
                    self.credit(half);
                }
                None => {}
            }
            match self.decoder.next_frame() {
                Ok(Some(frame)) if frame.tag == Message::Ping.id() && host::is_greeting(frame.payload) => {
                    let greeting = Input::Greeted(frame.payload.to_vec());
                    return self.other_host(greeting, inputs);
                }
                Ok(Some(frame)) => inputs.push(Input::Frame(frame.tag, frame.payload.to_vec())),
                Ok(None) => return,
                Err(violation) => {
                    log::warn!(
                        "the host sent {violation}: not listening until it connects again, or on a line pauses"
                    );
                    self.deaf = true;
                    self.connection = None;
                    return;
                }
            }
        }
        self.whole = true;
    }

    /// The bytes say that another host is there. What it asks waits until what was for the one before is gone.
    fn other_host(&mut self, input: Input, inputs: &mut Vec<Input>) {
        self.came = Some(Instant::now());
        self.parting = true;
        self.whole = true;
        inputs.push(input);
    }

    /// The host hung up. What waits for it is kept; half a frame in either direction is not. What a device's has sent can still be
    /// read.
    fn host_left(&mut self) {
        if let Port::Device(_) = self.port {
            if !self.away {
                self.leaving = true;
                self.late = self.came.is_some_and(|came| came.elapsed() < LATE);
            }
            self.away = true;
            return;
        }
        if self.connection.take().is_some() {
            log::info!("{LEFT}");
        }
        self.readable = false;
        self.whole = false;
        self.decoder.reset();
        self.deaf = false;
        self.sent = 0;
        self.broken = false;
    }

    /// A new connection: credits and replies were owed to the old one, events and READY are anybody's.
    fn start_over(&mut self) {
        self.whole = false;
        self.decoder.reset();
        self.deaf = false;
        self.sent = 0;
        self.blocked = false;
        self.broken = false;
        self.readable = true;
        self.keep_events();
    }

    fn keep_events(&mut self) {
        self.out.retain(|out| out.message == Message::ProcessAsyncEvent);
        self.count_waiting();
    }

    /// As [`Control::start_over`], but a READY that nobody has heard is still to be said, and of what has left in part the rest
    /// has to follow.
    fn forget_replies(&mut self) {
        let mut begun = self.sent > 0;
        self.out.retain(|out| {
            std::mem::take(&mut begun) || matches!(out.message, Message::ProcessAsyncEvent | Message::Ready)
        });
        self.count_waiting();
    }

    fn count_waiting(&mut self) {
        self.waiting = self.out.iter().map(|out| out.bytes.len()).sum();
    }

    /// Writes what can be written: small frames together, for each write to a device is work for the host and wakes init again.
    pub fn flush(&mut self) {
        if self.broken {
            return;
        }
        while let Some(first) = self.out.front().filter(|_| !self.blocked && !self.leaving && !self.parting) {
            let rest = first.bytes.get(self.sent..).unwrap_or_default();
            let Some(fd) = self.fd() else { return };
            let wrote = if rest.len() >= TOGETHER || self.out.len() == 1 {
                write(fd, rest)
            } else {
                write(fd, &self.together())
            };
            match wrote {
                Ok(count) => self.wrote(count),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.blocked = true,
                Err(errno) => {
                    log::info!("{}", Fault::errno("writing", "the control port", errno));
                    return self.cannot_write();
                }
            }
        }
    }

    /// A connection's host may have written its last command and closed: that is carried out although nobody hears of it
    /// (protocol.md «DESTROYPOD»). Its end is where it cannot be read any more.
    fn cannot_write(&mut self) {
        if self.connection.is_none() {
            return self.host_left();
        }
        (self.broken, self.readable, self.sent) = (true, true, 0);
        self.keep_events();
    }

    /// What is left of the first frame, and those behind it that fit into a write with it.
    fn together(&self) -> Vec<u8> {
        let mut together = Vec::with_capacity(TOGETHER);
        let mut sent = self.sent;
        for out in &self.out {
            let rest = out.bytes.get(sent..).unwrap_or_default();
            if together.len() + rest.len() > TOGETHER {
                break;
            }
            together.extend_from_slice(rest);
            sent = 0;
        }
        together
    }

    /// So many bytes have left.
    fn wrote(&mut self, mut count: usize) {
        while let Some(first) = self.out.front() {
            let rest = first.bytes.len().saturating_sub(self.sent);
            if count < rest {
                self.sent += count;
                return;
            }
            count -= rest;
            self.waiting = self.waiting.saturating_sub(first.bytes.len());
            self.sent = 0;
            self.out.pop_front();
        }
    }
}

fn edges(token: u64) -> EpollEvent {
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    EpollEvent::new(flags, token)
}

#[cfg(test)]
mod tests;
