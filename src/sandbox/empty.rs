//! A mount namespace with nothing in it, for a process that opens nothing any more.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};

use crate::fault::{Fault, OrFault};

/// Moves to one. What is open stays open; every path leads nowhere. And whoever may look into the process's
/// /proc directory (for the pod init, whose number every container knows, many may) finds none of the guest's
/// mounts there.
pub fn enter() -> Result<(), Fault> {
    unshare(CloneFlags::CLONE_NEWNS).fault("making", "a mount namespace")?;
    // By hand, on a machine that shares its mounts, what follows would reach it.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).fault("making private", "/")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    // Somewhere: what is there is left behind with everything else.
    mount(Some("tmpfs"), "/proc", Some("tmpfs"), flags, Some("size=4k,mode=555"))
        .fault("mounting tmpfs on", "/proc")?;
    chdir("/proc").fault("entering", "an empty directory")?;
    pivot_root(".", ".").fault("changing", "the root")?;
    umount2(".", MntFlags::MNT_DETACH).fault("leaving", "the old root")?;
    chdir("/").fault("entering", "/")
}
