//! The warden: forked from init before init confines itself, it starts and restarts the helpers.
//!
//! Helpers are init's children (CLONE_PARENT), so init reaps them and an exit status cannot be lost with the warden.
//! Each spawn has a thread of its own: at boot the helpers come up beside each other.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use ipc_channel::ipc::{self, IpcOneShotServer, IpcReceiver, IpcSender};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::stat::Mode;
use nix::unistd::pipe2;

use super::ports::Port;
use super::settings::Settings;
use crate::fault::{Fault, OrFault};
use crate::ids::Pid;
use crate::sandbox::Policy;
use crate::sys::spawn::{self, Forked};
use crate::wire::Role;
use crate::wire::bootstrap::{
    FD_BUFFER_IN, FD_BUFFER_OUT, FD_PARK_IN, FD_PARK_OUT, FD_PIPE_IN, FD_PIPE_OUT, FD_PORT, FD_SOCKET,
    FD_VAULT_IN, FD_VAULT_OUT, Hello,
};
use crate::wire::warden::{Reply, Request};
use crate::{logger, paths};

/// Kept descriptors are moved up here, out of the way of the numbers that helpers inherit.
const KEPT_FROM: RawFd = 64;
/// What execd's vault holds, in bytes as the kernel counts them: an entry costs 1 kB, and there are at most 4096 processes,
/// each of them there twice while it is swept, and as many that have ended.
const VAULT: usize = 16 << 20;
/// Of a spawn's threads, in bytes: they call ipc-channel and little else.
const STACK: usize = 256 << 10;

/// init's end.
pub struct Warden {
    /// A child of init.
    pub pid: Pid,
    /// Asks it for helpers.
    pub requests: IpcSender<Request>,
    /// What it says.
    pub replies: IpcReceiver<Reply>,
}

/// What the helpers of one role inherit: (the warden's descriptor, the number in the helper).
type Inherited = Vec<(OwnedFd, RawFd)>;

/// Everything the warden keeps for the helpers of today and their successors.
struct Kept {
    program: OwnedFd,
    inherited: BTreeMap<Role, Inherited>,
    null: OwnedFd,
    arguments: Vec<CString>,
    listen: bool,
}

