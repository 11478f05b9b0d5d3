//! hyperctl: starts guests and speaks to them. `cli` declares what it takes, one file each does it.

mod cgroup;
mod cli;
mod events;
mod guest;
mod local;
mod tied;
mod up;

use std::io::Write;
use std::process::ExitCode;

use hyperinit::logger;

fn main() -> ExitCode {
    logger::name("hyperctl");
    let command = match cli::parse(std::env::args_os()) {
        Ok(command) => command,
        Err(answer) => return answer,
    };
    let failed = command.failed();
    let done = match command {
        cli::Command::Up(options) => up::up(&options),
        cli::Command::Tied(options) => tied::tied(&options),
    };
    done.unwrap_or_else(|fault| {
        // Nobody may be reading.
        let _ = writeln!(std::io::stderr(), "{fault}");
        failed
    })
}
