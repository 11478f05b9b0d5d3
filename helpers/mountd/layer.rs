//! The Docker init layer, the kernel's modules, and the pod's files bound over the container's.

use std::os::fd::OwnedFd;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::paths;
use hyperinit::sys::mount::{Resolve, clone_tree, move_mount, openat2, set_attributes};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{symlinkat, write};

use super::tree::{file_to_mount_over, libc_flags, make_directories, remove_dead_link};
use super::volumes::is_empty;

/// What `/etc/hosts` says where an image has none.
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// Makes what Docker puts under every image: hosts and mtab. (resolv.conf and hostname are made where they are bound.)
pub fn make(root: &OwnedFd) -> Result<(), Fault> {
    let etc = make_directories(root, Path::new("etc")).fault("making in the image", "/etc")?;
    let flags = libc_flags(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW);
    make_room(root, Path::new("etc/hosts"));
    match openat2(&etc, Path::new("hosts"), flags, 0o644, Resolve::NoLinks) {
        Ok(hosts) => drop(write(&hosts, HOSTS.as_bytes()).fault("writing in the image", "/etc/hosts")?),
        Err(Errno::EEXIST) => {}
        Err(errno) => return Err(Fault::errno("making in the image", "/etc/hosts", errno)),
    }
    match symlinkat("/proc/mounts", &etc, "mtab") {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(Fault::errno("making in the image", "/etc/mtab", errno)),
    }
}

/// Binds the pod's resolv.conf and hostname over the container's, read-only: they are the whole pod's. An image that
/// has no such file and is read-only goes without.
pub fn bind_pod_files(root: &OwnedFd, read_only: bool) -> Result<(), Fault> {
    for (from, to) in [(paths::POD_RESOLV_CONF, "etc/resolv.conf"), (paths::POD_HOSTNAME, "etc/hostname")] {
        let file = match open(from, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) {
            Ok(file) => file,
            // The pod has no DNS.
            Err(Errno::ENOENT) => continue,
            Err(errno) => return Err(Fault::errno("opening", from, errno)),
        };
        if !read_only {
            make_room(root, Path::new(to));
        }
        let target = match file_to_mount_over(root, Path::new(to), !read_only) {
            Ok(target) => target,
            Err(errno) => {
                log::warn!("{}", Fault::errno("going without in the image:", format!("/{to}"), errno));
                continue;
            }
        };
        let tree = clone_tree(&file, false).fault("cloning", from)?;
        set_attributes(&tree, nix::libc::MOUNT_ATTR_RDONLY, false).fault("making read-only", from)?;
        move_mount(&tree, &target).fault("binding in the image", format!("/{to}"))?;
    }
    Ok(())
}

/// A link to what a service of the image would make (systemd-resolved's stub) gives way, as under Docker: there is nothing to
/// bind over.
fn make_room(root: &OwnedFd, path: &Path) {
    if let Err(errno) = remove_dead_link(root, path) {
        log::warn!(
            "{}",
            Fault::errno("removing in the image the link", format!("/{}", path.display()), errno)
        );
    }
}

/// The release of the kernel whose modules this guest kept; none in nearly all guests (src/init/root.rs).
pub fn release() -> Result<Option<String>, Fault> {
    let uname = nix::sys::utsname::uname().fault("asking", "uname")?;
    let release = uname.release().to_string_lossy().into_owned();
    Ok(Some(release).filter(|release| Path::new(paths::MODULES).join(release).is_dir()))
}

/// Binds the guest's modules, read-only, where an image has none. An image that cannot have them goes without.
pub fn bind_modules(release: Option<&str>, root: &OwnedFd) -> Result<(), Fault> {
    let Some(release) = release else { return Ok(()) };
    let path = Path::new(paths::MODULES).join(release);
    let target = match make_directories(root, &path) {
        Ok(target) => target,
        Err(errno) => {
            log::warn!("{}", Fault::errno("going without in the image:", path.display(), errno));
            return Ok(());
        }
    };
    if !is_empty(&target).fault("looking in the image at", path.display())? {
        return Ok(());
    }
    let modules = open(&path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", path.display())?;
    let tree = clone_tree(&modules, false).fault("cloning", path.display())?;
    set_attributes(&tree, nix::libc::MOUNT_ATTR_RDONLY | nix::libc::MOUNT_ATTR_NODEV, false)
        .fault("making read-only", path.display())?;
    move_mount(&tree, &target).fault("binding in the image", path.display())
}
