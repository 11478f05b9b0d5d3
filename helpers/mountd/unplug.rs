//! Unplugging NICs.

use std::os::fd::OwnedFd;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::sys::mount::{Resolve, openat2};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, readlinkat};
use nix::sys::stat::Mode;
use nix::unistd::write;

use super::tree::libc_flags;

/// Unplugs a NIC by one write, after which the kernel has removed the link with its addresses and routes.
/// mountd does this because the file belongs to root, and netd is an unprivileged user without access to
/// files.
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

/// Opens the directory of the PCI device of a network link; for virtio, of the device that the link's device
/// is on. Symbolic links on the way are the kernel's and do not lead out of /sys.
fn pci_device(sys: &OwnedFd, link: &str) -> Result<Option<OwnedFd>, Errno> {
    let below = |path: &str| openat2(sys, Path::new(path), libc_flags(OFlag::O_PATH), 0, Resolve::InRoot);
    // If the link itself is missing, the name is wrong. If it has no device, it is one of the kernel's own
    // links.
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
