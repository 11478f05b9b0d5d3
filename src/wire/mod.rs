//! The edges between init and its helpers: one request enum and one reply enum for each.
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

/// Which container profile of policy/container the pod runs under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Docker's 14 capabilities, seccomp, masked paths.
    Default,
    /// Everything execd has to give (kernel cmdline `hyper_profile=privileged`).
    Privileged,
}

impl Profile {
    /// As on the kernel cmdline and in policy/container.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Default => "default",
            Profile::Privileged => "privileged",
        }
    }
}
