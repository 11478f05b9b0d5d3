//! The control channel: bytes in, frames out, and the flow control that runV counts on (protocol.md «Flow control»).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::unistd::{read, write};

use super::ports::Port;
use crate::fault::{Fault, OrFault};
use crate::frame::{self, ControlDecoder, Message};
use crate::host::{self, Caller, Silence};
use crate::sys::socket;

/// How much is read at once; runV writes at most 512 bytes before it waits for their NEXT.
const CHUNK: usize = 64 << 10;
/// As much as is written at once, in bytes: whole frames, but for one that is longer.
const TOGETHER: usize = 16 << 10;
/// While more than this waits for a host that does not read, nothing more is read from it: in bytes.
const OUT_MAX: usize = 1 << 20;

/// Something from the host.
#[derive(Debug, PartialEq, Eq)]
pub enum Input {
    /// A new connection: it is owed a READY, and no reply to what an earlier one asked.
    Connected,
    /// The host of a device left: nobody waits for the replies to what it asked.
    Left,
    /// A whole frame: type and payload.
    Frame(u32, Vec<u8>),
}

/// A frame on its way out.
struct Out {
    message: Message,
    bytes: Vec<u8>,
}

/// The channel and what waits in it.
pub struct Control {
    port: Port,
    connection: Option<OwnedFd>,
    decoder: ControlDecoder,
    /// After a violation: nothing is understood until the host connects again.
    deaf: bool,
    /// Edge-triggered readiness that has not been used up.
    readable: bool,
    /// The port takes no more until an event says that it does.
    blocked: bool,
    /// The decoder may have whole frames, which nobody had room for.
    whole: bool,
    /// The same of the listening socket: a stranger was refused, and others may wait behind it.
    callers: bool,
    /// The host of a device is away, and that has been said.
    away: bool,
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
        Control {
            port,
            connection: None,
            decoder: ControlDecoder::default(),
            deaf: false,
            readable: false,
            blocked: false,
            whole: false,
            callers: false,
            away: false,
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

    /// Whether [`Control::turn`] has something to do without a new event.
    pub fn wants_turn(&self) -> bool {
        self.callers || ((self.readable || self.whole) && self.waiting < OUT_MAX)
    }

    /// An event of the token came. What a host does that leaves is said; that one on a line begins anew is only guessed.
    pub fn ready(&mut self, events: EpollFlags) -> Option<Input> {
        let away = events.contains(EpollFlags::EPOLLHUP) && matches!(self.port, Port::Device(_));
        let left = away && !self.away;
        self.away = away;
        if away {
            self.host_left();
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
        left.then(|| {
            log::info!("the host has left the control port");
            self.forget_replies();
            Input::Left
        })
    }

    /// Writes what waits, takes at most `room` frames, of what was read before or else of one portion more, takes a new
    /// connection if there is none, and says what came. Call again while [`Control::wants_turn`].
    pub fn turn(&mut self, epoll: &Epoll, room: usize) -> Vec<Input> {
        let mut inputs = Vec::new();
        self.flush();
        if room > 0 && self.waiting < OUT_MAX {
            if self.whole {
                self.decode(&[], room, &mut inputs);
            } else if self.readable {
                self.read(room, &mut inputs);
            }
        }
        if self.connection.is_none() && self.accept(epoll) {
            inputs.push(Input::Connected);
        }
        inputs
    }

    /// Takes the next connection in the queue, if there is one: only one is served at a time.
    fn accept(&mut self, epoll: &Epoll) -> bool {
        let (Port::Listener(listener) | Port::Vsock(listener)) = &self.port else { return false };
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
                return false;
            }
        }
        self.start_over();
        true
    }

