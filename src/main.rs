//! All programs of the guest in one file; the program's name says which one runs. PID 1 starts the helpers
//! from its own file.
//!
//! The C library and std exist once instead of five times, on disk and in memory, because the kernel shares
//! the pages. In exchange each process carries the code of the others, and its filter and capabilities keep
//! it from using that code's calls. `helpers/*/main.rs` are also programs of their own, for a person and for
//! tests.
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
    // This comes first, while there is memory. A helper without the reserve ends when memory runs out, and
    // init logs that it has none itself.
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
