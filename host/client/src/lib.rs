//! The host side of the hyperstart protocol, with which hyperctl and the tests talk to a guest.
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
//! It uses runV's flow control: it sends at most 512 control bytes, then nothing until the guest's NEXT
//! counts add up to them (protocol.md «Flow control»). If a guest breaks the protocol, the client closes the
//! connection and reports the reason; no call waits for such a guest for ever.
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
/// The stream channel's socket in that directory.
pub const STREAM_SOCKET: &str = "stream.sock";
/// Exists instead of these two if the guest has a vsock device: the device's socket, where a host asks for
/// one of the guest's ports.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// The interval between two attempts to connect to a guest on vsock that does not listen yet. It is long,
/// because vhost-device-vsock 0.3 stops serving anyone if it is asked at the moment in which the guest sets
/// the device up.
const VSOCK_LOOK_AGAIN: Duration = Duration::from_millis(250);
/// How long a call waits for its reply. DESTROYPOD's grace period is the longest that a guest delays a reply
/// on purpose.
pub const TIMEOUT: Duration = Duration::from_secs(60);
/// The interval between two looks for a socket that does not exist yet.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Why a call has no result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallError {
    /// The guest answered ERROR with this text.
    Refused(String),
    /// The connection is of no further use, for this reason: it was closed, or the guest broke the protocol.
    Broken(String),
    /// The awaited message did not come in time; the text names it.
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

/// The event that a process has finished (PROCESSASYNCEVENT).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// The container's id.
    pub container: String,
    /// The process's id in that container.
    pub process: String,
    /// The exit code, or 128+n if signal n killed the process.
    pub status: u8,
}

impl Finished {
    /// Parses the payload of PROCESSASYNCEVENT. The error tells how the guest broke the protocol.
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

/// A connection to a guest, with both channels. Dropping it closes the connection.
#[derive(Debug)]
pub struct Client {
    control: Arc<control::Control>,
    streams: Arc<streams::Streams>,
    threads: Vec<JoinHandle<()>>,
}

impl Client {
    /// Connects to the sockets in a guest's directory, as the guest's first host. The sockets must exist.
    /// This function and the other ways to connect wait for other hosts for at most a minute.
    pub fn connect(directory: &Path) -> Result<Client, Fault> {
        let (control, stream) = Client::sockets(directory)?;
        Client::over(control, stream)
    }

    /// Connects as a host that was connected before. `processes` are those that it has started, by the
    /// numbers of their `stdio` and `stderr` (0: none); their output may come at once.
    pub fn resume(
        directory: &Path,
        processes: &[(u64, u64)],
    ) -> Result<(Client, Vec<ProcessStreams>), Fault> {
        let (control, stream) = Client::greet(directory, Some(processes))?;
        Client::start(control, stream, processes, streams::Others::Wrong)
    }

    /// Connects to a guest that other hosts use too. If `hyperctl up` serves the guest, any number of hosts
    /// can be connected at once ([`mux`]). Otherwise they take turns, and output of processes that other
    /// hosts have started is discarded during this connection.
    pub fn visit(directory: &Path) -> Result<Client, Fault> {
        if mux::is_served(directory) || !connect::are_there(directory) {
            return Client::enter(directory, streams::Others::Wrong);
        }
        let (control, stream) = Client::greet(directory, Some(&[]))?;
        Client::start(control, stream, &[], streams::Others::ThrownAway).map(|(client, _)| client)
    }

    /// Like [`Client::visit`], for commands only: the output of all processes is discarded during this
    /// connection.
    pub fn visit_control(directory: &Path) -> Result<Client, Fault> {
        if mux::is_served(directory) || !connect::are_there(directory) {
            // Processes that these commands start may write before their start is answered.
            return Client::enter(directory, streams::Others::Everything);
        }
        let (control, stream) = Client::greet(directory, None)?;
        Client::start(control, stream, &[], streams::Others::Everything).map(|(client, _)| client)
    }

