//! All programs of the guest in one file; which one it is says its name. PID 1 starts the helpers from its
//! own.
//!
//! The C library and std are there once and not five times, on disk and in memory: the kernel shares the
//! pages. In exchange each process carries the others' code; its filter and capabilities do not let it use
//! more of it. `helpers/*/main.rs` are programs of their own as well, for a person and for tests.
#![forbid(unsafe_code)]

#[path = "../helpers/execd/main.rs"]
mod execd;
#[path = "../helpers/mountd/main.rs"]
mod mountd;
#[path = "../helpers/netd/main.rs"]
mod netd;
#[path = "../helpers/streamd/main.rs"]
mod streamd;

use std::path::Path;
use std::process::ExitCode;

use hyperinit::sys::heap::Heap;
use hyperinit::wire::Role;

#[global_allocator]
static HEAP: Heap = Heap;

fn main() -> ExitCode {
    // First, while there is memory. A helper without it ends when there is none, and init says so of itself.
    let _ = hyperinit::sys::heap::reserve();
    let name = std::env::args_os().next().unwrap_or_default();
    let name = Path::new(&name).file_name().and_then(|name| name.to_str());
    match Role::ALL.into_iter().find(|role| name == Some(role.name())) {
        Some(Role::Execd) => execd::main(),
        Some(Role::Mountd) => mountd::main(),
        Some(Role::Netd) => netd::main(),
        Some(Role::Streamd) => streamd::main(),
        None => hyperinit::init::main(),
    }
}
