//! `hyperctl exec`: runs a further process in a container of a running guest, and exits with its status.

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

/// How long to wait for the guest's reply to the signal that says goodbye.
const GOODBYE: Duration = Duration::from_secs(2);

/// Runs a program in an existing container.
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
        // If hyperctl is ending, the queue no longer has a receiver.
        let _ = events.send(Event::Done(status));
    });
    let status = match attached::attend(&target, &queue)? {
        End::Done(result) => result.map_err(|failure| failure.fault)?,
        // Not sent here: the guest is not this hyperctl's, so its end is seen as a broken connection.
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

/// Connects, for which other hosts may have to leave first, runs the program, and returns its exit status.
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

/// Sends the program the signal that a local one would get: SIGPIPE if its output is not read, SIGHUP if its
/// terminal is gone. Otherwise it is killed.
fn leave(target: &Target, client: &Client, signal: Signal) {
    let signal = match signal {
        Signal::PIPE => Signal::PIPE,
        _ if target.tty => Signal::HUP,
        _ => Signal::KILL,
    };
    // The program may have ended, and so may the guest.
    let _ = target.signal(client, signal).wait(GOODBYE);
}

/// EXECCMD's process, with an id and stream numbers that no other host uses.
fn process(options: &Exec) -> Result<Process, Fault> {
    // Streams are 64-bit numbers that the host chooses; each hasher has random keys of its own.
    let random = RandomState::new().build_hasher().finish() | 1 << 63;
    let (stdio, stderr) = (random & !1, random | 1);
    let id = ProcessId::try_from(format!("hyperctl-{random:x}"))
        .map_err(|why| Fault::new("naming", "the process", why))?;
    options.process.process(id, (stdio, stderr), &options.command)
}
