//! The guest's own root: a tmpfs with the kernel's filesystems and nothing else.
//!
//! A VM leaves its initramfs, which pivot_root(2) cannot leave, as switch_root(8) does; a namespace leaves
//! the machine's tree. Containers then `pivot_root` and detach this root instead of hiding it under a mount.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::statfs::{FsType, TMPFS_MAGIC};
use nix::unistd::{UnlinkatFlags, chdir, chroot, pivot_root, unlinkat};

use super::boot::mount_kernel;
use super::settings::{Local, Settings};
use crate::cgroups;
use crate::fault::{Fault, OrFault};
use crate::paths;
use crate::sys::mount::enter_new_namespace;

/// Where the new root is put together. The directory exists in an initramfs and on every host.
const STAGE: &str = "/tmp";
/// The types of an initramfs (statfs(2); nix does not name the second).
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);
/// The device nodes of a namespace. The machine's /dev is not used.
const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

/// Moves PID 1 to the new root and lays it out.
pub fn enter(settings: &Settings) -> Result<(), Fault> {
    match &settings.local {
        Some(local) => enter_namespace(local)?,
        None => enter_vm(settings)?,
    }
    for (kind, at, data) in [
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("devpts", "/dev/pts", "newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ] {
        make_directory(at, 0o755)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        mount(Some(kind), at, Some(kind), flags, Some(data))
            .fault(format!("mounting {kind} on").as_str(), at)?;
    }
    // Only root may enter these directories, except the way to the helpers' bootstrap sockets: helpers run as
    // users of their own.
    make_directory(paths::RUN, 0o711)?;
    make_directory(paths::IPC, 0o711)?;
    make_directory(paths::CONTAINERS, 0o700)?;
    cgroups(settings.local.is_some());
    Ok(())
}

fn enter_vm(settings: &Settings) -> Result<(), Fault> {
    stage()?;
    let wanted = [(settings.keep_modules, paths::MODULES), (settings.debug_door, paths::TOOLS)];
    let wanted = wanted.into_iter().filter_map(|(wanted, path)| wanted.then_some(path));
    let kept = wanted.map(keep).collect::<Result<Vec<Option<u64>>, Fault>>()?;
    let kept: Vec<u64> = kept.into_iter().flatten().collect();
    for at in ["proc", "sys", "dev"] {
        let (from, to) = (format!("/{at}"), format!("{STAGE}/{at}"));
        make_directory(&to, 0o755)?;
        mount(Some(from.as_str()), to.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .fault("moving", from)?;
    }
    let old = open("/", OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", "/")?;
    chdir(STAGE).fault("entering", STAGE)?;
    // Frees the memory of the initramfs. Files in use (init, the helpers, by descriptor) stay until they are
    // closed. A root that is a disk belongs to someone else and stays as it is.
    let kind = nix::sys::statfs::fstatfs(&old).fault("asking what is", "/")?.filesystem_type();
    if kind == TMPFS_MAGIC || kind == RAMFS_MAGIC {
        empty(&old, &kept);
    }
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).fault("moving", "the root")?;
    chroot(".").fault("changing", "the root")?;
    chdir("/").fault("entering", "/")
}

/// Takes a directory of the initramfs along: the kernel modules, which containers may see, or programs for
/// the debugging door. Returns its identity in the initramfs, or none if the image has no such directory.
fn keep(path: &str) -> Result<Option<u64>, Fault> {
    let Ok(stat) = nix::sys::stat::stat(path) else { return Ok(None) };
    let to = format!("{STAGE}{path}");
    make_directory(&to, 0o755)?;
    mount(Some(path), to.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>).fault("keeping", path)?;
    Ok(Some(stat.st_ino))
}

fn enter_namespace(local: &Local) -> Result<(), Fault> {
    // This comes before the working directory changes.
    let share = local.share.canonicalize().fault("looking up the share", local.share.display())?;
    enter_new_namespace().fault("entering", "a mount namespace that can keep the containers'")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).fault("making private", "/")?;
    // The stage hides the directory below it, so the share is opened first and bound by descriptor.
    let share = open(&share, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening the share", share.display())?;
    stage()?;
    for at in ["proc", "sys", "dev", "run", "run/hyperinit", "run/hyperinit/local-share"] {
        make_directory(&format!("{STAGE}/{at}"), 0o755)?;
    }
    let from = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&share));
    let to = format!("{STAGE}{}", paths::LOCAL_SHARE);
    mount(Some(from.as_str()), to.as_str(), None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .fault("binding the share", local.share.display())?;
    chdir(STAGE).fault("entering", STAGE)?;
    pivot_root(".", ".").fault("changing", "the root")?;
    // The kernel mounts a new proc or sysfs in a namespace only while an old one is visible.
    mount_kernel("proc", "/proc")?;
    mount_kernel("sysfs", "/sys")?;
    devices()?;
    umount2(".", MntFlags::MNT_DETACH).fault("leaving", "the host's root")?;
    chdir("/").fault("entering", "/")
}

fn stage() -> Result<(), Fault> {
    // In a namespace this is the machine's own directory, whose mode stays.
    std::fs::create_dir_all(STAGE).fault("making", STAGE)?;
    mount(Some("tmpfs"), STAGE, Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=755"))
        .fault("mounting tmpfs on", STAGE)
}

/// Makes a /dev with only the standard nodes: the machine's disks and terminals are not the guest's.
fn devices() -> Result<(), Fault> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("tmpfs"), "/dev", Some("tmpfs"), flags, Some("mode=755"))
        .fault("mounting tmpfs on", "/dev")?;
    let mode = Mode::from_bits_truncate(0o666);
    for (name, major, minor) in DEVICES {
        let path = format!("/dev/{name}");
        mknod(path.as_str(), SFlag::S_IFCHR, mode, makedev(major, minor)).fault("making", &path)?;
        set_mode(&path, 0o666)?;
    }
    Ok(())
}

