//! NICs that are unplugged.

use std::os::fd::OwnedFd;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::sys::mount::{Resolve, openat2};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, readlinkat};
use nix::sys::stat::Mode;
use nix::unistd::write;

use super::tree::libc_flags;

/// Unplugs a NIC. One write, after which the kernel has taken the link down, its addresses and its routes
/// with it. It is mountd's to do, for the file is root's and netd is a user who has no files.
pub fn unplug(device: &str, local: bool) -> Result<(), Fault> {
    const DOING: &str = "unplugging";
    let fault = |why: &str| Fault::new(DOING, device, why);
    if local {
        return Err(fault("a guest in namespaces has no devices of its own"));
    }
    if matches!(device, "" | "." | "..") || device.contains('/') {
        return Err(Fault::new("reading", "device", format!("{device:?} is not the name of a link")));
    }
    let sys = open("/sys", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).fault("opening", "/sys")?;
    let pci = pci_device(&sys, device).fault(DOING, device)?;
    let pci = pci.ok_or_else(|| fault("it is no device on the PCI bus"))?;
    let remove = openat2(&pci, Path::new("remove"), libc_flags(OFlag::O_WRONLY), 0, Resolve::NoLinks)
        .fault(DOING, device)?;
    write(&remove, b"1").map(drop).fault(DOING, device)
}

/// The directory of the PCI device that a link is, or (for virtio) that the link's device is on. Its links
/// lead where the kernel has put them, and not out of /sys.
fn pci_device(sys: &OwnedFd, link: &str) -> Result<Option<OwnedFd>, Errno> {
    let below = |path: &str| openat2(sys, Path::new(path), libc_flags(OFlag::O_PATH), 0, Resolve::InRoot);
    // Without the link itself the name is wrong; without a device it is the kernel's own.
    below(&format!("class/net/{link}"))?;
    for path in [format!("class/net/{link}/device"), format!("class/net/{link}/device/..")] {
        let directory = match below(&path) {
            Err(Errno::ENOENT) => return Ok(None),
            directory => directory?,
        };
        let bus = readlinkat(&directory, "subsystem").unwrap_or_default();
        if Path::new(&bus).file_name().is_some_and(|bus| bus == "pci") {
            return Ok(Some(directory));
        }
    }
    Ok(None)
}
