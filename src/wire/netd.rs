//! init ⇄ netd.

use serde::{Deserialize, Serialize};

/// What init asks of netd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Bring a link up (`lo` at STARTPOD).
    SetLinkUp {
        /// The link's name.
        device: String,
    },
}

/// What netd answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The kernel did it.
    Done,
}