/// Mounts cgroup v2, if the kernel has it. A container is then killed as one, and the pod's limits leave the
/// guest enough memory and tasks.
fn cgroups(local: bool) {
    let mounted = mount_kernel("cgroup2", paths::CGROUP).and_then(|()| cgroups::make());
    match mounted {
        Err(fault) => log::warn!("no cgroup v2: {fault}"),
        // A local guest does not change how its machine is divided.
        Ok(()) if local => {}
        Ok(()) => cgroups::share_out(),
    }
}

/// Makes a directory with exactly this mode, whatever the umask. An existing directory keeps its content.
fn make_directory(path: &str, mode: u32) -> Result<(), Fault> {
    match std::fs::create_dir_all(path) {
        Ok(()) => set_mode(path, mode),
        Err(_) if Path::new(path).is_dir() => Ok(()),
        Err(error) => Err(Fault::io("making", path, &error)),
    }
}

fn set_mode(path: &str, mode: u32) -> Result<(), Fault> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).fault("setting the mode of", path)
}

/// Deletes the content of a directory, on its own filesystem only and without the directories of those
/// inodes. A file that cannot be deleted only costs memory.
fn empty(directory: &OwnedFd, kept: &[u64]) {
    let Ok(device) = nix::sys::stat::fstat(directory).map(|stat| stat.st_dev) else { return };
    let Ok(mut entries) = nix::dir::Dir::from_fd(match directory.try_clone() {
        Ok(directory) => directory,
        Err(_) => return,
    }) else {
        return;
    };
    let names: Vec<_> = entries.iter().flatten().map(|entry| entry.file_name().to_owned()).collect();
    for name in names.iter().filter(|name| !matches!(name.to_bytes(), b"." | b"..")) {
        match unlinkat(directory.as_fd(), name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {}
            _ => continue,
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(below) = nix::fcntl::openat(directory.as_fd(), name.as_c_str(), flags, Mode::empty()) else {
            continue;
        };
        let same = nix::sys::stat::fstatat(&below, c"", AtFlags::AT_EMPTY_PATH)
            .is_ok_and(|stat| stat.st_dev == device && !kept.contains(&stat.st_ino));
        if same {
            empty(&below, kept);
            let _ = unlinkat(directory.as_fd(), name.as_c_str(), UnlinkatFlags::RemoveDir);
        }
    }
}
