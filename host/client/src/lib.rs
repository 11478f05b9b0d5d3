//! A host of the hyperstart protocol: what hyperctl and the tests say to a guest, and hear from it.
//!
//! ```no_run
//! use std::path::Path;
//! use hyperinit_client::Client;
//! use hyperinit_protocol::command::Command;
//!
//! let client = Client::connect(Path::new("/run/guest")).unwrap();
//! assert_eq!(client.call(Command::GetVersion).unwrap(), 4244u32.to_be_bytes());
//! ```
//!
//! It has runV's flow control: at most 512 bytes of control, then nothing until the guest's NEXT counts add
//! up (protocol.md «Flow control»). A guest that breaks the protocol ends the connection with the reason;
//! nothing waits for it for ever.
#![forbid(unsafe_code)]

mod connect;
mod control;
mod credit;
mod encode;
mod greeting;
pub mod mux;
mod streams;
#[cfg(test)]
mod tests;

use std::fmt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hyperinit_protocol::command::{Command, Features, WinSize};
use hyperinit_protocol::fault::Fault;
use hyperinit_protocol::ids::{ContainerId, ProcessId};

use serde::Deserialize;

use connect::has_connections;
pub use control::Pending;
pub use credit::CONTROL_CHUNK;
pub use encode::encode;
use greeting::Greeted;
pub use streams::{Input, Output, ProcessStreams};

/// The control channel's socket in a guest's directory.
pub const CONTROL_SOCKET: &str = "ctl.sock";
/// The stream channel's socket there.
pub const STREAM_SOCKET: &str = "stream.sock";
/// In their place: the socket of a vsock device, where a host says which of the guest's ports it wants.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// How often a guest that does not listen yet is asked there. Not in a hurry: vhost-device-vsock 0.3 serves
/// nobody any more when it is asked in the moment in which the guest sets the device up.
const VSOCK_LOOK_AGAIN: Duration = Duration::from_millis(250);
/// How long a call waits for its reply: DESTROYPOD's grace is the longest that a guest takes on purpose.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// How often a socket that is not there yet is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Why a call has no result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallError {
    /// The guest answered ERROR; its text.
    Refused(String),
    /// The connection is of no further use: it was closed, or the guest broke the protocol.
    Broken(String),
    /// Nothing came in time; what was being waited for.
    Late(String),
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CallError::Refused(text) => f.write_str(text),
            CallError::Broken(why) => write!(f, "the connection to the guest is lost: {why}"),
            CallError::Late(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for CallError {}

/// A process has finished (PROCESSASYNCEVENT).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// In which container.
    pub container: String,
    /// Which process.
    pub process: String,
    /// Its exit code, or 128+n when signal n killed it.
    pub status: u8,
}

impl Finished {
    /// PROCESSASYNCEVENT's payload. The error is how the guest broke the protocol.
    fn parse(payload: &[u8]) -> Result<Finished, String> {
        #[derive(Deserialize)]
        struct Event {
            container: String,
            process: String,
            event: String,
            status: u8,
        }
        let bad = |why: String| format!("the guest sent a bad PROCESSASYNCEVENT: {why}");
        let event: Event = serde_json::from_slice(payload).map_err(|error| bad(error.to_string()))?;
        if event.event != "finished" {
            return Err(bad(format!("event {:?}", event.event)));
        }
        let Event { container, process, status, .. } = event;
        Ok(Finished { container, process, status })
    }
}

/// A connection to a guest: both channels. Dropping it hangs up.
#[derive(Debug)]
pub struct Client {
    control: Arc<control::Control>,
    streams: Arc<streams::Streams>,
    threads: Vec<JoinHandle<()>>,
}

impl Client {
    /// Connects to the sockets in a guest's directory, which must be there, as its first host. A minute is
    /// the most that this and the other ways to connect wait for others.
    pub fn connect(directory: &Path) -> Result<Client, Fault> {
        let (control, stream) = Client::sockets(directory)?;
        Client::over(control, stream)
    }

