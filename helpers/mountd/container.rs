//! A container's mount namespace: put together, pivoted into, kept as a file.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::ContainerId;
use hyperinit::paths;
use hyperinit::sandbox::{ContainerProfile, Device};
use hyperinit::spec::Container;
use hyperinit::sys::mount::{Resolve, clone_tree, move_mount, new_mount, openat2, set_attributes};
use hyperinit::wire::mountd::Reply;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::{Mode, SFlag, fstat, makedev, mknodat};
use nix::unistd::{chdir, fchdir, pivot_root, symlinkat};

use super::tree::{Home, libc_flags, make_directories, mount_point};
use super::{Rules, layer, pod, sysctl};

/// How long a disk that is still being plugged is awaited at once; init asks again.
const DISK_TIMEOUT: Duration = Duration::from_millis(100);
/// A container's own /dev: nodes, links, and little else.
const DEV_SIZE: &str = "1m";
/// The group of ttys in every distribution.
const TTY_GROUP: &str = "5";

const NOSUID: u64 = nix::libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = nix::libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = nix::libc::MOUNT_ATTR_NOEXEC;
const RDONLY: u64 = nix::libc::MOUNT_ATTR_RDONLY;

/// Where a root filesystem comes from.
#[derive(Debug, PartialEq, Eq)]
enum Source<'a> {
    /// `<image>/<rootfs>` of the share.
    Share { image: &'a Path, rootfs: &'a Path },
    /// `<rootfs>` of a disk.
    Disk { device: &'a str, fstype: &'a str, rootfs: &'a Path },
}

/// Reads the host's words for the root filesystem.
fn source(container: &Container) -> Result<Source<'_>, Fault> {
    let rootfs = Path::new(&container.rootfs);
    if !container.addr.is_empty() {
        // It would override `image`: another disk than the one that was meant is worse than none.
        return Err(Fault::new("reading", "addr", "disks by SCSI address are not implemented"));
    }
    if container.fstype.is_empty() {
        return Ok(Source::Share { image: Path::new(&container.image), rootfs });
    }
    let word = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
            && !text.starts_with('.')
    };
    if !word(&container.image) {
        return Err(Fault::new(
            "reading",
            "image",
            format!("{:?} is not the name of a disk", container.image),
        ));
    }
    if !word(&container.fstype) {
        return Err(Fault::new("reading", "fstype", format!("{:?} is not a filesystem", container.fstype)));
    }
    Ok(Source::Disk { device: &container.image, fstype: &container.fstype, rootfs })
}

/// Everything of PrepareContainer, or nothing of it.
pub fn prepare(home: &Home, rules: &Rules, container: &Container) -> Result<Reply, Fault> {
    let source = source(container)?;
    sysctl::check(&container.sysctl, &rules.profile)?;
    if let Source::Disk { device, .. } = source
        && !await_device(device)?
    {
        let fault = Fault::errno("waiting for the disk", format!("/dev/{device}"), Errno::ENOENT);
        return Ok(Reply::NotYet { fault });
    }
    // What an earlier container of this id, or a mountd that died, left.
    remove(&container.id)?;
    let directory = paths::container(&container.id);
    fs::create_dir_all(&directory).fault("making", directory.display())?;
    let prepared = home
        .in_new_namespace(|| build(home, rules, container, &source))
        .and_then(|namespace| keep(&namespace, &container.id))
        .and_then(|()| make_cgroup(&container.id));
    if prepared.is_err()
        && let Err(fault) = remove(&container.id)
    {
        log::warn!("{}: {fault}", container.id);
    }
    prepared.map(|()| Reply::Done)
}

