//! `hyperctl exec`: one more process in a container of a guest that is up, and its exit status.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use hyperinit_client::Client;
use hyperinit_protocol::command::{Command, ExecCmd};
use hyperinit_protocol::fault::Fault;
use hyperinit_protocol::ids::{ContainerId, ProcessId, Signal};
use hyperinit_protocol::spec::Process;

use super::attached::{self, End, Target};
use super::cli::Exec;
use super::events::{Event, Failure};
use super::guest;
use super::terminal::Terminal;

/// How long the guest may take to hear that hyperctl leaves.
const GOODBYE: Duration = Duration::from_secs(2);

/// Runs a program in a container that is there.
pub fn exec(options: &Exec) -> Result<ExitCode, Fault> {
    let (events, queue) = attached::queue(options.process.tty, options.process.interactive)?;
    let process = process(options)?;
    let container = ContainerId::try_from(options.container.clone())
        .map_err(|why| Fault::new("naming", "the container", why))?;
    let target = Target {
        what: "the program",
        container,
        process: process.id.clone(),
        tty: process.terminal,
        interactive: options.process.interactive,
        is_init: false,
    };
    let terminal = Terminal::default();
    let _restore = terminal.restore_later();
    let (whose, directory) = (target.clone(), options.dir.clone());
    std::thread::spawn(move || {
        let status = visit(&whose, &directory, &process, &terminal, &events);
        // Nobody waits any more: hyperctl is ending.
        let _ = events.send(Event::Done(status));
    });
    let status = match attached::attend(&target, &queue)? {
        End::Done(result) => result.map_err(|failure| failure.fault)?,
        // It is not this hyperctl's guest: the connection breaks instead.
        End::GuestEnded(status) => {
            return Err(Fault::new("running", "the program", format!("its guest ended ({status})")));
        }
        End::Left(signal, running) => {
            if let Some(client) = running {
                leave(&target, &client, signal);
            }
            attached::status_of(signal)
        }
    };
    Ok(ExitCode::from(status))
}

/// From the connection, for which others may have to leave, to the program's exit status.
fn visit(
    target: &Target,
    directory: &Path,
    process: &Process,
    terminal: &Terminal,
    events: &Sender<Event>,
) -> Result<u8, Failure> {
    guest::wait_for_sockets(directory);
    let client = Arc::new(Client::visit(directory)?);
    client.introduce();
    let start = ExecCmd { container: target.container.clone(), process: Box::new(process.clone()) };
    attached::run(target, process, Command::ExecCmd(start), &client, terminal, events)
}

/// What a program of this machine would get in its place: SIGPIPE for what it writes, SIGHUP when its
/// terminal goes; one that heeds no signal is killed.
fn leave(target: &Target, client: &Client, signal: Signal) {
    let signal = match signal {
        Signal::PIPE => Signal::PIPE,
        _ if target.tty => Signal::HUP,
        _ => Signal::KILL,
    };
    // It may have ended, and so may the guest.
    let _ = target.signal(client, signal).wait(GOODBYE);
}

/// EXECCMD's process, with names that nobody else's has.
fn process(options: &Exec) -> Result<Process, Fault> {
    // Streams are numbers of 64 bits that the host chooses; each hasher has random keys of its own.
    let random = RandomState::new().build_hasher().finish() | 1 << 63;
    let (stdio, stderr) = (random & !1, random | 1);
    let id = ProcessId::try_from(format!("hyperctl-{random:x}"))
        .map_err(|why| Fault::new("naming", "the process", why))?;
    options.process.process(id, (stdio, stderr), &options.command)
}
