//! A program that serves a device to QEMU (vhost-user): started before it, and ended after it.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use hyperinit_protocol::fault::{Fault, OrFault};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::unistd::Pid;

use super::guest;
use super::volumes::Bind;

/// How long it may take to listen.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often its socket is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What is to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// The program; it runs in the guest's directory.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// The socket that QEMU connects to, in the guest's directory.
    pub socket: &'static str,
    /// Whether it has that socket as its standard input, listening, or makes it.
    pub is_given_socket: bool,
    /// What is bound for it before it starts, where it alone sees it.
    pub binds: Vec<Bind>,
}

/// A running one. Dropping it ends it.
pub struct Running {
    child: Child,
    program: PathBuf,
}

impl Service {
    /// Starts it; QEMU can connect then. What it has to complain about goes to `log`. It dies with the calling thread.
    pub fn start(&self, directory: &Path, log: &File) -> Result<Running, Fault> {
        let output = || log.try_clone().fault("duplicating", "the log");
        let mut command = guest::tied();
        guest::add_binds(&mut command, &self.binds);
        command.arg("--").arg(&self.program).args(&self.arguments);
        command.current_dir(directory).stdout(output()?).stderr(output()?);
        let given = self.is_given_socket.then(|| listening(directory, self.socket)).transpose()?;
        command.stdin(given.map_or_else(Stdio::null, Stdio::from));
        let child = command.spawn().fault("starting", self.program.display())?;
        let mut running = Running { child, program: self.program.clone() };
        if !self.is_given_socket {
            self.wait_until_it_listens(directory, &mut running)?;
        }
        Ok(running)
    }

    fn wait_until_it_listens(&self, directory: &Path, running: &mut Running) -> Result<(), Fault> {
        let (socket, deadline) = (directory.join(self.socket), Instant::now() + TIMEOUT);
        while !socket.exists() {
            let gone = running.child.try_wait().fault("waiting for", self.program.display())?;
            if let Some(status) = gone {
                return Err(Fault::new("starting", self.program.display(), format!("it ended ({status})")));
            }
            if Instant::now() >= deadline {
                return Err(Fault::new("waiting for", socket.display(), "nobody makes it"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }
}

/// A socket that listens, of that name in a directory, however long the directory's path is: an address holds 108 bytes (unix(7)).
fn listening(directory: &Path, name: &str) -> Result<OwnedFd, Fault> {
    let parent = File::open(directory).fault("opening", directory.display())?;
    let made = || -> nix::Result<OwnedFd> {
        let address = UnixAddr::new(format!("/proc/self/fd/{}/{name}", parent.as_raw_fd()).as_str())?;
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &address)?;
        listen(&socket, Backlog::new(1)?)?;
        Ok(socket)
    };
    made().fault("listening on", directory.join(name).display())
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
