//! The policies: their compiler refuses what is wrong, and the programs mean what the files say.
//! tests/confined has the real processes.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod compiler;
mod docker;
mod files;
mod kernel;
mod machine;
#[allow(dead_code)]
mod meaning;
mod never;
mod programs;

use hyperinit_policy::{compiled, format, names, policy, table};

use files::{policies, sources, table};
