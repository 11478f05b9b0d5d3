//! The state of the pod, the containers and the processes, and how far each has come.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::replies::Ticket;
use crate::fault::Fault;
use crate::ids::{ContainerId, Pid, ProcessId, StreamId};
use crate::spec;

/// The pod.
#[derive(Debug)]
pub(super) enum Pod {
    /// There is no pod.
    None,
    /// STARTPOD is under way; with a fault, it is being undone.
    Starting {
        ticket: Ticket,
        spec: Box<spec::Pod>,
        init: Option<Pid>,
        /// The step that a helper works on; none while the pod init is being killed.
        step: Option<PodStep>,
        fault: Option<Fault>,
    },
    /// The pod runs. `opening` holds what is left of an old-style STARTPOD, until all its containers have
    /// started.
    Running { hostname: String, init: Pid, opening: Option<Opening> },
    /// The pod is being taken down. `failed` is the STARTPOD to answer, and its fault, if not all its
    /// containers had been started.
    Ending { init: Option<Pid>, step: PodEnd, failed: Option<(Ticket, Fault)> },
}

impl Pod {
    /// The pod init's pid, while it lives.
    pub(super) fn init(&self) -> Option<Pid> {
        match self {
            Pod::None => None,
            Pod::Starting { init, .. } | Pod::Ending { init, .. } => *init,
            Pod::Running { init, .. } => Some(*init),
        }
    }
}

/// A STARTPOD that carries its containers (old style). They start one after the other; the reply follows the
/// last.
#[derive(Debug)]
pub(super) struct Opening {
    /// The STARTPOD command to answer.
    pub(super) ticket: Ticket,
    /// The containers whose start has not begun.
    pub(super) rest: VecDeque<spec::Container>,
}

/// The party that is told the result of a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// The host, which sent the command.
    Host(Ticket),
    /// The STARTPOD that carried the container.
    Pod,
}

/// How far the end of a pod has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PodEnd {
    /// Its containers are ending.
    Containers,
    /// The pod init was killed.
    Init,
    /// mountd unmounts the pod's files.
    Files,
}

/// DESTROYPOD is under way: the guest goes down.
#[derive(Debug)]
pub(super) struct Leaving {
    /// The DESTROYPOD commands, which are answered once everything is done.
    pub(super) tickets: Vec<Ticket>,
    /// When the processes that are left are killed.
    pub(super) kill_at: Duration,
    /// When output that the host does not read is given up.
    pub(super) abandon_at: Duration,
    /// When everything is given up.
    pub(super) give_up_at: Duration,
    /// How far it has come.
    pub(super) step: LeavingStep,
}

/// How far the guest's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeavingStep {
    /// SIGTERM was sent to the processes.
    Term,
    /// SIGKILL was sent to the processes.
    Killed,
    /// The unread output of the processes was given up.
    Abandoned,
    /// streamd was asked to write out what it holds.
    Flushing,
    /// The ACK has been sent. mountd is asked to sync when it has left, at the latest at `until`.
    Said { until: Duration },
    /// mountd syncs. The power goes off when it has, at the latest at `until`.
    Syncing { until: Duration },
}

/// A container that init knows.
#[derive(Debug)]
pub(super) struct Container {
    /// How far it has come.
    pub(super) state: ContainerState,
    /// The id of its init process; none for the debugging door, which is no container.
    pub(super) init: Option<ProcessId>,
    /// Whether the id was that of an exited container. If this start fails, that container is known as exited
    /// again.
    pub(super) reuses: bool,
    /// The host ports mapped to it; empty in a pod without white lists.
    pub(super) ports: Vec<spec::Port>,
    /// Whether these ports are open, or netd has been asked to open them.
    pub(super) open: bool,
    /// Whether the share, or a part of it, is mounted in it.
    pub(super) shares: bool,
    /// Its unfinished processes, the init among them.
    pub(super) processes: BTreeMap<ProcessId, Process>,
}

impl Container {
    /// The entry that stands for the debugging door among the containers. It runs as long as the guest.
    pub(super) fn door() -> Container {
        let (ports, processes) = (Vec::new(), BTreeMap::new());
        let state = ContainerState::Running;
        Container { state, init: None, reuses: false, ports, open: false, shares: true, processes }
    }

    /// Whether this entry is the debugging door.
    pub(super) fn is_door(&self) -> bool {
        self.init.is_none()
    }
}

