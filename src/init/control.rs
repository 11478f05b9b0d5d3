//! The control channel: bytes in, frames out, and the flow control that runV counts on
//! (protocol.md «Flow control»).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollFlags};
use nix::unistd::read;

use super::outbox::{OUT_MAX, Outbox};
use super::ports::Port;
use crate::clock::now;
use crate::fault::{Fault, OrFault};
use crate::frame::{ControlDecoder, Message};
use crate::greeting::{self, LINE_PAUSE};
use crate::port::caller::{self, Caller};
use crate::port::{self, Action, Event, Kind, Presence, Readiness, edges};
use crate::sys::socket;

/// How much is read at once, in bytes; runV writes at most 512 before it waits for their NEXT.
const CHUNK: usize = 64 << 10;
/// For the log.
const LEFT: &str = "the host has left the control port";

/// Something from the host.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// A new connection: it is owed a READY, and no reply to what an earlier host asked.
    Connected,
    /// The host of a device left: nobody waits for the replies to what it asked. [`Control::left`] is to
    /// follow.
    Left,
    /// A new host has greeted by a PING with this payload. [`Control::left`] is to follow, then an ACK with
    /// the payload.
    Greeted(Vec<u8>),
    /// A whole frame: type and payload.
    Frame(u32, Vec<u8>),
}

/// The channel and what waits in it.
pub struct Control {
    port: Port,
    connection: Option<OwnedFd>,
    presence: Presence,
    readiness: Readiness,
    decoder: ControlDecoder,
    /// The decoder may have whole frames that there was no room for.
    whole: bool,
    outbox: Outbox,
    token: u64,
    /// What is read arrives here. It is made once, for clearing it each time would cost more than the read.
    chunk: Vec<u8>,
}

impl Control {
    /// The channel over `port`; its events carry `token`.
    pub fn new(port: Port, token: u64) -> Control {
        Control {
            connection: None,
            presence: Presence::new(port.kind(), LINE_PAUSE),
            port,
            readiness: Readiness::UNTRIED,
            decoder: ControlDecoder::default(),
            whole: false,
            outbox: Outbox::default(),
            token,
            chunk: vec![0; CHUNK],
        }
    }

    /// Joins the epoll set. A device and a line count as connected from the start, for no event announces
    /// their host.
    pub fn open(&mut self, epoll: &Epoll) -> Result<Vec<Input>, Fault> {
        let (fd, inputs) = match &self.port {
            Port::Device(fd) | Port::Line(fd) => (fd, vec![Input::Connected]),
            Port::Listener(fd) | Port::Vsock(fd) => (fd, Vec::new()),
        };
        epoll.add(fd, edges(self.token)).fault("watching", "the control port")?;
        Ok(inputs)
    }

    /// Whether [`Control::turn`] has something to do without a new event, with room for `room` commands. A
    /// connection is accepted without room.
    pub fn wants_turn(&self, room: usize) -> bool {
        self.presence.may_accept()
            || room > 0 && (self.has_read_all() || self.may_read() || self.whole && self.has_room())
    }

    fn may_read(&self) -> bool {
        self.fd().is_some() && self.readiness.readable && self.has_room()
    }

    /// Whether so little waits to be written that more is read. For a connection that cannot be written to,
    /// only events wait: the next host hears of the processes that have ended, and no more are started than
    /// it is told of.
    fn has_room(&self) -> bool {
        self.outbox.waiting() < if self.is_broken() { 2 * OUT_MAX } else { OUT_MAX }
    }

    /// Whether the host has left its connection, and what it sent is still being read.
    fn is_broken(&self) -> bool {
        self.presence.kind() == Kind::Socket && self.presence.is_leaving()
    }

    /// Whether the host has left, and all that it sent has been read. A connection is read to its end, unless
    /// what it asks for costs too much. On a device the next host's bytes follow, so what can be read now
    /// counts as the last host's.
    fn has_read_all(&self) -> bool {
        let nothing = !self.readiness.readable && !self.whole;
        self.presence.is_leaving() && (!self.has_room() || nothing && self.presence.kind() != Kind::Socket)
    }

    /// When [`Control::turn`] has something to do without a new event.
    pub fn deadline(&self) -> Option<Duration> {
        self.presence.deadline()
    }

