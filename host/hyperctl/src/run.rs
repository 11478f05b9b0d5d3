//! `hyperctl run`: one guest, one pod, one container, and its exit status.
//!
//! One thread speaks with the guest, from the first connection to DESTROYPOD's reply; this one waits for what
//! it comes to, for signals, and for the guest's own end.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use hyperinit_client::Client;
use hyperinit_protocol::command::Command;
use hyperinit_protocol::fault::Fault;
use hyperinit_protocol::ids::{ContainerId, ProcessId};
use hyperinit_protocol::spec::{Container, Pod};

use super::attached::{self, End, Target, failed};
use super::cli::{GuestOptions, Run};
use super::events::{Event, Failure};
use super::guest::{Guest, SHARE_TAG};
use super::progress::Progress;
use super::scratch::Scratch;
use super::terminal::Terminal;
use super::up::{died, plan};
use super::{local, network, places, volumes};

/// How long a guest may take to come up; an emulated one on a busy machine takes many seconds.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// A guest's end and what it said last are heard by two threads, on a busy machine one well after the other.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// The container's id.
const NAME: &str = "hyperinit";
/// The streams' numbers: the pod has one process.
const STDIO: u64 = 1;
const STDERR: u64 = 2;

/// Runs a program in a container.
pub fn run(options: &Run) -> Result<ExitCode, Fault> {
    let (events, queue) = attached::queue(options.process.tty, options.process.interactive)?;
    if options.local {
        // Before the directory that only root's guest would use is made.
        local::need_root()?;
    }
    let rootfs = places::ROOTFS.find(options.rootfs.as_deref())?;
    let scratch = Scratch::make()?;
    let share = scratch.path().join("share");
    let disks = (!options.local).then_some(options.options.disk.len());
    let volumes = volumes::plan(&options.volume, disks, &rootfs, &share)?;
    let mut container = container(options)?;
    volumes.say(&mut container);
    container.volumes.extend(options.tmpfs.iter().map(|at| volumes::in_memory(at)));
    let (drives, binds) = (volumes.drives.clone(), volumes.binds.clone());
    let guest = GuestOptions { drives, binds, ..options.options.clone() };
    let plan = plan(options.local, scratch.path(), volumes.share(&rootfs, &share), &guest)?;
    let terminal = Terminal::default();
    let _restore = terminal.restore_later();
    let ended = events.clone();
    let guest = Guest::start(plan, move |status| drop(ended.send(Event::GuestEnded(status))))?;
    let target = Target {
        what: "the container",
        container: container.id.clone(),
        process: container.process.id.clone(),
        tty: options.process.tty,
        interactive: options.process.interactive,
        is_init: true,
    };
    let session = Session {
        target: target.clone(),
        directory: scratch.path().to_owned(),
        pod: pod(options),
        container,
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
    let end = attached::attend(&target, &queue);
    let status = outcome(end?, &queue, scratch.path());
    drop(guest);
    status.map(ExitCode::from)
}

/// The exit status that an end comes to.
fn outcome(end: End, queue: &Receiver<Event>, directory: &Path) -> Result<u8, Fault> {
    match end {
        End::Done(result) => result.map_err(|failure| why(failure, queue, directory)),
        // It ends in order once it has answered DESTROYPOD: that answer may still be on its way.
        End::GuestEnded(status) if status.success() => {
            last_word(queue).ok_or_else(|| died(directory, status))
        }
        End::GuestEnded(status) => Err(died(directory, status)),
        // The guest ends with hyperctl.
        End::Left(signal, _) => Ok(attached::status_of(signal)),
    }
}

/// The container's exit status, if its guest had told it.
fn last_word(queue: &Receiver<Event>) -> Option<u8> {
    loop {
        match queue.recv_timeout(END_TIMEOUT).ok()? {
            Event::Done(result) => return result.ok(),
            Event::Start { .. } | Event::Unread | Event::GuestEnded(_) | Event::Signal(_) => {}
        }
    }
}

/// STARTPOD's payload.
fn pod(options: &Run) -> Pod {
    let mut pod =
        Pod { hostname: options.hostname.clone(), share_dir: SHARE_TAG.to_owned(), ..Pod::default() };
    network::set_up(&mut pod, &options.options.net, &options.options.publish, &options.dns);
    pod
}

/// NEWCONTAINER's payload, without its volumes. The share is the root filesystem itself, so there is no way
/// to it.
fn container(options: &Run) -> Result<Container, Fault> {
    let mut process = options.process.process(process_id()?, (STDIO, STDERR), &options.command)?;
    process.additional_groups.clone_from(&options.group_add);
    process.rlimits.clone_from(&options.ulimit);
    Ok(Container {
        id: container_id()?,
        rootfs: String::new(),
        image: String::new(),
        addr: String::new(),
        fstype: String::new(),
        volumes: Vec::new(),
        fsmap: Vec::new(),
        sysctl: options.sysctl.iter().cloned().collect(),
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
    target: Target,
    directory: std::path::PathBuf,
    pod: Pod,
    container: Container,
    terminal: Terminal,
    events: Sender<Event>,
}

impl Session {
    /// From the connection to the pod's end; the container's exit status.
    fn whole(self, progress: Option<Progress>) -> Result<u8, Failure> {
        let client = Arc::new(Client::connect_within(&self.directory, BOOT_TIMEOUT, || Ok(()))?);
        client.ready(BOOT_TIMEOUT).map_err(failed("waiting for", "the guest"))?;
        client.introduce();
        client.call(Command::StartPod(Box::new(self.pod.clone()))).map_err(failed("starting", "the pod"))?;
        drop(progress);
        let Session { container, events, .. } = &self;
        let start = Command::NewContainer(Box::new(container.clone()));
        let status = attached::run(&self.target, &container.process, start, &client, &self.terminal, events)?;
        client.call(Command::DestroyPod).map_err(failed("ending", "the pod"))?;
        Ok(status)
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

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;
    use std::sync::mpsc::channel;

    use hyperinit_protocol::ids::Signal;

    use super::*;

    #[test]
    fn a_guest_whose_end_is_heard_before_its_last_word_has_said_it_all_the_same() {
        let (events, queue) = channel();
        let ended = || End::GuestEnded(ExitStatus::from_raw(0));
        events.send(Event::Signal(Signal::WINCH)).unwrap();
        events.send(Event::Done(Ok(9))).unwrap();
        assert_eq!(outcome(ended(), &queue, Path::new("nowhere")).unwrap(), 9);
        // One that has not is lost.
        let lost = failed("waiting for", "the guest")(hyperinit_client::CallError::Broken(String::new()));
        events.send(Event::Done(Err(lost))).unwrap();
        let fault = outcome(ended(), &queue, Path::new("nowhere")).unwrap_err().to_string();
        assert!(fault.contains("it ended (exit status: 0)"), "{fault}");
        // Nobody waits for the word of one that crashed.
        events.send(Event::Done(Ok(9))).unwrap();
        let crashed = End::GuestEnded(ExitStatus::from_raw(9));
        outcome(crashed, &queue, Path::new("nowhere")).unwrap_err();
    }
}
