//! Inside a container's root: every path is resolved there, by descriptor, and looked up once.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::ContainerId;
use hyperinit::paths;
use hyperinit::sys::mount::{Resolve, openat2};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, makedev, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// What mountd must reach while it is in a namespace where none of it can be seen.
pub struct Home {
    /// The guest's mount namespace.
    namespace: OwnedFd,
    /// The guest's /proc: the pod's does not show mountd itself.
    pub proc: OwnedFd,
    /// The guest's /dev/null, which hides files.
    pub null: OwnedFd,
    /// `paths::RUN`: the pod's namespaces are kept below it.
    pub run: OwnedFd,
}

impl Home {
    /// Opens it all. The log keeps working, for it is a descriptor too.
    pub fn open() -> Result<Home, Fault> {
        let path =
            |path: &str| open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).fault("opening", path);
        let null = path("/dev/null")?;
        let stat = fstat(&null).fault("looking at", "/dev/null")?;
        if kind(&stat) != SFlag::S_IFCHR || stat.st_rdev != makedev(1, 3) {
            return Err(Fault::new("looking at", "/dev/null", "it is not the null device"));
        }
        let proc = path("/proc")?;
        Ok(Home { namespace: own_namespace(&proc)?, proc, null, run: path(paths::RUN)? })
    }

    /// Runs `work` in a new mount namespace, a copy of the pod's, and comes back whatever happens. Returns the
    /// namespace with what `work` made of it; without its descriptor it is gone, and all its mounts.
    pub fn in_new_namespace(&self, work: impl FnOnce() -> Result<(), Fault>) -> Result<OwnedFd, Fault> {
        let pod = format!("{}/mnt", paths::POD_NS);
        self.inside(&pod, || {
            unshare(CloneFlags::CLONE_NEWNS).fault("making", "a mount namespace")?;
            let namespace = own_namespace(&self.proc)?;
            work().map(|()| namespace)
        })
    }

    /// Runs `work` in a container's mount namespace, and comes back whatever happens.
    pub fn in_namespace<T>(
        &self,
        container: &ContainerId,
        work: impl FnOnce() -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        self.inside(&paths::container_mount_ns(container).to_string_lossy(), work)
    }

    fn inside<T>(&self, path: &str, work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
        let namespace = open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .fault("opening the namespace", path)?;
        setns(&namespace, CloneFlags::CLONE_NEWNS).fault("entering", path)?;
        let result = work();
        if let Err(errno) = setns(&self.namespace, CloneFlags::CLONE_NEWNS) {
            // In a container's namespace mountd is of no use and a danger: its successor starts at home.
            log::error!("{}", Fault::errno("returning to", "the guest's mount namespace", errno));
            std::process::exit(1);
        }
        result
    }

    /// Opens what an O_PATH descriptor is of, and nothing else: no path is walked again.
    pub fn reopen(&self, file: &OwnedFd, flags: OFlag) -> Result<OwnedFd, Errno> {
        let link = format!("self/fd/{}", file.as_raw_fd());
        nix::fcntl::openat(&self.proc, link.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())
    }
}

fn own_namespace(proc: &OwnedFd) -> Result<OwnedFd, Fault> {
    nix::fcntl::openat(proc, "self/ns/mnt", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", "mountd's own mount namespace")
}

/// A descriptor of what is at `path` inside `root` (O_PATH). Links lead wherever they lead inside.
pub fn resolve(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    openat2(root, path, libc_flags(OFlag::O_PATH), 0, Resolve::InRoot)
}

/// A directory of the container's root that is mounted over, made if it is missing. Here an image has no say: a link
/// in the place of /proc or /dev is refused.
pub fn mount_point(root: impl AsFd, path: &str) -> Result<OwnedFd, Fault> {
    let flags = libc_flags(OFlag::O_PATH | OFlag::O_DIRECTORY);
    let open = || openat2(root.as_fd(), Path::new(path), flags, 0, Resolve::NoLinks);
    match open() {
        Err(Errno::ENOENT) => {
            mkdirat(root.as_fd(), path, Mode::from_bits_truncate(0o755))
                .fault("making in the image", format!("/{path}"))?;
            open()
        }
        result => result,
    }
    .fault("opening in the image", format!("/{path}"))
}

/// A directory inside `root`, with all that leads to it, made where it is missing. Links are followed inside.
pub fn make_directories(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = libc_flags(OFlag::O_PATH | OFlag::O_DIRECTORY);
    let mut done = std::path::PathBuf::new();
    let mut at = openat2(root.as_fd(), Path::new("."), flags, 0, Resolve::InRoot)?;
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
            // As the kernel has it: after links have been followed. So from the root again, with all so far.
            Component::ParentDir => done.push(".."),
            Component::Normal(name) => {
                match mkdirat(&at, name, Mode::from_bits_truncate(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    // A read-only image that has it is as good.
                    Err(Errno::EROFS) => {}
                    Err(errno) => return Err(errno),
                }
                done.push(name);
            }
        }
        at = openat2(root.as_fd(), &done, flags, 0, Resolve::InRoot)?;
    }
    Ok(at)
}

/// A regular file inside `root`, opened to be mounted over; made empty, with its directory, if it is missing.
pub fn file_to_mount_over(root: impl AsFd, path: &Path, create: bool) -> Result<OwnedFd, Errno> {
    match resolve(root.as_fd(), path) {
        Err(Errno::ENOENT) if create => {
            let parent = make_directories(root.as_fd(), path.parent().unwrap_or(Path::new("/")))?;
            let name = Path::new(path.file_name().ok_or(Errno::EINVAL)?);
            let flags = libc_flags(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW);
            // A dangling link in its place is the image's own: EEXIST.
            drop(openat2(&parent, name, flags, 0o644, Resolve::NoLinks)?);
            resolve(root, path)
        }
        result => result,
    }
}

/// Removes what is at `path` if it is a link that leads to nothing inside `root`. What is not there is no error.
pub fn remove_dead_link(root: impl AsFd, path: &Path) -> Result<(), Errno> {
    match resolve(root.as_fd(), path) {
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
        result => return result.map(drop),
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    let name = Path::new(path.file_name().ok_or(Errno::EINVAL)?);
    let look = libc_flags(OFlag::O_PATH | OFlag::O_NOFOLLOW);
    let found = resolve(root, directory).and_then(|directory| {
        let found = openat2(&directory, name, look, 0, Resolve::NoLinks)?;
        Ok((directory, fstat(&found)?))
    });
    match found {
        Ok((directory, stat)) if kind(&stat) == SFlag::S_IFLNK => {
            unlinkat(&directory, name, UnlinkatFlags::NoRemoveDir)
        }
        // It, or its directory, is missing.
        Ok(_) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// What kind of file it is.
pub fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// nix's flags as openat2 takes them.
pub fn libc_flags(flags: OFlag) -> i32 {
    flags.bits()
}