    /// An event of the token came.
    pub fn ready(&mut self, events: EpollFlags) {
        self.readiness.note(events);
        self.on(port::told(events));
        self.forget_replies_of_a_broken_connection();
    }

    /// Writes what waits, takes at most `room` frames, of what was read before or else of one portion more,
    /// takes a new connection if there is none, and returns what came. The caller acts on all of it before
    /// the next call, which follows while [`Control::wants_turn`].
    pub fn turn(&mut self, epoll: &Epoll, room: usize) -> Vec<Input> {
        let mut inputs = Vec::new();
        self.on(Event::Tick);
        self.flush();
        if room > 0 && self.has_room() {
            if self.whole {
                self.decode(&[], room, &mut inputs);
            } else if self.may_read() {
                self.read(room, &mut inputs);
            }
        }
        if self.has_read_all() {
            inputs.extend(self.part());
        }
        // What the last host asked is answered before the next host can hear it.
        if inputs.is_empty() && self.accept(epoll) {
            inputs.push(Input::Connected);
        }
        inputs
    }

    /// All that a host that left has sent has been read. On a device it may have been the next host's, which
    /// sent it before the report; a reply too few is better than another host's, so the replies are forgotten
    /// all the same.
    fn part(&mut self) -> Option<Input> {
        self.on(Event::ReadAll);
        (self.presence.kind() != Kind::Socket).then_some(Input::Left)
    }

    /// Forgets what waits for the last host. To be called when all that this host asked has been acted on.
    pub fn left(&mut self) {
        self.outbox.forget_replies();
        self.flush();
    }

    /// Does what follows from an event.
    fn on(&mut self, event: Event) {
        match self.presence.on(now(), event) {
            Some(Action::Begin) => self.begin(),
            Some(Action::Left) => {
                log::info!("{LEFT}");
                self.begin();
                self.outbox.rewind();
                self.connection = None;
            }
            Some(Action::EarlierLeft) => log::info!("{LEFT}"),
            Some(Action::HangUp) => self.connection = None,
            Some(Action::Paused) | None => {}
        }
    }

    /// The host's next byte begins a frame.
    fn begin(&mut self) {
        self.decoder.reset();
        self.whole = false;
    }

    /// Takes the next connection, if there is none and one waits: one host is served at a time.
    fn accept(&mut self, epoll: &Epoll) -> bool {
        let (Port::Listener(listener) | Port::Vsock(listener)) = &self.port else { return false };
        if !self.presence.may_accept() {
            return false;
        }
        // A connection that cannot be watched is closed, and its host has to come again.
        let accepted = caller::accept(listener).and_then(|caller| {
            if let Caller::Host(connection) = &caller {
                epoll.add(connection, edges(self.token))?;
            }
            Ok(caller)
        });
        match accepted {
            Ok(Caller::Host(connection)) => {
                self.on(Event::Accepted);
                self.connection = Some(connection);
                self.readiness = Readiness::UNTRIED;
                self.outbox.start_over();
                return true;
            }
            // The next caller has another round: strangers who call all the time must not keep the pod
            // waiting.
            Ok(Caller::Stranger) => {}
            Err(Errno::EAGAIN) => self.on(Event::NoCaller),
            Err(errno) => {
                log::warn!("{}", Fault::errno("accepting", "a connection", errno));
                self.on(Event::NotAccepted);
            }
        }
        false
    }

    /// Queues a frame; [`Control::flush`] writes it. A READY overtakes everything that waits. For a host that
    /// has left its connection only events are kept, for the next one.
    pub fn send(&mut self, message: Message, payload: &[u8]) {
        if !self.is_broken() || message == Message::ProcessAsyncEvent {
            self.outbox.push(message, payload);
        }
    }

    /// Whether everything sent so far has left: written, and for a device also taken by the host.
    pub fn drained(&mut self) -> bool {
        if !self.outbox.is_empty() {
            return false;
        }
        match &self.port {
            // What was written to a unix socket outlives its writer.
            Port::Listener(_) => true,
            // On vsock it does not: the host has to have taken it. Older kernels do not say; then a host that
            // hangs up has.
            Port::Vsock(_) => {
                self.connection.as_ref().is_none_or(|connection| socket::unsent(connection) == Ok(0))
            }
            Port::Line(fd) => socket::unsent(fd).is_ok_and(|unsent| unsent == 0),
            Port::Device(fd) => {
                // virtio_console is writable again when the host has taken the last buffer. While
                // virtio_console looks for input, it takes what has come out of the queue, and the interrupt
                // for that then finds nothing and wakes nobody: so the answer about input counts.
                let mut poll_fd = [PollFd::new(fd.as_fd(), PollFlags::POLLIN | PollFlags::POLLOUT)];
                let ready = poll(&mut poll_fd, PollTimeout::ZERO).ok().and_then(|_| poll_fd[0].revents());
                let ready = ready.unwrap_or(PollFlags::empty());
                self.readiness.readable |= ready.contains(PollFlags::POLLIN);
                ready.contains(PollFlags::POLLOUT)
            }
        }
    }

