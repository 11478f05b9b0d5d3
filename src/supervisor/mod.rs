//! The pure state machine of PID 1: events in, actions out, no input or output and no clock of its own, so that
//! every ordering question is a unit test.

mod ask;

use std::time::Duration;

pub use ask::{Ask, HelperReply, HelperRequest};

use crate::command::Command;
use crate::fault::Fault;
use crate::frame::Message;
use crate::ids::{Pid, Signal};
use crate::wire::Role;

/// What is known before the first event.
#[derive(Debug, Clone)]
pub struct Config {
    /// The share is the directory at `paths::LOCAL_SHARE`, not a 9p export.
    pub local: bool,
    /// The kernel cmdline opened the debugging door: container `hyperstart`.
    pub debug_door: bool,
    /// How long DESTROYPOD lets processes end by themselves.
    pub grace: Duration,
    /// The warden: no process of the pod can have its number.
    pub warden: Pid,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A host opened the control channel.
    HostConnected,
    /// A whole frame came.
    Command {
        /// The frame's message id.
        message: u32,
        /// The payload's length in bytes: what is held of the host's is bounded by it.
        size: usize,
        /// What `command::parse` made of it.
        command: Result<Command, Fault>,
    },
    /// A helper takes requests, for the first time or again.
    HelperUp {
        /// Which.
        role: Role,
        /// Its process: no process of the pod can have its number.
        pid: Pid,
    },
    /// A helper died, or its channel did. Everything it had sent has been reported before.
    HelperGone(Role),
    /// A helper crashed too often and will not come back.
    HelperClosed(Role),
    /// A helper answered.
    Reply {
        /// Which.
        role: Role,
        /// The request's number.
        id: u64,
        /// What came of it.
        result: Result<HelperReply, Fault>,
    },
    /// A child was reaped.
    Exited {
        /// Its number, free again.
        pid: Pid,
        /// Its exit code, or 128+n when signal n killed it.
        status: u8,
    },
    /// All bytes of all `Send`s have left through the control port.
    ControlDrained,
    /// `next_deadline` has come.
    Tick,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send a control frame.
    Send {
        /// Its type.
        message: Message,
        /// Its payload.
        payload: Vec<u8>,
    },
    /// Send a request to `ask.role()`.
    Ask {
        /// The number its reply will carry.
        id: u64,
        /// What.
        ask: Ask,
    },
    /// Send a signal to a child that has not been reaped.
    Kill {
        /// The child.
        pid: Pid,
        /// The signal.
        signal: Signal,
        /// To the process group that it leads; where it leads none (yet), to itself.
        group: bool,
    },
    /// End a helper that hangs or lies; `HelperGone` will follow.
    KillHelper {
        /// Which.
        role: Role,
        /// Why, for the log.
        why: String,
    },
    /// Everything is done and said: sync and power off.
    PowerOff,
}

/// The state of the guest.
#[derive(Debug)]
pub struct Supervisor {}

impl Supervisor {
    /// A guest without a pod, whose helpers are still to come up.
    pub fn new(_config: Config) -> Supervisor {
        Supervisor {}
    }

    /// What has to be done about `event`, `now` on the monotonic clock.
    pub fn on_event(&mut self, _now: Duration, _event: Event) -> Vec<Action> {
        Vec::new()
    }

    /// When `Tick` is due, on the same clock; none: when something happens.
    pub fn next_deadline(&self) -> Option<Duration> {
        None
    }

    /// Whether the control port may be read. While not, the host waits for NEXT: too many replies are due.
    pub fn takes_commands(&self) -> bool {
        true
    }
}
