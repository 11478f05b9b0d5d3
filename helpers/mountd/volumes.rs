//! Volumes and parts of the share: the source of each, the part of it that is bound, and its place in the
//! container (protocol.md «Volumes»).

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::paths;
use hyperinit::spec::Container;
use hyperinit::sys::mount::{Resolve, clone_tree, move_mount, new_mount, openat2, set_attributes};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, makedev, mkdirat};

use super::disk::{self, Access, Disk, Export, is_word};
use super::null;
use super::tree::{Home, Reach, directory_to_mount_over, fault, file_to_mount_over, kind, libc_flags};

const NODEV: u64 = nix::libc::MOUNT_ATTR_NODEV;
const RDONLY: u64 = nix::libc::MOUNT_ATTR_RDONLY;
/// The mount attributes of a volume in memory, as for Docker's --tmpfs: usable by every user, and without
/// devices, set-user-ID or execution.
const MEMORY: u64 = NODEV | nix::libc::MOUNT_ATTR_NOSUID | nix::libc::MOUNT_ATTR_NOEXEC;
const MEMORY_MODE: &str = "1777";
/// The directory of a volume that is bound. Any user of a container may write to a new one, as in the C
/// original.
const DATA: &str = "_data";
const DATA_MODE: Mode = Mode::from_bits_truncate(0o777);
/// The directory, beside the data, in which a copy of the image's files is assembled.
pub const SCRATCH: &str = ".hyperinit-new";
/// The name of the `SCRATCH` directory once the copy is complete, until all of it has been moved to its
/// place.
pub const WHOLE: &str = ".hyperinit-whole";
/// The name of the single file in a volume that stands for one file.
const FILE: &str = ".hyper_file_volume_data_do_not_create_on_your_own";
/// The directory that a new filesystem already contains (fsck(8)).
const LOST_AND_FOUND: &str = "lost+found";

/// Something that is bound into a container.
#[derive(Debug, PartialEq, Eq)]
pub struct Bind<'a> {
    /// Its source.
    pub from: From<'a>,
    /// Its path in the container.
    pub at: &'a Path,
    /// Whether the container may not write to it.
    pub read_only: bool,
    /// Whether a new volume is filled with the image's files at its path.
    pub docker: bool,
}

/// The source of a volume.
#[derive(Debug, PartialEq, Eq)]
pub enum From<'a> {
    /// A filesystem on a disk.
    Disk { disk: Disk<'a>, fstype: &'a str },
    /// An NFS export.
    Nfs(Export<'a>),
    /// An empty filesystem in memory, which ends with its container.
    Memory,
    /// A path of the share.
    Share(&'a Path),
}

/// The host's volumes and parts of the share, in the order in which they are bound: paths with fewer
/// components first, and of equal depth volumes before parts of the share. Fails on a value of the host's
/// that cannot be used, and names its key.
pub fn plan(container: &Container) -> Result<Vec<Bind<'_>>, Fault> {
    let mut binds = Vec::new();
    for volume in &container.volumes {
        let from = match volume.fstype.as_str() {
            "nfs" => From::Nfs(Export::read(&volume.device)?),
            "tmpfs" => From::Memory,
            fstype if is_word(fstype) => {
                From::Disk { disk: Disk::read("device", &volume.device, &volume.addr)?, fstype }
            }
            fstype => {
                return Err(Fault::new("reading", "fstype", format!("{fstype:?} is not a filesystem")));
            }
        };
        let at = place("mount", &volume.mount)?;
        // A volume in memory is new each time it is opened, so there is nothing to fill beforehand.
        let docker = volume.docker_volume && from != From::Memory;
        binds.push(Bind { from, at, read_only: volume.read_only, docker });
    }
    for map in &container.fsmap {
        let at = place("path", &map.path)?;
        let from = From::Share(Path::new(&map.source));
        binds.push(Bind { from, at, read_only: map.read_only, docker: map.docker_volume });
    }
    // A later mount covers everything below its path. The sort is stable: at equal depth, or for the same
    // path, the host's order counts.
    binds.sort_by_key(|bind| depth(bind.at));
    Ok(binds)
}