/// How far a container has come.
#[derive(Debug)]
pub(super) enum ContainerState {
    /// mountd builds its root; until `until` its disk may still be plugged. The start of its init follows.
    Preparing { asker: Asker, container: Box<spec::Container>, until: Duration },
    /// execd starts its init.
    Starting { asker: Asker },
    /// What was built is being undone. The fault is what the host is told afterwards.
    Undoing { asker: Asker, fault: Fault },
    /// Its init was started and has not exited.
    Running,
    /// Its init has exited.
    Ending(ContainerEnd),
    /// Everything of it is cleaned up; its id may be used again.
    Exited,
}

/// How far the end of a container has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ContainerEnd {
    /// mountd kills the processes that are left in it.
    Killing,
    /// Its processes other than the init are ending.
    Processes,
    /// The output of its init is being sent.
    Output,
    /// mountd unmounts its files.
    Files,
}

/// A process that is not finished.
#[derive(Debug)]
pub(super) struct Process {
    /// Its stdio stream.
    pub(super) stdio: StreamId,
    /// Its stderr stream, if it has one.
    pub(super) stderr: Option<StreamId>,
    /// Whether it has a tty.
    pub(super) terminal: bool,
    /// How many WINSIZE requests have to be answered before it may execute.
    pub(super) resizing: u32,
    /// How far it has come.
    pub(super) state: ProcessState,
}

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProcessState {
    /// execd starts it.
    Starting(Asker),
    /// It exists. It executes when the commands that the host sent for it meanwhile are done.
    Held(Pid),
    /// It executes.
    Running(Pid),
    /// It was reaped; its output has not all left yet.
    Exited(u8),
    /// Its output has left; what it wrote to the share may not have reached the host yet.
    Syncing(u8),
}

impl ProcessState {
    /// Its pid, if the process exists.
    pub(super) fn pid(self) -> Option<Pid> {
        match self {
            ProcessState::Held(pid) | ProcessState::Running(pid) => Some(pid),
            ProcessState::Starting(_) | ProcessState::Exited(_) | ProcessState::Syncing(_) => None,
        }
    }

    /// Its exit status, if it was reaped.
    pub(super) fn status(self) -> Option<u8> {
        match self {
            ProcessState::Exited(status) | ProcessState::Syncing(status) => Some(status),
            ProcessState::Starting(_) | ProcessState::Held(_) | ProcessState::Running(_) => None,
        }
    }
}

/// What a request to a helper is for; it decides what goes on when the request is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A step of STARTPOD.
    Pod(PodStep),
    /// A step of NEWCONTAINER.
    Container(ContainerId, ContainerStep),
    /// The only step of EXECCMD.
    Exec(ContainerId, ProcessId),
    /// The only or the last step of a command.
    Command(Ticket),
    /// WINSIZE for a process that is held until the answer.
    Resized(Ticket, ContainerId, ProcessId),
    /// SETUPINTERFACE: the bus is scanned for the interface before it is set up.
    Rescanned(Ticket, Box<spec::Interface>),
    /// READFILE: the next part of the file being read.
    Read,
    /// The end of a container: mountd kills what is left in it.
    KillLeft(ContainerId),
    /// The end of a process: its output leaves.
    Output(ContainerId, ProcessId),
    /// The end of processes: what they wrote to the share reaches its host.
    ShareSynced,
    /// The end of a container: mountd unmounts its files.
    RemoveFiles(ContainerId),
    /// The end of the pod: mountd unmounts its files.
    DestroyFiles,
    /// The last step of undoing a STARTPOD that failed, and the fault that the host is told afterwards.
    Failed(Ticket, Box<Fault>),
    /// The end of the guest: streamd writes out what it holds.
    Flush,
    /// The end of the guest: mountd syncs.
    Sync,
    /// A new execd enters the pod, or takes over the outputs that were kept.
    Rejoin,
    /// execd sends the processes' descriptors to a new streamd, whose pid this is.
    Resend(Pid),
    /// A check whether a helper is alive.
    Ping,
    /// Nothing waits for the answer.
    Nothing,
}

impl Purpose {
    /// Whether a helper that has just come up needs the request before all others, or the request finds out
    /// whether the others will ever be answered.
    pub(super) fn comes_first(&self) -> bool {
        matches!(self, Purpose::Rejoin | Purpose::Ping)
    }
}

/// The steps of STARTPOD, in order; the last two undo the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PodStep {
    Loopback,
    /// If the pod has white lists. It comes before any link is up that a packet could come in by.
    Ports,
    /// If the pod has interfaces: they may have just been plugged.
    Rescan,
    Interfaces,
    Routes,
    Files,
    Init,
    Join,
    Undo,
    UndoNetwork,
}

/// The steps of NEWCONTAINER, in order; the last undoes the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ContainerStep {
    Files,
    /// If ports are mapped. It comes before the init, so a fault here leaves no process running.
    Ports,
    Init,
    Undo,
}
