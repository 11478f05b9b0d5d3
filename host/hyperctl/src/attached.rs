//! A process of a guest with hyperctl's standard streams, signals and terminal.

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

/// A process runs as long as it does; this is how often the wait for it begins again.
const WAIT: Duration = Duration::from_secs(24 * 3600);
/// What asks hyperctl to end where it cannot be the process's.
const ENDING: [Signal; 4] = [Signal::HUP, Signal::INT, Signal::QUIT, Signal::TERM];
/// Who asks for the end by one of these so often wants out, whatever the process makes of it; docker counts
/// the same.
const INSISTING: [Signal; 2] = [Signal::INT, Signal::TERM];
const LAST_SIGNAL: u32 = 3;
/// What a terminal, or a shell that has one, sends to the whole group of a job.
const FOR_THE_GROUP: [Signal; 4] = [Signal::CONT, Signal::INT, Signal::QUIT, Signal::TSTP];

/// Who it is.
#[derive(Debug, Clone)]
pub struct Target {
    /// What a person calls it.
    pub what: &'static str,
    pub container: ContainerId,
    pub process: ProcessId,
    /// It has a terminal.
    pub tty: bool,
    /// hyperctl's standard input is its own.
    pub interactive: bool,
    /// It is its container's init.
    pub is_init: bool,
}

/// How it ended, or that hyperctl leaves it.
pub enum End {
    /// It has exited with this status, or could not be run.
    Done(Result<u8, Failure>),
    /// Its guest is gone.
    GuestEnded(ExitStatus),
    /// hyperctl is told to end by this signal, or has nobody to write for any more (SIGPIPE); the process was
    /// asked for, and may run, if there is somebody to say that to.
    Left(Signal, Option<Arc<Client>>),
}

/// The queue of whoever runs a process. Before any other thread is started.
pub fn queue(tty: bool, interactive: bool) -> Result<(Sender<Event>, Receiver<Event>), Fault> {
    let reads_terminal = interactive && stdin().is_terminal();
    events::queue(Signals::Program { tty, reads_terminal })
}

/// Has `attend` start a process by a command, passes its streams on and waits for its end; its exit status.
pub fn run(
    target: &Target,
    process: &Process,
    start: Command,
    client: &Arc<Client>,
    terminal: &Terminal,
    events: &Sender<Event>,
) -> Result<u8, Failure> {
    // Asked for before anything can come.
    let streams = client.streams(process.stdio, process.stderr);
    match (target.tty, target.interactive) {
        (true, true) => terminal.make_raw()?,
        (true, false) => terminal.pass_output()?,
        (false, _) => {}
    }
    let (sent, start_sent) = sync_channel(1);
    // Whoever waits for the process is there until Done, or has left without starting it.
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
        // The stream's end came before the event; only a panic is lost here.
        let _ = pump.join();
    }
    Ok(status)
}

/// A call that failed, as a failure of hyperctl.
pub fn failed(doing: &'static str, to: &'static str) -> impl Fn(CallError) -> Failure {
    move |error| Failure {
        fault: Fault::new(doing, to, error.to_string()),
        lost: matches!(error, CallError::Broken(_)),
    }
}

/// Waits for the end, and passes signals and sizes on until then: also to a process that is still being
/// started, for the guest keeps them behind the start. The start is sent from here, so that whoever leaves
/// knows whether it was.
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
                // It waits for it, unless it has panicked.
                let _ = sent.send(target.start(&connected, command));
                for signal in std::mem::take(&mut early) {
                    drop(target.signal(&connected, signal));
                }
                client = Some(connected);
            }
            Event::Signal(signal) => {
                asked += u32::from(INSISTING.contains(&signal));
                // With a terminal the process has its keys; what they would send is hyperctl's if it is sent
                // to hyperctl.
                let is_own = ENDING.contains(&signal) && (target.tty || client.is_none());
                if is_own || asked >= LAST_SIGNAL {
                    return Ok(End::Left(signal, client));
                }
                match client.as_deref() {
                    Some(client) if target.tty && signal == Signal::WINCH => target.resize(client),
                    Some(client) => drop(target.signal(client, signal)),
                    // The size is asked for when there is a process.
                    None if target.tty && signal == Signal::WINCH => {}
                    None => drop(early.insert(signal)),
                }
            }
        }
    }
}

impl Target {
    /// Sends it a signal: as docker does to an init alone, which says itself what its children get, but what
    /// comes of keys to its group. Of other processes the protocol knows the group only. The reply is
    /// nobody's business: it may have ended.
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

    /// Starts it, with a terminal as large as the caller's. The reply to the size is nobody's business.
    fn start(&self, client: &Client, command: Command) -> Pending {
        match self.size() {
            None => client.send(command),
            Some(size) => {
                let [started, _] = client.send_with_size(&command, size);
                started
            }
        }
    }

    /// Makes its terminal as large as the caller's.
    fn resize(&self, client: &Client) {
        if let Some(size) = self.size() {
            drop(client.send(Command::WinSize(size)));
        }
    }

    /// The size of the caller's terminal, for a program that has one.
    fn size(&self) -> Option<WinSize> {
        let (row, column) = terminal::size().filter(|_| self.tty)?;
        Some(WinSize { container: self.container.clone(), process: self.process.clone(), row, column })
    }
}

/// A shell's status of what a signal ended.
pub fn status_of(signal: Signal) -> u8 {
    128 + u8::try_from(signal.get()).unwrap_or_default()
}
