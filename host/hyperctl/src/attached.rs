//! A process of a guest that is attached to hyperctl's standard streams, signals and terminal.

use std::collections::BTreeSet;
use std::io::{IsTerminal, stdin};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, sync_channel};
use std::time::Duration;

use hyperinit_client::{CallError, Client, Pending, TIMEOUT};
use hyperinit_protocol::command::{Command, KillContainer, SignalProcess, WinSize};
use hyperinit_protocol::fault::Fault;
use hyperinit_protocol::ids::{ContainerId, ProcessId, Signal};
use hyperinit_protocol::spec::Process;

use super::events::{self, Event, Failure, Signals};
use super::terminal::{self, Terminal};
use super::{pump, standard};

/// How long one wait for the process's end lasts. The process may run longer, so the wait is repeated.
const WAIT: Duration = Duration::from_secs(24 * 3600);
/// The signals that ask hyperctl to end when they cannot be passed on to the process.
const ENDING: [Signal; 4] = [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM];
/// The third of these signals means that the user wants out, whatever the process does with them; docker
/// counts in the same way.
const INSISTING: [Signal; 2] = [Signal::INT, Signal::TERM];
const LAST_SIGNAL: u32 = 3;
/// The signals that a terminal, or a shell with one, sends to the whole process group of a job.
const FOR_THE_GROUP: [Signal; 4] = [Signal::CONT, Signal::INT, Signal::QUIT, Signal::TSTP];

/// The process.
#[derive(Debug, Clone)]
pub struct Target {
    /// The name for it in messages.
    pub what: &'static str,
    pub container: ContainerId,
    pub process: ProcessId,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether hyperctl's standard input is passed on to it.
    pub interactive: bool,
    /// Whether it is the init of its container.
    pub is_init: bool,
}

/// How the process ended, or that hyperctl leaves it.
pub enum End {
    /// The process has exited with this status, or could not be run.
    Done(Result<u8, Failure>),
    /// The guest is gone, with this status of QEMU or hyperinit.
    GuestEnded(ExitStatus),
    /// hyperctl was told to end by this signal, or its output is no longer read (SIGPIPE). With a client the
    /// start of the process was sent, and the process may be running.
    Left(Signal, Option<Arc<Client>>),
}

/// The queue of events for a subcommand that runs a process. Call it before any other thread is started.
pub fn queue(tty: bool, interactive: bool) -> Result<(Sender<Event>, Receiver<Event>), Fault> {
    let reads_terminal = interactive && stdin().is_terminal();
    events::queue(Signals::Program { tty, reads_terminal })
}

/// Makes `attend` send the command that starts the process, passes its streams on and waits for its end.
/// Returns its exit status.
pub fn run(
    target: &Target,
    process: &Process,
    start: Command,
    client: &Arc<Client>,
    terminal: &Terminal,
    events: &Sender<Event>,
) -> Result<u8, Failure> {
    // The streams are registered before any data can come.
    let streams = client.streams(process.stdio, process.stderr);
    match (target.tty, target.interactive) {
        (true, true) => terminal.make_raw()?,
        (true, false) => terminal.pass_output()?,
        (false, _) => {}
    }
    let (sent, start_sent) = sync_channel(1);
    // `attend` receives the event, unless it has left without starting the process.
    let _ = events.send(Event::Start { client: Arc::clone(client), command: start, sent });
    let gone = |_| Fault::new("starting", target.what, "hyperctl is ending");
    let started = start_sent.recv().map_err(gone)?;
    started.wait(TIMEOUT).map_err(failed("starting", target.what))?;
    if target.interactive {
        pump::stdin(streams.stdin);
    } else if !target.tty {
        streams.stdin.close().map_err(failed("closing the stdin of", target.what))?;
    }
    let out = pump::output(streams.stdout, standard::stdout(), events.clone());
    let err = streams.stderr.map(|stderr| pump::output(stderr, standard::stderr(), events.clone()));
    let status = loop {
        match client.finished(&target.container, &target.process, WAIT) {
            Err(CallError::Late(_)) => {}
            finished => break finished.map_err(failed("waiting for", target.what))?,
        }
    };
    for pump in [Some(out), err].into_iter().flatten() {
        // The stream ended before the event came. An error only means that the thread panicked.
        let _ = pump.join();
    }
    Ok(status)
}

