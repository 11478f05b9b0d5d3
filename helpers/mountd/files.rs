//! READFILE and WRITEFILE: regular files of a running container, in its own namespace and root.
//!
//! The inode at the path is inspected before it is opened (O_PATH opens nothing), and then that same inode is
//! opened, whatever is at the path by then. So no FIFO, device or directory is ever opened.
//!
//! Files that the kernel synthesises (proc, sysfs, cgroups, …) are not opened either: mountd would read and
//! write them with its own privileges. The one exception is for the host: it may read files of /proc and /sys
//! by paths that lead there through no link (protocol.md «READFILE»).

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::ContainerId;
use hyperinit::sys::mount::{Resolve, openat2};
use hyperinit::wire::Bytes;
use hyperinit::wire::mountd::{FILE_MAX, PART_MAX, Reply};
use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, open, readlinkat, renameat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::sys::statfs::fstatfs;
use nix::unistd::{UnlinkatFlags, ftruncate, read, unlinkat, write};

use super::tree::{Home, Reach, fault, kind, libc_flags};

/// The flags for opening files. O_NONBLOCK, because some files of procfs block until there is something to
/// read.
const FLAGS: OFlag = OFlag::O_NONBLOCK.union(OFlag::O_NOCTTY);
/// The temporary name beside a file that is replaced.
const SCRATCH: &str = ".hyperinit-written";

/// A file that init has not yet read to its end.
pub struct Reading {
    /// The container that the file belongs to.
    pub container: ContainerId,
    file: OwnedFd,
    path: String,
    /// The number of bytes handed out so far.
    count: usize,
}

impl Reading {
    /// Opens a file of a container for reading. Fails if it is not a regular file, belongs to the kernel, or
    /// is larger than [`FILE_MAX`].
    pub fn begin(home: &Home, container: &ContainerId, path: &str) -> Result<Reading, Fault> {
        let file = home.in_namespace(container, || {
            let at = Path::new(path);
            let file = Reach::Volumes(home).open(root()?, at, OFlag::O_PATH);
            let file = file.map_err(|errno| fault("opening", at, errno))?;
            let stat = regular(&file, path)?;
            if !is_named(at) {
                not_the_kernels(&file, path)?;
            }
            // Most files of procfs report size 0, so [`Reading::part`] checks the size again.
            if usize::try_from(stat.st_size).is_ok_and(|size| size > FILE_MAX) {
                return Err(too_large(path));
            }
            home.reopen(&file, OFlag::O_RDONLY | FLAGS).fault("opening", path)
        })?;
        Ok(Reading { container: container.clone(), file, path: path.to_owned(), count: 0 })
    }

    /// Reads the next part. Fails if a read fails, or if the file turns out larger than [`FILE_MAX`].
    pub fn part(&mut self) -> Result<Reply, Fault> {
        let mut bytes = vec![0; PART_MAX];
        let mut filled = 0;
        let mut last = false;
        while let Some(room @ [_, ..]) = bytes.get_mut(filled..) {
            match read(&self.file, room) {
                Ok(0) => {
                    last = true;
                    break;
                }
                Ok(count) => filled += count,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Fault::errno("reading", &self.path, errno)),
            }
        }
        bytes.truncate(filled);
        self.count += filled;
        if self.count > FILE_MAX {
            return Err(too_large(&self.path));
        }
        Ok(Reply::Part { bytes: Bytes(bytes), last })
    }
}

/// Replaces the content of a container's file, and creates the file if it is missing.
pub fn write_file(home: &Home, container: &ContainerId, path: &str, data: &[u8]) -> Result<(), Fault> {
    home.in_namespace(container, || {
        // This reach keeps a link from leading to one of the kernel's settings.
        let (reach, at) = (Reach::Volumes(home), Path::new(path));
        let file = match reach.open(root()?, at, OFlag::O_PATH) {
            Ok(file) => match open_to_write(home, &file, path) {
                Err(fault) if fault.errno == Some(Errno::ENOENT as i32) => {
                    return replace(home, &file, path, data);
                }
                result => result?,
            },
            Err(Errno::ENOENT) => {
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | FLAGS;
                let file =
                    reach.make(root()?, at, flags, 0o644).map_err(|errno| fault("making", at, errno))?;
                // Another process may have made something else there meanwhile, or a file that is not empty.
                regular(&file, path)?;
                not_the_kernels(&file, path)?;
                ftruncate(&file, 0).fault("emptying", path)?;
                file
            }
            Err(errno) => return Err(fault("opening", at, errno)),
        };
        write_all(&file, data).fault("writing", path)
    })
}

