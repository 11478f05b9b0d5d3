//! `hyperctl exec-child`: what has to happen between fork and exec of a guest, in a process with one thread.
//!
//! std::process has no safe way to run code between the two, so hyperctl executes itself. The guest dies with
//! its parent, even if the parent is killed, and is in its namespaces before its first instruction.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use hyperinit_protocol::boot::USERS_NETWORK;
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_sys::process::ignore_nothing;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{getegid, geteuid};

use super::cli::ExecChild;

/// Prepares this process and executes the program. Returns only if that fails.
pub fn exec_child(options: &ExecChild) -> Result<ExitCode, Fault> {
    // hyperctl blocks signals in every thread, and this process has inherited the mask. The guest must not.
    SigSet::empty().thread_set_mask().fault("unblocking", "signals")?;
    ignore_nothing().fault("heeding", "signals")?;
    // The setting survives execve(2) and the loss of capabilities (prctl(2)).
    set_pdeathsig(Some(Signal::SIGKILL)).fault("tying", "the guest to hyperctl")?;
    if let Some(cgroup) = &options.cgroup {
        // Zero stands for the writing process, in any PID namespace.
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
        // Set here, because the guest cannot tell its own network namespace from the machine's.
        for (path, value) in USERS_NETWORK {
            // Where these files cannot be written, the machine's settings stay.
            let _ = std::fs::write(path, value);
        }
    }
    if !options.bind.is_empty() {
        bind(&options.bind, options.namespaces)?;
    }
    let [program, arguments @ ..] = options.program.as_slice() else {
        return Err(Fault::new("executing", "", "no program"));
    };
    let error = Command::new(program).args(arguments).exec();
    Err(Fault::io("executing", program.display(), &error))
}

/// Binds each directory on the one that follows it, in a mount namespace that ends with the program.
fn bind(pairs: &[PathBuf], namespaces: bool) -> Result<(), Fault> {
    if !namespaces && geteuid().is_root() {
        unshare(CloneFlags::CLONE_NEWNS).fault("making", "a mount namespace")?;
    } else if !namespaces {
        own_user_namespace()?;
    }
    let none = None::<&str>;
    // Without this the bind mounts would propagate to the machine.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).fault("making private", "/")?;
    for pair in pairs.chunks_exact(2) {
        let [from, to] = pair else { continue };
        // Recursive, because in a user namespace a part of an inherited mount tree cannot be bound alone.
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(from), to, none, flags, none).fault("binding", from.display())?;
    }
    Ok(())
}

/// Enters a mount namespace without root, in a new user namespace that maps only the caller's own user and
/// group.
fn own_user_namespace() -> Result<(), Fault> {
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .fault("making", "a user namespace, which sharing a directory needs without root")?;
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{user} {user} 1")),
        ("gid_map", format!("{group} {group} 1")),
    ] {
        let path = format!("/proc/self/{file}");
        std::fs::write(&path, text).fault("writing to", path)?;
    }
    Ok(())
}
