//! `hyperctl run`: one guest, one pod, one container, and its exit status.
//!
//! One thread speaks with the guest, from the first connection to DESTROYPOD's reply; this one waits for what it comes
//! to, for signals, and for the guest's own end.

use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use hyperinit::client::{CallError, Client};
use hyperinit::command::{Command, SignalProcess, WinSize};
use hyperinit::fault::Fault;
use hyperinit::ids::{self, ContainerId, ProcessId};
use hyperinit::spec::{Container, Pod, Process};
use nix::sys::signal::Signal;

use super::cli::{GuestOptions, Run};
use super::events::{self, Event, Failure};
use super::guest::{Guest, SHARE_TAG};
use super::progress::Progress;
use super::terminal::{self, Terminal};
use super::up::{died, plan};
use super::{local, network, places, pump, volumes};

/// How long a guest may take to come up; an emulated one on a busy machine takes many seconds.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// The kernel tells of a dead guest's sockets before its parent hears of its end.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// A container runs as long as it does; this is how often the wait for it begins again.
const WAIT: Duration = Duration::from_secs(24 * 3600);
/// A person who asks this often wants out, whatever the container makes of it.
const LAST_SIGNAL: u32 = 3;
/// The container's id, and its pod's hostname.
const NAME: &str = "hyperinit";
/// The streams' numbers: the pod has one process.
const STDIO: u64 = 1;
const STDERR: u64 = 2;

/// Runs a program in a container.
pub fn run(options: &Run) -> Result<ExitCode, Fault> {
    use Signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
    let (events, queue) = events::queue(&[SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH])?;
    if options.local {
        // Before the directory that only root's guest would use is made.
        local::need_root()?;
    }
    let rootfs = places::ROOTFS.find(options.rootfs.as_deref())?;
    let scratch = tempfile::Builder::new().prefix("hyperctl-").tempdir();
    let scratch = scratch.map_err(|error| Fault::io("making", "a temporary directory", &error))?;
    let share = scratch.path().join("share");
    let disks = (!options.local).then_some(options.options.disk.len());
    let volumes = volumes::plan(&options.volume, disks, &rootfs, &share)?;
    let mut container = container(options)?;
    volumes.say(&mut container);
    let guest = GuestOptions { drives: volumes.drives.clone(), ..options.options.clone() };
    let mut plan = plan(options.local, scratch.path(), volumes.share(&rootfs, &share), &guest)?;
    plan.binds = volumes.binds;
    let terminal = Terminal::default();
    let _restore = terminal.restore_later();
    let ended = events.clone();
    let guest = Guest::start(plan, move |status| drop(ended.send(Event::GuestEnded(status))))?;
    let session = Session {
        directory: scratch.path().to_owned(),
        pod: pod(options),
        container,
        interactive: options.interactive,
        terminal,
        events: events.clone(),
    };
    // A local guest is there before a person has read a line about it.
    let progress = (!options.local).then(|| Progress::start("booting the VM"));
    std::thread::spawn(move || {
        let status = session.whole(progress);
        // Nobody waits any more: hyperctl is ending.
        let _ = events.send(Event::Done(status));
    });
    let status = attend(&queue, options.tty, scratch.path());
    drop(guest);
    status.map(ExitCode::from)
}

/// STARTPOD's payload.
fn pod(options: &Run) -> Pod {
    let mut pod = Pod { hostname: NAME.to_owned(), share_dir: SHARE_TAG.to_owned(), ..Pod::default() };
    network::set_up(&mut pod, &options.options.net, &options.options.publish, &options.dns);
    pod
}

/// NEWCONTAINER's payload, without its volumes. The share is the root filesystem itself, so there is no way to it.
fn container(options: &Run) -> Result<Container, Fault> {
    let (user, group) = options.user.split_once(':').unwrap_or((&options.user, ""));
    let process = Process {
        id: process_id()?,
        user: user.to_owned(),
        group: group.to_owned(),
        additional_groups: Vec::new(),
        terminal: options.tty,
        stdio: STDIO,
        stderr: if options.tty { 0 } else { STDERR },
        args: options.command.clone(),
        envs: options.env.clone(),
        workdir: options.workdir.clone(),
        rlimits: Vec::new(),
    };
    Ok(Container {
        id: container_id()?,
        rootfs: String::new(),
        image: String::new(),
        addr: String::new(),
        fstype: String::new(),
        volumes: Vec::new(),
        fsmap: Vec::new(),
        sysctl: Default::default(),
        process,
        initialize: true,
        read_only: options.read_only,
        restart_policy: String::new(),
        ports: Vec::new(),
    })
}

fn container_id() -> Result<ContainerId, Fault> {
    ContainerId::try_from(NAME.to_owned()).map_err(|why| Fault::new("naming", "the container", why))
}

fn process_id() -> Result<ProcessId, Fault> {
    ProcessId::try_from("init".to_owned()).map_err(|why| Fault::new("naming", "the process", why))
}