    /// Connects through the `hyperctl up` process that serves the guest.
    fn enter(directory: &Path, others: streams::Others) -> Result<Client, Fault> {
        let (control, stream) = mux::enter(directory)?;
        Client::start(control.into(), stream.into(), &[], others).map(|(client, _)| client)
    }

    /// Connects to ports that other hosts have used before. `known` are the streams to keep; with `None` the
    /// stream channel is not greeted.
    fn greet(directory: &Path, known: Option<&[(u64, u64)]>) -> Result<(Greeted, Greeted), Fault> {
        if has_connections(directory) {
            let (control, stream) = Client::sockets(directory)?;
            return Ok((control.into(), stream.into()));
        }
        greeting::until_answered(|deadline| connect::sockets(directory, deadline), known)
    }

    /// Connects both channels without a client, for a caller that speaks the protocol itself. Returns control
    /// and stream.
    pub fn sockets(directory: &Path) -> Result<(UnixStream, UnixStream), Fault> {
        connect::sockets(directory, Instant::now() + TIMEOUT)
    }

    /// Connects as soon as both sockets exist and are listened on. Between attempts it calls `alive`, whose
    /// error ends the wait.
    pub fn connect_within(
        directory: &Path,
        timeout: Duration,
        alive: impl FnMut() -> Result<(), Fault>,
    ) -> Result<Client, Fault> {
        let (control, stream) = Client::sockets_within(directory, timeout, alive)?;
        Client::over(control, stream)
    }

    /// Like [`Client::connect_within`], for a caller that speaks the protocol itself. Returns control and
    /// stream.
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

    /// Makes a client of two connected sockets.
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

    /// Waits for READY. A guest on virtio-serial sends it only once, so only its first client receives it.
    pub fn ready(&self, timeout: Duration) -> Result<(), CallError> {
        self.control.ready(timeout)
    }

    /// Tells the guest that this host, unlike runV's client, keeps reading after a process has ended, so the
    /// guest reports the end without a pause. Does not wait for the reply.
    pub fn introduce(&self) {
        drop(self.send(Command::Features));
    }

    /// The guest's features beyond API 4244; `None` if the guest replies with its version only.
    pub fn features(&self) -> Result<Option<Features>, CallError> {
        let reply = self.call(Command::Features)?;
        match reply.get(size_of::<u32>()..) {
            None | Some([]) => Ok(None),
            Some(json) => serde_json::from_slice(json).map(Some).map_err(|error| {
                CallError::Broken(format!("the guest's features are no such thing: {error}"))
            }),
        }
    }

    /// Sends a command without waiting for its reply. Any number of commands may be in flight.
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

    /// Sends a message as it is, even one that no correct host sends.
    pub fn send_raw(&self, id: u32, payload: &[u8]) -> Pending {
        self.control.send(id, payload)
    }

    /// Sends a command, waits for the reply, and returns the payload of the ACK.
    pub fn call(&self, command: Command) -> Result<Vec<u8>, CallError> {
        self.send(command).wait(TIMEOUT)
    }

    /// Waits for the next event, of any process.
    pub fn event(&self, timeout: Duration) -> Result<Finished, CallError> {
        self.control.event(timeout, "a process to finish", |_| true)
    }

    /// Waits until that process has finished, and returns its exit status. Other events are kept for later
    /// callers.
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

    /// Registers the streams of a process, by the numbers of its `stdio` and `stderr` (0: none). Call this
    /// before the process is started: all that came for these numbers before is discarded.
    pub fn streams(&self, stdio: u64, stderr: u64) -> ProcessStreams {
        streams::of_process(&self.streams, stdio, stderr)
    }

    /// The reason why the connection is of no further use; `None` while it works.
    pub fn broken(&self) -> Option<String> {
        self.control.broken().or_else(|| self.streams.broken())
    }

    /// The number of control bytes written, and how many of them the guest has credited.
    pub fn credit(&self) -> (u64, u64) {
        self.control.credit()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.control.hang_up();
        self.streams.hang_up();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to report.
            let _ = thread.join();
        }
    }
}
