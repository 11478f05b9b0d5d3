//! The descriptor-based mount calls (open_tree(2), move_mount(2), fsopen(2), mount_setattr(2)) and
//! openat2(2).

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, CpuSet, sched_getaffinity, sched_setaffinity, setns, unshare};
use nix::sys::stat::Mode;
use nix::unistd::Pid;

/// How a path may be resolved (openat2(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolve {
    /// As if the directory were the root: absolute links and `..` stay inside, and magic links are refused.
    InRoot,
    /// Like `InRoot`, and the path stays in the directory's mount.
    InMount,
    /// Below the directory, through no link of any kind.
    NoLinks,
    /// Like `NoLinks`, and the path stays in the directory's filesystem: a filesystem that is mounted below
    /// is not part of it.
    NoMounts,
    /// A single name in the directory itself; it may be neither a link nor a mount point. Unlike with the
    /// other variants it is no error if the file is moved out of the directory during the call: it was there.
    Name,
}

/// How many more times a path is looked up after EAGAIN.
const RACES: u32 = 1000;

fn c_path(path: &Path) -> Result<CString, Errno> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)
}

/// Takes ownership of the descriptor that a system call has just made.
pub fn owned(result: libc::c_long) -> Result<OwnedFd, Errno> {
    let number = Errno::result(result)?;
    let number = RawFd::try_from(number).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Opens a path below a directory, close-on-exec. `flags` are those of open(2); `mode` applies with O_CREAT.
pub fn openat2(
    directory: impl AsFd,
    path: &Path,
    flags: i32,
    mode: u32,
    resolve: Resolve,
) -> Result<OwnedFd, Errno> {
    if resolve == Resolve::Name && (path.as_os_str().as_bytes().contains(&b'/') || path == Path::new("..")) {
        return Err(Errno::EINVAL);
    }
    let path = c_path(path)?;
    // SAFETY: an all-zero open_how is a valid one.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = u64::from((flags | libc::O_CLOEXEC).cast_unsigned());
    how.mode = u64::from(mode);
    how.resolve = match resolve {
        Resolve::InRoot => libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS,
        Resolve::InMount => libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_XDEV,
        Resolve::NoLinks => libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS,
        Resolve::Name => libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_XDEV,
        Resolve::NoMounts => libc::RESOLVE_BENEATH | libc::RESOLVE_NO_SYMLINKS | libc::RESOLVE_NO_XDEV,
    };
    let mut races = 0;
    loop {
        // SAFETY: `path` and `how` outlive the call, which is told the size of `how`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                directory.as_fd().as_raw_fd(),
                path.as_ptr(),
                &raw const how,
                size_of::<libc::open_how>(),
            )
        };
        match owned(result) {
            // EAGAIN: a rename somewhere in the system raced with `..`, and the kernel wants the call
            // repeated. An attacker could keep this going for ever, so there is a limit.
            Err(Errno::EAGAIN) if races < RACES => races += 1,
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Makes a detached copy of the mount at `at`, with the mounts below it if `recursive`.
pub fn clone_tree(at: impl AsFd, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH.cast_unsigned();
    if recursive {
        flags |= libc::AT_RECURSIVE.cast_unsigned();
    }
    // SAFETY: the path is a string constant.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, at.as_fd().as_raw_fd(), c"".as_ptr(), flags) })
}

/// Attaches a detached mount at `to`, or moves an attached one there.
pub fn move_mount(from: impl AsFd, to: impl AsFd) -> Result<(), Errno> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are string constants.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            from.as_fd().as_raw_fd(),
            c"".as_ptr(),
            to.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    };
    Errno::result(result).map(drop)
}

/// Sets mount attributes (`MOUNT_ATTR_*` of libc) and makes the mount private; if `recursive`, also all
/// mounts below it.
pub fn set_attributes(at: impl AsFd, attributes: u64, recursive: bool) -> Result<(), Errno> {
    // SAFETY: an all-zero mount_attr is a valid one.
    let mut attr: libc::mount_attr = unsafe { std::mem::zeroed() };
    attr.attr_set = attributes;
    attr.propagation = libc::MS_PRIVATE;
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a constant, `attr` outlives the call, which is told its size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            at.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

/// A new, detached mount of a filesystem. Options are (key, value), or (key, "") for a flag.
pub fn new_mount(kind: &str, options: &[(&str, &str)], attributes: u64) -> Result<OwnedFd, Errno> {
    let text = |text: &str| CString::new(text).map_err(|_| Errno::EINVAL);
    let kind = text(kind)?;
    // SAFETY: `kind` outlives the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) })?;
    for &(key, value) in options {
        let (key, value) = (text(key)?, text(value)?);
        let (command, value) = match value.as_bytes() {
            [] => (libc::FSCONFIG_SET_FLAG, ptr::null()),
            _ => (libc::FSCONFIG_SET_STRING, value.as_ptr()),
        };
        // SAFETY: `key` and `value` outlive the call; the value of a flag is null, as the kernel requires.
        let result = unsafe {
            libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key.as_ptr(), value, 0)
        };
        Errno::result(result)?;
    }
    let null = ptr::null::<libc::c_char>();
    // SAFETY: CMD_CREATE takes neither key nor value.
    let result = unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), libc::FSCONFIG_CMD_CREATE, null, null, 0)
    };
    Errno::result(result)?;
    // SAFETY: fsmount takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), libc::FSMOUNT_CLOEXEC, attributes) })
}

/// Enters a new mount namespace in which a bind mount can keep every later namespace.
///
/// A namespace can be bound only in one with a smaller number (mnt_ns_loop in fs/namespace.c), and since
/// Linux 6.18 each CPU hands out numbers from a range of its own. So one namespace is made on each CPU and
/// the one with the smallest number is entered: all later namespaces have larger numbers. The first namespace
/// of a VM needs none of this, because its number is the smallest of all.
pub fn enter_new_namespace() -> Result<(), Errno> {
    let this = Pid::from_raw(0);
    let cpus = sched_getaffinity(this)?;
    let mut smallest = None;
    for cpu in (0..CpuSet::count()).filter(|&cpu| cpus.is_set(cpu) == Ok(true)) {
        let mut one = CpuSet::new();
        one.set(cpu)?;
        sched_setaffinity(this, &one)?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        let own = open("/proc/thread-self/ns/mnt", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let number = namespace_number(&own);
        if smallest.as_ref().is_none_or(|&(least, _)| number < least) {
            smallest = Some((number, own));
        }
    }
    sched_setaffinity(this, &cpus)?;
    let (_, namespace) = smallest.ok_or(Errno::EINVAL)?;
    setns(namespace, CloneFlags::CLONE_NEWNS)
}

/// A mount namespace's number; 0 where the kernel (before 6.11) does not tell. Such a kernel hands out all
/// numbers in order.
fn namespace_number(namespace: &OwnedFd) -> u64 {
    let mut number: u64 = 0;
    // SAFETY: NS_GET_MNTNS_ID writes one u64, which outlives the call.
    unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_MNTNS_ID, &raw mut number) };
    number
}

/// linux/nsfs.h: _IOR(0xb7, 5, __u64).
const NS_GET_MNTNS_ID: libc::Ioctl = 0x8008_b705_u32 as libc::Ioctl;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_no_path() {
        let root = open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        let name = |name: &str| openat2(&root, Path::new(name), libc::O_PATH, 0, Resolve::Name);
        for bad in ["..", "usr/bin", "/usr", "usr/"] {
            assert_eq!(name(bad).unwrap_err(), Errno::EINVAL, "{bad:?}");
        }
        assert!(name(".").is_ok() && name("usr").is_ok());
    }
}