/// Forks the warden. `program` is what it executes for every role. Everything handed over is closed in init, and `inits` in the warden.
pub fn start(
    settings: &Settings,
    policy: &Policy,
    program: OwnedFd,
    stream: Port,
    inits: &[RawFd],
) -> Result<Warden, Fault> {
    let fault = |error: std::io::Error| Fault::io("making a channel to", "the warden", &error);
    let (requests, inbox) = ipc::channel().map_err(fault)?;
    let (outbox, replies) = ipc::channel().map_err(fault)?;
    let kept = Kept::new(settings, program, stream)?;
    match spawn::fork().fault("forking", "the warden")? {
        Forked::Parent(pid) => Ok(Warden { pid, requests, replies }),
        Forked::Child => {
            drop((requests, replies));
            spawn::close_in_child(inits);
            logger::name("warden");
            std::process::exit(match serve(policy, kept, &inbox, &outbox) {
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
    fn new(settings: &Settings, program: OwnedFd, stream: Port) -> Result<Kept, Fault> {
        let (port, listen) = match stream {
            Port::Device(fd) | Port::Line(fd) => (fd, false),
            Port::Listener(fd) | Port::Vsock(fd) => (fd, true),
        };
        let flags = SockFlag::SOCK_CLOEXEC;
        let (execd, streamd) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .fault("making", "the socket for descriptors")?;
        let (vault_in, vault_out) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).fault("making", "the vault")?;
        if let Err(errno) = setsockopt(&vault_in, sockopt::SndBufForce, &VAULT) {
            // Less fits.
            log::warn!("{}", Fault::errno("enlarging", "the vault", errno));
        }
        let buffer_in =
            memfd_create(c"streamd", MFdFlags::MFD_CLOEXEC).fault("making", "the output buffer")?;
        // A second description of the same file: each has an offset of its own.
        let again = format!("/proc/self/fd/{}", buffer_in.as_raw_fd());
        let buffer_out = nix::fcntl::open(again.as_str(), OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
            .fault("opening again", "the output buffer")?;
        let (pipe_out, pipe_in) = pipe2(OFlag::O_CLOEXEC).fault("making", "a pipe")?;
        let (park_in, park_out) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
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
            (park_in, FD_PARK_IN),
            (park_out, FD_PARK_OUT),
        ];
        let inherited = BTreeMap::from([
            (Role::Netd, Vec::new()),
            (Role::Mountd, Vec::new()),
            (
                Role::Execd,
                vec![(up(execd)?, FD_SOCKET), (up(vault_in)?, FD_VAULT_IN), (up(vault_out)?, FD_VAULT_OUT)],
            ),
            (
                Role::Streamd,
                streamd.into_iter().map(|(fd, to)| Ok((up(fd)?, to))).collect::<Result<_, Fault>>()?,
            ),
        ]);
        let level = settings.log.as_str().to_ascii_lowercase();
        let mut words = vec!["--profile", settings.profile.name(), "--log", &level];
        words.push(if settings.local.is_none() { "--kmsg" } else { "--local" });
        let arguments = words.into_iter().map(c_string).collect::<Result<_, Fault>>()?;
        Ok(Kept { program: up(program)?, inherited, null: up(null)?, arguments, listen })
    }
}

/// The same descriptor at a number that no helper inherits at.
fn up(fd: OwnedFd) -> Result<OwnedFd, Fault> {
    spawn::duplicate_above(&fd, KEPT_FROM).fault("moving up", format!("descriptor {}", fd.as_raw_fd()))
}

fn c_string(word: &str) -> Result<CString, Fault> {
    CString::new(word).map_err(|_| Fault::new("passing", "an argument", "it contains a zero byte"))
}

fn serve(
    policy: &Policy,
    kept: Kept,
    inbox: &IpcReceiver<Request>,
    outbox: &IpcSender<Reply>,
) -> Result<(), Fault> {
    // The helpers' bootstrap servers are sockets in a directory of ours; ipc-channel asks for it by this variable.
    spawn::set_variable("TMPDIR", paths::IPC).fault("setting", "TMPDIR")?;
    policy.confine(policy.capabilities())?;
    let kept = Arc::new(kept);
    while let Ok(Request::Spawn(role)) = inbox.recv() {
        let (kept, outbox) = (Arc::clone(&kept), outbox.clone());
        let work = move || {
            let reply = start_helper(role, &kept).unwrap_or_else(|fault| Reply::Failed { role, fault });
            if outbox.send(reply).is_err() {
                log::error!("init does not listen to what became of {role}");
            }
        };
        std::thread::Builder::new().stack_size(STACK).spawn(work).fault("starting a thread for", role)?;
    }
    Ok(())
}

/// Starts one helper and waits for its first message, or for its death.
fn start_helper(role: Role, kept: &Kept) -> Result<Reply, Fault> {
    let (server, name) =
        IpcOneShotServer::<Hello>::new().map_err(|error| Fault::io("opening a server for", role, &error))?;
    let (pid, pidfd) = execute(role, kept, &name)?;
    let (stop_out, stop_in) = pipe2(OFlag::O_CLOEXEC).fault("making", "a pipe")?;
    let watcher = std::thread::Builder::new().stack_size(STACK).spawn({
        let name = name.clone();
        move || watch(&pidfd, &stop_out, name)
    });
    let watcher = watcher.fault("starting a thread for", role)?;
    let accepted = server.accept();
    drop(stop_in);
    let _ = watcher.join();
    match accepted {
        Ok((_, Hello::Up { requests, replies })) => Ok(Reply::Spawned { role, pid, requests, replies }),
        Ok((_, Hello::Gone)) => Err(Fault::new("starting", role, "it died before it came up")),
        Err(error) => Err(Fault::new("hearing from", role, error.to_string())),
    }
}

/// Unblocks `accept` when the helper dies first: ipc-channel cannot wait for two things.
fn watch(pidfd: &OwnedFd, stop: &OwnedFd, name: String) {
    let mut fds =
        [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    while poll(&mut fds, PollTimeout::NONE).is_err() {}
    let died = fds[0].any().unwrap_or(false) && !fds[1].any().unwrap_or(false);
    if died && let Ok(server) = IpcSender::<Hello>::connect(name) {
        let _ = server.send(Hello::Gone);
    }
}

/// Clones and executes one helper as a child of init.
fn execute(role: Role, kept: &Kept, name: &str) -> Result<(Pid, OwnedFd), Fault> {
    let inherited =
        kept.inherited.get(&role).ok_or_else(|| Fault::new("starting", role, "not a role of this guest"))?;
    let mut arguments = vec![c_string(role.name())?, c_string("--ipc")?, c_string(name)?];
    arguments.extend(kept.arguments.iter().cloned());
    if kept.listen && role == Role::Streamd {
        arguments.push(c_string("--listen")?);
    }
    let mut moves: Vec<(RawFd, RawFd)> = vec![(kept.null.as_raw_fd(), 0)];
    moves.extend(inherited.iter().map(|(fd, to)| (fd.as_raw_fd(), *to)));
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
