//! The edge between init and netd.

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
    /// Rename links, set their MTU, bring them up and give them addresses. Waits for a link that is not there
    /// yet. Undoes itself if it fails.
    SetInterfaces {
        /// The interfaces, in order.
        interfaces: Vec<Interface>,
        /// An earlier netd died over this request, so changes that are already in place are no error.
        #[serde(default)]
        repeated: bool,
    },
    /// Add routes. Undoes itself if it fails.
    AddRoutes {
        /// The routes, in order.
        routes: Vec<Route>,
        /// As in SetInterfaces.
        #[serde(default)]
        repeated: bool,
    },
    /// Let in what the white lists and the mapped ports allow, and nothing else. This replaces the rules set
    /// before.
    SetPorts {
        /// The complete rules.
        mapping: PortMapping,
    },
    /// Take back what the other requests did for a pod. What is missing is no error: this is the undo, also
    /// of a part.
    Reset {
        /// What those requests were asked to set up.
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

    /// Marks the request as one that an earlier netd died over.
    pub(super) fn set_repeated(&mut self) {
        match self {
            Request::SetInterfaces { repeated, .. } | Request::AddRoutes { repeated, .. } => *repeated = true,
            // Doing these twice has the same result as doing them once.
            Request::SetLinkUp { .. } | Request::SetPorts { .. } | Request::Reset { .. } => {}
        }
    }
}

pub use crate::spec::PORTS_MAX;

/// What a pod lets in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// The networks that may reach the pod, and which of its ports they may reach.
    pub white_lists: PortmappingWhiteLists,
    /// The mapped ports of all containers. A port without a host port is not mapped.
    pub ports: Vec<Port>,
}

/// What was set up for a pod, so that `Reset` can take it back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The interfaces of SetInterfaces.
    pub interfaces: Vec<Interface>,
    /// The reply to SetInterfaces; empty if there was none.
    #[serde(default)]
    pub before: Vec<Before>,
    /// The routes of AddRoutes.
    pub routes: Vec<Route>,
    /// Whether SetPorts was sent.
    pub ports: bool,
}

/// The state of a link before SetInterfaces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Before {
    /// Whether the link was up.
    pub up: bool,
    /// Its MTU in bytes, if that was changed.
    pub mtu: Option<u32>,
}

/// What netd answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The request is done.
    Done,
    /// SetInterfaces is done.
    Set {
        /// The earlier state of each interface, as far as it is known. netd itself keeps no record of it.
        before: Vec<Before>,
    },
}
