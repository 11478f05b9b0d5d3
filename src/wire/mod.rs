//! The edges between init and its helpers: one request enum and one reply enum for each.
//!
//! Several mountds may run at once, each with an edge of its own (`Instance`).
//!
//! A request carries a number, and its reply carries the same number. Helpers answer one request after the
//! other, with two exceptions: streamd answers `Finish` when the process's output has left, and execd answers
//! a start when the process is ready.

pub mod bootstrap;
pub mod bytes;
pub mod channel;
pub mod execd;
pub mod mountd;
pub mod netd;
pub mod packet;
pub mod streamd;
pub mod warden;

use std::mem::discriminant;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use bytes::Bytes;

use crate::fault::Fault;
pub use hyperinit_protocol::boot::Profile;

/// A request or a reply, with its number.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// Of a request: chosen by init, and unique for the life of the helper. Of a reply: the id of its
    /// request.
    pub id: u64,
    /// The request, or its result.
    pub body: T,
}

/// What a helper says to init.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said<T> {
    /// The helper is confined and takes requests. A helper says this first, and only once.
    Up,
    /// The answer to the request with the same id.
    Reply(Envelope<Result<T, Fault>>),
}

/// A request to any helper. On the wire it is encoded as the request of its edge alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
#[allow(missing_docs)]
pub enum Request {
    Netd(netd::Request),
    Mountd(mountd::Request),
    Execd(execd::Request),
    Streamd(streamd::Request),
}

impl Request {
    /// The role of the helpers that can carry it out.
    pub fn role(&self) -> Role {
        match self {
            Request::Netd(_) => Role::Netd,
            Request::Mountd(_) => Role::Mountd,
            Request::Execd(_) => Role::Execd,
            Request::Streamd(_) => Role::Streamd,
        }
    }

    /// The terms on which it is made.
    pub fn terms(&self) -> Terms {
        match self {
            Request::Netd(request) => request.terms(),
            Request::Mountd(request) => request.terms(),
            Request::Execd(request) => request.terms(),
            Request::Streamd(request) => request.terms(),
        }
    }

    /// Whether both are requests of the same kind, whatever they are about.
    pub fn is_like(&self, other: &Request) -> bool {
        match (self, other) {
            (Request::Netd(a), Request::Netd(b)) => discriminant(a) == discriminant(b),
            (Request::Mountd(a), Request::Mountd(b)) => discriminant(a) == discriminant(b),
            (Request::Execd(a), Request::Execd(b)) => discriminant(a) == discriminant(b),
            (Request::Streamd(a), Request::Streamd(b)) => discriminant(a) == discriminant(b),
            (Request::Netd(_) | Request::Mountd(_) | Request::Execd(_) | Request::Streamd(_), _) => false,
        }
    }

    /// Whether it makes a child of init.
    pub fn starts(&self) -> bool {
        matches!(self, Request::Execd(request) if request.starts())
    }

    /// Marks a request that is sent to a successor, because a helper died over it. Only netd has to know
    /// that.
    pub fn set_repeated(&mut self) {
        if let Request::Netd(request) = self {
            request.set_repeated();
        }
    }
}

/// A reply of any helper.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Reply {
    Netd(netd::Reply),
    Mountd(mountd::Reply),
    Execd(execd::Reply),
    Streamd(streamd::Reply),
}

/// Implements the conversions from an edge's request to [`Request`] and from its reply to [`Reply`].
macro_rules! edge {
    ($module:ident, $variant:ident) => {
        impl From<$module::Request> for Request {
            fn from(request: $module::Request) -> Request {
                Request::$variant(request)
            }
        }

        impl From<$module::Reply> for Reply {
            fn from(reply: $module::Reply) -> Reply {
                Reply::$variant(reply)
            }
        }
    };
}
edge!(netd, Netd);
edge!(mountd, Mountd);
edge!(execd, Execd);
edge!(streamd, Streamd);

/// How long a helper may work on one request before it counts as hanging. netd waits two seconds for a link
/// that is being plugged; execd gives a process that is being started five.
pub const WORK: Duration = Duration::from_secs(10);
/// The same for mountd, which waits for disks (2 s), replays journals, and syncs.
pub const MOUNT: Duration = Duration::from_secs(30);

/// How often a request that may be repeated is sent before it is given up, because the request may be what
/// kills the helper.
const TRIES: u32 = 3;

/// The terms on which a request is made. Each edge defines them beside its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// How many helpers, one after the other, the request is sent to if they die over it. One, unless doing
    /// it twice has the same result as doing it once.
    pub tries: u32,
    /// How long the helper may work on it; none if that depends on the host: a host that does not read the
    /// stream port is slow, not wrong.
    pub limit: Option<Duration>,
    /// Whether a request that cannot be sent is given up, with a fault for the asker. If not, the helper is
    /// killed and its successor gets the request.
    pub may_fail: bool,
}

impl Terms {
    /// Sent to one helper only.
    const fn once(limit: Duration) -> Terms {
        Terms { tries: 1, limit: Some(limit), may_fail: true }
    }

    /// Sent to up to [`TRIES`] helpers.
    const fn repeated(limit: Duration) -> Terms {
        Terms { tries: TRIES, limit: Some(limit), may_fail: false }
    }
}

/// The helpers by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Links, addresses, routes.
    Netd,
    /// Root filesystems, volumes, files.
    Mountd,
    /// Starts processes.
    Execd,
    /// Moves the processes' bytes.
    Streamd,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 4] = [Role::Netd, Role::Mountd, Role::Execd, Role::Streamd];

    /// The name of its binary, policy and log lines.
    pub fn name(self) -> &'static str {
        match self {
            Role::Netd => "netd",
            Role::Mountd => "mountd",
            Role::Execd => "execd",
            Role::Streamd => "streamd",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How many mountds there may be. A request that waits for a disk, a server or the share's host blocks one of
/// them, and requests of other containers go to the rest. If all are blocked, those requests wait.
pub const MOUNTDS: u8 = 10;

/// One helper: its role, and its number within the role. Only mountd has more than one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Instance {
    role: Role,
    number: u8,
}

impl Instance {
    /// The first helper of a role, which always runs.
    pub const fn first(role: Role) -> Instance {
        Instance { role, number: 0 }
    }

    /// The mountd with that number, counted from 0; none if the number is `MOUNTDS` or more.
    pub fn mountd(number: u8) -> Option<Instance> {
        (number < MOUNTDS).then_some(Instance { role: Role::Mountd, number })
    }

    /// Every helper that may exist.
    pub fn all() -> impl Iterator<Item = Instance> {
        Role::ALL.into_iter().map(Instance::first).chain((1..MOUNTDS).filter_map(Instance::mountd))
    }

    /// Its role.
    pub const fn role(self) -> Role {
        self.role
    }

    /// Its number within its role; 0 for the first.
    pub const fn number(self) -> u8 {
        self.number
    }

    /// Whether it runs only while it is needed, as every mountd but the first does.
    pub const fn is_extra(self) -> bool {
        self.number > 0
    }

    /// Its index in `all`, which identifies it in a packet with one byte.
    pub fn place(self) -> u8 {
        let at = Instance::all().position(|other| other == self);
        at.and_then(|at| u8::try_from(at).ok()).unwrap_or(u8::MAX)
    }

    /// The helper with that index.
    pub fn at(place: u8) -> Option<Instance> {
        Instance::all().nth(usize::from(place))
    }
}

impl std::fmt::Display for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.number {
            0 => write!(f, "{}", self.role),
            number => write!(f, "{} {number}", self.role),
        }
    }
}
