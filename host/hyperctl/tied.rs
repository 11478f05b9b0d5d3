//! `hyperctl tied`: between fork and exec of a guest, in a process with one thread.
//!
//! std::process has no safe place for code between the two, so hyperctl executes itself. The guest dies with its
//! parent, even if that is killed, and is in its namespaces before its own first instruction.

use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use hyperinit::fault::{Fault, OrFault};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::cli::Tied;

/// Returns only if the program cannot be executed.
pub fn tied(options: &Tied) -> Result<ExitCode, Fault> {
    // Kept over execve(2), and over the loss of capabilities (prctl(2)).
    set_pdeathsig(Some(Signal::SIGKILL)).fault("tying", "the guest to hyperctl")?;
    if let Some(cgroup) = &options.cgroup {
        // Zero is the writer itself, in whatever PID namespace.
        let procs = cgroup.join("cgroup.procs");
        std::fs::write(&procs, "0").fault("entering", procs.display())?;
    }
    if options.namespaces {
        let all = CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS;
        unshare(all).fault("making", "namespaces")?;
    }
    let [program, arguments @ ..] = options.program.as_slice() else {
        return Err(Fault::new("executing", "", "no program"));
    };
    let error = Command::new(program).args(arguments).exec();
    Err(Fault::io("executing", program.display(), &error))
}
