//! Landlock's scopes (landlock(7)): a process in a scope cannot signal processes outside of it, and cannot
//! connect to their abstract sockets.

use std::os::fd::AsRawFd;

use nix::errno::Errno;

use crate::fault::{Fault, OrFault};
use crate::sys::mount::owned;

/// The first version of the kernel's interface that has scopes (Linux 6.12).
const HAS_SCOPES: libc::c_long = 6;
/// Constants of linux/landlock.h.
const CREATE_RULESET_VERSION: libc::c_ulong = 1;
const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1;
const SCOPE_SIGNAL: u64 = 2;

/// `struct landlock_ruleset_attr`. No rights for files and ports are handled here: every use of a handled
/// right that no rule allows is denied.
#[repr(C)]
struct Attributes {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// Whether the kernel has scopes: it may be older, or be built or booted without Landlock.
pub fn available() -> bool {
    let none = std::ptr::null::<Attributes>();
    // SAFETY: with this flag the call takes no attributes, and touches no memory.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0, CREATE_RULESET_VERSION) };
    version >= HAS_SCOPES
}

/// Puts this process and its later descendants into a scope: they can signal no process outside, and connect
/// to no abstract socket outside. The caller has set no_new_privs, or holds CAP_SYS_ADMIN.
pub fn enter() -> Result<(), Fault> {
    let scoped = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL;
    let attributes = Attributes { handled_access_fs: 0, handled_access_net: 0, scoped };
    // SAFETY: the size is that of `attributes`, which outlives the call.
    let fd = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const attributes, size_of::<Attributes>(), 0)
    };
    let ruleset = owned(fd).fault("making", "a Landlock scope")?;
    // SAFETY: takes a descriptor, which is open, and a number; it touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) };
    Errno::result(result).map(drop).fault("entering", "a Landlock scope")
}