/// Puts the root together, step by step, and makes it the namespace's root.
fn build(home: &Home, rules: &Rules, container: &Container, source: &Source<'_>) -> Result<(), Fault> {
    let profile = &rules.profile;
    let root = root(source, container.read_only)?;
    let proc = self::proc(&root)?;
    let sys = self::sys(profile, &root)?;
    dev(profile, &root)?;
    if container.initialize && !container.read_only {
        layer::make(&root)?;
    }
    layer::bind_pod_files(&root, container.read_only)?;
    if container.initialize && !container.process.workdir.is_empty() {
        make_directories(&root, Path::new(&container.process.workdir))
            .fault("making the workdir", &container.process.workdir)?;
    }
    sysctl::apply(home, &proc, &container.sysctl, rules.local)?;
    let mut covers = Covers { home, directory: None };
    for path in profile.masked_paths() {
        if let Some(target) = kernel_file(&proc, &sys, path)? {
            covers.hide(&target, path)?;
        }
    }
    for path in profile.readonly_paths() {
        make_read_only(&proc, &sys, path)?;
    }
    fchdir(&root).fault("entering", "the container's root")?;
    pivot_root(".", ".").fault("changing", "the container's root")?;
    umount2(".", MntFlags::MNT_DETACH).fault("leaving", "the guest's root")?;
    chdir("/").fault("entering", "/")
}

/// The root filesystem, mounted at the stage.
fn root(source: &Source<'_>, read_only: bool) -> Result<OwnedFd, Fault> {
    let stage = || {
        open(paths::STAGE, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .fault("opening", paths::STAGE)
    };
    let directory = match source {
        Source::Share { image, rootfs } => {
            let share =
                open(paths::SHARE, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
                    .fault("opening", "the share")?;
            below(&below(&share, image)?, rootfs)?
        }
        Source::Disk { device, fstype, rootfs } => {
            let disk = disk(device, fstype, read_only)?;
            let at = stage()?;
            move_mount(&disk, &at).fault("attaching", device)?;
            below(&stage()?, rootfs)?
        }
    };
    // A copy of the mount's part below the directory: the rest of the share is not in the container's namespace.
    let tree = clone_tree(&directory, false).fault("cloning", "the root filesystem")?;
    // An image's device nodes are nobody's way to the guest's devices.
    set_attributes(&tree, NODEV | if read_only { RDONLY } else { 0 }, false)
        .fault("setting up", "the root filesystem")?;
    move_mount(&tree, &stage()?).fault("attaching", "the root filesystem")?;
    stage()
}

/// A directory below another, whatever links there are.
fn below(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Fault> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    openat2(root, path, libc_flags(OFlag::O_PATH | OFlag::O_DIRECTORY), 0, Resolve::InRoot)
        .fault("opening the root filesystem", path.display())
}

/// A disk's filesystem, mounted nowhere yet.
fn disk(device: &str, fstype: &str, read_only: bool) -> Result<OwnedFd, Fault> {
    let path = format!("/dev/{device}");
    let mut options = vec![("source", path.as_str())];
    if fstype == "xfs" {
        // Snapshots of one image carry the same uuid.
        options.push(("nouuid", ""));
    }
    if read_only {
        // The disk itself may be write-protected.
        options.push(("ro", ""));
    }
    new_mount(fstype, &options, NODEV).fault(&format!("mounting {fstype} from"), path)
}

/// Waits a moment until a disk's node is there; whether it is.
fn await_device(device: &str) -> Result<bool, Fault> {
    let path = Path::new("/dev").join(device);
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).fault("watching", "/dev")?;
    watch.add_watch("/dev", AddWatchFlags::IN_CREATE).fault("watching", "/dev")?;
    let deadline = Instant::now() + DISK_TIMEOUT;
    while !path.exists() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&watch), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)).fault("watching", "/dev")?;
        let _ = watch.read_events();
    }
    Ok(true)
}

/// The pod's proc: only a process inside the pod's PID namespace could mount one, and the pod init has.
fn proc(root: &OwnedFd) -> Result<OwnedFd, Fault> {
    let pods =
        open("/proc", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).fault("opening", "the pod's /proc")?;
    let tree = clone_tree(&pods, false).fault("cloning", "the pod's /proc")?;
    attach(&tree, root, "proc", NOSUID | NODEV | NOEXEC)?;
    Ok(tree)
}

fn sys(profile: &ContainerProfile, root: &OwnedFd) -> Result<OwnedFd, Fault> {
    let sys = open("/sys", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).fault("opening", "/sys")?;
    let tree = clone_tree(&sys, false).fault("cloning", "/sys")?;
    let read_only = if profile.readonly_sys() { RDONLY } else { 0 };
    attach(&tree, root, "sys", NOSUID | NODEV | NOEXEC | read_only)?;
    Ok(tree)
}

