//! The guest's /dev/null, which hides a file of a container by a mount on top of it.

use std::os::fd::OwnedFd;

use hyperinit::fault::{Fault, OrFault};
use nix::fcntl::{OFlag, open};
use nix::libc::{MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use nix::sys::stat::{Mode, fstat};

use super::tree::Home;

/// The attributes of the mount. It is read-only because otherwise a container's root could change the mode of
/// the device; the device itself stays writable.
pub const COVER: u64 = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC;

/// Opens /dev/null of the namespace that mountd is in. A file that is not the device checked at mountd's
/// start is a fault.
pub fn open_checked(home: &Home) -> Result<OwnedFd, Fault> {
    let null = open("/dev/null", OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", "/dev/null")?;
    let looks =
        |fd: &OwnedFd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).fault("looking at", "/dev/null");
    if looks(&null)? != looks(&home.null)? {
        return Err(Fault::new("opening", "/dev/null", "it is another file than at the start"));
    }
    Ok(null)
}
