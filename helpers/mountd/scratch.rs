//! A container's scratch: a small tmpfs for its copies of the pod's files, and for the mount points that a
//! read-only image lacks.

use std::os::fd::OwnedFd;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::paths;
use hyperinit::sys::mount::{Resolve, move_mount, new_mount, openat2};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID};
use nix::sys::stat::{Mode, fchmod, fstat, mkdirat};
use nix::unistd::{Gid, Uid, fchown};

use super::tree::{directory, libc_flags};

/// The size of the scratch: a container may write to its files, and they use the pod's memory.
const SIZE: &str = "1m";
/// The directories on the scratch for a layered root: the upper layer and the work directory.
const UPPER: &str = "upper";
const WORK: &str = "work";

/// Makes the scratch in the namespace that becomes the container's. It becomes invisible when the guest's
/// root is detached.
pub fn make() -> Result<OwnedFd, Fault> {
    let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    let scratch = new_mount("tmpfs", &[("mode", "700"), ("size", SIZE)], attributes)
        .fault("making", "the container's scratch")?;
    // A part of a mount can only be cloned where the mount is attached.
    let place = directory(paths::VOLUME)?;
    move_mount(&scratch, &place).fault("attaching", "the container's scratch")?;
    Ok(scratch)
}

/// Makes a detached overlay of the root filesystem at the stage and a layer on the scratch, which receives
/// anything that would have to be made in the image. With these options, an image cannot influence how its
/// layers are read (`redirect_dir`, `metacopy`).
pub fn layered(scratch: &OwnedFd, image: &OwnedFd) -> Result<OwnedFd, Fault> {
    let make = || {
        let of = fstat(image)?;
        for name in [UPPER, WORK] {
            mkdirat(scratch, name, Mode::S_IRWXU)?;
        }
        // The overlay's root takes its owner and mode from the upper layer.
        let flags = libc_flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY);
        let upper = openat2(scratch, Path::new(UPPER), flags, 0, Resolve::NoLinks)?;
        fchown(&upper, Some(Uid::from_raw(of.st_uid)), Some(Gid::from_raw(of.st_gid)))?;
        fchmod(&upper, Mode::from_bits_truncate(of.st_mode))?;
        let at = |name: &str| format!("{}/{name}", paths::VOLUME);
        let (upper, work) = (at(UPPER), at(WORK));
        let options = [
            ("lowerdir", paths::STAGE),
            ("upperdir", &upper),
            ("workdir", &work),
            ("redirect_dir", "nofollow"),
            ("metacopy", "off"),
        ];
        new_mount("overlay", &options, MOUNT_ATTR_NODEV)
    };
    make().map_err(|errno: Errno| Fault::errno("making", "a layer over the image", errno))
}
