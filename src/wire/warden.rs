//! init ⇄ warden: the process that can still fork and execute once init cannot.

use ipc_channel::ipc::{OpaqueIpcReceiver, OpaqueIpcSender};
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::ids::Pid;
use crate::wire::Role;

/// What init asks of the warden.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Start a helper, as init's child.
    Spawn(Role),
}

/// What the warden answers.
#[derive(Serialize, Deserialize)]
pub enum Reply {
    /// The helper runs; it confines itself before it reads its first request.
    Spawned {
        /// Which.
        role: Role,
        /// Its number; a child of init.
        pid: Pid,
        /// Carries `Request<…>` of its edge.
        requests: OpaqueIpcSender,
        /// Carries `Reply<…>` back.
        replies: OpaqueIpcReceiver,
    },
    /// It could not be started, or died before it came up.
    Failed {
        /// Which.
        role: Role,
        /// Why.
        fault: Fault,
    },
}
