//! Disks: how the host names them, waiting for them to appear, and mounting their filesystems; and NFS
//! exports.

use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Instant;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::sys::mount::new_mount;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

const NODEV: u64 = nix::libc::MOUNT_ATTR_NODEV;
/// The kernel's directories of SCSI disks, followed by `target:lun`. runV has one controller, with one
/// channel.
const SCSI_DISKS: &str = "/sys/class/scsi_disk/0:0:";
const SCSI_HOSTS: &str = "/sys/class/scsi_host";
/// The NFS versions that are tried, best first (nfs(5): `vers`).
const NFS_VERSIONS: [&str; 3] = ["4.2", "4.1", "4.0"];

/// The host's name for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk<'a> {
    /// Its name under /dev.
    Name(&'a str),
    /// Its SCSI address, `target:lun`.
    Scsi(&'a str),
}

/// How a filesystem is accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It is written to.
    Write,
    /// It is only read, though another container may write to it.
    Read,
    /// It is only read by the container, but mountd may first have to create directories on it, if the disk
    /// allows that.
    WriteIfPossible,
}

impl<'a> Disk<'a> {
    /// Reads the host's name for a disk, given by `key`, or its address `addr`, which overrides the name.
    pub fn read(key: &str, name: &'a str, addr: &'a str) -> Result<Disk<'a>, Fault> {
        if addr.is_empty() {
            return if is_word(name) {
                Ok(Disk::Name(name))
            } else {
                Err(Fault::new("reading", key, format!("{name:?} is not the name of a disk")))
            };
        }
        let number =
            |text: &str| (1..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        match addr.split_once(':') {
            Some((target, lun)) if number(target) && number(lun) => Ok(Disk::Scsi(addr)),
            _ => Err(Fault::new("reading", "addr", format!("{addr:?} is not of the form TARGET:LUN"))),
        }
    }

    /// The disk's name under /dev, if it has appeared.
    fn name(self) -> Option<String> {
        let name = match self {
            Disk::Name(name) => name.to_owned(),
            Disk::Scsi(addr) => {
                let mut blocks = fs::read_dir(format!("{SCSI_DISKS}{addr}/device/block")).ok()?;
                blocks.next()?.ok()?.file_name().into_string().ok()?
            }
        };
        Path::new("/dev").join(&name).exists().then_some(name)
    }
}

impl std::fmt::Display for Disk<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Disk::Name(name) => write!(f, "/dev/{name}"),
            Disk::Scsi(addr) => write!(f, "SCSI {addr}"),
        }
    }
}

/// Whether `text` is a plain name: letters, digits, `_`, `-` and `.`, not beginning with a dot. So it
/// contains no path and no mount option.
pub fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
        && !text.starts_with('.')
}

/// Waits until the deadline for disks that are still being plugged; returns one that is still missing then.
/// `rescan`: the guest's SCSI controllers may be asked to look for the disk.
pub fn missing<'a>(disks: &[Disk<'a>], rescan: bool, until: Instant) -> Result<Option<Disk<'a>>, Fault> {
    let first_missing = || disks.iter().copied().find(|disk| disk.name().is_none());
    // Nearly always, no disk is missing.
    let Some(missing) = first_missing() else { return Ok(None) };
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).fault("watching", "/dev")?;
    watch.add_watch("/dev", AddWatchFlags::IN_CREATE).fault("watching", "/dev")?;
    if rescan && let Disk::Scsi(addr) = missing {
        look_for(addr);
    }
    loop {
        let Some(missing) = first_missing() else { return Ok(None) };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Some(missing));
        }
        let mut fds = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)).fault("watching", "/dev")?;
        let _ = watch.read_events();
    }
}

/// Makes every SCSI controller look at one address. Some take seconds to scan all of their addresses, and
/// only one scans at a time. A refusal is only logged, because it may come from a controller without the
/// disk: what counts is whether the disk appears.
fn look_for(addr: &str) {
    let address = format!("0 {}", addr.replace(':', " "));
    // A guest without SCSI has no such directory.
    let Ok(hosts) = fs::read_dir(SCSI_HOSTS) else { return };
    for host in hosts.flatten() {
        let scan = host.path().join("scan");
        match fs::write(&scan, &address).fault("writing to", scan.display()) {
            // The controller has no such address (an ATA port).
            Err(fault) if fault.is(Errno::EINVAL) => {}
            Err(fault) => log::warn!("{fault}"),
            Ok(()) => {}
        }
    }
}

