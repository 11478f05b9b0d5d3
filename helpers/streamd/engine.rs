//! The loop: one epoll set, edge-triggered, and work lists of what is ready, so that nothing is watched twice and every
//! process gets its turn.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::frame::StreamDecoder;
use hyperinit::helper::{Replies, Requests};
use hyperinit::ids::StreamId;
use hyperinit::sys::fd::{inherited, receive_fds};
use hyperinit::wire::bootstrap::{
    FD_BUFFER_IN, FD_BUFFER_OUT, FD_PARK_IN, FD_PARK_OUT, FD_PIPE_IN, FD_PIPE_OUT, FD_PORT, FD_SOCKET,
};
use hyperinit::wire::streamd::{Reply, Request, STREAMS_LEN, Streams as Packet};
use hyperinit::wire::{Reply as Answer, Request as Question};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{pipe2, read};

use super::buffer::{Buffer, SLOT_INPUT, Taken};
use super::input::Flushed;
use super::output::{End, Process, Processes, SURVIVOR_GRACE, next_deadline};
use super::park::Park;
use super::port::Port;

/// Epoll tokens below this are ours; a process's sources have the stream number that their frames carry, shifted.
const BELL: u64 = 0;
const SOCKET: u64 = 1;
const PORT: u64 = 2;
const LISTENER: u64 = 3;
/// How much is read from the host at once, and thrown away from survivors.
const CHUNK: usize = 64 << 10;
/// Requests that wait for the loop; init has at most 16 under way.
const REQUESTS: usize = 32;

/// A source of output by process and place.
type SourceId = (StreamId, usize);

/// Everything streamd has.
pub struct Engine {
    epoll: Epoll,
    socket: Option<OwnedFd>,
    port: Port,
    buffer: Buffer,
    decoder: StreamDecoder,
    processes: Processes,
    /// What each epoll token stands for: tokens are never used again.
    tokens: std::collections::HashMap<u64, (StreamId, Watched)>,
    next_token: u64,
    /// Sources that may have something, in turn.
    ready: VecDeque<SourceId>,
    /// The same, to have each once.
    is_ready: BTreeSet<SourceId>,
    /// Who is to be told when the port has passed which place.
    waiting: VecDeque<(u64, u64)>,
    /// The port may have something, or take something.
    readable: bool,
    writable: bool,
    /// After a violation: nothing is understood until the host connects again.
    deaf: bool,
}

/// What a token watches.
#[derive(Clone, Copy)]
enum Watched {
    Source(usize),
    Stdin,
}

