//! PID 1 of the guest.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: hyperinit::sys::alloc::Capped = hyperinit::sys::alloc::Capped;

fn main() -> ExitCode {
    hyperinit::init::main()
}
