//! A container's mount namespace: it is built, entered with pivot_root(2), and kept as a file.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use hyperinit::cgroups;
use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::ContainerId;
use hyperinit::paths;
use hyperinit::sandbox::{ContainerProfile, Device};
use hyperinit::spec::Container;
use hyperinit::sys::mount::{Resolve, clone_tree, move_mount, new_mount, openat2, set_attributes};
use hyperinit::sysctl;
use hyperinit::wire::mountd::Reply;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, fstat, makedev, mknodat};
use nix::unistd::{chdir, fchdir, pivot_root, symlinkat};

use super::disk::{self, Disk};
use super::populate::Populations;
use super::source::{Source, source};
use super::tree::{Home, Reach, directory, fault, kind, libc_flags, make_directories, mount_point, unmount};
use super::volumes::{self, Bind};
use super::{layer, null, scratch};

/// How long one request waits for a disk that is being plugged, or fills volumes; init asks again.
const SLICE: Duration = Duration::from_millis(100);
/// The size of a container's own /dev: it holds nodes, links, and little else.
const DEV_SIZE: &str = "1m";
/// The group of ttys in every distribution.
const TTY_GROUP: &str = "5";
/// How many terminals a container may have at once: a third of the kernel's number for all containers (3,072:
/// `kernel.pty.max` less `kernel.pty.reserve`, the kernel's Documentation/filesystems/devpts.rst), so that
/// one container cannot use up the terminals of the others.
const TERMINALS: &str = "1024";

const NOSUID: u64 = nix::libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = nix::libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = nix::libc::MOUNT_ATTR_NOEXEC;
const RDONLY: u64 = nix::libc::MOUNT_ATTR_RDONLY;

/// What containers of this guest may have.
pub struct Rules {
    /// The container profile.
    pub profile: ContainerProfile,
    /// Whether this is a local guest: settings that are not per namespace belong to its machine and are not
    /// changed.
    pub local: bool,
    /// The kernel's release, in a guest that kept its kernel modules.
    pub release: Option<String>,
}

/// Carries out PrepareContainer completely or not at all. If a disk is missing or volumes are still being
/// filled, the reply says so, and init asks again.
pub fn prepare(
    home: &Home,
    rules: &Rules,
    populations: &mut Populations,
    container: &Container,
) -> Result<Reply, Fault> {
    let until = Instant::now() + SLICE;
    let source = source(container)?;
    let binds = volumes::plan(container)?;
    sysctl::check(&container.sysctl, &rules.profile)?;
    let disks: Vec<Disk<'_>> = source.disk().into_iter().chain(binds.iter().filter_map(Bind::disk)).collect();
    if let Some(disk) = disk::missing(&disks, !rules.local, until)? {
        let fault = Fault::errno("waiting for the disk", disk, Errno::ENOENT);
        return Ok(Reply::NotYet { fault });
    }
    if container.initialize && !populations.advance(home, &container.id, &source, &binds, until)? {
        return Ok(Reply::Populating);
    }
    // Remove leftovers of an earlier container with this id, or of a mountd that died.
    remove(&container.id)?;
    let directory = paths::container(&container.id);
    fs::create_dir_all(&directory).fault("making", directory.display())?;
    let build = |layered| home.in_new_namespace(|| build(home, rules, container, layered, &source, &binds));
    let built = match build(false) {
        // The image lacks a mount point. As under Docker, it is made in a layer of the container's, and the
        // image stays as it is.
        Err(fault) if container.read_only && fault.is(Errno::EROFS) => build(true),
        built => built,
    };
    let prepared =
        built.and_then(|namespace| keep(&namespace, &container.id)).and_then(|()| make_cgroup(&container.id));
    if prepared.is_err()
        && let Err(fault) = remove(&container.id)
    {
        log::warn!("{}: {fault}", container.id);
    }
    prepared.map(|()| Reply::Done)
}

