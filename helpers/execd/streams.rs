//! The processes' outputs as execd keeps them: duplicates of the descriptors that streamd reads, for a
//! successor of streamd.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::StreamId;
use hyperinit::sys::fd::send_fds;
use hyperinit::sys::spawn::duplicate_above;
use hyperinit::sys::tty;
use hyperinit::wire::streamd::{Streams as Packet, forget};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::output_store::{Entry, OutputStore};

/// How long streamd may leave its socket full. streamd does nothing that takes long.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// The lowest number of a duplicate. The numbers below are for the descriptors of starts, with room for about
/// fifty starts: a started process copies all descriptors up to the highest that it needs.
const KEPT_FROM: RawFd = 512;

/// The ends of one process's streams that streamd works with.
pub struct Ends {
    /// The packet about the process for streamd.
    pub packet: Packet,
    /// The write end of its stdin. It is closed once streamd has it: a duplicate would keep the process from
    /// seeing EOF.
    pub stdin: Option<OwnedFd>,
    /// The read end of its stdout, or the master of its tty.
    pub output: OwnedFd,
    /// The read end of its stderr.
    pub stderr: Option<OwnedFd>,
}

/// What execd keeps of a process.
struct Kept {
    /// The number of its entry in the output store; 0 if it has none.
    number: u64,
    ends: Ends,
}

/// The kept outputs of all processes, and the socket to streamd.
pub struct Streams {
    socket: OwnedFd,
    store: OutputStore,
    kept: BTreeMap<StreamId, Kept>,
}

impl Ends {
    /// Moves the outputs to high descriptor numbers, for keeping.
    fn out_of_the_way(mut self) -> Ends {
        self.output = out_of_the_way(self.output);
        self.stderr = self.stderr.map(out_of_the_way);
        self
    }

    /// The outputs, in the order of a packet.
    fn outputs(&self) -> Vec<BorrowedFd<'_>> {
        [Some(&self.output), self.stderr.as_ref()].into_iter().flatten().map(AsFd::as_fd).collect()
    }
}

impl Streams {
    /// Starts without kept outputs.
    pub fn new(socket: OwnedFd, store: OutputStore) -> Streams {
        Streams { socket, store, kept: BTreeMap::new() }
    }

    /// Takes over the outputs that earlier execds have kept of the running processes. This execd's own
    /// entries stay, because a process of the debugging door may have started after the list `running` was
    /// made. Other entries belong to processes that have ended, or of which init never knew because the execd
    /// that started them died: streamd is told to forget those.
    pub fn adopt(&mut self, running: &[StreamId]) -> Result<(), Fault> {
        let running: BTreeSet<StreamId> = running.iter().copied().collect();
        let (mut found, mut others) = (BTreeMap::new(), Vec::new());
        self.store.sweep(|entry| {
            let stdio = entry.packet.stdio;
            if running.contains(&stdio) {
                let number = entry.number;
                let known = found.get(&stdio).map_or(0, |kept: &Kept| kept.number);
                if let Some(ends) = ends(entry).filter(|_| number > known) {
                    found.insert(stdio, Kept { number, ends: ends.out_of_the_way() });
                }
            } else if !self.kept.contains_key(&stdio) {
                others.push(stdio);
            }
            // All entries stay until streamd has been told of the others.
            true
        })?;
        found.append(&mut self.kept);
        self.kept = found;
        if let Err(fault) = others.into_iter().try_for_each(|stdio| self.tell(&forget(stdio), &[], stdio)) {
            // streamd keeps unused descriptors until the stream's number is used again.
            log::warn!("{fault}");
        }
        self.sweep()
    }

    /// Hands a new process's ends to streamd and keeps duplicates. The output store gets its duplicates
    /// first, because streamd may die as soon as it has the ends.
    pub fn hand_over(&mut self, mut ends: Ends) -> Result<(), Fault> {
        if self.store.is_full(self.kept.len()) {
            self.tidy();
        }
        let handed = ends.packet;
        ends.packet.stdin = false;
        ends.packet.again = true;
        let number = self.store.put(&ends.packet, &ends.outputs()).unwrap_or_else(|fault| {
            // The start continues without the output store: this execd and streamd still hold the output.
            log::warn!("{fault}");
            0
        });
        let stdin = ends.stdin.take();
        let fds: Vec<_> = stdin.iter().map(AsFd::as_fd).chain(ends.outputs()).collect();
        self.tell(&handed.encode(), &fds, handed.stdio)?;
        self.kept.insert(handed.stdio, Kept { number, ends: ends.out_of_the_way() });
        Ok(())
    }

    /// Drops the kept outputs of finished processes.
    pub fn release(&mut self, finished: &[StreamId]) {
        for stdio in finished {
            self.kept.remove(stdio);
        }
    }

    /// Removes entries from the output store that are no longer kept, if there are any.
    pub fn tidy(&mut self) {
        if self.store.has_more_than(self.kept.len())
            && let Err(fault) = self.sweep()
        {
            log::warn!("{fault}");
        }
    }

    fn sweep(&mut self) -> Result<(), Fault> {
        let kept = &self.kept;
        self.store
            .sweep(|entry| kept.get(&entry.packet.stdio).is_some_and(|kept| kept.number == entry.number))
    }

    /// Hands all kept outputs to a new streamd.
    pub fn resend(&self) -> Result<(), Fault> {
        self.kept.iter().try_for_each(|(&stdio, Kept { ends, .. })| {
            self.tell(&ends.packet.encode(), &ends.outputs(), stdio)
        })
    }

    /// Sets the size of a process's tty. Fails if the stream is unknown or has no tty.
    pub fn resize(&self, stdio: StreamId, row: u16, column: u16) -> Result<(), Fault> {
        let fault = |why| Fault::new("resizing", format!("stream {stdio}"), why);
        let Kept { ends, .. } = self.kept.get(&stdio).ok_or_else(|| fault("no such stream"))?;
        if !ends.packet.terminal {
            return Err(fault("the process has no tty"));
        }
        tty::set_size(&ends.output, row, column).fault("resizing", format!("stream {stdio}"))
    }

    /// Sends streamd a packet about a process.
    fn tell(&self, packet: &[u8], fds: &[BorrowedFd<'_>], stdio: StreamId) -> Result<(), Fault> {
        loop {
            match send_fds(&self.socket, packet, fds) {
                Err(Errno::EAGAIN) => self.wait()?,
                sent => return sent.fault("handing to streamd", format!("stream {stdio}")),
            }
        }
    }

    fn wait(&self) -> Result<(), Fault> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        let timeout = PollTimeout::try_from(SEND_TIMEOUT).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) => Err(Fault::new("handing to streamd", "a stream", "it takes none")),
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(Fault::errno("waiting for", "streamd", errno)),
        }
    }
}

/// The outputs of an entry; none if it has too few descriptors.
fn ends(entry: Entry) -> Option<Ends> {
    let mut fds = entry.fds.into_iter();
    Some(Ends { packet: entry.packet, stdin: None, output: fds.next()?, stderr: fds.next() })
}

/// Moves a descriptor to a high number; if none is free, returns it unchanged.
fn out_of_the_way(fd: OwnedFd) -> OwnedFd {
    duplicate_above(&fd, KEPT_FROM).unwrap_or(fd)
}
