//! hyperctl: starts guests and speaks to them. `cli` declares what it takes, one file each does it.
#![forbid(unsafe_code)]

mod attached;
mod bench;
mod call;
mod cgroup;
mod cli;
mod compression;
mod events;
mod exec;
mod exec_child;
mod guest;
mod initrd;
mod kernel;
mod local;
mod logs;
mod modules;
mod network;
mod places;
mod process;
mod progress;
mod pump;
mod run;
mod scratch;
mod service;
mod share;
mod standard;
mod terminal;
mod up;
mod vm;
mod volumes;

use std::io::Write;
use std::process::ExitCode;

use hyperinit_protocol::logger;
use hyperinit_sys::signal::{Set, keep_children};

fn main() -> ExitCode {
    logger::start("hyperctl", log::LevelFilter::Warn, false);
    // Whoever started hyperctl may have blocked signals, and may not have wanted to hear of its children.
    // What it ignores else stays ignored.
    keep_children();
    // It fails for sets that make no sense only.
    let _ = Set::of([]).block_only();
    let command = match cli::parse(std::env::args_os()) {
        Ok(command) => command,
        Err(answer) => return answer,
    };
    let failed = command.failed();
    let done = match command {
        cli::Command::Bench(options) => bench::bench(&options),
        cli::Command::Call(options) => call::call(&options),
        cli::Command::Exec(options) => exec::exec(&options),
        cli::Command::Initrd(options) => initrd::initrd(&options),
        cli::Command::Kernel(options) => kernel::kernel(&options),
        cli::Command::Logs(options) => logs::logs(&options),
        cli::Command::Run(options) => run::run(&options),
        cli::Command::Up(options) => up::up(&options),
        cli::Command::ExecChild(options) => exec_child::exec_child(&options),
    };
    done.unwrap_or_else(|fault| {
        // Nobody may be reading.
        let _ = standard::stderr().write_all(format!("{fault}\n").as_bytes());
        failed
    })
}
