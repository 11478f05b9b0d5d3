//! The files that Docker puts over every image (the pod's hosts, hostname and resolv.conf, and mtab), and the
//! kernel's modules.

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::paths;
use hyperinit::sys::mount::{Resolve, clone_tree, move_mount, openat2, set_attributes};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use nix::sys::stat::Mode;
use nix::unistd::symlinkat;

use super::tree::{Reach, file_to_mount_over, libc_flags, make_directories};
use super::volumes::is_empty;

/// The pod's files, and their places in a container.
const FILES: [(&str, &str); 3] = [
    (paths::POD_HOSTS, "etc/hosts"),
    (paths::POD_HOSTNAME, "etc/hostname"),
    (paths::POD_RESOLV_CONF, "etc/resolv.conf"),
];

/// Makes `/etc/mtab`, which older programs read.
pub fn make_mtab(root: &OwnedFd) -> Result<(), Fault> {
    let etc = make_directories(root, Path::new("etc"), Reach::Image).fault("making in the image", "/etc")?;
    match symlinkat("/proc/mounts", &etc, "mtab") {
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(Fault::errno("making in the image", "/etc/mtab", errno)),
    }
}

/// Binds a copy of each of the pod's files over the container's. The container may write to its copy, unless
/// its root is read-only.
///
/// If the image has no place for a file and none can be made, the container goes without it. With `strict`, a
/// read-only root that lacks a place is a fault instead.
pub fn bind_pod_files(scratch: &OwnedFd, root: &OwnedFd, read_only: bool, strict: bool) -> Result<(), Fault> {
    for (from, to) in FILES {
        let text = match fs::read(from) {
            Ok(text) => text,
            // The pod has no such file: it has no DNS.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(Fault::io("reading", from, &error)),
        };
        let doing = "making in the image";
        let target = match file_to_mount_over(root, Path::new(to), Reach::Image) {
            Ok(target) => target,
            Err(Errno::EROFS) if strict => {
                return Err(Fault::errno(doing, format!("/{to}"), Errno::EROFS));
            }
            Err(errno) => {
                log::warn!("{}", Fault::errno("going without in the image:", format!("/{to}"), errno));
                continue;
            }
        };
        let name = Path::new(to).file_name().unwrap_or_default();
        let flags = libc_flags(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL);
        let file = openat2(scratch, Path::new(name), flags, 0o644, Resolve::NoLinks)
            .fault("making the container's", format!("/{to}"))?;
        let mut file = fs::File::from(file);
        file.write_all(&text).fault("writing the container's", format!("/{to}"))?;
        let tree = clone_tree(&file, false).fault("cloning", from)?;
        let read_only = if read_only { MOUNT_ATTR_RDONLY } else { 0 };
        set_attributes(&tree, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | read_only, false)
            .fault("setting up the container's", format!("/{to}"))?;
        move_mount(&tree, &target).fault("binding in the image", format!("/{to}"))?;
    }
    Ok(())
}

/// The release of the kernel whose modules this guest kept; nearly all guests have none (src/init/root.rs).
pub fn release() -> Result<Option<String>, Fault> {
    let uname = nix::sys::utsname::uname().fault("asking", "uname")?;
    let release = uname.release().to_string_lossy().into_owned();
    Ok(Some(release).filter(|release| Path::new(paths::MODULES).join(release).is_dir()))
}

/// Binds the guest's modules, read-only, if the image has none. If the image has no place for them, the
/// container goes without.
pub fn bind_modules(release: Option<&str>, root: &OwnedFd) -> Result<(), Fault> {
    let Some(release) = release else { return Ok(()) };
    let path = Path::new(paths::MODULES).join(release);
    let target = match make_directories(root, &path, Reach::Image) {
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
    set_attributes(&tree, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NODEV, false)
        .fault("making read-only", path.display())?;
    move_mount(&tree, &target).fault("binding in the image", path.display())
}