/// What the thread that speaks with the guest has.
struct Session {
    directory: std::path::PathBuf,
    pod: Pod,
    container: Container,
    interactive: bool,
    terminal: Terminal,
    events: Sender<Event>,
}

impl Session {
    /// From the connection to the pod's end; the container's exit status.
    fn whole(self, progress: Option<Progress>) -> Result<u8, Failure> {
        let client = Arc::new(Client::connect_within(&self.directory, BOOT_TIMEOUT, || Ok(()))?);
        client.ready(BOOT_TIMEOUT).map_err(failed("waiting for", "the guest"))?;
        client.call(Command::StartPod(Box::new(self.pod.clone()))).map_err(failed("starting", "the pod"))?;
        drop(progress);
        let status = self.container(&client)?;
        client.call(Command::DestroyPod).map_err(failed("ending", "the pod"))?;
        Ok(status)
    }

    /// Starts the container, passes its streams on and waits for its end.
    fn container(&self, client: &Arc<Client>) -> Result<u8, Failure> {
        let Session { container, events, .. } = self;
        let (id, process) = (&container.id, &container.process);
        // Asked for before anything can come.
        let streams = client.streams(process.stdio, process.stderr);
        if process.terminal && self.interactive {
            self.terminal.make_raw()?;
        }
        client
            .call(Command::NewContainer(Box::new(container.clone())))
            .map_err(failed("starting", "the container"))?;
        // Whoever waits for it is there until Done.
        let _ = events.send(Event::Running(Arc::clone(client)));
        if self.interactive {
            pump::stdin(streams.stdin);
        } else if !process.terminal {
            streams.stdin.close().map_err(failed("closing", "the container's stdin"))?;
        }
        let out = pump::output(streams.stdout, io::stdout(), events.clone());
        let err = streams.stderr.map(|stderr| pump::output(stderr, io::stderr(), events.clone()));
        let status = loop {
            match client.finished(id, &process.id, WAIT) {
                Err(CallError::Late(_)) => {}
                finished => break finished.map_err(failed("waiting for", "the container"))?,
            }
        };
        for pump in [Some(out), err].into_iter().flatten() {
            // The stream's end came before the event; only a panic is lost here.
            let _ = pump.join();
        }
        Ok(status)
    }
}

fn failed(doing: &'static str, to: &'static str) -> impl Fn(CallError) -> Failure {
    move |error| Failure {
        fault: Fault::new(doing, to, error.to_string()),
        lost: matches!(error, CallError::Broken(_)),
    }
}

/// Waits for the end, and passes signals and sizes on until then.
fn attend(queue: &Receiver<Event>, tty: bool, directory: &Path) -> Result<u8, Fault> {
    let mut client: Option<Arc<Client>> = None;
    let mut signals = 0;
    loop {
        let event = queue.recv().map_err(|_| Fault::new("waiting for", "the container", "nobody is left"))?;
        match event {
            Event::Done(Ok(status)) => return Ok(status),
            Event::Done(Err(failure)) => return Err(why(failure, queue, directory)),
            Event::GuestEnded(status) => return Err(died(directory, status)),
            Event::Unread => return Ok(128 + signal_number(Signal::SIGPIPE)),
            Event::Running(running) => {
                client = Some(running);
                resize(client.as_deref().filter(|_| tty));
            }
            Event::Signal(Signal::SIGWINCH) => resize(client.as_deref().filter(|_| tty)),
            // With a terminal the keys are the container's, and signals are hyperctl's.
            Event::Signal(signal) => {
                signals += 1;
                match client.as_deref().filter(|_| !tty && signals < LAST_SIGNAL) {
                    Some(client) => forward(client, signal),
                    None => return Ok(128 + signal_number(signal)),
                }
            }
        }
    }
}

/// A lost connection may only be the echo of the guest's end.
fn why(failure: Failure, queue: &Receiver<Event>, directory: &Path) -> Fault {
    while failure.lost
        && let Ok(event) = queue.recv_timeout(END_TIMEOUT)
    {
        if let Event::GuestEnded(status) = event {
            return died(directory, status);
        }
    }
    failure.fault
}

fn signal_number(signal: Signal) -> u8 {
    u8::try_from(signal as i32).unwrap_or_default()
}

/// Sends the container's process group a signal; the reply is nobody's business.
fn forward(client: &Client, signal: Signal) {
    if let (Ok(container), Ok(process), Ok(signal)) =
        (container_id(), process_id(), ids::Signal::try_from(i64::from(signal as i32)))
    {
        drop(client.send(Command::SignalProcess(SignalProcess { container, process, signal })));
    }
}

/// Makes the container's terminal as large as the caller's.
fn resize(client: Option<&Client>) {
    if let (Some(client), Some((row, column)), Ok(container), Ok(process)) =
        (client, terminal::size(), container_id(), process_id())
    {
        drop(client.send(Command::WinSize(WinSize { container, process, row, column })));
    }
}
