//! One process: its descriptors, what waits for its stdin, and how far its end has come.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use hyperinit::ids::StreamId;
use hyperinit::wire::streamd::Streams as Packet;
use nix::fcntl::{FcntlArg, fcntl};

use super::input::{Flushed, Queue};

/// How long an exited process's survivors may still write, from when all that it wrote itself has been taken.
pub const SURVIVOR_GRACE: Duration = Duration::from_millis(100);
/// The most that an exited process can have left in a pipe whose size is not known, in bytes:
/// fs.pipe-max-size.
const PIPE_MAX: usize = 1 << 20;
/// As much as a pty holds between its two ends, and more.
const TTY_MAX: usize = 64 << 10;

/// One source of output.
pub struct Source {
    /// The pipe's read end, or the tty's master; none once it has ended.
    pub fd: Option<OwnedFd>,
    /// The number of its frames.
    pub stream: StreamId,
    /// Whether it is a tty.
    pub tty: bool,
    /// How much of what can be taken now may have been written before the process exited, in bytes.
    pub owed: usize,
    /// The host wants nothing of it for now.
    pub held: bool,
}

/// How far a process's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It runs.
    Running,
    /// It has exited: its output is read until empty, then survivors have until the deadline.
    Finishing {
        /// The request that is answered when the end has left.
        id: u64,
        /// Once everything owed has been taken.
        deadline: Option<Duration>,
        /// Whether the answer has to wait for the host's readers.
        pause: bool,
    },
    /// Its end is on the way to the host: what survivors write is thrown away.
    Finished,
}

/// One process.
pub struct Process {
    /// stdout or tty, then stderr.
    pub sources: Vec<Source>,
    /// How much of its output this streamd has taken, in bytes.
    pub taken: usize,
    /// How far its end has come.
    pub end: End,
    /// Its tokens in the epoll set.
    pub tokens: Vec<u64>,
    /// stdin, until it is closed. A tty's is its only source.
    stdin: Option<OwnedFd>,
    queue: Queue,
    /// How much has come for its stdin, and for how much of that the host was told that it waits no more, in
    /// bytes.
    received: u64,
    told: u64,
}

impl Process {
    /// The process of a packet and its descriptors, in the packet's order; none if they do not fit it.
    pub fn new(packet: &Packet, fds: Vec<OwnedFd>) -> Option<Process> {
        if fds.len() != packet.fds() {
            return None;
        }
        let mut fds = fds.into_iter();
        let stdin = if packet.stdin { fds.next() } else { None };
        let mut sources =
            vec![Source { fd: fds.next(), stream: packet.stdio, tty: packet.terminal, owed: 0, held: false }];
        if let Some(stream) = packet.stderr {
            sources.push(Source { fd: fds.next(), stream, tty: false, owed: 0, held: false });
        }
        Some(Process { sources, stdin, ..Process::unknown() })
    }

    /// A process of which nothing is left but that it is to end.
    pub fn unknown() -> Process {
        Process {
            sources: Vec::new(),
            taken: 0,
            stdin: None,
            queue: Queue::default(),
            end: End::Running,
            tokens: Vec::new(),
            received: 0,
            told: 0,
        }
    }

    /// The separate descriptor of its stdin.
    pub fn stdin(&self) -> Option<BorrowedFd<'_>> {
        self.stdin.as_ref().map(AsFd::as_fd)
    }

    /// Whether nothing more can come.
    pub fn is_silent(&self) -> bool {
        self.sources.iter().all(|source| source.fd.is_none())
    }

    /// Whether something of its own may still come.
    pub fn owes(&self) -> bool {
        self.sources.iter().any(|source| source.fd.is_some() && source.owed > 0)
    }

    /// The process has exited. Its pipes hold at most what it wrote itself and has not been taken.
    pub fn finish(&mut self, id: u64, pause: bool) {
        self.end = End::Finishing { id, deadline: None, pause };
        self.drop_input();
        for source in &mut self.sources {
            let size = source.fd.as_ref().map(|fd| fcntl(fd, FcntlArg::F_GETPIPE_SZ));
            source.owed = match size {
                _ if source.tty => TTY_MAX,
                Some(Ok(size)) => usize::try_from(size).unwrap_or(PIPE_MAX),
                Some(Err(_)) | None => PIPE_MAX,
            };
        }
    }

    /// The tty, if it has one.
    fn tty(&self) -> Option<&OwnedFd> {
        self.sources.iter().find(|source| source.tty).and_then(|source| source.fd.as_ref())
    }

    /// What waits for its stdin, in bytes.
    pub fn waiting(&self) -> usize {
        self.queue.waiting()
    }

    /// How many bytes for its stdin wait no more, without the host having been told.
    pub fn untold(&self) -> u32 {
        let gone = self.received.saturating_sub(self.queue.waiting() as u64);
        u32::try_from(gone.saturating_sub(self.told)).unwrap_or(u32::MAX)
    }

    /// The host was told of this many bytes.
    pub fn tell(&mut self, bytes: u32) {
        self.told += u64::from(bytes);
    }

    /// Whether writing has to be tried again after a pause, for want of memory.
    pub fn is_starved(&self) -> bool {
        self.queue.starved
    }

    /// Appends a frame's payload to its stdin. An empty one closes that, but not a tty. It may still have to
    /// be flushed.
    pub fn push(&mut self, payload: &[u8]) {
        if self.end != End::Running {
            return;
        }
        self.received += payload.len() as u64;
        let mut queue = std::mem::take(&mut self.queue);
        let flushed = match (self.stdin.as_ref().or(self.tty()), payload) {
            (None, _) => Flushed::Broken,
            (Some(_), []) if self.stdin.is_none() => Flushed::All,
            (Some(_), []) => queue.close(),
            (Some(fd), bytes) => queue.push(bytes, fd.as_fd()),
        };
        self.queue = queue;
        self.settle(flushed);
    }

    /// Writes what waits for its stdin, as far as it goes.
    pub fn flush(&mut self) {
        let mut queue = std::mem::take(&mut self.queue);
        let flushed = match self.stdin.as_ref().or(self.tty()) {
            Some(fd) => queue.flush(fd.as_fd()),
            None => Flushed::Broken,
        };
        self.queue = queue;
        self.settle(flushed);
    }

    fn settle(&mut self, flushed: Flushed) {
        match flushed {
            Flushed::All | Flushed::Blocked => {}
            Flushed::Done | Flushed::Broken => self.drop_input(),
        }
    }

    /// Throws away what waits for its stdin, and closes stdin.
    pub fn drop_input(&mut self) {
        self.stdin = None;
        self.queue = Queue::default();
    }
}