fn attach(tree: &OwnedFd, root: &OwnedFd, path: &str, attributes: u64) -> Result<(), Fault> {
    set_attributes(tree, attributes, false).fault("setting up", format!("/{path}"))?;
    move_mount(tree, mount_point(root, path)?).fault("mounting", format!("/{path}"))
}

/// A private /dev with the profile's nodes: the control port, the disks and the terminals of the guest are not in it.
///
/// A container's root may have CAP_MKNOD, so what it makes there must be no device: only the profile's nodes, each on
/// a mount of its own, are. That also keeps them in their places, for a mount point cannot be removed.
fn dev(profile: &ContainerProfile, root: &OwnedFd) -> Result<(), Fault> {
    let dev = new_mount("tmpfs", &[("mode", "755"), ("size", DEV_SIZE)], NOSUID | NOEXEC)
        .fault("making", "/dev")?;
    attach(&dev, root, "dev", NOSUID | NOEXEC)?;
    let nodes = profile
        .devices()
        .iter()
        .map(|device| Ok((device, node(&dev, device)?)))
        .collect::<Result<Vec<_>, _>>()?;
    set_attributes(&dev, NODEV, false).fault("setting up", "/dev")?;
    for (device, (place, tree)) in nodes {
        move_mount(tree, place).fault("mounting", format!("/dev/{}", device.name))?;
    }
    dev_files(&dev)
}

/// A device node: its place, and a mount of it on which it works.
fn node(dev: &OwnedFd, device: &Device) -> Result<(OwnedFd, OwnedFd), Fault> {
    let name = device.name.as_str();
    let doing = |errno| Fault::errno("making", format!("/dev/{name}"), errno);
    let number = makedev(device.major.into(), device.minor.into());
    mknodat(dev, name, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), number).map_err(doing)?;
    let place =
        openat2(dev, Path::new(name), libc_flags(OFlag::O_PATH), 0, Resolve::NoLinks).map_err(doing)?;
    let tree = clone_tree(&place, false).map_err(doing)?;
    Ok((place, tree))
}

/// The rest of /dev: links, ttys, the pod's shared memory.
fn dev_files(dev: &OwnedFd) -> Result<(), Fault> {
    let links = [
        ("pts/ptmx", "ptmx"),
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ];
    for (to, name) in links {
        symlinkat(to, dev, name).fault("making", format!("/dev/{name}"))?;
    }
    // Where execd binds the tty of a container's init.
    mknodat(dev, "console", SFlag::S_IFREG, Mode::from_bits_truncate(0o620), 0)
        .fault("making", "/dev/console")?;
    let options = [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620"), ("gid", TTY_GROUP)];
    let pts = new_mount("devpts", &options, NOSUID | NOEXEC).fault("making", "/dev/pts")?;
    move_mount(&pts, mount_point(dev, "pts")?).fault("mounting", "/dev/pts")?;
    let shm = open(paths::POD_SHM, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", paths::POD_SHM)?;
    let shm = clone_tree(&shm, false).fault("cloning", "the pod's shared memory")?;
    move_mount(&shm, mount_point(dev, "shm")?).fault("mounting", "/dev/shm")
}

/// What is at a path of /proc or /sys, below the mount just made: nothing of the image is on the way. None: the kernel has
/// no such file.
fn kernel_file(proc: &OwnedFd, sys: &OwnedFd, path: &str) -> Result<Option<OwnedFd>, Fault> {
    let (root, below) = match (path.strip_prefix("/proc/"), path.strip_prefix("/sys/")) {
        (Some(below), _) => (proc, below),
        (None, Some(below)) => (sys, below),
        (None, None) => {
            return Err(Fault::new("reading the profile's path", path, "it is not below /proc or /sys"));
        }
    };
    match openat2(root, Path::new(below), libc_flags(OFlag::O_PATH), 0, Resolve::NoLinks) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(Fault::errno("opening", path, errno)),
    }
}

/// What hides: /dev/null a file, one empty directory all directories.
struct Covers<'a> {
    home: &'a Home,
    directory: Option<OwnedFd>,
}

