//! Lookups inside a container's root: every path is resolved relative to the root's descriptor, once.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::ContainerId;
use hyperinit::paths;
use hyperinit::sys::mount::{Resolve, openat2};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, readlinkat};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, makedev, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Descriptors that mountd needs while it is in a namespace in which their paths are not visible.
pub struct Home {
    /// The guest's mount namespace.
    namespace: OwnedFd,
    /// The guest's /proc: the pod's does not show mountd itself.
    pub proc: OwnedFd,
    /// The guest's /dev/null, which hides files.
    pub null: OwnedFd,
}

impl Home {
    /// Opens all of them. The log keeps working in any namespace, because it is a descriptor too.
    pub fn open() -> Result<Home, Fault> {
        let path =
            |path: &str| open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).fault("opening", path);
        let null = path("/dev/null")?;
        let stat = fstat(&null).fault("looking at", "/dev/null")?;
        if kind(&stat) != SFlag::S_IFCHR || stat.st_rdev != makedev(1, 3) {
            return Err(Fault::new("looking at", "/dev/null", "it is not the null device"));
        }
        let proc = path("/proc")?;
        Ok(Home { namespace: own_namespace(&proc)?, proc, null })
    }

    /// Runs `work` in a new mount namespace, a copy of the pod's, and returns to the guest's in every case.
    /// Returns the namespace as `work` left it. When its descriptor is closed, the namespace and all its
    /// mounts are gone.
    pub fn in_new_namespace(&self, work: impl FnOnce() -> Result<(), Fault>) -> Result<OwnedFd, Fault> {
        let pod = format!("{}/mnt", paths::POD_NS);
        self.inside(&pod, || {
            unshare(CloneFlags::CLONE_NEWNS).fault("making", "a mount namespace")?;
            let namespace = own_namespace(&self.proc)?;
            work().map(|()| namespace)
        })
    }

    /// Runs `work` in a container's mount namespace, and returns to the guest's in every case.
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
            // A mountd stuck in a container's namespace is useless and dangerous. Its successor starts in the
            // guest's.
            log::error!("{}", Fault::errno("returning to", "the guest's mount namespace", errno));
            std::process::exit(1);
        }
        result
    }

    /// The path of a descriptor's file in mountd's current namespace.
    fn path_of(&self, file: BorrowedFd<'_>) -> Result<PathBuf, Errno> {
        readlinkat(&self.proc, format!("self/fd/{}", file.as_raw_fd()).as_str()).map(PathBuf::from)
    }

    /// Opens the inode of an O_PATH descriptor, without walking a path again.
    pub fn reopen(&self, file: &OwnedFd, flags: OFlag) -> Result<OwnedFd, Errno> {
        let link = format!("self/fd/{}", file.as_raw_fd());
        nix::fcntl::openat(&self.proc, link.as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())
    }
}

fn own_namespace(proc: &OwnedFd) -> Result<OwnedFd, Fault> {
    nix::fcntl::openat(proc, "self/ns/mnt", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", "mountd's own mount namespace")
}

/// Opens one of the guest's own directories (O_PATH).
pub fn directory(path: &str) -> Result<OwnedFd, Fault> {
    open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).fault("opening", path)
}

/// How far links inside a container's root may lead, for a path that is mounted over or written to.
///
/// Images and their links are untrusted: with `/etc/hostname -> /dev/null`, mountd would cover or write the
/// device.
#[derive(Clone, Copy)]
pub enum Reach<'a> {
    /// Not out of the image's own filesystem. For files that the guest adds on its own.
    Image,
    /// Also to volumes, but not to anything that the guest has made. For paths that the host names.
    Volumes(&'a Home),
}

impl Reach<'_> {
    /// Opens `path` inside `root`. Fails with EXDEV if a link leads too far.
    pub fn open(self, root: impl AsFd, path: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
        self.make(root, path, flags, 0)
    }

    /// Opens `path` inside `root` as [`Reach::open`] does, and creates it with `mode` if `flags` have
    /// O_CREAT.
    pub fn make(self, root: impl AsFd, path: &Path, flags: OFlag, mode: u32) -> Result<OwnedFd, Errno> {
        let open = |path, resolve| openat2(root.as_fd(), path, libc_flags(flags), mode, resolve);
        let home = match self {
            Reach::Image => return open(path, Resolve::InMount),
            Reach::Volumes(home) => home,
        };
        // If no link is on the way, the host itself has named the place, whatever it is. A trailing slash
        // requires a directory, so it is kept.
        let below = path.as_os_str().as_bytes();
        let start = below.iter().position(|&byte| byte != b'/').unwrap_or(below.len());
        let below = Path::new(OsStr::from_bytes(below.get(start..).unwrap_or_default()));
        if let Ok(found) = open(below, Resolve::NoLinks) {
            return Ok(found);
        }
        let found = open(path, Resolve::InRoot)?;
        let (top, at) = (home.path_of(root.as_fd())?, home.path_of(found.as_fd())?);
        if at.strip_prefix(top).is_ok_and(|below| !is_guests(below)) { Ok(found) } else { Err(Errno::EXDEV) }
    }
}