/// The number of components of a path below the root.
fn depth(path: &Path) -> usize {
    path.components().fold(0, |depth, component| match component {
        Component::Normal(_) => depth + 1,
        Component::ParentDir => depth.saturating_sub(1),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => depth,
    })
}

fn place<'a>(key: &str, path: &'a str) -> Result<&'a Path, Fault> {
    if Path::new(path).components().any(|component| matches!(component, Component::Normal(_))) {
        Ok(Path::new(path))
    } else {
        Err(Fault::new("reading", key, format!("{path:?} names nothing below the root")))
    }
}

/// An opened volume. It is not attached anywhere, unless it is part of the share.
pub struct Volume {
    /// The root of the volume; for a file of the share, that file.
    pub root: OwnedFd,
    /// The part that is bound: a directory, or a file of the share.
    pub data: OwnedFd,
}

impl Bind<'_> {
    /// The disk that the volume is on, if it is on one.
    pub fn disk(&self) -> Option<Disk<'_>> {
        match self.from {
            From::Disk { disk, .. } => Some(disk),
            From::Memory | From::Nfs(_) | From::Share(_) => None,
        }
    }

    /// Opens the volume in mountd's current namespace. The directory of its data is made if it is missing.
    pub fn open(&self) -> Result<Volume, Fault> {
        let root = match &self.from {
            From::Disk { disk, fstype } => {
                let access = if self.read_only { Access::WriteIfPossible } else { Access::Write };
                disk::mount(*disk, fstype, access)?
            }
            From::Nfs(export) => export.mount()?,
            From::Memory => new_mount("tmpfs", &[("mode", MEMORY_MODE)], MEMORY)
                .fault("making a filesystem in memory for", self.at.display())?,
            From::Share(source) => share(source)?,
        };
        let data = match self.from {
            From::Disk { .. } => Some(self.data(&root)?),
            From::Share(_) if self.docker && is_directory(&root) => Some(self.data(&root)?),
            // An export is the data itself: the server's path names it.
            From::Memory | From::Nfs(_) | From::Share(_) => None,
        };
        let data = match data {
            Some(data) => data,
            None => root.try_clone().fault("opening", self.at.display())?,
        };
        Ok(Volume { root, data })
    }

    fn data(&self, root: &OwnedFd) -> Result<OwnedFd, Fault> {
        directory(root, DATA, Some(DATA_MODE))
            .fault(&format!("opening {DATA} of the volume for"), self.at.display())
    }

    /// Whether the data's directory may turn out to be a file (`FILE`).
    fn may_be_a_file(&self) -> bool {
        !matches!(self.from, From::Share(_))
    }
}

/// Opens a path of the share, through no link: a container that may write there must not redirect another's
/// mount.
fn share(source: &Path) -> Result<OwnedFd, Fault> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let share = open(paths::SHARE, flags, Mode::empty()).fault("opening", "the share")?;
    // The path is relative to the share, even if it is written as absolute.
    let below = source.strip_prefix("/").unwrap_or(source);
    let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
    openat2(&share, below, libc_flags(OFlag::O_PATH), 0, Resolve::NoLinks)
        .fault("opening on the share", source.display())
}

fn is_directory(file: &OwnedFd) -> bool {
    fstat(file).is_ok_and(|stat| kind(&stat) == SFlag::S_IFDIR)
}

/// Whether `file` is the null device.
fn is_null(file: &OwnedFd) -> bool {
    fstat(file).is_ok_and(|stat| kind(&stat) == SFlag::S_IFCHR && stat.st_rdev == makedev(1, 3))
}

