//! What the processes of hyperinit share: docs/design.md draws the process tree.

pub mod cgroups;
pub mod channel;
#[path = "../host/client/mod.rs"]
pub mod client;
pub mod command;
pub mod fault;
pub mod flow;
pub mod frame;
pub mod helper;
pub mod host;
pub mod ids;
pub mod init;
pub mod logger;
pub mod paths;
pub mod sandbox;
pub mod spec;
pub mod supervisor;
pub mod sys;
pub mod sysctl;
pub mod wire;