    /// Connects as a host that was there before. What processes write that it has started, by the numbers of
    /// their `stdio` and `stderr` (0: none), may come at once.
    pub fn resume(
        directory: &Path,
        processes: &[(u64, u64)],
    ) -> Result<(Client, Vec<ProcessStreams>), Fault> {
        let (control, stream) = Client::greet(directory, Some(processes))?;
        Client::start(control, stream, processes, streams::Others::Wrong)
    }

    /// Connects to a guest that others use too. Where `hyperctl up` serves them it is at once ([`mux`]), else
    /// one after the other: what processes write that others have started is thrown away meanwhile.
    pub fn visit(directory: &Path) -> Result<Client, Fault> {
        if mux::is_served(directory) || !connect::are_there(directory) {
            return Client::enter(directory);
        }
        let (control, stream) = Client::greet(directory, Some(&[]))?;
        Client::start(control, stream, &[], streams::Others::ThrownAway).map(|(client, _)| client)
    }

    /// The same for commands only: all that processes write is thrown away meanwhile.
    pub fn visit_control(directory: &Path) -> Result<Client, Fault> {
        if mux::is_served(directory) || !connect::are_there(directory) {
            return Client::enter(directory);
        }
        let (control, stream) = Client::greet(directory, None)?;
        Client::start(control, stream, &[], streams::Others::Everything).map(|(client, _)| client)
    }

    /// Connects through the `hyperctl up` that serves the guest.
    fn enter(directory: &Path) -> Result<Client, Fault> {
        let (control, stream) = mux::enter(directory)?;
        Client::over(control, stream)
    }

    /// Connects to where others were before: with the streams that are known, if any are to be heard.
    fn greet(directory: &Path, known: Option<&[(u64, u64)]>) -> Result<(Greeted, Greeted), Fault> {
        if has_connections(directory) {
            let (control, stream) = Client::sockets(directory)?;
            return Ok((control.into(), stream.into()));
        }
        greeting::until_answered(|deadline| connect::sockets(directory, deadline), known)
    }

    /// Both channels as they are, for who speaks the protocol by hand: control, stream.
    pub fn sockets(directory: &Path) -> Result<(UnixStream, UnixStream), Fault> {
        connect::sockets(directory, Instant::now() + TIMEOUT)
    }

    /// Connects as soon as both sockets are there and somebody listens; `alive` is asked again and again
    /// whether it is still worth while.
    pub fn connect_within(
        directory: &Path,
        timeout: Duration,
        alive: impl FnMut() -> Result<(), Fault>,
    ) -> Result<Client, Fault> {
        let (control, stream) = Client::sockets_within(directory, timeout, alive)?;
        Client::over(control, stream)
    }

    /// The same, for who speaks the protocol by hand: control, stream.
    pub fn sockets_within(
        directory: &Path,
        timeout: Duration,
        mut alive: impl FnMut() -> Result<(), Fault>,
    ) -> Result<(UnixStream, UnixStream), Fault> {
        let deadline = Instant::now() + timeout;
        loop {
            match connect::sockets(directory, deadline) {
                Ok(sockets) => return Ok(sockets),
                Err(fault) if Instant::now() >= deadline => return Err(fault),
                Err(_) => alive()?,
            }
            std::thread::sleep(if has_connections(directory) { VSOCK_LOOK_AGAIN } else { LOOK_AGAIN });
        }
    }

    /// Speaks over two connected sockets.
    pub fn over(control: UnixStream, stream: UnixStream) -> Result<Client, Fault> {
        let (control, stream) = (control.into(), stream.into());
        Client::start(control, stream, &[], streams::Others::Wrong).map(|(client, _)| client)
    }