    /// Queues a frame; [`Control::flush`] writes it. READY goes before all else, also before what an earlier
    /// connection left.
    pub fn send(&mut self, message: Message, payload: &[u8]) {
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
            Some(Ok(0)) => self.host_left(),
            Some(Ok(count)) => {
                self.credit(count);
                self.decode(chunk.get(..count).unwrap_or_default(), room, inputs);
            }
            Some(Err(Errno::EINTR)) => {}
            Some(Err(Errno::EAGAIN)) => {
                self.readable = false;
                self.silence.goes_on(Instant::now());
            }
            Some(Err(errno)) => {
                log::warn!("{}", Fault::errno("reading", "the control port", errno));
                self.host_left();
            }
        }
        self.chunk = chunk;
    }

    /// Says how much was read, at once: runV waits for it before it writes on.
    fn credit(&mut self, count: usize) {
        if !self.deaf {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            self.send(Message::Next, &count.to_be_bytes());
            self.flush();
        }
    }

    fn decode(&mut self, bytes: &[u8], room: usize, inputs: &mut Vec<Input>) {
        self.whole = false;
        if self.deaf {
            return;
        }
        self.decoder.push(bytes);
        while inputs.len() < room {
            match self.decoder.next_frame() {
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

    /// The host hung up. What waits for it is kept; half a frame in either direction is not.
    fn host_left(&mut self) {
        self.connection = None;
        self.readable = false;
        self.whole = false;
        self.decoder.reset();
        self.deaf = false;
        self.sent = 0;
    }

    /// A new connection: credits and replies were owed to the old one, events and READY are anybody's.
    fn start_over(&mut self) {
        self.whole = false;
        self.decoder.reset();
        self.deaf = false;
        self.sent = 0;
        self.blocked = false;
        self.readable = true;
        self.out.retain(|out| out.message == Message::ProcessAsyncEvent);
        self.count_waiting();
    }

    /// The host of a device left: as [`Control::start_over`], but a READY that nobody has heard is still to be said.
    fn forget_replies(&mut self) {
        self.out.retain(|out| matches!(out.message, Message::ProcessAsyncEvent | Message::Ready));
        self.count_waiting();
    }

    fn count_waiting(&mut self) {
        self.waiting = self.out.iter().map(|out| out.bytes.len()).sum();
    }

    /// Writes what can be written: small frames together, for each write to a device is work for the host and wakes init again.
    pub fn flush(&mut self) {
        while let Some(first) = self.out.front().filter(|_| !self.blocked) {
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
                    self.host_left();
                    return;
                }
            }
        }
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
mod tests {
    use super::*;
    use nix::sys::epoll::EpollCreateFlags;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    /// One read may hold thousands of commands, and the guest has room for a few.
    #[test]
    fn no_more_commands_are_taken_than_there_is_room_for() {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (host, guest) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut control = Control::new(Port::Device(guest), 0);
        assert_eq!(control.open(&epoll).unwrap(), [Input::Connected]);
        let all: Vec<u8> = (0..1000_u32).flat_map(|id| frame::control(id, b"").unwrap()).collect();
        assert_eq!(write(&host, &all), Ok(all.len()));
        assert!(control.turn(&epoll, 0).is_empty() && control.wants_turn());
        let mut next = 0..1000_u32;
        while next.start < next.end {
            assert!(control.wants_turn());
            let inputs = control.turn(&epoll, 7);
            assert!((1..=7).contains(&inputs.len()));
            for input in inputs {
                assert_eq!(Some(input), next.next().map(|id| Input::Frame(id, Vec::new())));
            }
        }
        // All of it was one read, and has one credit.
        let mut said = [0; 64];
        let count = read(&host, &mut said).unwrap();
        let credit = u32::try_from(all.len()).unwrap().to_be_bytes();
        assert_eq!(said[..count], frame::control(Message::Next, &credit).unwrap());
        assert!(control.turn(&epoll, 7).is_empty() && !control.wants_turn());
    }

    /// Each message of this socket is one write.
    #[test]
    fn small_frames_leave_together_and_in_order() {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (host, guest) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let mut control = Control::new(Port::Device(guest), 0);
        let payloads = [10, 5000, 8, 7000, 9000, TOGETHER, 3, TOGETHER * 2, 1].map(|len| vec![b'x'; len]);
        let mut all = Vec::new();
        for payload in &payloads {
            all.extend(frame::control(Message::Ack, payload).unwrap());
            control.send(Message::Ack, payload);
        }
        control.flush();
        assert!(control.wrote_all() && control.waiting == 0);
        let (mut said, mut sizes) = (Vec::new(), Vec::new());
        let mut chunk = vec![0; 4 * TOGETHER];
        while let Ok(count) = read(&host, &mut chunk) {
            sizes.push(count);
            said.extend_from_slice(&chunk[..count]);
        }
        assert!(said == all);
        let header = 8;
        let expected = [12_018 + 4 * header, 9000 + header, TOGETHER + header, 3 + header];
        assert_eq!(sizes[..4], expected);
        assert_eq!(sizes.len(), 6);
    }

    #[test]
    fn a_write_may_end_anywhere() {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (_host, guest) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
        let lengths = [0, 5, 1];
        let all: usize = lengths.iter().map(|len| len + 8).sum();
        for first in 0..=all {
            let mut control = Control::new(Port::Device(guest.try_clone().unwrap()), 0);
            for len in lengths {
                control.send(Message::Ack, &vec![b'y'; len]);
            }
            let whole = control.together();
            control.wrote(first);
            assert_eq!(control.together(), whole[first..]);
            control.wrote(all - first);
            assert!(control.wrote_all() && control.waiting == 0 && control.sent == 0);
        }
    }

    /// runV waits for the NEXT of what it has written; a host that does not read them is not read either.
    #[test]
    fn credits_that_nobody_reads_have_an_end() {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (host, guest) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut control = Control::new(Port::Device(guest), 0);
        control.open(&epoll).unwrap();
        let ping = frame::control(Message::Ping, b"").unwrap();
        let mut taken = 0_usize;
        while write(&host, &ping).is_ok() {
            control.ready(EpollFlags::EPOLLIN);
            while control.wants_turn() && control.readable {
                taken += control.turn(&epoll, 256).len();
                control.send(Message::Ack, b"");
                control.flush();
            }
        }
        assert!(taken > OUT_MAX / 40 && control.waiting <= OUT_MAX + 64, "{taken}, {}", control.waiting);
    }
}
