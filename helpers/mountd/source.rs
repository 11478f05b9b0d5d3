//! The source of a container's root filesystem: a directory of the share, or a disk.

use std::os::fd::OwnedFd;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::paths;
use hyperinit::spec::Container;
use hyperinit::sys::mount::{Resolve, move_mount, openat2};
use nix::fcntl::OFlag;

use super::disk::{self, Access, Disk, is_word};
use super::tree::{directory, libc_flags};

/// The source of a root filesystem.
#[derive(Debug, PartialEq, Eq)]
pub enum Source<'a> {
    /// `<image>/<rootfs>` of the share.
    Share { image: &'a Path, rootfs: &'a Path },
    /// `<rootfs>` of a disk.
    Disk { disk: Disk<'a>, fstype: &'a str, rootfs: &'a Path, read_only: bool },
}

/// Reads the host's description of the root filesystem.
pub fn source(container: &Container) -> Result<Source<'_>, Fault> {
    let rootfs = Path::new(&container.rootfs);
    if container.fstype.is_empty() {
        if !container.addr.is_empty() {
            return Err(Fault::new("reading", "fstype", "the disk at addr has none"));
        }
        return Ok(Source::Share { image: Path::new(&container.image), rootfs });
    }
    let disk = Disk::read("image", &container.image, &container.addr)?;
    if !is_word(&container.fstype) {
        return Err(Fault::new("reading", "fstype", format!("{:?} is not a filesystem", container.fstype)));
    }
    Ok(Source::Disk { disk, fstype: &container.fstype, rootfs, read_only: container.read_only })
}

impl Source<'_> {
    /// The disk that it is on.
    pub fn disk(&self) -> Option<Disk<'_>> {
        match self {
            Source::Share { .. } => None,
            Source::Disk { disk, .. } => Some(*disk),
        }
    }

    /// Opens the directory of the root filesystem, in mountd's current namespace. A disk is mounted at the
    /// stage, or detached if there is none.
    pub fn open_at(&self, stage: Option<&OwnedFd>) -> Result<OwnedFd, Fault> {
        match self {
            Source::Share { image, rootfs } => below(&below(&directory(paths::SHARE)?, image)?, rootfs),
            Source::Disk { disk, fstype, rootfs, read_only } => {
                let access = if *read_only { Access::Read } else { Access::Write };
                let mounted = disk::mount(*disk, fstype, access)?;
                if let Some(stage) = stage {
                    move_mount(&mounted, stage).fault("attaching", disk)?;
                }
                below(&mounted, rootfs)
            }
        }
    }

    /// Opens the directory only to look at the image, with a disk detached.
    pub fn open(&self) -> Result<OwnedFd, Fault> {
        self.open_at(None)
    }
}

/// Opens a directory below another; no link leads out of that.
fn below(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Fault> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    openat2(root, path, libc_flags(OFlag::O_PATH | OFlag::O_DIRECTORY), 0, Resolve::InRoot)
        .fault("opening the root filesystem", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(image: &str, fstype: &str) -> Container {
        let json = serde_json::json!({
            "id": "c", "rootfs": "rootfs", "image": image, "fstype": fstype, "process": {"stdio": 1, "stderr": 2, "args": ["sh"]}
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_root_is_a_directory_of_the_share_or_a_disk() {
        assert_eq!(
            source(&container("img/1", "")).unwrap(),
            Source::Share { image: Path::new("img/1"), rootfs: Path::new("rootfs") }
        );
        let disk =
            |disk| Source::Disk { disk, fstype: "ext4", rootfs: Path::new("rootfs"), read_only: false };
        assert_eq!(source(&container("vdb1", "ext4")).unwrap(), disk(Disk::Name("vdb1")));
        let scsi = Container { addr: "2:1".to_owned(), ..container("vdb1", "ext4") };
        assert_eq!(source(&scsi).unwrap(), disk(Disk::Scsi("2:1")));
    }

    #[test]
    fn a_disk_has_a_filesystem() {
        assert!(source(&container("vda", "ext4,suid")).is_err());
        let scsi = Container { addr: "2:1".to_owned(), ..container("image", "") };
        assert_eq!(source(&scsi).unwrap_err().to, "fstype");
    }
}
