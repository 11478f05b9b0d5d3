//! An empty mount namespace, for a process that no longer opens anything.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};

use crate::fault::{Fault, OrFault};

/// Moves to an empty mount namespace. Open files stay open; every path leads nowhere. A process that may look
/// into this one's /proc directory finds none of the guest's mounts there. That matters for the pod init:
/// every container knows its number, and many processes may look.
pub fn enter() -> Result<(), Fault> {
    unshare(CloneFlags::CLONE_NEWNS).fault("making", "a mount namespace")?;
    // On a machine with shared mounts, where hyperinit was started by hand, what follows would propagate to
    // it.
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).fault("making private", "/")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    // Any mount point will do: what is there is left behind with everything else.
    mount(Some("tmpfs"), "/proc", Some("tmpfs"), flags, Some("size=4k,mode=555"))
        .fault("mounting tmpfs on", "/proc")?;
    chdir("/proc").fault("entering", "an empty directory")?;
    pivot_root(".", ".").fault("changing", "the root")?;
    umount2(".", MntFlags::MNT_DETACH).fault("leaving", "the old root")?;
    chdir("/").fault("entering", "/")
}
