//! A program that serves a device to QEMU (vhost-user): started before it, and ended after it.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use hyperinit_protocol::fault::{Fault, OrFault};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::unistd::Pid;

use super::guest;
use super::volumes::Bind;

/// How long it may take to listen.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often it is tried whether it listens.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What is to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// The program; it runs in the guest's directory.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Its socket, in the guest's directory.
    pub socket: &'static str,
    /// Whether it gets that socket as its standard input, listening, and QEMU connects to it. Otherwise the
    /// service makes the socket, and QEMU gets a connection as its own standard input: QEMU ends where it is
    /// refused, and a service binds its socket and listens on it by two calls.
    pub is_given_socket: bool,
    /// What is bound for it before it starts, where it alone sees it.
    pub binds: Vec<Bind>,
}

/// A running one. Dropping it ends it.
pub struct Running {
    child: Child,
    program: PathBuf,
    /// QEMU's connection, of a service that has made its socket.
    pub connection: Option<OwnedFd>,
}

impl Service {
    /// Starts it; QEMU can connect then, or has its connection. What it has to complain about goes to `log`.
    /// It dies with the calling thread.
    pub fn start(&self, directory: &Path, log: &File) -> Result<Running, Fault> {
        let output = || log.try_clone().fault("duplicating", "the log");
        let mut command = guest::exec_child();
        guest::add_binds(&mut command, &self.binds);
        command.arg("--").arg(&self.program).args(&self.arguments);
        command.current_dir(directory).stdout(output()?).stderr(output()?);
        let given = self.is_given_socket.then(|| listening(directory, self.socket)).transpose()?;
        command.stdin(given.map_or_else(Stdio::null, Stdio::from));
        let child = command.spawn().fault("starting", self.program.display())?;
        let mut running = Running { child, program: self.program.clone(), connection: None };
        if !self.is_given_socket {
            running.connection =
                Some(connection(directory, self.socket, &running.name(), || running.child.try_wait())?);
        }
        Ok(running)
    }
}

/// Connects to a socket that a program is about to make, unless `ended` has its exit status before.
fn connection(
    directory: &Path,
    name: &str,
    program: &str,
    mut ended: impl FnMut() -> std::io::Result<Option<ExitStatus>>,
) -> Result<OwnedFd, Fault> {
    let path = directory.join(name);
    let parent = File::open(directory).fault("opening", directory.display())?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let connected = || -> nix::Result<OwnedFd> {
            let socket = stream_socket()?;
            connect(socket.as_raw_fd(), &address(&parent, name)?)?;
            Ok(socket)
        };
        match connected() {
            // Neither bound nor listening tells anybody.
            Err(Errno::ENOENT | Errno::ECONNREFUSED | Errno::EINTR) => {}
            connected => return connected.fault("connecting to", path.display()),
        }
        if let Some(status) = ended().fault("waiting for", program)? {
            return Err(Fault::new("starting", program, format!("it ended ({status})")));
        }
        if Instant::now() >= deadline {
            return Err(Fault::new("waiting for", path.display(), "nobody listens there"));
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// A socket that listens, of that name in a directory.
fn listening(directory: &Path, name: &str) -> Result<OwnedFd, Fault> {
    let parent = File::open(directory).fault("opening", directory.display())?;
    let made = || -> nix::Result<OwnedFd> {
        let socket = stream_socket()?;
        bind(socket.as_raw_fd(), &address(&parent, name)?)?;
        listen(&socket, Backlog::new(1)?)?;
        Ok(socket)
    };
    made().fault("listening on", directory.join(name).display())
}

fn stream_socket() -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
}

/// The address of a name in a directory, however long the directory's path is: an address holds 108 bytes
/// (unix(7)).
fn address(directory: &File, name: &str) -> nix::Result<UnixAddr> {
    UnixAddr::new(format!("/proc/self/fd/{}/{name}", directory.as_raw_fd()).as_str())
}

impl Running {
    /// Its number, which is nobody else's as long as this lives.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Its program, for a person.
    pub fn name(&self) -> String {
        self.program.display().to_string()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_service_that_binds_its_socket_and_does_not_listen_yet_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let mut socket = None;
        // One look finds no socket, the next one a socket that refuses, and the third a socket that listens.
        let mut looks = 0;
        let connected = connection(directory.path(), "a.sock", "service", || {
            looks += 1;
            match &socket {
                None => {
                    let made = stream_socket()?;
                    let path = directory.path().join("a.sock");
                    bind(made.as_raw_fd(), &UnixAddr::new(&path)?)?;
                    socket = Some(made);
                }
                Some(bound) => listen(bound, Backlog::new(1)?)?,
            }
            Ok(None)
        });
        connected.unwrap();
        assert_eq!(looks, 2);
    }

    #[test]
    fn a_service_that_ends_before_it_listens_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let ended = || Ok(Some(ExitStatus::from_raw(3 << 8)));
        let fault = connection(directory.path(), "a.sock", "service", ended).unwrap_err();
        assert_eq!((fault.doing.as_str(), fault.why.as_str()), ("starting", "it ended (exit status: 3)"));
    }
}
