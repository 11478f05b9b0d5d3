//! READFILE and WRITEFILE: regular files of a running container, in its own namespace and root.
//!
//! What is at the path is looked at before it is opened (O_PATH opens nothing), and then opened itself,
//! whatever is at the path by then: no FIFO, no device and no directory is ever opened.
//!
//! Nor is what the kernel makes up (proc, sysfs, cgroups, …): mountd would read and write there with its own
//! powers. The one exception is the host's: it may read files of /proc and /sys by paths that lead there
//! through no link (protocol.md «READFILE»).

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

/// Some of procfs's files wait for what they have to say.
const FLAGS: OFlag = OFlag::O_NONBLOCK.union(OFlag::O_NOCTTY);
/// Beside a file that is replaced.
const SCRATCH: &str = ".hyperinit-written";

/// A file that init has not read to its end.
pub struct Reading {
    /// Whose it is.
    pub container: ContainerId,
    file: OwnedFd,
    path: String,
    /// What was handed out, in bytes.
    count: usize,
}

impl Reading {
    /// Opens a container's file.
    pub fn begin(home: &Home, container: &ContainerId, path: &str) -> Result<Reading, Fault> {
        let file = home.in_namespace(container, || {
            let at = Path::new(path);
            let file = Reach::Volumes(home).open(root()?, at, OFlag::O_PATH);
            let file = file.map_err(|errno| fault("opening", at, errno))?;
            let stat = regular(&file, path)?;
            if !is_named(at) {
                not_the_kernels(&file, path)?;
            }
            // Of most files of procfs the size is 0, and not known.
            if usize::try_from(stat.st_size).is_ok_and(|size| size > FILE_MAX) {
                return Err(too_large(path));
            }
            home.reopen(&file, OFlag::O_RDONLY | FLAGS).fault("opening", path)
        })?;
        Ok(Reading { container: container.clone(), file, path: path.to_owned(), count: 0 })
    }

    /// The next part.
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

/// Writes a container's file.
pub fn write_file(home: &Home, container: &ContainerId, path: &str, data: &[u8]) -> Result<(), Fault> {
    home.in_namespace(container, || {
        // A link does not lead it to a setting of the kernel's.
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
                // Somebody may have made another thing there meanwhile, or a file with something in it.
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

/// Writes a file that the share's host has removed while the guest's kernel knows it, because somebody has it
/// open or because of `hyper_share_cache=loose`. The kernel makes no other of that name; but it lets one be
/// moved there.
fn replace(home: &Home, gone: &OwnedFd, path: &str, data: &[u8]) -> Result<(), Fault> {
    // Links of `path` have been followed.
    let place = readlinkat(&home.proc, format!("self/fd/{}", gone.as_raw_fd()).as_str());
    let place = place.fault("looking up", path)?;
    let (Some(directory), Some(name)) = (Path::new(&place).parent(), Path::new(&place).file_name()) else {
        return Err(Fault::errno("opening", path, Errno::ENOENT));
    };
    let reach = Reach::Volumes(home);
    let directory = reach.open(root()?, directory, OFlag::O_PATH | OFlag::O_DIRECTORY);
    let directory = directory.fault("opening the directory of", path)?;
    match unlinkat(&directory, SCRATCH, UnlinkatFlags::NoRemoveDir) {
        // That of a mountd that died.
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
        // The first fault says it.
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

/// The root of the namespace that mountd is in now.
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

/// Whether the host itself has named a file of /proc or /sys. A link on the way there is refused by
/// [`Reach::Volumes`].
fn is_named(path: &Path) -> bool {
    let below = path.strip_prefix("/").unwrap_or(path);
    ["proc", "sys"].iter().any(|made| below.starts_with(made))
}

/// Filesystems whose files are the kernel's own, by their numbers (statfs(2), linux/magic.h).
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

/// A container's root may mount these elsewhere, if its profile lets it.
fn not_the_kernels(file: &OwnedFd, path: &str) -> Result<(), Fault> {
    let kind = fstatfs(file).fault("looking at", path)?.filesystem_type().0;
    match KERNELS.contains(&kind) {
        false => Ok(()),
        true => Err(Fault::new("opening", path, "it is the kernel's, not a file of the container's")),
    }
}

fn too_large(path: &str) -> Fault {
    Fault::new(
        "reading",
        path,
        format!("it is larger than {FILE_MAX} bytes, which is what a frame can carry"),
    )
}