    /// Whether everything sent so far has been written.
    pub fn wrote_all(&self) -> bool {
        self.outbox.is_empty()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.port {
            Port::Device(fd) | Port::Line(fd) => Some(fd.as_fd()),
            Port::Listener(_) | Port::Vsock(_) => self.connection.as_ref().map(AsFd::as_fd),
        }
    }

    fn read(&mut self, room: usize, inputs: &mut Vec<Input>) {
        let mut chunk = std::mem::take(&mut self.chunk);
        match self.fd().map_or(Err(Errno::EAGAIN), |fd| read(fd, &mut chunk)) {
            Ok(0) => self.host_ends(),
            Ok(count) => {
                self.on(Event::Bytes);
                if self.presence.hears_frames() {
                    self.credit(count);
                    self.decode(chunk.get(..count).unwrap_or_default(), room, inputs);
                }
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                self.readiness.readable = false;
                self.on(Event::Nothing);
            }
            Err(errno) => {
                log::warn!("{}", Fault::errno("reading", "the control port", errno));
                self.host_ends();
            }
        }
        self.chunk = chunk;
    }

    /// Says how much was read, at once: runV waits for it before it writes on.
    fn credit(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.send(Message::Next, &count.to_be_bytes());
        self.flush();
    }

    fn decode(&mut self, bytes: &[u8], room: usize, inputs: &mut Vec<Input>) {
        self.whole = false;
        self.decoder.push(bytes);
        while inputs.len() < room {
            match self.decoder.next_frame() {
                Ok(Some(frame))
                    if frame.tag == Message::Ping.id() && greeting::is_greeting(frame.payload) =>
                {
                    inputs.push(Input::Greeted(frame.payload.to_vec()));
                    self.on(Event::Greeted);
                    // What the new host asks waits until what was for the last host is forgotten.
                    break;
                }
                Ok(Some(frame)) => inputs.push(Input::Frame(frame.tag, frame.payload.to_vec())),
                Ok(None) => return,
                Err(violation) => {
                    log::warn!(
                        "the host sent {violation}: not listening until it connects again, or on a line pauses"
                    );
                    self.begin();
                    return self.on(Event::Violation);
                }
            }
        }
        self.whole = true;
    }

    /// A read says that the host is gone. A connection has nothing behind that.
    fn host_ends(&mut self) {
        self.readiness.readable = false;
        self.on(Event::Gone);
        if self.presence.kind() == Kind::Socket {
            self.part();
        }
    }

    /// Writes what can be written. While a host leaves, nothing is: it might reach nobody.
    pub fn flush(&mut self) {
        if self.presence.is_leaving() {
            return;
        }
        let fd = match &self.port {
            Port::Device(fd) | Port::Line(fd) => Some(fd),
            Port::Listener(_) | Port::Vsock(_) => self.connection.as_ref(),
        };
        let Some(fd) = fd.filter(|_| self.readiness.writable) else { return };
        match self.outbox.write(fd) {
            Ok(all) => self.readiness.writable = all,
            Err(errno) => {
                log::info!("{}", Fault::errno("writing", "the control port", errno));
                self.cannot_write();
            }
        }
    }

    /// A connection's host may have written its last command and closed: the command is carried out although
    /// nobody hears of it (protocol.md «DESTROYPOD»).
    fn cannot_write(&mut self) {
        self.readiness = Readiness { readable: true, writable: false };
        self.on(Event::Gone);
        self.forget_replies_of_a_broken_connection();
    }

    fn forget_replies_of_a_broken_connection(&mut self) {
        if self.is_broken() {
            self.outbox.start_over();
        }
    }
}

#[cfg(test)]
mod tests;