impl Engine {
    /// Takes what the warden left. By hand, 4 to 7 may be missing (they are then made) as may 3 (no process comes).
    pub fn open(listen: bool) -> Result<Engine, Fault> {
        let port = inherited(FD_PORT).fault(
            "taking",
            "descriptor 8, the stream port (by hand: 8<>/dev/ttyS2, or a socket with --listen)",
        )?;
        let socket = inherited(FD_SOCKET).ok();
        let buffer = match (
            inherited(FD_BUFFER_IN),
            inherited(FD_BUFFER_OUT),
            inherited(FD_PIPE_OUT),
            inherited(FD_PIPE_IN),
        ) {
            (Ok(input), Ok(output), Ok(pipe_out), Ok(pipe_in)) => {
                Buffer::open(input, output, pipe_out, pipe_in)?
            }
            _ => own_buffer()?,
        };
        let park = match (inherited(FD_PARK_IN), inherited(FD_PARK_OUT)) {
            (Ok(put), Ok(take)) => Some(Park::new(put, take)),
            _ => None,
        };
        let port = if listen {
            Port::Listener { listener: port, connection: park.as_ref().and_then(Park::find), park }
        } else {
            Port::Device(port)
        };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).fault("making", "an epoll set")?;
        let mut engine = Engine {
            epoll,
            socket,
            port,
            deaf: buffer.page().get(SLOT_INPUT) != 0,
            buffer,
            decoder: StreamDecoder::default(),
            processes: Processes::new(),
            tokens: std::collections::HashMap::new(),
            next_token: LISTENER + 1,
            ready: VecDeque::new(),
            is_ready: BTreeSet::new(),
            waiting: VecDeque::new(),
            readable: true,
            writable: true,
        };
        engine.watch_all()?;
        if engine.deaf {
            log::warn!(
                "a predecessor died in the middle of a frame: not listening until the host connects again"
            );
        }
        Ok(engine)
    }

    fn watch_all(&mut self) -> Result<(), Fault> {
        let watch =
            |fd: BorrowedFd<'_>, token| self.epoll.add(fd, edges(token)).fault("watching", "the stream port");
        if let Some(socket) = &self.socket {
            watch(socket.as_fd(), SOCKET)?;
        }
        if let Some(listener) = self.port.listener() {
            watch(listener, LISTENER)?;
        }
        if let Some(fd) = self.port.fd() {
            nonblocking(fd)?;
            watch(fd, PORT)?;
        }
        Ok(())
    }

    /// The loop: ends when there are no more requests, which is when init is gone.
    pub fn run(mut self, requests: Requests<Request>, replies: Replies<Reply>) -> Result<(), Fault> {
        let (bell, inbox, replies) = read_requests(requests, replies)?;
        self.epoll.add(&*bell, edges(BELL)).fault("watching", "requests")?;
        loop {
            let mut events = [EpollEvent::empty(); 64];
            let count = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(Fault::errno("waiting for", "events", errno)),
            };
            let mut asked = false;
            for event in events.iter().take(count) {
                match event.data() {
                    BELL => asked = true,
                    SOCKET => self.receive_processes()?,
                    PORT => self.port_event(event.events())?,
                    LISTENER => {}
                    token => self.process_event(token)?,
                }
            }
            if asked {
                let _ = bell.read();
                loop {
                    match inbox.try_recv() {
                        Ok(question) => self.request(question)?,
                        Err(std::sync::mpsc::TryRecvError::Empty) => break,
                        Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(()),
                    }
                }
            }
            self.accept()?;
            self.expire()?;
            self.pump(&replies)?;
        }
    }

    fn timeout(&self) -> EpollTimeout {
        match next_deadline(&self.processes) {
            None => EpollTimeout::NONE,
            Some(deadline) => {
                let left = deadline.saturating_sub(now()) + Duration::from_micros(999);
                EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
            }
        }
    }

    /// Moves bytes until nothing moves: from the host while its processes take them, from the processes while there is
    /// room, to the host while it takes them.
    fn pump(&mut self, replies: &Replies<Reply>) -> Result<(), Fault> {
        loop {
            let mut moved = self.read_host()?;
            moved |= self.take_turns()?;
            moved |= self.send()?;
            self.tell(replies)?;
            if !moved {
                return Ok(());
            }
        }
    }

    // ---- processes ----

    /// Takes every process that execd has handed over. Init asks for the end of none before it was.
    fn receive_processes(&mut self) -> Result<(), Fault> {
        while let Some(socket) = &self.socket {
            // One byte more than a packet has: a longer one is cut, and refused.
            let mut packet = [0; STREAMS_LEN + 1];
            match receive_fds(socket, &mut packet) {
                Ok((0, _)) => self.socket = None,
                Ok((count, fds)) => match packet.get(..count).and_then(Packet::decode) {
                    Some(packet) => self.add(&packet, fds)?,
                    None => log::error!("execd sent {count} bytes that are no streams"),
                },
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => log::error!("{}", Fault::errno("hearing from", "execd", errno)),
            }
        }
        Ok(())
    }

    fn add(&mut self, packet: &Packet, fds: Vec<OwnedFd>) -> Result<(), Fault> {
        let running = |process: &Process| process.end != End::Finished;
        if self.processes.get(&packet.stdio).is_some_and(running) {
            // Sent again to a streamd that has it: the descriptors are duplicates.
            return Ok(());
        }
        let Some(mut process) = Process::new(packet, fds) else {
            log::error!("execd sent stream {} without its descriptors", packet.stdio);
            return Ok(());
        };
        if !packet.again {
            self.buffer.forget_end(packet.stdio);
        } else if self.buffer.find_end(packet.stdio).is_some() {
            process.end = End::Finished;
        }
        self.drop_process(packet.stdio);
        for (place, source) in process.sources.iter().enumerate() {
            if let Some(fd) = &source.fd {
                nonblocking(fd.as_fd())?;
                self.watch(packet.stdio, Watched::Source(place), fd.as_fd())?;
            }
        }
        if let Some(stdin) = &process.stdin {
            nonblocking(stdin.as_fd())?;
            self.watch(packet.stdio, Watched::Stdin, stdin.as_fd())?;
        }
        let sources = process.sources.len();
        self.processes.insert(packet.stdio, process);
        (0..sources).for_each(|place| self.mark_ready((packet.stdio, place)));
        Ok(())
    }

    fn watch(&mut self, stdio: StreamId, watched: Watched, fd: BorrowedFd<'_>) -> Result<(), Fault> {
        let token = self.next_token;
        self.next_token += 1;
        self.epoll.add(fd, edges(token)).fault("watching", format!("stream {stdio}"))?;
        self.tokens.insert(token, (stdio, watched));
        Ok(())
    }

    fn drop_process(&mut self, stdio: StreamId) {
        if let Some(process) = self.processes.remove(&stdio) {
            process.sources.into_iter().filter_map(|source| source.fd).for_each(|fd| self.close(fd));
            self.tokens.retain(|_, (of, _)| *of != stdio);
        }
    }

    /// Closes a source. execd has a duplicate of it, so closing alone would leave it in the epoll set.
    fn close(&self, fd: OwnedFd) {
        if let Err(errno) = self.epoll.delete(&fd) {
            log::info!("{}", Fault::errno("leaving", "a stream", errno));
        }
    }

    fn mark_ready(&mut self, source: SourceId) {
        if self.is_ready.insert(source) {
            self.ready.push_back(source);
        }
    }

    fn process_event(&mut self, token: u64) -> Result<(), Fault> {
        match self.tokens.get(&token) {
            Some(&(stdio, Watched::Source(place))) => {
                self.mark_ready((stdio, place));
                // A tty is also where its stdin goes.
                self.flush_stdin(stdio);
            }
            Some(&(stdio, Watched::Stdin)) => self.flush_stdin(stdio),
            None => {}
        }
        Ok(())
    }

    // ---- output ----

    /// One chunk from each source that may have something, while there is room; true if anything was taken.
    fn take_turns(&mut self) -> Result<bool, Fault> {
        let mut moved = false;
        for _ in 0..self.ready.len() {
            if !self.buffer.has_room() {
                break;
            }
            let Some(id) = self.ready.pop_front() else { break };
            self.is_ready.remove(&id);
            match self.take(id)? {
                Taken::Bytes(_) => {
                    moved = true;
                    self.mark_ready(id);
                }
                Taken::Nothing => {}
                Taken::End => self.end_source(id),
            }
            moved |= self.advance_end(id.0)?;
        }
        Ok(moved)
    }

    fn take(&mut self, (stdio, place): SourceId) -> Result<Taken, Fault> {
        let Some(process) = self.processes.get(&stdio) else { return Ok(Taken::Nothing) };
        let Some((source, fd)) =
            process.sources.get(place).and_then(|source| Some((source, source.fd.as_ref()?)))
        else {
            return Ok(Taken::Nothing);
        };
        if process.end == End::Finished {
            return Ok(discard(fd));
        }
        match self.buffer.take(source.stream, fd.as_fd(), source.tty) {
            Err(fault) if fault.is(Errno::ENOSPC) || fault.is(Errno::ENOMEM) => Err(fault),
            Err(fault) => {
                // This source is broken; the others are not.
                log::error!("{fault}");
                Ok(Taken::End)
            }
            taken => taken,
        }
    }

    fn end_source(&mut self, (stdio, place): SourceId) {
        let Some(process) = self.processes.get_mut(&stdio) else { return };
        let ended = process.sources.get_mut(place).and_then(|source| source.fd.take());
        if let Some(fd) = ended {
            self.close(fd);
        }
        let Some(process) = self.processes.get(&stdio) else { return };
        if process.is_silent() && process.end == End::Finished {
            self.drop_process(stdio);
        }
    }

    /// Writes the end of an exited process once it has nothing more to say; true if that happened.
    fn advance_end(&mut self, stdio: StreamId) -> Result<bool, Fault> {
        let Some(process) = self.processes.get_mut(&stdio) else { return Ok(false) };
        let End::Finishing { id, deadline } = process.end else { return Ok(false) };
        let busy = (0..process.sources.len()).any(|place| self.is_ready.contains(&(stdio, place)));
        if !process.is_silent() {
            if busy {
                return Ok(false);
            }
            // Everything that it wrote has been taken; somebody else still can write.
            match deadline {
                None => {
                    process.end = End::Finishing { id, deadline: Some(now() + SURVIVOR_GRACE) };
                    return Ok(false);
                }
                Some(deadline) if now() < deadline => return Ok(false),
                Some(_) => {}
            }
        }
        self.write_end(stdio, id)?;
        Ok(true)
    }

    fn write_end(&mut self, stdio: StreamId, id: u64) -> Result<(), Fault> {
        let end = self.buffer.append_end(stdio)?;
        self.waiting.push_back((end, id));
        if let Some(process) = self.processes.get_mut(&stdio) {
            process.end = End::Finished;
            process.drop_input();
            if process.is_silent() {
                self.drop_process(stdio);
            }
        }
        Ok(())
    }

    /// Survivors' time is over.
    fn expire(&mut self) -> Result<(), Fault> {
        if next_deadline(&self.processes).is_none_or(|deadline| now() < deadline) {
            return Ok(());
        }
        let due: Vec<StreamId> = self.processes.keys().copied().collect();
        due.into_iter().try_for_each(|stdio| self.advance_end(stdio).map(drop))
    }

    // ---- requests ----

    fn request(&mut self, Question { id, body }: Question<Request>) -> Result<(), Fault> {
        match body {
            Request::Flush => self.waiting.push_back((self.buffer.end(), id)),
            Request::Finish { stdio } => {
                self.receive_processes()?;
                if let Some(end) = self.buffer.find_end(stdio) {
                    // A predecessor wrote it, and died before it could say so.
                    self.waiting.push_back((end, id));
                    return Ok(());
                }
                let Some(process) = self.processes.get_mut(&stdio) else {
                    let end = self.buffer.append_end(stdio)?;
                    self.waiting.push_back((end, id));
                    return Ok(());
                };
                process.end = End::Finishing { id, deadline: None };
                process.drop_input();
                let sources = process.sources.len();
                (0..sources).for_each(|place| self.mark_ready((stdio, place)));
                self.advance_end(stdio)?;
            }
        }
        Ok(())
    }

    /// Answers whoever waited for what has left.
    fn tell(&mut self, replies: &Replies<Reply>) -> Result<(), Fault> {
        let buffer = &self.buffer;
        let (told, waiting): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|&(end, _)| buffer.has_left(end));
        self.waiting = waiting;
        told.into_iter().try_for_each(|(_, id)| replies.send(Answer { id, result: Ok(Reply::Drained) }))
    }

    // ---- the host ----

    fn port_event(&mut self, events: EpollFlags) -> Result<(), Fault> {
        self.readable = true;
        self.writable = true;
        if events.contains(EpollFlags::EPOLLHUP) {
            self.host_left()?;
        }
        Ok(())
    }

    fn accept(&mut self) -> Result<(), Fault> {
        let Some(connection) = self.port.accept() else { return Ok(()) };
        self.epoll.add(connection, edges(PORT)).fault("watching", "the connection")?;
        self.start_over()
    }

    /// The host hung up: it gets whole frames when it is back, and half a frame from it is forgotten.
    fn host_left(&mut self) -> Result<(), Fault> {
        self.port.hang_up();
        self.start_over()
    }

    fn start_over(&mut self) -> Result<(), Fault> {
        self.buffer.rewind()?;
        self.decoder.reset();
        self.deaf = false;
        self.buffer.page().set(SLOT_INPUT, 0);
        Ok(())
    }

    /// Sends what waits; true if anything went.
    fn send(&mut self) -> Result<bool, Fault> {
        let Some(fd) = self.port.fd().filter(|_| self.writable && self.buffer.waits()) else {
            return Ok(false);
        };
        match self.buffer.send(fd) {
            Ok(all) => {
                self.writable = all;
                Ok(true)
            }
            Err(errno) => {
                log::info!("{}", Fault::errno("writing", "the stream port", errno));
                self.writable = false;
                self.host_left()?;
                Ok(false)
            }
        }
    }

    /// Reads one portion from the host, if all its processes have room; true if something came.
    fn read_host(&mut self) -> Result<bool, Fault> {
        let full = self.processes.values().any(|process| process.queue.is_full()) || !self.buffer.has_room();
        let Some(fd) = self.port.fd().filter(|_| self.readable && !full) else { return Ok(false) };
        let mut chunk = [0; CHUNK];
        // What a kill takes between here and the end is not known to a successor, but that something was is.
        self.buffer.page().set(SLOT_INPUT, 1);
        let count = match read(fd, &mut chunk) {
            Ok(0) => {
                self.readable = false;
                self.host_left()?;
                return Ok(false);
            }
            Ok(count) => count,
            Err(Errno::EINTR) => return Ok(true),
            Err(errno) => {
                self.readable = false;
                self.settle();
                if errno != Errno::EAGAIN {
                    log::info!("{}", Fault::errno("reading", "the stream port", errno));
                    self.host_left()?;
                }
                return Ok(false);
            }
        };
        self.dispatch(chunk.get(..count).unwrap_or_default())?;
        self.settle();
        Ok(true)
    }

    /// At a frame's end a successor can go on reading.
    fn settle(&self) {
        if self.decoder.pending() == 0 && !self.deaf {
            self.buffer.page().set(SLOT_INPUT, 0);
        }
    }

    fn dispatch(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        if self.deaf {
            return Ok(());
        }
        let mut decoder = std::mem::take(&mut self.decoder);
        decoder.push(bytes);
        let outcome = loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => self.stdin(frame.tag, frame.payload)?,
                Ok(None) => break Ok(()),
                Err(violation) => break Err(violation),
            }
        };
        self.decoder = decoder;
        if let Err(violation) = outcome {
            log::warn!("the host sent {violation}: not listening until it connects again");
            self.port.hang_up();
            self.deaf = true;
        }
        Ok(())
    }

    /// One frame from the host.
    fn stdin(&mut self, number: u64, payload: &[u8]) -> Result<(), Fault> {
        let Some(stdio) = StreamId::new(number) else { return Ok(()) };
        // Its process may have been handed over a moment ago.
        if !self.processes.contains_key(&stdio) {
            self.receive_processes()?;
        }
        let Some(process) = self.processes.get_mut(&stdio) else {
            // An unknown stream is answered by its end; one that has just ended has had it.
            return if self.buffer.find_end(stdio).is_some() {
                Ok(())
            } else {
                self.buffer.append_empty(stdio)
            };
        };
        if process.end != End::Running {
            return Ok(());
        }
        let tty = process.has_tty();
        let mut queue = std::mem::take(&mut process.queue);
        let flushed = match (process.input(), payload) {
            (None, _) => Flushed::Broken,
            (Some(_), []) if tty => Flushed::All,
            (Some(fd), []) => queue.close(fd),
            (Some(fd), bytes) => queue.push(bytes, fd),
        };
        process.queue = queue;
        settle_stdin(process, flushed);
        Ok(())
    }

    fn flush_stdin(&mut self, stdio: StreamId) {
        let Some(process) = self.processes.get_mut(&stdio) else { return };
        let mut queue = std::mem::take(&mut process.queue);
        let flushed = process.input().map_or(Flushed::Broken, |fd| queue.flush(fd));
        process.queue = queue;
        settle_stdin(process, flushed);
    }
}