/// A fault at a path of a container; for EXDEV it explains that a link leads too far.
pub fn fault(doing: &str, path: &Path, errno: Errno) -> Fault {
    match errno {
        Errno::EXDEV => Fault {
            errno: Some(errno as i32),
            ..Fault::new(doing, path.display(), "a link leads to what is the guest's own")
        },
        errno => Fault::errno(doing, path.display(), errno),
    }
}

/// Whether a path of a container, relative to its root, is in a mount that the guest has made. The shared
/// memory counts as the containers' own.
fn is_guests(path: &Path) -> bool {
    ["proc", "sys", "dev"].iter().any(|made| path.starts_with(made)) && !path.starts_with("dev/shm")
}

/// Opens a directory of the container's root that is to be mounted over, and makes it if it is missing. No
/// link of the image is followed: a link in place of /proc or /dev is refused.
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

/// Opens a directory inside `root`, and makes it and its parents where they are missing.
pub fn make_directories(root: impl AsFd, path: &Path, reach: Reach<'_>) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let mut done = PathBuf::new();
    let mut at = reach.open(root.as_fd(), Path::new("."), flags)?;
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir | Component::Prefix(_) => continue,
            // `..` applies after links have been followed, as in the kernel. So the path so far is resolved
            // from the root again.
            Component::ParentDir => done.push(".."),
            Component::Normal(name) => done.push(name),
        }
        at = match (reach.open(root.as_fd(), &done, flags), component) {
            (Err(Errno::ENOENT), Component::Normal(name)) => {
                match mkdirat(&at, name, Mode::from_bits_truncate(0o755)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(errno),
                }
                reach.open(root.as_fd(), &done, flags)?
            }
            (result, _) => result?,
        };
    }
    Ok(at)
}

/// Opens a directory inside `root` that is to be mounted over, and makes it and its parents where they are
/// missing. A dead link in its place is removed.
pub fn directory_to_mount_over(root: impl AsFd, path: &Path, reach: Reach<'_>) -> Result<OwnedFd, Errno> {
    let errno = match make_directories(root.as_fd(), path, reach) {
        Err(errno) if is_dead(errno) => errno,
        result => return result,
    };
    let (parent, name) = parent_and_name(path)?;
    match reach.open(root.as_fd(), parent, OFlag::O_PATH | OFlag::O_DIRECTORY) {
        Ok(parent) if remove_link(&parent, name)? => make_directories(root, path, reach),
        _ => Err(errno),
    }
}

/// Opens a file inside `root` that is to be mounted over; if it is missing, it is made empty, with its
/// directory. A dead link in its place is removed.
pub fn file_to_mount_over(root: impl AsFd, path: &Path, reach: Reach<'_>) -> Result<OwnedFd, Errno> {
    match reach.open(root.as_fd(), path, OFlag::O_PATH) {
        Err(errno) if is_dead(errno) => {}
        result => return result,
    }
    let (parent, name) = parent_and_name(path)?;
    let parent = make_directories(root.as_fd(), parent, reach)?;
    remove_link(&parent, name)?;
    let flags = libc_flags(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW);
    drop(openat2(&parent, name, flags, 0o644, Resolve::NoLinks)?);
    reach.open(root, path, OFlag::O_PATH)
}

/// Whether nothing can be reached at a path: it does not exist, or a link dangles, loops or leads too far.
fn is_dead(errno: Errno) -> bool {
    matches!(errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::EXDEV)
}

fn parent_and_name(path: &Path) -> Result<(&Path, &Path), Errno> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    Ok((parent.unwrap_or(Path::new("/")), Path::new(path.file_name().ok_or(Errno::EINVAL)?)))
}

/// Removes a name if it is a link; returns whether it was one.
fn remove_link(directory: &OwnedFd, name: &Path) -> Result<bool, Errno> {
    let look = libc_flags(OFlag::O_PATH | OFlag::O_NOFOLLOW);
    let found = match openat2(directory, name, look, 0, Resolve::NoLinks) {
        Err(Errno::ENOENT) => return Ok(false),
        result => fstat(&result?)?,
    };
    match kind(&found) {
        SFlag::S_IFLNK => unlinkat(directory, name, UnlinkatFlags::NoRemoveDir).map(|()| true),
        _ => Ok(false),
    }
}

/// The file type bits of a file's mode.
pub fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// The flags of nix as [`openat2`] takes them.
pub fn libc_flags(flags: OFlag) -> i32 {
    flags.bits()
}

/// Detaches every mount at a path. A process that still uses one of the mounts keeps it.
pub fn unmount(path: &Path) -> Result<(), Fault> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            // EINVAL: nothing is mounted there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(Fault::errno("unmounting", path.display(), errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_makes_is_not_the_containers() {
        for made in ["proc", "proc/sys/kernel/hostname", "sys", "dev/null", "dev/pts/ptmx", "dev"] {
            assert!(is_guests(Path::new(made)), "{made}");
        }
        for own in ["", "etc/hosts", "dev/shm", "dev/shm/x", "device", "srv/proc"] {
            assert!(!is_guests(Path::new(own)), "{own}");
        }
    }
}
