//! The Docker init layer, and the pod's files bound over the container's.

use std::os::fd::OwnedFd;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::paths;
use hyperinit::sys::mount::{Resolve, clone_tree, move_mount, openat2, set_attributes};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{symlinkat, write};

use super::tree::{file_to_mount_over, libc_flags, make_directories};

/// What `/etc/hosts` says where an image has none.
const HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// Makes what Docker puts under every image: hosts and mtab. (resolv.conf and hostname are made where they are bound.)
pub fn make(root: &OwnedFd) -> Result<(), Fault> {
    let etc = make_directories(root, Path::new("etc")).fault("making in the image", "/etc")?;
    let flags = libc_flags(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW);
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
