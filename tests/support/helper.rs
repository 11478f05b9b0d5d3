//! A helper driven through its `--stdio` door: one request and one reply a line.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use command_fds::{CommandFdExt, FdMapping};
use hyperinit::fault::Fault;
use hyperinit::ids::Pid;
use hyperinit::wire::Role;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::guest::SCRATCH;
use super::read_until;

/// A running helper. Dropping it kills the process.
pub struct Helper {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    log: PathBuf,
}

/// The path of a helper's binary.
pub fn binary(role: Role) -> &'static str {
    match role {
        Role::Netd => env!("CARGO_BIN_EXE_netd"),
        Role::Mountd => env!("CARGO_BIN_EXE_mountd"),
        Role::Execd => env!("CARGO_BIN_EXE_execd"),
        Role::Streamd => env!("CARGO_BIN_EXE_streamd"),
    }
}

impl Helper {
    /// Starts the helper confined, with more arguments, and with `socket` as descriptor 3.
    pub fn start(role: Role, arguments: &[&str], socket: Option<OwnedFd>) -> Helper {
        let mut command = Command::new(binary(role));
        command.arg("--stdio").args(arguments);
        Helper::spawn(role, command, socket)
    }

    /// Starts a command that is, or becomes, the helper, with `socket` as descriptor 3.
    pub fn spawn(role: Role, command: Command, socket: Option<OwnedFd>) -> Helper {
        Helper::spawn_with(role, command, socket.into_iter().collect())
    }

    /// Starts a command that is, or becomes, the helper, with `inherited` as descriptors 3, 4, …
    pub fn spawn_with(role: Role, mut command: Command, inherited: Vec<OwnedFd>) -> Helper {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let log = PathBuf::from(format!("{SCRATCH}/{role}.{}.log", NEXT.fetch_add(1, Ordering::Relaxed)));
        command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&log).unwrap());
        let mappings = (3..).zip(inherited).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd });
        command.fd_mappings(mappings.collect()).unwrap();
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        Helper { child, stdin, stdout, log }
    }

    /// Writes a line and returns the line of the reply.
    pub fn line(&mut self, line: &str) -> String {
        self.write(line);
        self.reply(line)
    }

    fn write(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().unwrap();
        stdin.write_all(format!("{line}\n").as_bytes()).unwrap_or_else(|error| {
            panic!("{error}; its log: {}", fs::read_to_string(&self.log).unwrap());
        });
    }

    fn reply(&self, to: &str) -> String {
        let reply = read_until(Borrowed(self.stdout.as_ref().unwrap()), |all| all.ends_with(b"\n"));
        assert!(reply.ends_with('\n'), "no reply to {to}; its log: {}", self.log());
        reply.trim_end().to_owned()
    }

    /// Sends a request without waiting for the reply.
    pub fn send<Q: Serialize>(&mut self, request: &Q) {
        self.write(&serde_json::to_string(request).unwrap());
    }

    /// Reads the next reply, whichever request it answers.
    pub fn receive<R: DeserializeOwned>(&self) -> Result<R, Fault> {
        result(&self.reply("any request"))
    }

    /// Sends a request and returns the reply, in the types of the helper's protocol.
    pub fn ask<Q: Serialize, R: DeserializeOwned>(&mut self, request: &Q) -> Result<R, Fault> {
        result(&self.line(&serde_json::to_string(request).unwrap()))
    }

    /// Sends a request and closes the helper's stdout, so that the helper cannot write the reply. Returns the
    /// helper's exit status.
    pub fn ask_and_leave<Q: Serialize>(&mut self, request: &Q) -> ExitStatus {
        drop(self.stdout.take());
        let line = format!("{}\n", serde_json::to_string(request).unwrap());
        self.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap();
        self.child.wait().unwrap()
    }

    /// The helper's log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The helper's pid.
    pub fn pid(&self) -> Pid {
        Pid(i32::try_from(self.child.id()).unwrap())
    }

    /// Kills the helper with SIGKILL and reaps it.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Closes the helper's stdin and waits for its end.
    pub fn finish(mut self) -> ExitStatus {
        drop(self.stdin.take());
        self.child.wait().unwrap()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Parses a reply: a `Result` as serde writes it.
fn result<R: DeserializeOwned>(reply: &str) -> Result<R, Fault> {
    let reply: serde_json::Value = serde_json::from_str(reply).unwrap();
    match (reply.get("Ok"), reply.get("Err")) {
        (Some(ok), None) => Ok(serde_json::from_value(ok.clone()).unwrap()),
        (None, Some(fault)) => Err(serde_json::from_value(fault.clone()).unwrap()),
        _ => panic!("{reply}"),
    }
}

/// Lets `read_until`, which takes its source by value, read from a borrowed stdout.
struct Borrowed<'a>(&'a ChildStdout);

impl std::io::Read for Borrowed<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        // Reads one byte at a time, so that what follows a line stays for the next call.
        let end = bytes.len().min(1);
        nix::unistd::read(self.0, &mut bytes[..end]).map_err(Into::into)
    }
}

impl AsFd for Borrowed<'_> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