/// Opens a directory directly below another. With a mode in `make`, it is made if it is missing.
fn directory(parent: impl AsFd, name: &str, make: Option<Mode>) -> Result<OwnedFd, Errno> {
    let flags = libc_flags(OFlag::O_PATH | OFlag::O_DIRECTORY);
    let open = || openat2(parent.as_fd(), Path::new(name), flags, 0, Resolve::NoLinks);
    match (open(), make) {
        (Err(Errno::ENOENT), Some(mode)) => {
            mkdirat(parent.as_fd(), name, mode)?;
            open()
        }
        (result, _) => result,
    }
}

/// The kind of content of a volume.
#[derive(Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing yet.
    New,
    /// One file, which is the volume.
    File,
    /// Anything else.
    Data,
}

/// Inspects a volume's data. Two names of it are enough to decide.
pub fn content(data: &OwnedFd) -> Result<Content, Errno> {
    let names = names(data, 2)?;
    match names.as_slice() {
        [] => Ok(Content::New),
        [name] if name == LOST_AND_FOUND => match directory(data, LOST_AND_FOUND, None) {
            Ok(lost) if is_empty(&lost)? => Ok(Content::New),
            _ => Ok(Content::Data),
        },
        [name] if name == FILE => {
            let file = openat2(data, Path::new(FILE), libc_flags(OFlag::O_PATH), 0, Resolve::NoLinks)?;
            match kind(&fstat(&file)?) {
                SFlag::S_IFREG => Ok(Content::File),
                _ => Ok(Content::Data),
            }
        }
        _ => Ok(Content::Data),
    }
}

/// The first `count` names of a directory, without `SCRATCH` and `WHOLE`.
fn names(directory: &OwnedFd, count: usize) -> Result<Vec<String>, Errno> {
    let flags = libc_flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY);
    let readable = openat2(directory, Path::new("."), flags, 0, Resolve::NoLinks)?;
    let mut entries = nix::dir::Dir::from_fd(readable)?;
    let names = entries.iter().map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let ours = |name: &Result<String, Errno>| !matches!(name.as_deref(), Ok("." | ".." | SCRATCH | WHOLE));
    names.filter(ours).take(count).collect()
}

/// Whether a directory has nothing in it.
pub fn is_empty(directory: &OwnedFd) -> Result<bool, Errno> {
    Ok(names(directory, 1)?.is_empty())
}

/// Binds a volume into a container's root, in the namespace that becomes the container's.
pub fn bind(home: &Home, root: &OwnedFd, bind: &Bind<'_>) -> Result<(), Fault> {
    let at = bind.at.display();
    let volume = bind.open()?;
    let mounted = !matches!(bind.from, From::Share(_));
    if mounted {
        // A part of a mount can only be cloned where the mount is attached.
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let place = open(paths::VOLUME, flags, Mode::empty()).fault("opening", paths::VOLUME)?;
        move_mount(&volume.root, &place).fault("attaching the volume for", &at)?;
    }
    let file = if bind.may_be_a_file() {
        file(home, &volume.data).fault("looking into the volume for", &at)?
    } else {
        None
    };
    let what = file.as_ref().unwrap_or(&volume.data);
    // The host hides a file by its own /dev/null. Devices of the share do not work in a container, so the
    // guest's /dev/null takes its place.
    let null = matches!(bind.from, From::Share(_)) && is_null(what);
    let (tree, attributes) = if null {
        (clone_tree(null::open_checked(home)?, false), null::COVER)
    } else {
        (clone_tree(what, false), if bind.from == From::Memory { MEMORY } else { NODEV })
    };
    let tree = tree.fault("cloning the volume for", &at)?;
    set_attributes(&tree, attributes | if bind.read_only { RDONLY } else { 0 }, false)
        .fault("setting up the volume for", &at)?;
    let target = target(home, root, bind.at, is_directory(what))?;
    move_mount(&tree, &target).fault("mounting the volume on", &at)?;
    if mounted {
        umount2(paths::VOLUME, MntFlags::MNT_DETACH).fault("detaching the volume for", &at)?;
    }
    Ok(())
}

