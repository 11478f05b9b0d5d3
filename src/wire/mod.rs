//! The edges between init and its helpers: one request enum and one reply enum for each.
//!
//! There may be several mountd at once, each with an edge of its own (`Instance`).
//!
//! A request carries a number, its reply the same one. Helpers answer one request after the other, but
//! streamd, whose `Finish` is answered when the process's output has left, and execd, whose starts are
//! answered when the process is ready.

pub mod bootstrap;
pub mod execd;
pub mod mountd;
pub mod netd;
pub mod packet;
pub mod streamd;
pub mod warden;

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
pub use hyperinit_protocol::boot::Profile;

/// A request and its number.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request<T> {
    /// Chosen by init; unique for the life of the helper.
    pub id: u64,
    /// What is asked.
    pub body: T,
}

/// The answer to the request of the same number.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply<T> {
    /// The request's number.
    pub id: u64,
    /// What came of it.
    pub result: Result<T, Fault>,
}

/// What a helper says to init.
#[derive(Debug, Serialize, Deserialize)]
pub enum Said<T> {
    /// It is confined and takes requests. Its first words, and said once.
    Up,
    /// The answer to a request.
    Reply(Reply<T>),
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

/// How many mountd there are at most. What waits for a disk, a server or the share's host holds one of them up, and the
/// requests of other containers go to others; with all of them held up, those wait.
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
