//! Reports from a process that execd starts: ready, or a fault. The process executes its program when init
//! releases it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::Pid;
use hyperinit::paths;
use hyperinit::sys::fd::{receive_fds, send_fds};
use hyperinit::sys::process;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::passwd_cache::Files;

/// How long a process may take until it is ready. It reads files of the container, possibly from a share that
/// the host serves slowly. init's own limit is twice as long.
const READY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long init may take to release a process. If init does not, execd died before it told init of the
/// process.
pub const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest report in bytes. A longer fault is shortened.
const REPORT_MAX: usize = 4096;
const READY: u8 = b'R';
const TTY: u8 = b'T';
const NAMESPACE: u8 = b'N';
const FAULT: u8 = b'F';

/// Makes a new socket pair: execd's end, then the process's end.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Fault> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .fault("making", "a socket pair")
}

/// The report of a process that is ready.
#[derive(Debug, Default)]
pub struct Ready {
    /// The master of its tty.
    pub tty: Option<OwnedFd>,
    /// The namespaces of the pod init, in the order of `paths::POD_NAMESPACES`.
    pub namespaces: Vec<OwnedFd>,
    /// The container's passwd and group files, as far as the process had to read them.
    pub read: Files,
}

/// A process that has been cloned and is not ready yet.
pub struct Start {
    pid: Pid,
    pidfd: OwnedFd,
    /// execd's end of the pair, then the process's end. The latter stays open until the process is ready,
    /// because it may still share execd's descriptors.
    ours: OwnedFd,
    _theirs: OwnedFd,
    tty: Option<OwnedFd>,
    namespaces: Vec<OwnedFd>,
    until: Instant,
}

impl Start {
    /// Begins to track a process that has just been cloned.
    pub fn new(pid: Pid, pidfd: OwnedFd, (ours, theirs): (OwnedFd, OwnedFd)) -> Start {
        let until = Instant::now() + READY_TIMEOUT;
        Start { pid, pidfd, ours, _theirs: theirs, tty: None, namespaces: Vec::new(), until }
    }

    /// The process's number.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The descriptors to poll: the report socket, readable when the process has said something, and its
    /// pidfd, readable when it is dead.
    pub fn watched(&self) -> [BorrowedFd<'_>; 2] {
        [self.ours.as_fd(), self.pidfd.as_fd()]
    }

    /// The time at which the start is too late.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// The outcome of the start; none while the process is not ready. `dead`: its pidfd was readable before
    /// this call. A process that failed or is late is killed, so that it does not go on. This call does not
    /// wait for its death: a process that hangs in the kernel dies later.
    pub fn look(&mut self, dead: bool) -> Option<Result<Ready, Fault>> {
        let outcome = self.hear(dead).or_else(|| {
            let late = Instant::now() >= self.until;
            late.then(|| Err(Fault::errno("waiting for", self.name(), Errno::ETIMEDOUT)))
        })?;
        if outcome.is_err() {
            self.kill();
        }
        Some(outcome)
    }

    /// Kills the process, which may be dead already.
    pub fn kill(&self) {
        let _ = process::kill(&self.pidfd);
    }

    fn hear(&mut self, dead: bool) -> Option<Result<Ready, Fault>> {
        loop {
            let mut packet = [0; REPORT_MAX];
            let (count, fds) = match receive_fds(&self.ours, &mut packet) {
                Err(Errno::EAGAIN) if !dead => return None,
                // The process is dead, and all of its reports have been received.
                Err(Errno::EAGAIN) => (0, Vec::new()),
                Err(errno) => return Some(Err(Fault::errno("hearing from", self.name(), errno))),
                Ok(received) => received,
            };
            return Some(match packet.get(..count) {
                Some([TTY]) if self.tty.is_none() => {
                    self.tty = fds.into_iter().next();
                    continue;
                }
                Some([NAMESPACE]) if self.namespaces.len() < paths::POD_NAMESPACES.len() => {
                    self.namespaces.extend(fds.into_iter().next());
                    continue;
                }
                Some([READY, read @ ..]) => {
                    let read = serde_json::from_slice(read).unwrap_or_default();
                    Ok(Ready { tty: self.tty.take(), namespaces: std::mem::take(&mut self.namespaces), read })
                }
                Some([FAULT, fault @ ..]) => Err(serde_json::from_slice(fault).unwrap_or_else(|_| {
                    Fault::new("hearing from", self.name(), "it failed, and does not say why")
                })),
                _ => Err(Fault::new("waiting for", self.name(), "it died before it was ready")),
            });
        }
    }

