//! The warden: forked from init before init confines itself, it starts and restarts the helpers.
//!
//! Helpers are children of init (CLONE_PARENT): init reaps them, so no exit status is lost with the warden.
//! The warden hears nothing from the helpers. It makes the sockets, executes the helper with one end of each,
//! and gives init the other ends.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::stat::Mode;
use nix::unistd::pipe2;

use super::ports::Port;
use super::settings::Settings;
use crate::fault::{Fault, OrFault};
use crate::ids::Pid;
use crate::logger;
use crate::sandbox::Policy;
use crate::sys::fd::{await_bytes, send_fds};
use crate::sys::process::become_standard;
use crate::sys::spawn::{self, Forked};
use crate::wire::bootstrap::{
    FD_BUFFER_IN, FD_BUFFER_OUT, FD_CONNECTION_IN, FD_CONNECTION_OUT, FD_NETWORK, FD_OUTPUTS_IN,
    FD_OUTPUTS_OUT, FD_PIPE_IN, FD_PIPE_OUT, FD_PORT, FD_REPLIES, FD_REQUESTS, FD_SOCKET, socket_pair,
};
use crate::wire::warden::{REQUEST_LEN, Reply, Request};
use crate::wire::{Instance, Role};

/// Kept descriptors are moved to numbers from here on, away from the numbers that helpers inherit.
const KEPT_FROM: RawFd = 64;
/// The capacity of execd's output store, in bytes as the kernel counts them. An entry costs 1 kB. There are
/// at most 4096 processes, each of which is there twice while the store is swept, and as many that have
/// ended.
const OUTPUT_STORE: usize = 16 << 20;

/// The capacity of a log channel, in bytes; the kernel doubles it and counts its own overhead. It is less
/// than init reads from one sender in a second (journal.rs), so the last words of a sender that dies are
/// read.
const LOG_BUFFER: usize = 100 << 10;

/// How long the warden pauses when there was no memory to receive a request.
const PAUSE: Duration = Duration::from_millis(100);

/// init's end of the warden.
pub struct Warden {
    /// The warden's process, a child of init.
    pub pid: Pid,
    /// Requests to the warden, `wire::warden::Request`. Sending never blocks.
    pub requests: OwnedFd,
    /// The warden's answers, `wire::warden::Reply`, with descriptors.
    pub replies: OwnedFd,
    /// The warden's log.
    pub log: OwnedFd,
}

/// The descriptors that the helpers of one role inherit: (the warden's number, the number in the helper).
type Inherited = Vec<(OwnedFd, RawFd)>;

/// Everything the warden keeps for the present helpers and their successors.
struct Kept {
    program: OwnedFd,
    inherited: BTreeMap<Role, Inherited>,
    null: OwnedFd,
    arguments: Vec<CString>,
    listen: bool,
}

/// Descriptors that stay with the warden and are closed in init.
pub struct Stays {
    /// The program that it executes for every role.
    pub program: OwnedFd,
    /// streamd's port.
    pub stream: Port,
    /// The pod's network namespace, if it is not the guest's.
    pub network: Option<OwnedFd>,
}

/// Forks the warden. The descriptors in `inits` are closed in the child.
pub fn start(settings: &Settings, policy: &Policy, stays: Stays, inits: &[RawFd]) -> Result<Warden, Fault> {
    let (requests, inbox) = socket_pair()?;
    // PID 1 must not block on a warden that does not read.
    fcntl(&requests, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).fault("setting up", "the socket to the warden")?;
    let (replies, outbox) = socket_pair()?;
    let (log, lines) = log_pair()?;
    let kept = Kept::new(settings, stays)?;
    match spawn::fork().fault("forking", "the warden")? {
        Forked::Parent(pid) => Ok(Warden { pid, requests, replies, log }),
        Forked::Child => {
            drop((requests, replies, log));
            spawn::close_in_child(inits);
            logger::start("warden", settings.log, true);
            let served = logs_to(lines).and_then(|()| serve(policy, kept, &inbox, &outbox));
            std::process::exit(match served {
                Ok(()) => 0,
                Err(fault) => {
                    log::error!("leaving: {fault}");
                    1
                }
            })
        }
    }
}