    fn start(
        control: Greeted,
        stream: Greeted,
        processes: &[(u64, u64)],
        others: streams::Others,
    ) -> Result<(Client, Vec<ProcessStreams>), Fault> {
        let (control, mut threads) = control::start(control)?;
        let (streams, known, reader) = streams::start(stream, processes, others)?;
        threads.push(reader);
        Ok((Client { control, streams, threads }, known))
    }

    /// Waits for READY. A guest on virtio-serial says it once in its life, so only its first client hears it.
    pub fn ready(&self, timeout: Duration) -> Result<(), CallError> {
        self.control.ready(timeout)
    }

    /// Lets the guest know that this host reads on behind the end of a process, which runV's client does not:
    /// so the guest tells of an end without a pause. The reply is not waited for.
    pub fn introduce(&self) {
        drop(self.send(Command::Features));
    }

    /// What the guest can beyond API 4244; none of a guest that tells its version alone.
    pub fn features(&self) -> Result<Option<Features>, CallError> {
        let reply = self.call(Command::Features)?;
        match reply.get(size_of::<u32>()..) {
            None | Some([]) => Ok(None),
            Some(json) => serde_json::from_slice(json).map(Some).map_err(|error| {
                CallError::Broken(format!("the guest's features are no such thing: {error}"))
            }),
        }
    }

    /// Sends a command; the reply is waited for later. Any number may be under way.
    pub fn send(&self, command: Command) -> Pending {
        match encode(&command) {
            Ok((message, payload)) => self.control.send(message.id(), &payload),
            Err(fault) => Pending::failed(CallError::Broken(fault.to_string())),
        }
    }

    /// Sends the start of a process (EXECCMD, NEWCONTAINER) and the size of its terminal (WINSIZE), so that
    /// the guest has the size before the process executes.
    pub fn send_with_size(&self, start: &Command, size: WinSize) -> [Pending; 2] {
        match encode(start).and_then(|start| Ok((start, encode(&Command::WinSize(size))?))) {
            Ok(((message, payload), (size, sizes))) => {
                self.control.send_both([(message.id(), &payload), (size.id(), &sizes)])
            }
            Err(fault) => [0, 1].map(|_| Pending::failed(CallError::Broken(fault.to_string()))),
        }
    }

    /// Sends a message as it is: also one that no honest host sends.
    pub fn send_raw(&self, id: u32, payload: &[u8]) -> Pending {
        self.control.send(id, payload)
    }

    /// Sends a command and waits for what its ACK carries.
    pub fn call(&self, command: Command) -> Result<Vec<u8>, CallError> {
        self.send(command).wait(TIMEOUT)
    }

    /// The next event, whichever process it is about.
    pub fn event(&self, timeout: Duration) -> Result<Finished, CallError> {
        self.control.event(timeout, "a process to finish", |_| true)
    }

    /// Waits until that process has finished; other events are kept for who asks for them.
    pub fn finished(
        &self,
        container: &ContainerId,
        process: &ProcessId,
        timeout: Duration,
    ) -> Result<u8, CallError> {
        let what = format!("process {process} of container {container} to finish");
        let this = |e: &Finished| e.container == container.as_str() && e.process == process.as_str();
        self.control.event(timeout, &what, this).map(|event| event.status)
    }

    /// The streams of a process, by the numbers of its `stdio` and `stderr` (0: none). Ask before it is
    /// started: what came for the numbers before is forgotten.
    pub fn streams(&self, stdio: u64, stderr: u64) -> ProcessStreams {
        streams::of_process(&self.streams, stdio, stderr)
    }

    /// Why the connection is of no further use, if it is not.
    pub fn broken(&self) -> Option<String> {
        self.control.broken().or_else(|| self.streams.broken())
    }

    /// How many control bytes were written, and how many of them the guest has credited.
    pub fn credit(&self) -> (u64, u64) {
        self.control.credit()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.control.hang_up();
        self.streams.hang_up();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to say.
            let _ = thread.join();
        }
    }
}
