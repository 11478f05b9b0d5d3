//! streamd's loop: one edge-triggered epoll set, and lists of ready sources, so that nothing is watched twice
//! and every process gets its turn.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::rc::Rc;
use std::time::Duration;

use hyperinit::clock::now;
use hyperinit::fault::{Fault, OrFault};
use hyperinit::helper::{Asked, Replies, Requests};
use hyperinit::port::edges;
use hyperinit::sys::fd::inherited;
use hyperinit::wire::Envelope;
use hyperinit::wire::bootstrap::{
    FD_BUFFER_IN, FD_BUFFER_OUT, FD_CONNECTION_IN, FD_CONNECTION_OUT, FD_PIPE_IN, FD_PIPE_OUT, FD_PORT,
    FD_SOCKET,
};
use hyperinit::wire::streamd::{Reply, Request};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{isatty, pipe2};

use super::buffer::Buffer;
use super::port::Port;
use super::processes::Processes;
use super::store::ConnectionStore;
use super::stream_channel::StreamChannel;

/// The epoll token of init's requests.
const REQUESTS: u64 = 0;
/// The epoll token of the socket from execd.
const SOCKET: u64 = 1;
/// The epoll token of the stream port, or of the connection.
pub const PORT: u64 = 2;
/// The epoll token of the listening socket.
pub const LISTENER: u64 = 3;
/// The first epoll token of processes' descriptors.
pub const FIRST_TOKEN: u64 = 4;

/// The state of streamd.
pub struct Engine {
    epoll: Rc<Epoll>,
    buffer: Buffer,
    channel: StreamChannel,
    processes: Processes,
}