fn settle_stdin(process: &mut Process, flushed: Flushed) {
    match flushed {
        Flushed::All | Flushed::Blocked => {}
        Flushed::Done | Flushed::Broken => process.drop_input(),
    }
}

/// Reads and throws away: a survivor must not get SIGPIPE.
fn discard(fd: &OwnedFd) -> Taken {
    let mut chunk = [0; CHUNK];
    match read(fd, &mut chunk) {
        Ok(0) => Taken::End,
        Ok(count) => Taken::Bytes(count),
        Err(Errno::EAGAIN) => Taken::Nothing,
        Err(Errno::EINTR) => Taken::Bytes(0),
        Err(_) => Taken::End,
    }
}

fn edges(token: u64) -> EpollEvent {
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    EpollEvent::new(flags, token)
}

fn nonblocking(fd: BorrowedFd<'_>) -> Result<(), Fault> {
    let flags = fcntl(fd, FcntlArg::F_GETFL).fault("setting up", "a descriptor")?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
    fcntl(fd, FcntlArg::F_SETFL(flags)).map(drop).fault("setting up", "a descriptor")
}

fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

/// A buffer of one's own, for a streamd that is run by hand.
fn own_buffer() -> Result<Buffer, Fault> {
    let input = memfd_create(c"streamd", MFdFlags::MFD_CLOEXEC).fault("making", "the output buffer")?;
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&input));
    let output = open(again.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening again", "the output buffer")?;
    let (pipe_out, pipe_in) = pipe2(OFlag::O_CLOEXEC).fault("making", "a pipe")?;
    Buffer::open(input, output, pipe_out, pipe_in)
}

/// The thread that reads requests, for ipc-channel cannot join an epoll set: a bell, and what it rang for. Replies are
/// the loop's own; only a line by hand that is no request is answered by the thread.
#[allow(clippy::type_complexity)]
fn read_requests(
    mut requests: Requests<Request>,
    replies: Replies<Reply>,
) -> Result<(Arc<EventFd>, Receiver<Question<Request>>, Replies<Reply>), Fault> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let bell = Arc::new(EventFd::from_flags(flags).fault("opening", "an eventfd")?);
    let (sender, inbox) = sync_channel(REQUESTS);
    let (ring, answers) = (Arc::clone(&bell), replies.clone());
    let body = move || {
        while let Some(request) = requests.next(&answers) {
            if sender.send(request).is_err() {
                return;
            }
            let _ = ring.write(1);
        }
        drop(sender);
        let _ = ring.write(1);
    };
    std::thread::Builder::new()
        .stack_size(CHUNK * 4)
        .spawn(body)
        .fault("starting", "the reader of requests")?;
    Ok((bell, inbox, replies))
}
