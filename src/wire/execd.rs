//! The edge between init and execd.
//!
//! Starts are answered in any order, each when its process is ready or has failed; every other request is
//! answered at once.

use serde::{Deserialize, Serialize};

use crate::ids::{ContainerId, Pid, StreamId};
use crate::spec::Process;
use crate::sysctl::Sysctls;

use super::streamd::TRIES_FOR_OUTPUT;
use super::{Terms, WORK};

/// What init asks of execd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Start the pod init as init's child, in new PID, mount, IPC and UTS namespaces, and keep these under
    /// `paths::POD_NS`.
    StartPod {
        /// The hostname in the pod's UTS namespace.
        hostname: String,
    },
    /// Sent to a restarted execd: enter the namespaces kept under `paths::POD_NS`, and take over the kept
    /// duplicates of the processes' outputs. Also sent after `StartPod`.
    JoinPod {
        /// The stdio streams of the processes that are not finished.
        running: Vec<StreamId>,
    },
    /// Sent to a restarted execd while there is no pod: take over the kept duplicates of the outputs of
    /// processes that were started through the debugging door.
    Adopt {
        /// As with `JoinPod`.
        running: Vec<StreamId>,
    },
    /// Start a process in a prepared container, as init's child.
    StartProcess {
        /// The container whose mount namespace the process enters.
        container: ContainerId,
        /// The process.
        process: Box<Process>,
        /// Whether it is the container's init, whose tty is also `/dev/console`.
        init: bool,
        /// The pod's hostname, the value of `HOSTNAME`.
        hostname: String,
        /// The container's sysctls, sent with the start of its init. The process sets those that do not
        /// belong to the network namespace before it enters the container.
        #[serde(default)]
        sysctl: Sysctls,
        /// The stdio streams of processes that have finished meanwhile. They are released, as by `Release`,
        /// before the start.
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
    /// Close the duplicates of the outputs of finished processes.
    Release {
        /// Their stdio streams.
        finished: Vec<StreamId>,
    },
    /// streamd was restarted: send it every duplicate again.
    Resend,
    /// Answer `Done` at once, which shows that every request sent before has been taken from the socket.
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
            // It is not repeated: a successor has just shown that it is alive.
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
    /// The request is done.
    Done,
    /// The process exists and waits. It executes when init, which knows it now, sends it SIGCONT.
    Started {
        /// Its pid in the guest's PID namespace; it is a child of init. For StartPod this is the pod init.
        pid: Pid,
    },
}