/// The volume's single file, if the volume stands for one file; none otherwise. Any user of a container may
/// use it.
fn file(home: &Home, data: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    if content(data)? != Content::File {
        return Ok(None);
    }
    let file = openat2(data, Path::new(FILE), libc_flags(OFlag::O_PATH), 0, Resolve::NoLinks)?;
    match fchmod(home.reopen(&file, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?, DATA_MODE) {
        // On a read-only filesystem its mode stays as it is.
        Ok(()) | Err(Errno::EROFS) => Ok(Some(file)),
        Err(errno) => Err(errno),
    }
}

/// Opens the place to mount over, and makes it if it is missing.
fn target(home: &Home, root: &OwnedFd, at: &Path, directory: bool) -> Result<OwnedFd, Fault> {
    let reach = Reach::Volumes(home);
    let target = if directory {
        directory_to_mount_over(root, at, reach)
    } else {
        file_to_mount_over(root, at, reach)
    }
    .map_err(|errno| fault("making in the image", at, errno))?;
    let same = |one: &OwnedFd| fstat(one).map(|stat| (stat.st_dev, stat.st_ino));
    // A link may lead to the container's root itself. The container would not see a mount there.
    match (same(&target), same(root)) {
        (Ok(target), Ok(root)) if target == root => {
            Err(Fault::new("making in the image", at.display(), "it is the root"))
        }
        _ => Ok(target),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(more: serde_json::Value) -> Container {
        let mut all = serde_json::json!({"id": "c", "process": {"stdio": 1, "stderr": 2, "args": ["sh"]}});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    #[test]
    fn volumes_come_before_what_is_of_the_share() {
        let container = container(serde_json::json!({
            "fsmap": [{"source": "vol/a", "path": "/a", "dockerVolume": true}],
            "volumes": [
                {"device": "vdb", "mount": "/b", "fstype": "ext4", "readOnly": true},
                {"device": "vdb", "addr": "0:1", "mount": "c", "fstype": "xfs"},
                {"device": "192.0.2.7:/srv", "mount": "/d", "fstype": "nfs"},
                {"mount": "/e", "fstype": "tmpfs", "dockerVolume": true},
            ],
        }));
        let bind = |from, at, read_only, docker| Bind { from, at: Path::new(at), read_only, docker };
        let disk = |disk, fstype| From::Disk { disk, fstype };
        assert_eq!(
            plan(&container).unwrap(),
            [
                bind(disk(Disk::Name("vdb"), "ext4"), "/b", true, false),
                bind(disk(Disk::Scsi("0:1"), "xfs"), "c", false, false),
                bind(From::Nfs(Export::read("192.0.2.7:/srv").unwrap()), "/d", false, false),
                bind(From::Memory, "/e", false, false),
                bind(From::Share(Path::new("vol/a")), "/a", false, true),
            ]
        );
    }

    #[test]
    fn words_that_make_no_sense_are_named() {
        for (volume, key) in [
            (serde_json::json!({"device": "../vdb", "mount": "/b", "fstype": "ext4"}), "device"),
            (serde_json::json!({"device": "vdb", "mount": "/b", "fstype": ""}), "fstype"),
            (serde_json::json!({"device": "vdb", "mount": "/b", "fstype": "ext4,suid"}), "fstype"),
            (serde_json::json!({"device": "vdb", "mount": "", "fstype": "ext4"}), "mount"),
            (serde_json::json!({"device": "vdb", "mount": "/../..", "fstype": "ext4"}), "mount"),
            (serde_json::json!({"device": "server:/srv", "mount": "/b", "fstype": "nfs"}), "device"),
            (serde_json::json!({"addr": "x", "mount": "/b", "fstype": "ext4"}), "addr"),
        ] {
            let container = container(serde_json::json!({"volumes": [volume]}));
            assert_eq!(plan(&container).unwrap_err().to, key, "{volume}");
        }
        let container = container(serde_json::json!({"fsmap": [{"source": "a", "path": "/"}]}));
        assert_eq!(plan(&container).unwrap_err().to, "path");
    }
}
