//! streamd: moves bytes between the stream port and the processes' pipes and ttys. It can do nothing else,
//! and what it has taken from a process outlives it (docs/streams.md).
#![forbid(unsafe_code)]

mod buffer;
mod engine;
mod input;
mod port;
mod process;
mod processes;
mod store;
mod stream_channel;
mod waiting;

use std::process::ExitCode;

use hyperinit::sandbox::CapSet;
use hyperinit::wire::Role;
use hyperinit::{embedded_policy, helper};

/// The program, alone or as a part of the guest's (src/main.rs).
pub fn main() -> ExitCode {
    helper::run(
        Role::Streamd,
        embedded_policy!("streamd"),
        |_options| Ok(CapSet::default()),
        |options| engine::Engine::open(options.listen),
        |engine, requests, replies| engine.run(requests, replies),
    )
}
