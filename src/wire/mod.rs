//! The edges between init and its helpers: one request enum and one reply enum for each.
//!
//! There may be several mountd at once, each with an edge of its own (`Instance`).
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
    /// Of a request: chosen by init, and unique for the life of the helper. Of a reply: the request's.
    pub id: u64,
    /// A request, or the result of one.
    pub body: T,
}

/// What a helper says to init.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said<T> {
    /// It is confined and takes requests. Its first words, and said once.
    Up,
    /// The answer to the request of the same number.
    Reply(Envelope<Result<T, Fault>>),
}

/// A request to any helper. It travels as its edge's request alone.
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
    /// The helpers that can carry it out.
    pub fn role(&self) -> Role {
        match self {
            Request::Netd(_) => Role::Netd,
            Request::Mountd(_) => Role::Mountd,
            Request::Execd(_) => Role::Execd,
            Request::Streamd(_) => Role::Streamd,
        }
    }

    /// On what terms it is made.
    pub fn terms(&self) -> Terms {
        match self {
            Request::Netd(request) => request.terms(),
            Request::Mountd(request) => request.terms(),
            Request::Execd(request) => request.terms(),
            Request::Streamd(request) => request.terms(),
        }
    }

    /// Whether both ask for the same, of whatever it may be.
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

    /// It is sent to a successor of the helper that died over it. netd has to know that.
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

/// Makes an edge's request one of [`Request`], and its reply one of [`Reply`].
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

/// A helper that works on one request for this long without answering hangs. netd waits two seconds for a
/// link that is being plugged; execd gives a process that is being started five.
pub const WORK: Duration = Duration::from_secs(10);
/// As [`WORK`], for mountd: it waits for disks (2 s), replays journals, and syncs.
pub const MOUNT: Duration = Duration::from_secs(30);

/// How often a request that may be repeated is sent before it is given up: it may be what kills the helper.
const TRIES: u32 = 3;

/// On what terms a request is made. Each edge says so beside its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// To how many helpers, one the successor of the other, it is sent when they die over it. One, unless a
    /// second time comes to the same.
    pub tries: u32,
    /// How long the helper may work on it; none where the host decides: a host that does not read the stream
    /// port is slow, not wrong.
    pub limit: Option<Duration>,
    /// Whether it is given up if it cannot be sent, and whoever asked for it is told. Otherwise the helper is
    /// killed, and its successor gets the request.
    pub may_fail: bool,
}

impl Terms {
    /// Sent once.
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

/// How many mountd there are at most. What waits for a disk, a server or the share's host holds one of them
/// up, and the requests of other containers go to others; with all of them held up, those wait.
pub const MOUNTDS: u8 = 10;

/// One helper: its role, and which of that role it is. Only mountd has more than the first.
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

    /// The mountd of that number, from 0 on; none from `MOUNTDS` on.
    pub fn mountd(number: u8) -> Option<Instance> {
        (number < MOUNTDS).then_some(Instance { role: Role::Mountd, number })
    }

    /// Every helper that there may be.
    pub fn all() -> impl Iterator<Item = Instance> {
        Role::ALL.into_iter().map(Instance::first).chain((1..MOUNTDS).filter_map(Instance::mountd))
    }

    /// Its role.
    pub const fn role(self) -> Role {
        self.role
    }

    /// Its number among those of its role.
    pub const fn number(self) -> u8 {
        self.number
    }

    /// Whether it runs only while it is needed.
    pub const fn is_extra(self) -> bool {
        self.number > 0
    }

    /// Its place in `all`, which stands for it in a packet of one byte.
    pub fn place(self) -> u8 {
        let at = Instance::all().position(|other| other == self);
        at.and_then(|at| u8::try_from(at).ok()).unwrap_or(u8::MAX)
    }

    /// The helper of that place.
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
