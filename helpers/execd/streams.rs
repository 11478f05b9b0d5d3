//! The processes' output as execd keeps it: duplicates of what streamd reads, for a streamd that comes after
//! it.

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

use super::vault::{Entry, Vault};

/// How long streamd may leave its socket full: it does nothing that takes long.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Duplicates have numbers from here on. Below, where the descriptors of starts are, there is room for those
/// of some fifty: a process that is started takes over all numbers up to its own ones.
const KEPT_FROM: RawFd = 512;

/// The ends of one process that streamd works with.
pub struct Ends {
    /// What it is, as streamd is told.
    pub packet: Packet,
    /// The write end of its stdin, gone once streamd has it: a duplicate would hide its EOF.
    pub stdin: Option<OwnedFd>,
    /// The read end of its stdout, or the master of its tty.
    pub output: OwnedFd,
    /// The read end of its stderr.
    pub stderr: Option<OwnedFd>,
}

/// What is kept of a process.
struct Kept {
    /// The number of its entry in the vault, 0 if it has none.
    number: u64,
    ends: Ends,
}

/// All of them, and the way to streamd.
pub struct Streams {
    socket: OwnedFd,
    vault: Vault,
    kept: BTreeMap<StreamId, Kept>,
}

impl Ends {
    /// Outputs that are kept, with high numbers.
    fn out_of_the_way(mut self) -> Ends {
        self.output = out_of_the_way(self.output);
        self.stderr = self.stderr.map(out_of_the_way);
        self
    }

    /// The outputs, in a packet's order.
    fn outputs(&self) -> Vec<BorrowedFd<'_>> {
        [Some(&self.output), self.stderr.as_ref()].into_iter().flatten().map(AsFd::as_fd).collect()
    }
}

impl Streams {
    /// None yet.
    pub fn new(socket: OwnedFd, vault: Vault) -> Streams {
        Streams { socket, vault, kept: BTreeMap::new() }
    }

    /// Takes over what earlier execds have kept of the processes that run, and keeps its own: one that came
    /// by the debugging door may have been started after that list was made. The others have ended, or were
    /// never known to init, for whoever started them died: streamd need not wait for those.
    pub fn adopt(&mut self, running: &[StreamId]) -> Result<(), Fault> {
        let running: BTreeSet<StreamId> = running.iter().copied().collect();
        let (mut found, mut others) = (BTreeMap::new(), Vec::new());
        self.vault.sweep(|entry| {
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
            // Until streamd has been told of the others, all of them stay.
            true
        })?;
        found.append(&mut self.kept);
        self.kept = found;
        if let Err(fault) = others.into_iter().try_for_each(|stdio| self.tell(&forget(stdio), &[], stdio)) {
            // It keeps what nobody asks for, until the number is used again.
            log::warn!("{fault}");
        }
        self.sweep()
    }

    /// Hands a new process's ends to streamd, and keeps the duplicates: first of all in the vault, for
    /// streamd may die as soon as it has them.
    pub fn hand_over(&mut self, mut ends: Ends) -> Result<(), Fault> {
        if self.vault.is_full(self.kept.len()) {
            self.tidy();
        }
        let handed = ends.packet;
        ends.packet.stdin = false;
        ends.packet.again = true;
        let number = self.vault.put(&ends.packet, &ends.outputs()).unwrap_or_else(|fault| {
            // It runs, and this process and streamd have its output.
            log::warn!("{fault}");
            0
        });
        let stdin = ends.stdin.take();
        let fds: Vec<_> = stdin.iter().map(AsFd::as_fd).chain(ends.outputs()).collect();
        self.tell(&handed.encode(), &fds, handed.stdio)?;
        self.kept.insert(handed.stdio, Kept { number, ends: ends.out_of_the_way() });
        Ok(())
    }

    /// The processes of these are finished.
    pub fn release(&mut self, finished: &[StreamId]) {
        for stdio in finished {
            self.kept.remove(stdio);
        }
    }

    /// Throws out of the vault what is not kept any more, if there is such.
    pub fn tidy(&mut self) {
        if self.vault.has_more_than(self.kept.len())
            && let Err(fault) = self.sweep()
        {
            log::warn!("{fault}");
        }
    }

    fn sweep(&mut self) -> Result<(), Fault> {
        let kept = &self.kept;
        self.vault
            .sweep(|entry| kept.get(&entry.packet.stdio).is_some_and(|kept| kept.number == entry.number))
    }

    /// Hands everything that is kept to a new streamd.
    pub fn resend(&self) -> Result<(), Fault> {
        self.kept.iter().try_for_each(|(&stdio, Kept { ends, .. })| {
            self.tell(&ends.packet.encode(), &ends.outputs(), stdio)
        })
    }

    /// Sets the size of a tty.
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

/// The outputs of an entry; none if its descriptors are too few.
fn ends(entry: Entry) -> Option<Ends> {
    let mut fds = entry.fds.into_iter();
    Some(Ends { packet: entry.packet, stdin: None, output: fds.next()?, stderr: fds.next() })
}

/// The same descriptor with a high number, or if there is none left as it is.
fn out_of_the_way(fd: OwnedFd) -> OwnedFd {
    duplicate_above(&fd, KEPT_FROM).unwrap_or(fd)
}
