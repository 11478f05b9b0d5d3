//! The nouns: pod, containers, processes, and how far each has come.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::replies::Ticket;
use crate::fault::Fault;
use crate::ids::{ContainerId, Pid, ProcessId, StreamId};
use crate::spec;

/// The pod.
#[derive(Debug)]
pub(super) enum Pod {
    /// There is none.
    None,
    /// STARTPOD is under way; with a fault it is being undone.
    Starting {
        ticket: Ticket,
        spec: Box<spec::Pod>,
        init: Option<Pid>,
        /// What a helper works on; none while the pod init is awaited to die.
        step: Option<PodStep>,
        fault: Option<Fault>,
    },
    /// It lives. Of an old-style pod that is being started, the containers that are still to come.
    Running { hostname: String, init: Pid, opening: Option<Opening> },
    /// It is being taken down; with a fault because its containers could not all be started.
    Ending { init: Option<Pid>, step: PodEnd, failed: Option<(Ticket, Fault)> },
}

impl Pod {
    /// The pod init, for as long as it lives.
    pub(super) fn init(&self) -> Option<Pid> {
        match self {
            Pod::None => None,
            Pod::Starting { init, .. } | Pod::Ending { init, .. } => *init,
            Pod::Running { init, .. } => Some(*init),
        }
    }
}

/// A STARTPOD that carries its containers (old style): they start one after the other, and it is answered
/// then.
#[derive(Debug)]
pub(super) struct Opening {
    /// STARTPOD.
    pub(super) ticket: Ticket,
    /// Those that have not been begun.
    pub(super) rest: VecDeque<spec::Container>,
}

/// Who is told how a start went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// The host, which has asked for it.
    Host(Ticket),
    /// STARTPOD, which carried the container.
    Pod,
}

/// How far the end of a pod has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PodEnd {
    /// Its containers end.
    Containers,
    /// Its pod init was killed.
    Init,
    /// mountd unmounts.
    Files,
}

/// DESTROYPOD: the guest goes down.
#[derive(Debug)]
pub(super) struct Leaving {
    /// Who is told once everything is done.
    pub(super) tickets: Vec<Ticket>,
    /// When what is left is killed.
    pub(super) kill_at: Duration,
    /// When output that nobody reads is given up.
    pub(super) abandon_at: Duration,
    /// When everything is given up.
    pub(super) give_up_at: Duration,
    /// How far it has come.
    pub(super) step: LeavingStep,
}

/// How far the guest's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LeavingStep {
    /// Processes were asked to end.
    Term,
    /// Processes were killed.
    Killed,
    /// What they wrote is given up.
    Abandoned,
    /// streamd was asked to write what it has.
    Flushing,
    /// The ACK has been sent; mountd is asked to sync when it has left, or then.
    Said { until: Duration },
    /// mountd syncs; the power goes off when it has, or then.
    Syncing { until: Duration },
}

/// A container that is known.
#[derive(Debug)]
pub(super) struct Container {
    /// How far it has come.
    pub(super) state: ContainerState,
    /// The id of its init; none of the debugging door, which is no container.
    pub(super) init: Option<ProcessId>,
    /// Whether its id was one's that has exited, which is still known if this one cannot be started.
    pub(super) reuses: bool,
    /// The ports that are mapped to it; none of a pod without white lists.
    pub(super) ports: Vec<spec::Port>,
    /// Whether they are open, or about to be.
    pub(super) open: bool,
    /// Whether it has the share, or a part of it.
    pub(super) shares: bool,
    /// Its processes that are not finished, the init among them.
    pub(super) processes: BTreeMap<ProcessId, Process>,
}

impl Container {
    /// What stands for the debugging door among the containers: it runs as long as the guest.
    pub(super) fn door() -> Container {
        let (ports, processes) = (Vec::new(), BTreeMap::new());
        let state = ContainerState::Running;
        Container { state, init: None, reuses: false, ports, open: false, shares: true, processes }
    }

    /// Whether it is that.
    pub(super) fn is_door(&self) -> bool {
        self.init.is_none()
    }
}