impl Engine {
    /// Takes the descriptors inherited from the warden. In a start by hand, descriptors 4 to 7 may be
    /// missing, and are then made; without descriptor 3 no process arrives. Fails if the stream port
    /// (descriptor 8) is missing.
    pub fn open(listen: bool) -> Result<Engine, Fault> {
        let port = inherited(FD_PORT).fault(
            "taking",
            "descriptor 8, the stream port (by hand: 8<>/dev/ttyS2, or a socket with --listen)",
        )?;
        let kind = fstat(&port).fault("looking at", "the stream port")?.st_mode & SFlag::S_IFMT.bits();
        let copies = kind != SFlag::S_IFSOCK.bits();
        let socket = inherited(FD_SOCKET).ok();
        let buffer = match (
            inherited(FD_BUFFER_IN),
            inherited(FD_BUFFER_OUT),
            inherited(FD_PIPE_OUT),
            inherited(FD_PIPE_IN),
        ) {
            (Ok(input), Ok(output), Ok(pipe_out), Ok(pipe_in)) => {
                Buffer::open(input, output, pipe_out, pipe_in, copies)
            }
            _ => own_buffer(copies),
        };
        let mut buffer = buffer?;
        let store = match (inherited(FD_CONNECTION_IN), inherited(FD_CONNECTION_OUT)) {
            (Ok(put), Ok(take)) => Some(ConnectionStore::new(put, take)),
            _ => None,
        };
        let port = if listen {
            Port::Listener {
                listener: port,
                connection: store.as_ref().and_then(ConnectionStore::find),
                store,
            }
        } else if isatty(&port).unwrap_or(false) {
            Port::Line(port)
        } else {
            Port::Device(port)
        };
        let epoll = Rc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).fault("making", "an epoll set")?);
        let channel = StreamChannel::open(Rc::clone(&epoll), port, &mut buffer)?;
        let processes = Processes::new(Rc::clone(&epoll), socket);
        if let Some(socket) = processes.socket() {
            epoll.add(socket, edges(SOCKET)).fault("watching", "the socket from execd")?;
        }
        Ok(Engine { epoll, buffer, channel, processes })
    }

    /// Runs until the channel of requests ends, because init is gone, and all requests have been answered.
    pub fn run(mut self, mut requests: Requests<Request>, replies: Replies<Reply>) -> Result<(), Fault> {
        let unwatched = self.watch(&requests)?;
        // execd may already have handed processes over.
        self.processes.receive(&mut self.buffer);
        let (mut moved, mut over) = (true, false);
        loop {
            let timeout = if moved || (unwatched && !over) { EpollTimeout::ZERO } else { self.timeout() };
            let asked = self.wait(timeout)?;
            if (asked || unwatched) && !over {
                over = self.requests(&mut requests, &replies)?;
            }
            self.channel.tick(&mut self.processes, &self.buffer);
            self.processes.tick(&mut self.buffer);
            // One round of work, then events again: so neither a process nor a host that never pauses keeps
            // init waiting.
            moved = self.channel.accept(&mut self.buffer)?;
            moved |= self.processes.receive_more(&mut self.buffer);
            moved |= self.channel.read(&mut self.processes, &mut self.buffer)?;
            moved |= self.processes.take_turns(&mut self.buffer);
            moved |= self.processes.tell(&mut self.buffer)?;
            moved |= self.channel.send(&mut self.buffer)?;
            moved |= self.channel.part(&mut self.processes, &mut self.buffer)?;
            self.tell(&replies)?;
            if over && !self.processes.owes_an_answer() {
                return Ok(());
            }
        }
    }

    /// Adds the requests to the epoll set; returns true if they cannot be watched and are always ready (a
    /// file, in a start by hand).
    fn watch(&self, requests: &Requests<Request>) -> Result<bool, Fault> {
        match self.epoll.add(requests.watched(), edges(REQUESTS)) {
            Err(Errno::EPERM) => Ok(true),
            added => added.map(|()| false).fault("watching", "requests"),
        }
    }

    /// Waits for events and dispatches them; returns true if there are requests.
    fn wait(&mut self, timeout: EpollTimeout) -> Result<bool, Fault> {
        let mut events = [EpollEvent::empty(); 64];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(Fault::errno("waiting for", "events", errno)),
        };
        let mut asked = false;
        for event in events.iter().take(count) {
            match event.data() {
                REQUESTS => asked = true,
                SOCKET => self.processes.receive(&mut self.buffer),
                PORT => self.channel.event(event.events()),
                LISTENER => self.channel.called(),
                token => self.processes.event(token),
            }
        }
        Ok(asked)
    }

    fn timeout(&self) -> EpollTimeout {
        let deadlines =
            [self.processes.deadline(), self.processes.waiting.deadline(), self.channel.deadline()];
        match deadlines.into_iter().flatten().min() {
            None => EpollTimeout::NONE,
            Some(deadline) => {
                let left = deadline.saturating_sub(now()) + Duration::from_micros(999);
                EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
            }
        }
    }

    /// Takes init's requests; returns true if init will send no more.
    fn requests(
        &mut self,
        requests: &mut Requests<Request>,
        replies: &Replies<Reply>,
    ) -> Result<bool, Fault> {
        loop {
            let Envelope { id, body } = match requests.take(replies)? {
                Asked::Request(envelope) => envelope,
                Asked::Nothing => return Ok(false),
                Asked::Over => return Ok(true),
            };
            match body {
                Request::Flush => self.processes.waiting.add(id, self.buffer.end(), Duration::ZERO),
                Request::Finish { stdio, pause } => {
                    self.processes.finish(stdio, id, pause, &mut self.buffer);
                }
                Request::Ping => replies.send(id, Ok(Reply::Alive))?,
            }
        }
    }

    /// Answers the requests whose bytes have been sent and whose pause is over.
    fn tell(&mut self, replies: &Replies<Reply>) -> Result<(), Fault> {
        let due = self.processes.waiting.due(now(), |end| self.buffer.has_left(end));
        due.into_iter().try_for_each(|id| replies.send(id, Ok(Reply::Drained)))
    }
}

/// Sets O_NONBLOCK. Errors are those of fcntl(2).
pub fn nonblocking(fd: BorrowedFd<'_>) -> Result<(), Fault> {
    let flags = fcntl(fd, FcntlArg::F_GETFL).fault("setting up", "a descriptor")?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd, FcntlArg::F_SETFL(flags)).map(drop).fault("setting up", "a descriptor")
}

/// Makes a new buffer, for a streamd that is run by hand.
pub(super) fn own_buffer(copied: bool) -> Result<Buffer, Fault> {
    let input = memfd_create(c"streamd", MFdFlags::MFD_CLOEXEC).fault("making", "the output buffer")?;
    let again = format!("/proc/self/fd/{}", input.as_raw_fd());
    let output = open(again.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening again", "the output buffer")?;
    let (pipe_out, pipe_in) = pipe2(OFlag::O_CLOEXEC).fault("making", "a pipe")?;
    Buffer::open(input, output, pipe_out, pipe_in, copied)
}