fn open_to_write(home: &Home, file: &OwnedFd, path: &str) -> Result<OwnedFd, Fault> {
    regular(file, path)?;
    not_the_kernels(file, path)?;
    home.reopen(file, OFlag::O_WRONLY | OFlag::O_TRUNC | FLAGS).fault("opening", path)
}

/// Writes a file that the host has removed from the share while the guest's kernel still caches it, because a
/// process has it open or because of `hyper_share_cache=loose`. The kernel does not create a new file of that
/// name, but allows one to be renamed to it.
fn replace(home: &Home, gone: &OwnedFd, path: &str, data: &[u8]) -> Result<(), Fault> {
    // This is the path after links of `path` have been followed.
    let place = readlinkat(&home.proc, format!("self/fd/{}", gone.as_raw_fd()).as_str());
    let place = place.fault("looking up", path)?;
    let (Some(directory), Some(name)) = (Path::new(&place).parent(), Path::new(&place).file_name()) else {
        return Err(Fault::errno("opening", path, Errno::ENOENT));
    };
    let reach = Reach::Volumes(home);
    let directory = reach.open(root()?, directory, OFlag::O_PATH | OFlag::O_DIRECTORY);
    let directory = directory.fault("opening the directory of", path)?;
    match unlinkat(&directory, SCRATCH, UnlinkatFlags::NoRemoveDir) {
        // A mountd that died may have left one.
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(errno) => return Err(Fault::errno("making", path, errno)),
    }
    let flags = libc_flags(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW);
    let file =
        openat2(&directory, Path::new(SCRATCH), flags, 0o644, Resolve::NoLinks).fault("making", path)?;
    let written = write_all(&file, data).fault("writing", path);
    let moved = written.and_then(|()| {
        renameat2(&directory, SCRATCH, &directory, name, RenameFlags::empty()).fault("making", path)
    });
    if moved.is_err() {
        // The first fault is the one reported.
        let _ = unlinkat(&directory, SCRATCH, UnlinkatFlags::NoRemoveDir);
    }
    moved
}

fn write_all(file: &OwnedFd, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match write(file, data) {
            Ok(0) => return Err(Errno::EIO),
            Ok(count) => data = data.get(count..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Opens the root of mountd's current namespace.
fn root() -> Result<OwnedFd, Fault> {
    open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", "the container's root")
}

fn regular(file: &OwnedFd, path: &str) -> Result<FileStat, Fault> {
    let stat = fstat(file).fault("looking at", path)?;
    let what = match kind(&stat) {
        SFlag::S_IFREG => return Ok(stat),
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFIFO => "a FIFO",
        SFlag::S_IFSOCK => "a socket",
        _ => "a device",
    };
    Err(Fault::new("opening", path, format!("it is {what}, not a regular file")))
}

/// Whether the host itself has named a path of /proc or /sys. [`Reach::Volumes`] refuses a link on the way
/// there.
fn is_named(path: &Path) -> bool {
    let below = path.strip_prefix("/").unwrap_or(path);
    ["proc", "sys"].iter().any(|made| below.starts_with(made))
}

/// The magic numbers of filesystems whose files are the kernel's own (statfs(2), linux/magic.h).
const KERNELS: [i64; 20] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x1cd1,      // devpts
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0x6265_6570, // configfs
    0x6e73_6673, // nsfs
    0xcafe_4a11, // bpf
    0xde5e_81e4, // efivarfs
    0x6165_676c, // pstore
    0x4249_4e4d, // binfmt_misc
    0x1980_0202, // mqueue
    0x6573_5543, // fusectl
    0xf97c_ff8c, // selinuxfs
    0x4341_5d53, // smackfs
    0x5a3c_69f0, // apparmorfs
    0x0765_5821, // resctrl
];

/// Refuses a file of the kernel's filesystems, wherever it is: a container's root may mount them elsewhere,
/// if its profile allows it.
fn not_the_kernels(file: &OwnedFd, path: &str) -> Result<(), Fault> {
    let kind = fstatfs(file).fault("looking at", path)?.filesystem_type().0;
    if KERNELS.contains(&kind) {
        Err(Fault::new("opening", path, "it is the kernel's, not a file of the container's"))
    } else {
        Ok(())
    }
}

fn too_large(path: &str) -> Fault {
    Fault::new(
        "reading",
        path,
        format!("it is larger than {FILE_MAX} bytes, which is what a frame can carry"),
    )
}
