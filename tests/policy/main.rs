//! The policies: their compiler refuses what is wrong, and the programs mean what the files say. tests/confined has the
//! real processes.
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

#[path = "../../build/bpf.rs"]
mod bpf;
#[path = "../../build/compiled.rs"]
#[allow(dead_code)]
mod compiled;
#[path = "../../build/format.rs"]
mod format;
#[path = "../../build/names.rs"]
#[allow(dead_code)]
mod names;
#[path = "../../build/policy.rs"]
mod policy;
#[path = "../../build/table.rs"]
mod table;

mod compiler;
mod docker;
mod files;
mod kernel;
mod machine;
#[allow(dead_code)]
mod meaning;
mod never;
mod programs;

use files::{policies, sources, table};