/// How far a container has come.
#[derive(Debug)]
pub(super) enum ContainerState {
    /// mountd builds its root, whose disk may be plugged until then; then its init is to be started.
    Preparing { asker: Asker, container: Box<spec::Container>, until: Duration },
    /// execd starts its init.
    Starting { asker: Asker },
    /// What was built is undone, and this is what the host is told.
    Undoing { asker: Asker, fault: Fault },
    /// It runs.
    Running,
    /// Its init has exited.
    Ending(ContainerEnd),
    /// It is cleaned up; its id may be used again.
    Exited,
}

/// How far the end of a container has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ContainerEnd {
    /// mountd kills what is left in it.
    Killing,
    /// Its other processes are finished.
    Processes,
    /// Its init's output leaves.
    Output,
    /// mountd unmounts.
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
    /// How often its tty is being resized before it executes.
    pub(super) resizing: u32,
    /// How far it has come.
    pub(super) state: ProcessState,
}

/// How far a process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProcessState {
    /// execd starts it.
    Starting(Asker),
    /// It exists, and executes when what the host has sent for it meanwhile is done.
    Held(Pid),
    /// It runs.
    Running(Pid),
    /// It was reaped; what it wrote to its streams has not left yet.
    Exited(u8),
    /// That has left; what it wrote to the share may not be at the host yet.
    Syncing(u8),
}

impl ProcessState {
    /// The process, if it exists.
    pub(super) fn pid(self) -> Option<Pid> {
        match self {
            ProcessState::Held(pid) | ProcessState::Running(pid) => Some(pid),
            ProcessState::Starting(_) | ProcessState::Exited(_) | ProcessState::Syncing(_) => None,
        }
    }

    /// Its status, if it was reaped.
    pub(super) fn status(self) -> Option<u8> {
        match self {
            ProcessState::Exited(status) | ProcessState::Syncing(status) => Some(status),
            ProcessState::Starting(_) | ProcessState::Held(_) | ProcessState::Running(_) => None,
        }
    }
}

/// What a request to a helper is for: who goes on when it is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A step of STARTPOD.
    Pod(PodStep),
    /// A step of NEWCONTAINER.
    Container(ContainerId, ContainerStep),
    /// EXECCMD's only step.
    Exec(ContainerId, ProcessId),
    /// A command of one step, or the last of it.
    Command(Ticket),
    /// WINSIZE of a process that is held until then.
    Resized(Ticket, ContainerId, ProcessId),
    /// SETUPINTERFACE: the bus has been scanned for what is to be set up.
    Rescanned(Ticket, Box<spec::Interface>),
    /// READFILE: a part of the file that is being read.
    Read,
    /// A container's end: mountd kills what is left.
    KillLeft(ContainerId),
    /// A process's end: its output.
    Output(ContainerId, ProcessId),
    /// Ends of processes: what was written to the share.
    ShareSynced,
    /// A container's end: mountd unmounts.
    RemoveFiles(ContainerId),
    /// The pod's end: mountd unmounts.
    DestroyFiles,
    /// A STARTPOD that failed: the last of its undoing, and what the host is told then.
    Failed(Ticket, Box<Fault>),
    /// The guest's end: streamd writes what it has.
    Flush,
    /// The guest's end: mountd syncs.
    Sync,
    /// A new execd enters the pod.
    Rejoin,
    /// A new streamd, that one, gets the processes' descriptors.
    Resend(Pid),
    /// Whether streamd is alive.
    Ping,
    /// Nobody waits for it.
    Nothing,
}

impl Purpose {
    /// Whether a helper that has just come up needs it before all else; or it tells whether the others
    /// will ever be answered.
    pub(super) fn comes_first(&self) -> bool {
        matches!(self, Purpose::Rejoin | Purpose::Ping)
    }
}

/// STARTPOD's steps, in order; the last two undo the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PodStep {
    Loopback,
    /// With white lists: before there is a link that anything could come in by.
    Ports,
    /// With interfaces: they may have been plugged.
    Rescan,
    Interfaces,
    Routes,
    Files,
    Init,
    Join,
    Undo,
    UndoNetwork,
}

/// NEWCONTAINER's steps, in order; the last undoes the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ContainerStep {
    Files,
    /// With mapped ports: a fault there leaves nothing running.
    Ports,
    Init,
    Undo,
}