impl Covers<'_> {
    /// Read-only, or a container's root could change the mode of the guest's own /dev/null.
    fn hide(&mut self, target: &OwnedFd, path: &str) -> Result<(), Fault> {
        let kind = fstat(target).fault("looking at", path)?.st_mode;
        let is_directory = SFlag::from_bits_truncate(kind) & SFlag::S_IFMT == SFlag::S_IFDIR;
        let cover = match (&self.directory, is_directory) {
            (Some(attached), true) => clone_tree(attached, false),
            (None, true) => new_mount("tmpfs", &[("size", "4k"), ("mode", "555")], 0),
            (_, false) => clone_tree(null(self.home)?, false),
        }
        .fault("making a cover for", path)?;
        set_attributes(&cover, RDONLY | NOSUID | NOEXEC | if is_directory { NODEV } else { 0 }, false)
            .fault("setting up a cover for", path)?;
        move_mount(&cover, target).fault("hiding", path)?;
        if is_directory {
            self.directory = Some(cover);
        }
        Ok(())
    }
}

/// /dev/null of the namespace mountd is in now, the device that was checked at the start.
fn null(home: &Home) -> Result<OwnedFd, Fault> {
    let null = open("/dev/null", OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", "/dev/null")?;
    let looks = |fd: &OwnedFd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    match (looks(&null), looks(&home.null)) {
        (Ok(this), Ok(checked)) if this == checked => Ok(null),
        _ => Err(Fault::new("opening", "/dev/null", "it is another file than at the start")),
    }
}

fn make_read_only(proc: &OwnedFd, sys: &OwnedFd, path: &str) -> Result<(), Fault> {
    let Some(target) = kernel_file(proc, sys, path)? else { return Ok(()) };
    let tree = clone_tree(&target, true).fault("cloning", path)?;
    set_attributes(&tree, RDONLY | NOSUID | NODEV | NOEXEC, true).fault("making read-only", path)?;
    move_mount(&tree, &target).fault("making read-only", path)
}

/// Keeps the namespace by a bind mount of its file, in the guest's own namespace.
fn keep(namespace: &OwnedFd, id: &ContainerId) -> Result<(), Fault> {
    let file = paths::container_mount_ns(id);
    fs::write(&file, "").fault("making", file.display())?;
    let from = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    mount(Some(from.as_str()), &file, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .fault("keeping the namespace", file.display())
}

/// The container's cgroup, where the kernel has cgroup v2 (its root was made at boot).
fn make_cgroup(id: &ContainerId) -> Result<(), Fault> {
    match fs::create_dir(paths::container_cgroup(id)) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Fault::io("making the cgroup of", id, &error))
        }
        _ => Ok(()),
    }
}

/// Forgets a container; what is not there is no error. One in which something runs is left as it is: the kernel does
/// not remove its cgroup, and that is tried first.
pub fn remove(id: &ContainerId) -> Result<(), Fault> {
    let gone = |result: std::io::Result<()>, doing: &str| match result {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Fault::io(doing, id, &error)),
        _ => Ok(()),
    };
    gone(fs::remove_dir(paths::container_cgroup(id)), "removing the cgroup of")?;
    pod::unmount(&paths::container_mount_ns(id))?;
    gone(fs::remove_dir_all(paths::container(id)), "removing what is kept of")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(image: &str, fstype: &str) -> Container {
        let json = serde_json::json!({
            "id": "c", "rootfs": "rootfs", "image": image, "fstype": fstype, "process": {"stdio": 1, "stderr": 2, "args": ["sh"]}
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_root_is_a_directory_of_the_share_or_a_disk() {
        assert_eq!(
            source(&container("img/1", "")).unwrap(),
            Source::Share { image: Path::new("img/1"), rootfs: Path::new("rootfs") }
        );
        assert_eq!(
            source(&container("vdb1", "ext4")).unwrap(),
            Source::Disk { device: "vdb1", fstype: "ext4", rootfs: Path::new("rootfs") }
        );
    }

    #[test]
    fn a_disk_is_a_name_and_no_path() {
        for bad in ["", "..", "../sda", "disk/by-id/x", "a b", ".hidden"] {
            assert!(source(&container(bad, "ext4")).is_err(), "{bad:?}");
        }
        assert!(source(&container("vda", "ext4,suid")).is_err());
    }
}
