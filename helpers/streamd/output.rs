//! The processes' streams: what streamd has of each, and how far its end has come.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use hyperinit::ids::StreamId;
use hyperinit::wire::streamd::Streams as Packet;

use super::input::Queue;

/// How long an exited process's survivors may still write. What the process itself wrote is in the pipe when it exits.
pub const SURVIVOR_GRACE: Duration = Duration::from_millis(100);

/// One source of output.
pub struct Source {
    /// The pipe's read end, or the tty's master; none once it has ended.
    pub fd: Option<OwnedFd>,
    /// The number of its frames.
    pub stream: StreamId,
    /// Whether it is a tty.
    pub tty: bool,
}

/// How far a process's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It runs.
    Running,
    /// It has exited: its output is read until empty, then survivors have until the deadline.
    Finishing { id: u64, deadline: Option<Duration> },
    /// Its end is on the way to the host: what survivors write is thrown away.
    Finished,
}

/// One process.
pub struct Process {
    /// stdout or tty, then stderr.
    pub sources: Vec<Source>,
    /// stdin, until it is closed. A tty's is its only source.
    pub stdin: Option<OwnedFd>,
    /// What waits for it.
    pub queue: Queue,
    /// How far its end has come.
    pub end: End,
}

impl Process {
    /// The process of a packet and its descriptors, in the packet's order; none if they do not fit it.
    pub fn new(packet: &Packet, fds: Vec<OwnedFd>) -> Option<Process> {
        if fds.len() != packet.fds() {
            return None;
        }
        let mut fds = fds.into_iter();
        let stdin = if packet.stdin { fds.next() } else { None };
        let mut sources = vec![Source { fd: fds.next(), stream: packet.stdio, tty: packet.terminal }];
        if let Some(stream) = packet.stderr {
            sources.push(Source { fd: fds.next(), stream, tty: false });
        }
        Some(Process { sources, stdin, queue: Queue::default(), end: End::Running })
    }

    /// Where its stdin goes.
    pub fn input(&self) -> Option<BorrowedFd<'_>> {
        let tty = self.sources.iter().find(|source| source.tty).and_then(|source| source.fd.as_ref());
        self.stdin.as_ref().or(tty).map(AsFd::as_fd)
    }

    /// Whether it has a tty.
    pub fn has_tty(&self) -> bool {
        self.sources.iter().any(|source| source.tty)
    }

    /// Whether nothing more can come.
    pub fn is_silent(&self) -> bool {
        self.sources.iter().all(|source| source.fd.is_none())
    }

    /// Throws away what waits for its stdin, and closes that.
    pub fn drop_input(&mut self) {
        self.stdin = None;
        self.queue = Queue::default();
    }
}

/// All processes, by stdio stream.
pub type Processes = BTreeMap<StreamId, Process>;

/// The deadline that comes first.
pub fn next_deadline(processes: &Processes) -> Option<Duration> {
    processes
        .values()
        .filter_map(|process| match process.end {
            End::Finishing { deadline, .. } => deadline,
            End::Running | End::Finished => None,
        })
        .min()
}
