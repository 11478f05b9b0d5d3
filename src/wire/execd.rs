//! init ⇄ execd.
//!
//! Starts are answered in any order, each when its process is ready or has failed; everything else at once.

use serde::{Deserialize, Serialize};

use crate::ids::{ContainerId, Pid, StreamId};
use crate::spec::Process;
use crate::sysctl::Sysctls;

use super::streamd::TRIES_FOR_OUTPUT;
use super::{Terms, WORK};

/// What init asks of execd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Start the pod init in new PID, mount, IPC and UTS namespaces, as init's child, and keep these under
    /// `paths::POD_NS`.
    StartPod {
        /// The pod's UTS name.
        hostname: String,
    },
    /// A restarted execd: enter what is kept under `paths::POD_NS`, and take over what was kept of the
    /// processes' outputs. Also sent after `StartPod`.
    JoinPod {
        /// The stdio streams of the processes that are not finished.
        running: Vec<StreamId>,
    },
    /// A restarted execd before there is a pod: take over what was kept of the outputs of what came by the
    /// debugging door.
    Adopt {
        /// As with `JoinPod`.
        running: Vec<StreamId>,
    },
    /// Start a process in a prepared container, as init's child.
    StartProcess {
        /// Whose mount namespace.
        container: ContainerId,
        /// The process.
        process: Box<Process>,
        /// Whether it is the container's init (its tty is then also `/dev/console`).
        init: bool,
        /// The pod's hostname, for `HOSTNAME`.
        hostname: String,
        /// The container's sysctls, with its init's start: the process sets those that are not the network's
        /// before it enters the container.
        #[serde(default)]
        sysctl: Sysctls,
        /// The stdio streams of processes that have finished meanwhile: as `Release`, before the start.
        #[serde(default)]
        finished: Vec<StreamId>,
    },
    /// The debugging door: start a process in the guest's own namespaces, as init's child. Refused unless the
    /// door was opened at boot.
    StartInGuest {
        /// The process.
        process: Box<Process>,
        /// As with `StartProcess`.
        #[serde(default)]
        finished: Vec<StreamId>,
    },
    /// Set the size of a process's tty.
    Resize {
        /// The process's stdio stream.
        stdio: StreamId,
        /// Rows.
        row: u16,
        /// Columns.
        column: u16,
    },
    /// Processes are finished: close the duplicates of their output.
    Release {
        /// Their stdio streams.
        finished: Vec<StreamId>,
    },
    /// streamd was restarted: send every duplicate again.
    Resend,
    /// Answer `Done` at once: what was asked before has been taken from the socket.
    Ping,
}

impl Request {
    /// See [`Terms`].
    pub fn terms(&self) -> Terms {
        match self {
            Request::StartPod { .. } | Request::StartProcess { .. } | Request::StartInGuest { .. } => {
                Terms::once(WORK)
            }
            Request::JoinPod { .. }
            | Request::Adopt { .. }
            | Request::Resize { .. }
            | Request::Release { .. } => Terms::repeated(WORK),
            Request::Resend => Terms { tries: TRIES_FOR_OUTPUT, ..Terms::repeated(WORK) },
            // A successor is alive.
            Request::Ping => Terms::once(WORK),
        }
    }

    /// Whether it makes a child of init.
    pub fn starts(&self) -> bool {
        match self {
            Request::StartPod { .. } | Request::StartProcess { .. } | Request::StartInGuest { .. } => true,
            Request::JoinPod { .. }
            | Request::Adopt { .. }
            | Request::Resize { .. }
            | Request::Release { .. }
            | Request::Resend
            | Request::Ping => false,
        }
    }
}

/// What execd answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// The process exists, and waits: it executes when init, which knows of it now, sends it SIGCONT.
    Started {
        /// Its number in the guest's PID namespace; a child of init. For StartPod: the pod init's.
        pid: Pid,
    },
}