/// Builds the container's root step by step and makes it the namespace's root. `layered`: mount points that a
/// read-only image lacks are made in a layer over it.
fn build(
    home: &Home,
    rules: &Rules,
    container: &Container,
    layered: bool,
    source: &Source<'_>,
    binds: &[Bind<'_>],
) -> Result<(), Fault> {
    let profile = &rules.profile;
    let read_only = container.read_only;
    let scratch = scratch::make()?;
    // With no_new_privs, execve gains nothing from file capabilities, and NOSUID also keeps them from
    // preventing it: the kernel refuses to execute a program with capabilities that the bounding set lacks.
    let attributes = NODEV | if profile.no_new_privs() { NOSUID } else { 0 };
    let mut root = root(source, attributes | if read_only { RDONLY } else { 0 })?;
    if layered {
        root = layer_over(&scratch, root, attributes)?;
    }
    let proc = self::proc(&root)?;
    let sys = self::sys(profile, &root)?;
    dev(profile, &root)?;
    // Before the host's mounts, or links of the image, could get in the way of these covers.
    cover(home, profile, &proc, &sys)?;
    if container.initialize && !read_only {
        layer::make_mtab(&root)?;
    }
    layer::bind_modules(rules.release.as_deref(), &root)?;
    // Before the volumes: a volume at one of these paths, or above one, takes precedence.
    layer::bind_pod_files(&scratch, &root, read_only, read_only && !layered)?;
    for bind in binds {
        volumes::bind(home, &root, bind)?;
    }
    if container.initialize && !container.process.workdir.is_empty() {
        let workdir = Path::new(&container.process.workdir);
        make_directories(&root, workdir, Reach::Volumes(home))
            .map_err(|errno| fault("making the workdir", workdir, errno))?;
    }
    if layered {
        set_attributes(&root, RDONLY, false).fault("making read-only", "the root filesystem")?;
    }
    sysctl::set_network(&pods_proc()?, &container.sysctl)?;
    fchdir(&root).fault("entering", "the container's root")?;
    pivot_root(".", ".").fault("changing", "the container's root")?;
    umount2(".", MntFlags::MNT_DETACH).fault("leaving", "the guest's root")?;
    chdir("/").fault("entering", "/")
}

/// Hides or makes read-only the parts of /proc and /sys that containers may not use.
fn cover(home: &Home, profile: &ContainerProfile, proc: &OwnedFd, sys: &OwnedFd) -> Result<(), Fault> {
    let mut covers = Covers { home, directory: None };
    for path in profile.masked_paths() {
        if let Some(target) = kernel_file(proc, sys, path)? {
            covers.hide(&target, path)?;
        }
    }
    for path in profile.readonly_paths() {
        make_read_only(proc, sys, path)?;
    }
    Ok(())
}

/// Mounts the root filesystem at the stage.
fn root(source: &Source<'_>, attributes: u64) -> Result<OwnedFd, Fault> {
    let stage = || directory(paths::STAGE);
    let image = source.open_at(Some(&stage()?))?;
    // Clone only the part of the mount below the directory: the rest of the share is not in the container's
    // namespace.
    let tree = clone_tree(&image, false).fault("cloning", "the root filesystem")?;
    // With NODEV (in `attributes`), device nodes in an image give no access to the guest's devices.
    set_attributes(&tree, attributes, false).fault("setting up", "the root filesystem")?;
    move_mount(&tree, &stage()?).fault("attaching", "the root filesystem")?;
    stage()
}

/// Mounts a writable layer over the root filesystem; returns the root itself if the layer cannot be made (a
/// kernel without overlayfs).
fn layer_over(scratch: &OwnedFd, image: OwnedFd, attributes: u64) -> Result<OwnedFd, Fault> {
    match scratch::layered(scratch, &image) {
        Ok(tree) => {
            // This also makes it private, as all mounts of a container are.
            set_attributes(&tree, attributes, false).fault("setting up", "the layer over the image")?;
            move_mount(&tree, &image).fault("attaching", "the layer over the image")?;
            directory(paths::STAGE)
        }
        Err(fault) => {
            log::warn!("{fault}");
            Ok(image)
        }
    }
}

/// Binds the pod's proc. Only a process inside the pod's PID namespace can mount one, and the pod init has
/// done so.
fn proc(root: &OwnedFd) -> Result<OwnedFd, Fault> {
    let tree = clone_tree(pods_proc()?, false).fault("cloning", "the pod's /proc")?;
    attach(&tree, root, "proc", NOSUID | NODEV | NOEXEC)?;
    Ok(tree)
}

fn pods_proc() -> Result<OwnedFd, Fault> {
    open("/proc", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).fault("opening", "the pod's /proc")
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

/// Makes a private /dev with the profile's nodes. It lacks the guest's control port, disks and terminals.
///
/// A container's root may have CAP_MKNOD, so nodes that it makes in /dev must not work as devices. Only the
/// profile's nodes work, because each is on a mount of its own. That also keeps them in place, since a mount
/// point cannot be removed.
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

/// Makes a device node; returns its place, and a detached mount of it on which it works.
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

/// Makes the rest of /dev: links, the console, devpts and the pod's shared memory.
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
    // execd binds the tty of a container's init here.
    mknodat(dev, "console", SFlag::S_IFREG, Mode::from_bits_truncate(0o620), 0)
        .fault("making", "/dev/console")?;
    let options =
        [("newinstance", ""), ("ptmxmode", "0666"), ("mode", "0620"), ("gid", TTY_GROUP), ("max", TERMINALS)];
    let pts = new_mount("devpts", &options, NOSUID | NOEXEC).fault("making", "/dev/pts")?;
    move_mount(&pts, mount_point(dev, "pts")?).fault("mounting", "/dev/pts")?;
    let shm = open(paths::POD_SHM, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", paths::POD_SHM)?;
    let shm = clone_tree(&shm, false).fault("cloning", "the pod's shared memory")?;
    move_mount(&shm, mount_point(dev, "shm")?).fault("mounting", "/dev/shm")
}

/// Opens a path of /proc or /sys below the mounts just made, so that the image cannot interfere with the
/// lookup. None: the kernel has no such file.
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

/// The covers that hide paths: /dev/null hides a file, and one empty directory hides every directory.
struct Covers<'a> {
    home: &'a Home,
    directory: Option<OwnedFd>,
}

impl Covers<'_> {
    fn hide(&mut self, target: &OwnedFd, path: &str) -> Result<(), Fault> {
        let is_directory = kind(&fstat(target).fault("looking at", path)?) == SFlag::S_IFDIR;
        let cover = match (&self.directory, is_directory) {
            (Some(attached), true) => clone_tree(attached, false),
            (None, true) => new_mount("tmpfs", &[("size", "4k"), ("mode", "555")], 0),
            (_, false) => clone_tree(null::open_checked(self.home)?, false),
        }
        .fault("making a cover for", path)?;
        set_attributes(&cover, if is_directory { null::COVER | NODEV } else { null::COVER }, false)
            .fault("setting up a cover for", path)?;
        move_mount(&cover, target).fault("hiding", path)?;
        if is_directory {
            self.directory = Some(cover);
        }
        Ok(())
    }
}

