//! init ⇄ netd.

use serde::{Deserialize, Serialize};

use crate::spec::{Interface, Port, PortmappingWhiteLists, Route};

use super::{Terms, WORK};

/// What init asks of netd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Bring a link up (`lo` at STARTPOD).
    SetLinkUp {
        /// The link's name.
        device: String,
    },
    /// Name, size and bring up links, and give them addresses. A link that is not there is waited for. Undoes
    /// itself when it fails.
    SetInterfaces {
        /// Which, in order.
        interfaces: Vec<Interface>,
        /// A predecessor died over it: what is there of it already is done, and no error.
        #[serde(default)]
        repeated: bool,
    },
    /// Add routes. Undoes itself when it fails.
    AddRoutes {
        /// Which, in order.
        routes: Vec<Route>,
        /// As for SetInterfaces.
        #[serde(default)]
        repeated: bool,
    },
    /// Let in what the white lists and the ports let in, and nothing else, in place of what was let in
    /// before.
    SetPorts {
        /// All of it.
        mapping: PortMapping,
    },
    /// Take back what the other requests did for a pod. What is not there is no error: this is the undo, of a
    /// part too.
    Reset {
        /// What they were asked.
        network: Network,
    },
}

impl Request {
    /// See [`Terms`].
    pub fn terms(&self) -> Terms {
        match self {
            Request::SetLinkUp { .. } => Terms::once(WORK),
            Request::SetInterfaces { .. } | Request::AddRoutes { .. } => {
                Terms { may_fail: true, ..Terms::repeated(WORK) }
            }
            Request::SetPorts { .. } | Request::Reset { .. } => Terms::repeated(WORK),
        }
    }

    /// A predecessor died over it.
    pub(super) fn set_repeated(&mut self) {
        match self {
            Request::SetInterfaces { repeated, .. } | Request::AddRoutes { repeated, .. } => *repeated = true,
            // A second time comes to the same.
            Request::SetLinkUp { .. } | Request::SetPorts { .. } | Request::Reset { .. } => {}
        }
    }
}

pub use crate::spec::PORTS_MAX;

/// What a pod lets in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// Who may reach what.
    pub white_lists: PortmappingWhiteLists,
    /// The mapped ports of all containers; a port that has no host port is not mapped.
    pub ports: Vec<Port>,
}

/// What was set up for a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// SetInterfaces.
    pub interfaces: Vec<Interface>,
    /// What its answer said; nothing, if there was none.
    #[serde(default)]
    pub before: Vec<Before>,
    /// AddRoutes.
    pub routes: Vec<Route>,
    /// Whether there was a SetPorts.
    pub ports: bool,
}

/// What a link was before SetInterfaces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// Whether it was up.
    pub up: bool,
    /// How large its packets were, if that was changed.
    pub mtu: Option<u32>,
}

/// What netd answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The kernel did it.
    Done,
    /// The same, to SetInterfaces.
    Set {
        /// What each of the interfaces was before, as far as that is known. netd itself remembers nothing.
        before: Vec<Before>,
    },
}