impl Kept {
    fn new(settings: &Settings, stays: Stays) -> Result<Kept, Fault> {
        let Stays { program, stream, network } = stays;
        let (port, listen) = match stream {
            Port::Device(fd) | Port::Line(fd) => (fd, false),
            Port::Listener(fd) | Port::Vsock(fd) => (fd, true),
        };
        let flags = SockFlag::SOCK_CLOEXEC;
        let (execd, streamd) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .fault("making", "the socket for descriptors")?;
        let (outputs_in, outputs_out) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .fault("making", "the output store")?;
        if let Err(errno) = setsockopt(&outputs_in, sockopt::SndBufForce, &OUTPUT_STORE) {
            // A smaller store keeps fewer outputs.
            log::warn!("{}", Fault::errno("enlarging", "the output store", errno));
        }
        let buffer_in =
            memfd_create(c"streamd", MFdFlags::MFD_CLOEXEC).fault("making", "the output buffer")?;
        // A second open file description of the same file, because each has an offset of its own.
        let again = format!("/proc/self/fd/{}", buffer_in.as_raw_fd());
        let buffer_out = nix::fcntl::open(again.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
            .fault("opening again", "the output buffer")?;
        let (pipe_out, pipe_in) = pipe2(OFlag::O_CLOEXEC).fault("making", "a pipe")?;
        let (connection_in, connection_out) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
                .fault("making", "the socket for connections")?;
        let null = nix::fcntl::open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
            .fault("opening", "/dev/null")?;
        let streamd = [
            (streamd, FD_SOCKET),
            (buffer_in, FD_BUFFER_IN),
            (buffer_out, FD_BUFFER_OUT),
            (pipe_out, FD_PIPE_OUT),
            (pipe_in, FD_PIPE_IN),
            (port, FD_PORT),
            (connection_in, FD_CONNECTION_IN),
            (connection_out, FD_CONNECTION_OUT),
        ];
        let execd = [(execd, FD_SOCKET), (outputs_in, FD_OUTPUTS_IN), (outputs_out, FD_OUTPUTS_OUT)];
        let all_up = |fds: &mut dyn Iterator<Item = (OwnedFd, RawFd)>| {
            fds.map(|(fd, to)| Ok((up(fd)?, to))).collect::<Result<Inherited, Fault>>()
        };
        let mut inherited = BTreeMap::from([
            (Role::Netd, Vec::new()),
            (Role::Mountd, Vec::new()),
            (Role::Execd, all_up(&mut execd.into_iter())?),
            (Role::Streamd, all_up(&mut streamd.into_iter())?),
        ]);
        if let Some(network) = network {
            for role in [Role::Netd, Role::Mountd, Role::Execd] {
                let again =
                    network.try_clone().map_err(|error| Fault::io("duplicating", "a namespace", &error))?;
                inherited.entry(role).or_default().push((up(again)?, FD_NETWORK));
            }
        }
        let level = settings.log.as_str().to_ascii_lowercase();
        let mut words = vec!["--profile", settings.profile.name(), "--log", &level];
        if settings.local.is_some() {
            words.push("--local");
        }
        if settings.debug_door {
            words.push("--debug");
        }
        let arguments = words.into_iter().map(c_string).collect::<Result<_, Fault>>()?;
        Ok(Kept { program: up(program)?, inherited, null: up(null)?, arguments, listen })
    }
}

/// A duplicate of a descriptor, at a number that no helper inherits.
fn up(fd: OwnedFd) -> Result<OwnedFd, Fault> {
    spawn::duplicate_above(&fd, KEPT_FROM).fault("moving up", format!("descriptor {}", fd.as_raw_fd()))
}

fn c_string(word: &str) -> Result<CString, Fault> {
    CString::new(word).map_err(|_| Fault::new("passing", "an argument", "it contains a zero byte"))
}

fn serve(policy: &Policy, kept: Kept, inbox: &OwnedFd, outbox: &OwnedFd) -> Result<(), Fault> {
    policy.confine(policy.capabilities())?;
    let mut deaf = false;
    loop {
        match hear(inbox) {
            Ok(Some(Request::Spawn(helper))) => {
                deaf = false;
                if let Err(fault) = start_helper(helper, &kept, outbox) {
                    log::error!("{fault}");
                    failed(helper, outbox);
                }
            }
            Ok(None) => return Ok(()),
            // Memory is short, which may pass. If the warden ended here, a dead helper would have no
            // successor.
            Err(fault) if fault.is(Errno::ENOMEM) || fault.is(Errno::ENOBUFS) => {
                if !std::mem::replace(&mut deaf, true) {
                    log::error!("{fault}");
                }
                std::thread::sleep(PAUSE);
            }
            Err(fault) => return Err(fault),
        }
    }
}

/// Waits for a request from init. Returns none if init is gone.
fn hear(inbox: &OwnedFd) -> Result<Option<Request>, Fault> {
    let mut packet = [0; REQUEST_LEN];
    loop {
        match await_bytes(inbox, &mut packet) {
            Ok(0) => return Ok(None),
            Ok(count) => {
                return match packet.get(..count).and_then(Request::decode) {
                    None => Err(Fault::new("hearing", "init", "it names no helper")),
                    request => Ok(request),
                };
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Fault::errno("hearing", "init", errno)),
        }
    }
}

/// Sends an answer. If that fails, init waits for its time limit (lifecycle.rs) and asks again.
fn failed(helper: Instance, outbox: &OwnedFd) {
    if let Err(fault) = tell(outbox, &Reply::Failed { helper }, &[]) {
        log::error!("{fault}");
    }
}

/// Makes a log channel: init's end, and the end of the process that logs. A full channel loses lines and
/// never blocks its writer.
/// writer wait.
///
/// It is a socket and not a pipe. A writer locks a pipe while the kernel copies from the writer's memory,
/// which may be a file on a server that hangs, and PID 1 would wait for that lock.
fn log_pair() -> Result<(OwnedFd, OwnedFd), Fault> {
    let (log, lines) = socket_pair()?;
    fcntl(&lines, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).fault("setting up", "a log")?;
    setsockopt(&lines, sockopt::SndBuf, &LOG_BUFFER).fault("setting up", "a log")?;
    Ok((log, lines))
}

/// Makes the log channel standard output and error.
fn logs_to(lines: OwnedFd) -> Result<(), Fault> {
    for number in [1, 2] {
        become_standard(lines.as_fd(), number).fault("taking", "its log")?;
    }
    Ok(())
}

/// Starts one helper, and gives init its ends of the three sockets.
fn start_helper(helper: Instance, kept: &Kept, outbox: &OwnedFd) -> Result<(), Fault> {
    let (inits_requests, requests) = socket_pair()?;
    let (inits_replies, replies) = socket_pair()?;
    let (inits_log, log) = log_pair()?;
    let pid = execute(helper.role(), kept, [&up(requests)?, &up(replies)?, &up(log)?])?;
    tell(outbox, &Reply::Spawned { helper, pid }, &[inits_requests, inits_replies, inits_log])
}

fn tell(outbox: &OwnedFd, reply: &Reply, ends: &[OwnedFd]) -> Result<(), Fault> {
    let ends: Vec<_> = ends.iter().map(AsFd::as_fd).collect();
    send_fds(outbox, &reply.encode(), &ends).fault("telling", "init")
}

/// Clones and executes one helper as a child of init.
fn execute(role: Role, kept: &Kept, [requests, replies, log]: [&OwnedFd; 3]) -> Result<Pid, Fault> {
    let inherited =
        kept.inherited.get(&role).ok_or_else(|| Fault::new("starting", role, "not a role of this guest"))?;
    let mut arguments = vec![c_string(role.name())?, c_string("--ipc")?];
    arguments.extend(kept.arguments.iter().cloned());
    if kept.listen && role == Role::Streamd {
        arguments.push(c_string("--listen")?);
    }
    let mut moves: Vec<(RawFd, RawFd)> =
        vec![(kept.null.as_raw_fd(), 0), (log.as_raw_fd(), 1), (log.as_raw_fd(), 2)];
    moves.extend(inherited.iter().map(|(fd, to)| (fd.as_raw_fd(), *to)));
    moves.extend([(requests.as_raw_fd(), FD_REQUESTS), (replies.as_raw_fd(), FD_REPLIES)]);
    spawn::spawn_sibling(&kept.program, &arguments, &moves).fault("starting", role)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, fcntl};

    #[test]
    fn kept_descriptors_leave_the_inherited_numbers_alone() {
        let (out, _in) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let moved = up(out).unwrap();
        assert!(moved.as_raw_fd() >= KEPT_FROM);
        let flags = fcntl(&moved, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & nix::libc::FD_CLOEXEC, nix::libc::FD_CLOEXEC);
    }
}
