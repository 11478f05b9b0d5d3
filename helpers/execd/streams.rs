//! The processes' output as execd keeps it: duplicates of what streamd reads, for a streamd that comes after it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::StreamId;
use hyperinit::sys::fd::{receive_fds, send_fds};
use hyperinit::sys::spawn::duplicate_above;
use hyperinit::sys::tty;
use hyperinit::wire::streamd::{STREAMS_LEN, Streams as Packet};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long streamd may leave its socket full: it does nothing that takes long.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// init knows of 4096 processes at the most, and an earlier execd may have died before it took them.
const ADOPTED_MAX: usize = 4 * 4096;

/// Duplicates have numbers from here on. Below, where a start's descriptors are, there is room: the process that is started
/// takes over all numbers up to its own ones.
const KEPT_FROM: RawFd = 128;

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

impl Ends {
    /// The outputs of a packet; none if its descriptors do not fit it, or it speaks of a start.
    fn new(packet: Packet, fds: Vec<OwnedFd>) -> Option<Ends> {
        if fds.len() != packet.fds() || !packet.again {
            return None;
        }
        let mut fds = fds.into_iter();
        Some(Ends { packet, stdin: None, output: fds.next()?, stderr: fds.next() })
    }
}

/// All of them, and the way to streamd.
pub struct Streams {
    socket: OwnedFd,
    kept: BTreeMap<StreamId, Ends>,
}

impl Streams {
    /// None yet.
    pub fn new(socket: OwnedFd) -> Streams {
        Streams { socket, kept: BTreeMap::new() }
    }

    fn keep(&mut self, mut ends: Ends) {
        ends.output = out_of_the_way(ends.output);
        ends.stderr = ends.stderr.map(out_of_the_way);
        self.kept.insert(ends.packet.stdio, ends);
    }

    /// Takes what streamd has handed back to this execd's predecessors and to it.
    pub fn adopt(&mut self) {
        // streamd is not believed to stop: more than this it cannot honestly have sent.
        for _ in 0..ADOPTED_MAX {
            // One byte more than a packet has: a longer one is cut, and refused.
            let mut packet = [0; STREAMS_LEN + 1];
            let (count, fds) = match receive_fds(&self.socket, &mut packet) {
                Ok((0, _)) | Err(Errno::EAGAIN) => return,
                Ok(received) => received,
                Err(errno) => {
                    log::error!("{}", Fault::errno("hearing from", "streamd", errno));
                    return;
                }
            };
            match packet.get(..count).and_then(Packet::decode).and_then(|packet| Ends::new(packet, fds)) {
                Some(ends) => self.keep(ends),
                None => log::error!("{}", Fault::new("hearing from", "streamd", "a packet of no outputs")),
            }
        }
    }

    /// Hands a new process's ends to streamd, and keeps the duplicates.
    pub fn hand_over(&mut self, mut ends: Ends) -> Result<(), Fault> {
        self.send(&ends)?;
        ends.stdin = None;
        ends.packet.stdin = false;
        ends.packet.again = true;
        self.keep(ends);
        Ok(())
    }

    /// The processes of these are finished.
    pub fn release(&mut self, finished: &[StreamId]) {
        for stdio in finished {
            self.kept.remove(stdio);
        }
    }

    /// Hands everything that is kept to a new streamd.
    pub fn resend(&self) -> Result<(), Fault> {
        self.kept.values().try_for_each(|ends| self.send(ends))
    }

    /// Sets the size of a tty.
    pub fn resize(&self, stdio: StreamId, row: u16, column: u16) -> Result<(), Fault> {
        let fault = |why| Fault::new("resizing", format!("stream {stdio}"), why);
        let ends = self.kept.get(&stdio).ok_or_else(|| fault("no such stream"))?;
        if !ends.packet.terminal {
            return Err(fault("the process has no tty"));
        }
        tty::set_size(&ends.output, row, column).fault("resizing", format!("stream {stdio}"))
    }

    fn send(&self, ends: &Ends) -> Result<(), Fault> {
        let fds: Vec<BorrowedFd<'_>> = [ends.stdin.as_ref(), Some(&ends.output), ends.stderr.as_ref()]
            .into_iter()
            .flatten()
            .map(AsFd::as_fd)
            .collect();
        loop {
            match send_fds(&self.socket, &ends.packet.encode(), &fds) {
                Err(Errno::EAGAIN) => self.wait()?,
                sent => return sent.fault("handing to streamd", format!("stream {}", ends.packet.stdio)),
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

/// The same descriptor with a high number, or if there is none left as it is.
fn out_of_the_way(fd: OwnedFd) -> OwnedFd {
    duplicate_above(&fd, KEPT_FROM).unwrap_or(fd)
}