/// Turns a failed call into a failure of hyperctl.
pub fn failed(doing: &'static str, to: &'static str) -> impl Fn(CallError) -> Failure {
    move |error| Failure {
        fault: Fault::new(doing, to, error.to_string()),
        lost: matches!(error, CallError::Broken(_)),
    }
}

/// Waits for the process's end, and passes signals and sizes on until then. The process may still be
/// starting, for the guest keeps them until after the start. The start is sent from here, so that it is known
/// on leaving whether it was sent.
pub fn attend(target: &Target, queue: &Receiver<Event>) -> Result<End, Fault> {
    let mut client: Option<Arc<Client>> = None;
    let mut early = BTreeSet::new();
    let mut asked = 0;
    loop {
        let event = queue.recv().map_err(|_| Fault::new("waiting for", target.what, "nobody is left"))?;
        match event {
            Event::Done(result) => return Ok(End::Done(result)),
            Event::GuestEnded(status) => return Ok(End::GuestEnded(status)),
            Event::Unread => return Ok(End::Left(Signal::PIPE, client)),
            Event::Start { client: connected, command, sent } => {
                // `run` waits for this, unless its thread has panicked.
                let _ = sent.send(target.start(&connected, command));
                for signal in std::mem::take(&mut early) {
                    drop(target.signal(&connected, signal));
                }
                client = Some(connected);
            }
            Event::Signal(signal) => {
                asked += u32::from(INSISTING.contains(&signal));
                // With a terminal, the process gets the keys of the terminal as input. The signals that keys
                // would cause are hyperctl's own if they are sent to hyperctl.
                let is_own = ENDING.contains(&signal) && (target.tty || client.is_none());
                if is_own || asked >= LAST_SIGNAL {
                    return Ok(End::Left(signal, client));
                }
                match client.as_deref() {
                    Some(client) if target.tty && signal == Signal::WINCH => target.resize(client),
                    Some(client) => drop(target.signal(client, signal)),
                    // The size is read when the process is started.
                    None if target.tty && signal == Signal::WINCH => {}
                    None => drop(early.insert(signal)),
                }
            }
        }
    }
}

impl Target {
    /// Sends the process a signal. As with docker, a container's init gets it alone and decides what its
    /// children get; signals that stem from keys go to its process group. For other processes the protocol
    /// has only the group. The reply is not needed: the process may have ended.
    pub fn signal(&self, client: &Client, signal: Signal) -> Pending {
        let container = self.container.clone();
        if self.is_init && !FOR_THE_GROUP.contains(&signal) {
            return client.send(Command::KillContainer(KillContainer { container, signal }));
        }
        client.send(Command::SignalProcess(SignalProcess {
            container,
            process: self.process.clone(),
            signal,
        }))
    }

    /// Sends the start, together with the size of the caller's terminal if the process has one. The reply to
    /// the size is not needed.
    fn start(&self, client: &Client, command: Command) -> Pending {
        match self.size() {
            None => client.send(command),
            Some(size) => {
                let [started, _] = client.send_with_size(&command, size);
                started
            }
        }
    }

    /// Sets the size of the process's terminal to that of the caller's.
    fn resize(&self, client: &Client) {
        if let Some(size) = self.size() {
            drop(client.send(Command::WinSize(size)));
        }
    }

    /// The size of the caller's terminal; `None` if the process has no terminal.
    fn size(&self) -> Option<WinSize> {
        let (row, column) = terminal::size().filter(|_| self.tty)?;
        Some(WinSize { container: self.container.clone(), process: self.process.clone(), row, column })
    }
}

/// The status that a shell reports for a process that this signal ended.
pub fn status_of(signal: Signal) -> u8 {
    128 + u8::try_from(signal.get()).unwrap_or_default()
}
