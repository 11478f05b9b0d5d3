//! One process: its descriptors, the bytes that wait for its stdin, and the progress of its end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use hyperinit::ids::StreamId;
use hyperinit::wire::streamd::Streams as Packet;
use nix::fcntl::{FcntlArg, fcntl};

use super::input::{Flushed, Queue};

/// How long an exited process's survivors may still write, counted from when all that the process itself
/// wrote has been taken.
pub const SURVIVOR_GRACE: Duration = Duration::from_millis(100);
/// The most bytes that an exited process can have left in a pipe of unknown size: fs.pipe-max-size.
const PIPE_MAX: usize = 1 << 20;
/// More bytes than a pty holds between its two ends.
const TTY_MAX: usize = 64 << 10;

/// One source of output.
pub struct Source {
    /// The pipe's read end, or the tty's master; none once it has ended.
    pub fd: Option<OwnedFd>,
    /// The stream number of its frames.
    pub stream: StreamId,
    /// Whether it is a tty.
    pub tty: bool,
    /// How many of the bytes that can be taken now the process itself may have written before it exited.
    pub owed: usize,
    /// Whether the host has asked to hold this stream.
    pub held: bool,
}

/// The progress of a process's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The process runs.
    Running,
    /// The process has exited: its output is taken until its sources are empty, and then survivors may write
    /// until the deadline.
    Finishing {
        /// The request that is answered when the end has been sent.
        id: u64,
        /// When the grace period of survivors ends; set once everything owed has been taken.
        deadline: Option<Duration>,
        /// Whether the answer has to wait for the host's readers.
        pause: bool,
    },
    /// Its end is in the buffer: output of survivors is discarded.
    Finished,
}

/// One process.
pub struct Process {
    /// The sources of output: stdout or the tty, then stderr.
    pub sources: Vec<Source>,
    /// How many bytes of its output this streamd has taken.
    pub taken: usize,
    /// The progress of its end.
    pub end: End,
    /// Its tokens in the epoll set.
    pub tokens: Vec<u64>,
    /// The write end of stdin, until it is closed. A process with a tty has none: its stdin goes to the tty's
    /// master.
    stdin: Option<OwnedFd>,
    queue: Queue,
    /// The bytes that have arrived for its stdin; and how many of these were reported to the host as no
    /// longer waiting.
    received: u64,
    told: u64,
}

impl Process {
    /// The process of a packet and its descriptors, in the packet's order; none if the number of descriptors
    /// does not match the packet.
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

    /// A process without descriptors, of which only the end remains to be written.
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

    /// The descriptor of its stdin, if it is not the tty.
    pub fn stdin(&self) -> Option<BorrowedFd<'_>> {
        self.stdin.as_ref().map(AsFd::as_fd)
    }

    /// Whether all sources have ended, so that no more output can come.
    pub fn is_silent(&self) -> bool {
        self.sources.iter().all(|source| source.fd.is_none())
    }

    /// Whether the sources may still hold output of the process itself.
    pub fn owes(&self) -> bool {
        self.sources.iter().any(|source| source.fd.is_some() && source.owed > 0)
    }

    /// Begins the end of an exited process. The size of each pipe bounds the output of the process that has
    /// not been taken.
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

    /// The number of bytes that wait for its stdin.
    pub fn waiting(&self) -> usize {
        self.queue.waiting()
    }

    /// How many bytes for its stdin no longer wait, without this having been reported to the host.
    pub fn untold(&self) -> u32 {
        let gone = self.received.saturating_sub(self.queue.waiting() as u64);
        u32::try_from(gone.saturating_sub(self.told)).unwrap_or(u32::MAX)
    }

    /// Records that this many bytes were reported to the host.
    pub fn tell(&mut self, bytes: u32) {
        self.told += u64::from(bytes);
    }

    /// Whether a write failed for lack of memory, and has to be tried again after a pause.
    pub fn is_starved(&self) -> bool {
        self.queue.starved
    }

    /// Appends a frame's payload to its stdin. An empty payload closes stdin, but not a tty. Bytes may remain
    /// to be flushed.
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

    /// Writes the bytes that wait for its stdin, until it is full.
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

    /// Discards the bytes that wait for its stdin, and closes stdin.
    pub fn drop_input(&mut self) {
        self.stdin = None;
        self.queue = Queue::default();
    }
}