/// Makes a detached mount of a disk's filesystem. If the filesystem is already mounted, this is a further
/// mount of it.
pub fn mount(disk: Disk<'_>, fstype: &str, access: Access) -> Result<OwnedFd, Fault> {
    if !has_disk(fstype)? {
        let why = "it is the kernel's own and has no disk";
        return Err(Fault::new(format!("mounting {fstype} from"), disk, why));
    }
    let name = disk.name().ok_or_else(|| Fault::errno("looking for the disk", disk, Errno::ENOENT))?;
    let path = format!("/dev/{name}");
    let mount = |read_only: bool| {
        let mut options = vec![("source", path.as_str())];
        if fstype == "xfs" {
            // Snapshots of one image carry the same uuid.
            options.push(("nouuid", ""));
        }
        if read_only {
            options.push(("ro", ""));
        }
        new_mount(fstype, &options, NODEV)
    };
    let mounted = match access {
        Access::Write => mount(false),
        // All mounts of a filesystem share its read-only state (EBUSY). A container that may not write is
        // kept from it by the flag of its own mount.
        Access::Read => {
            mount(true).or_else(|errno| if errno == Errno::EBUSY { mount(false) } else { Err(errno) })
        }
        Access::WriteIfPossible => mount(false).or_else(|errno| match errno {
            // The disk is write-protected, or it is already mounted read-only.
            Errno::EACCES | Errno::EROFS | Errno::EBUSY => mount(true),
            errno => Err(errno),
        }),
    };
    let doing = format!("mounting {fstype} from");
    match mounted {
        // fsopen(2) returns ENODEV for an unknown filesystem type. Its text, "no such device", would suggest
        // a missing disk.
        Err(Errno::ENODEV) => Err(Fault::new(doing, path, "the kernel has no such filesystem")),
        mounted => mounted.fault(&doing, path),
    }
}

/// Whether this type of filesystem resides on a disk: a proc or a devtmpfs would give a container access to
/// the guest. A type that the kernel does not know passes here, and mounting it fails.
fn has_disk(fstype: &str) -> Result<bool, Fault> {
    const KNOWN: &str = "/proc/filesystems";
    let known = fs::read_to_string(KNOWN).fault("reading", KNOWN)?;
    Ok(!known.lines().any(|line| line.strip_prefix("nodev").is_some_and(|name| name.trim() == fstype)))
}

/// An export of an NFS server, `server:/path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export<'a> {
    source: &'a str,
    server: IpAddr,
}

impl<'a> Export<'a> {
    /// Reads the host's name for an export. The server must be an address, because the guest does not resolve
    /// names.
    pub fn read(source: &'a str) -> Result<Export<'a>, Fault> {
        let fault = |why: &str| Err(Fault::new("reading", "device", format!("{source:?} {why}")));
        let Some((server, path)) = source.rsplit_once(":/") else {
            return fault("is not of the form SERVER:/PATH");
        };
        if path.chars().any(char::is_control) {
            return fault("contains a control character");
        }
        let server = server.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(server);
        match server.parse() {
            Ok(server) => Ok(Export { source, server }),
            Err(_) => fault("does not name its server by an address"),
        }
    }

    /// The mount options for one version (nfs(5)). `clientaddr` is the address for callbacks of version 4.0,
    /// which no server can make to this guest.
    fn options(&self, version: &'static str) -> Vec<(&'static str, String)> {
        let any = if self.server.is_ipv4() { "0.0.0.0" } else { "::" };
        vec![
            ("source", self.source.to_owned()),
            ("addr", self.server.to_string()),
            ("clientaddr", any.to_owned()),
            ("vers", version.to_owned()),
        ]
    }

    /// Makes a detached mount of the export, in the best version that the server supports.
    pub fn mount(&self) -> Result<OwnedFd, Fault> {
        let mut answer = Err(Errno::EPROTONOSUPPORT);
        for version in NFS_VERSIONS {
            let options = self.options(version);
            let options: Vec<_> = options.iter().map(|(key, value)| (*key, value.as_str())).collect();
            answer = new_mount("nfs4", &options, NODEV);
            if !matches!(answer, Err(Errno::EPROTONOSUPPORT | Errno::EINVAL)) {
                break;
            }
        }
        answer.fault("mounting NFS from", self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_name_and_no_path() {
        assert_eq!(Disk::read("image", "vdb1", ""), Ok(Disk::Name("vdb1")));
        for bad in ["", "..", "../sda", "disk/by-id/x", "a b", ".hidden"] {
            let fault = Disk::read("image", bad, "").unwrap_err();
            assert_eq!((fault.doing.as_str(), fault.to.as_str()), ("reading", "image"), "{bad:?}");
        }
    }

    #[test]
    fn an_address_is_two_numbers_and_overrides_the_name() {
        assert_eq!(Disk::read("image", "vda", "3:0"), Ok(Disk::Scsi("3:0")));
        for bad in ["3", "3:", ":0", "a:0", "3:0:0", "../..", "3:0/../..", "123456:0"] {
            assert_eq!(Disk::read("image", "vda", bad).unwrap_err().to, "addr", "{bad:?}");
        }
    }

    #[test]
    fn an_export_names_its_server_by_an_address() {
        let export = Export::read("192.0.2.7:/srv/data").unwrap();
        let options = export.options("4.2");
        let text: Vec<_> = options.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(text.join(","), "source=192.0.2.7:/srv/data,addr=192.0.2.7,clientaddr=0.0.0.0,vers=4.2");
        let options = Export::read("[2001:db8::7]:/").unwrap().options("4.1");
        assert_eq!(options[1].1, "2001:db8::7");
        assert_eq!(options[2].1, "::");
        for bad in ["", "192.0.2.7", "192.0.2.7:srv", "server.test:/srv", "192.0.2.7:/a\nb", ":/"] {
            assert!(Export::read(bad).is_err(), "{bad:?}");
        }
    }
}