fn make_read_only(proc: &OwnedFd, sys: &OwnedFd, path: &str) -> Result<(), Fault> {
    let Some(target) = kernel_file(proc, sys, path)? else { return Ok(()) };
    let tree = clone_tree(&target, true).fault("cloning", path)?;
    set_attributes(&tree, RDONLY | NOSUID | NODEV | NOEXEC, true).fault("making read-only", path)?;
    move_mount(&tree, &target).fault("making read-only", path)
}

/// Keeps the namespace by a bind mount of its file in the guest's own mount namespace.
fn keep(namespace: &OwnedFd, id: &ContainerId) -> Result<(), Fault> {
    let file = paths::container_mount_ns(id);
    fs::write(&file, "").fault("making", file.display())?;
    let from = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    mount(Some(from.as_str()), &file, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .fault("keeping the namespace", file.display())
}

/// Makes the container's cgroup if the kernel has cgroup v2 (boot made the parent cgroup).
fn make_cgroup(id: &ContainerId) -> Result<(), Fault> {
    match cgroups::make_container(id) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Fault::io("making the cgroup of", id, &error))
        }
        _ => Ok(()),
    }
}

/// Removes what is kept of a container; a missing part is no error. A container in which a process runs stays
/// as it is: the kernel refuses to remove its cgroup, and that is tried first.
pub fn remove(id: &ContainerId) -> Result<(), Fault> {
    let gone = |result: std::io::Result<()>, doing: &str| match result {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Fault::io(doing, id, &error)),
        _ => Ok(()),
    };
    gone(fs::remove_dir(paths::container_cgroup(id)), "removing the cgroup of")?;
    unmount(&paths::container_mount_ns(id))?;
    gone(fs::remove_dir_all(paths::container(id)), "removing what is kept of")
}