    fn name(&self) -> String {
        format!("process {}", self.pid)
    }
}

/// The process's side: gives execd the master of its tty. This must come before the process drops privileges.
/// The kernel counts descriptors in flight by user, and a process with a low limit of open files and no
/// capability can send none while other processes of that user have some in flight.
pub fn tty(socket: &OwnedFd, master: BorrowedFd<'_>) -> Result<(), Errno> {
    send_fds(socket, &[TTY], &[master])
}

/// The pod init's side: gives execd one of its namespaces.
pub fn namespace(socket: &OwnedFd, namespace: BorrowedFd<'_>) -> Result<(), Errno> {
    send_fds(socket, &[NAMESPACE], &[namespace])
}

/// The process's side: reports that it is ready to be released, with the files that it has read. A file that
/// does not fit into the report is left out, and the next process reads it again.
pub fn ready(socket: &OwnedFd, read: Files) -> Result<(), Errno> {
    process::await_release()?;
    send_fds(socket, &ready_packet(read), &[])
}

fn ready_packet(read: Files) -> Vec<u8> {
    let (passwd, group) = (Files { group: None, ..read.clone() }, Files { passwd: None, ..read.clone() });
    let told = [read, passwd, group].into_iter().filter(|files| *files != Files::default());
    let mut packets =
        told.map(|files| [vec![READY], serde_json::to_vec(&files).unwrap_or_default()].concat());
    packets.find(|packet| packet.len() <= REPORT_MAX).unwrap_or_else(|| vec![READY])
}

/// The process's side: waits until init releases it to execute. init does so once it knows of the process, so
/// every running program is known to init, whenever execd dies. False: init was not told in time.
pub fn released(limit: Duration) -> bool {
    process::wait_for_release(limit).is_ok()
}

/// The process's side: reports why it cannot be started.
pub fn fault(socket: &OwnedFd, fault: &Fault) {
    let encode = |fault: &Fault| {
        let mut packet = vec![FAULT];
        packet.extend(serde_json::to_vec(fault).unwrap_or_default());
        packet
    };
    let mut packet = encode(fault);
    if packet.len() > REPORT_MAX {
        let cut = |text: &str| text.chars().take(200).collect::<String>();
        packet = encode(&Fault::new(cut(&fault.doing), cut(&fault.to), cut(&fault.why)));
    }
    let _ = send_fds(socket, &packet, &[]);
}

#[cfg(test)]
mod tests {
    use super::super::passwd_cache::Copy;
    use super::*;

    #[test]
    fn what_does_not_fit_the_report_is_left_out() {
        let copy = |size: usize| Copy::of_text("x".repeat(size));
        let told = |passwd: Option<usize>, group: Option<usize>| {
            let packet = ready_packet(Files { passwd: passwd.map(copy), group: group.map(copy) });
            assert!(packet.len() <= REPORT_MAX && packet[0] == READY);
            serde_json::from_slice(&packet[1..]).unwrap_or_else(|_| Files::default())
        };
        let all = Files { passwd: Some(copy(1000)), group: Some(copy(1000)) };
        assert_eq!(told(Some(1000), Some(1000)), all);
        assert_eq!(told(Some(2000), Some(2000)), Files { passwd: Some(copy(2000)), group: None });
        assert_eq!(told(None, Some(5000)), Files::default());
        assert_eq!(told(Some(5000), Some(10)), Files { passwd: None, group: Some(copy(10)) });
        assert_eq!(ready_packet(Files::default()), [READY]);
    }
}
