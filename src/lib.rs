//! The code that the guest's processes share. docs/design.md draws the process tree.
#![deny(unsafe_code)]

pub mod cgroups;
pub mod clock;
pub mod helper;
pub mod init;
pub mod paths;
pub mod port;
pub mod sandbox;
pub mod supervisor;
pub mod sysctl;
pub mod wire;

pub use hyperinit_protocol::{command, fault, flow, frame, greeting, ids, logger, spec};
pub use hyperinit_sys as sys;
