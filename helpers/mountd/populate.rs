//! A new volume is filled with the image's files at the volume's path (protocol.md «Volumes»).
//!
//! Copying has no time limit, so it is done in slices, between which the host may cancel it. The copy is
//! assembled in a directory of mountd's own beside the data (`SCRATCH`). When the copy is complete, the
//! directory is renamed (`WHOLE`), and its content is moved to the data. If mountd dies, its successor
//! removes a `SCRATCH` that it finds, or finishes moving a `WHOLE`: a volume is either new or whole.
//!
//! Other processes may change the image and the volume meanwhile. So every name is resolved once, directly
//! below a descriptor and through no link. The result is inspected first (O_PATH opens nothing), and then
//! that same inode is opened, if it is a file. Memory is bounded: a few descriptors for each directory level,
//! one buffer, and a fixed amount for links.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::ContainerId;
use hyperinit::paths;
use hyperinit::sys::mount::{Resolve, openat2};
use hyperinit::sys::xattr;
use nix::dir::{Dir, OwningIter};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, OFlag, RenameFlags, fcntl, open, readlinkat, renameat, renameat2};
use nix::poll::{PollTimeout, poll};
use nix::sys::stat::{
    FileStat, Mode, SFlag, UtimensatFlags, fchmod, fstat, futimens, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::sys::uio::pwrite;
use nix::unistd::{
    Gid, Uid, UnlinkatFlags, Whence, fchown, fchownat, ftruncate, linkat, lseek, read, symlinkat, unlinkat,
};

use super::source::Source;
use super::tree::{Home, kind, libc_flags};
use super::volumes::{Bind, Content, SCRATCH, Volume, WHOLE, content};

/// The deepest nesting of directories that is copied.
const DEPTH: usize = 128;
/// The limit, in bytes of their paths, on remembered files that have more links still to be found. Beyond it,
/// each further link becomes a file of its own.
const LINKS: usize = 2 << 20;
/// The longest path that the kernel accepts, in bytes, with its terminating zero (limits.h).
const PATH_MAX: usize = 4096;
/// How long undoing may take. Anything left after that is removed before the volume is next populated.
const UNDO: Duration = Duration::from_secs(1);
/// How often a name that was already copied may appear again. A directory that changes while it is read can
/// show a name twice, and one that never stops changing may never end.
const REPEATS: usize = 1024;
/// How many volumes one mountd fills concurrently; further ones wait. Each remembers links and holds
/// descriptors for its depth, and the host may ask for as many as it has commands in progress.
const AT_ONCE: usize = 8;
/// How many bytes are copied at once. Holes in the copy consist of whole chunks.
const CHUNK: usize = 64 << 10;

/// The volumes that are being populated, by container.
#[derive(Default)]
pub struct Populations(BTreeMap<ContainerId, Progress>);

/// The progress of one container's volumes.
#[derive(Default)]
struct Progress {
    /// How many volumes are done.
    done: usize,
    current: Option<Population>,
}

impl Populations {
    /// Works until the deadline `until`; returns whether all of the container's volumes are ready. After a
    /// fault, an unfinished volume is undone.
    pub fn advance(
        &mut self,
        home: &Home,
        container: &ContainerId,
        source: &Source<'_>,
        binds: &[Bind<'_>],
        until: Instant,
    ) -> Result<bool, Fault> {
        let mut progress = self.0.remove(container).unwrap_or_default();
        let result = self.go_on(&mut progress, home, source, binds, until);
        match (&result, progress.current) {
            (Ok(false), current) => {
                let done = progress.done;
                self.0.insert(container.clone(), Progress { done, current });
            }
            (_, Some(unfinished)) => unfinished.undo(),
            (_, None) => {}
        }
        result
    }

    fn go_on(
        &self,
        progress: &mut Progress,
        home: &Home,
        source: &Source<'_>,
        binds: &[Bind<'_>],
        until: Instant,
    ) -> Result<bool, Fault> {
        for bind in binds.iter().filter(|bind| bind.docker).skip(progress.done) {
            if progress.current.is_none() {
                if self.under_way().count() >= AT_ONCE {
                    return Ok(false);
                }
                let volume = bind.open()?;
                let Some(lock) = lock(&volume)? else {
                    // This mountd or another is filling it for the start of another container.
                    let left = until.saturating_duration_since(Instant::now());
                    let _ = poll(&mut [], PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO));
                    return Ok(false);
                };
                progress.current = Population::begin(source, bind, volume, lock)?;
            }
            if let Some(current) = &mut progress.current {
                if !current.advance(home, until)? {
                    return Ok(false);
                }
                progress.current = None;
            }
            progress.done += 1;
        }
        Ok(true)
    }

    /// The volumes in progress. While one container is worked on, those of the others.
    fn under_way(&self) -> impl Iterator<Item = &Population> {
        self.0.values().filter_map(|progress| progress.current.as_ref())
    }

    /// Undoes the unfinished volume of a container.
    pub fn forget(&mut self, container: &ContainerId) {
        if let Some(population) = self.0.remove(container).and_then(|progress| progress.current) {
            population.undo();
        }
    }

    /// Undoes the unfinished volumes of all containers.
    pub fn forget_all(&mut self) {
        let all = std::mem::take(&mut self.0).into_values();
        all.filter_map(|progress| progress.current).for_each(Population::undo);
    }
}

/// Locks a volume for filling, until the returned descriptor is closed or its mountd dies; none if it is
/// already locked. The lock is on one byte of mountd's own file, at an offset derived from the volume's
/// device and inode. Two volumes that share an offset merely wait for one another.
fn lock(volume: &Volume) -> Result<Option<OwnedFd>, Fault> {
    let stat = fstat(&volume.data).fault("looking at", "a volume")?;
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC;
    let file = open(paths::FILLING, flags, Mode::S_IRUSR | Mode::S_IWUSR).fault("opening", paths::FILLING)?;
    let place = stat.st_dev.rotate_left(40) ^ stat.st_ino;
    let byte = nix::libc::flock {
        l_type: nix::libc::F_WRLCK as i16,
        l_whence: nix::libc::SEEK_SET as i16,
        l_start: i64::try_from(place >> 1).unwrap_or(0),
        l_len: 1,
        l_pid: 0,
    };
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&byte)) {
        Ok(_) => Ok(Some(file)),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
        Err(errno) => Err(Fault::errno("locking", paths::FILLING, errno)),
    }
}

/// One volume that is being populated.
struct Population {
    /// The volume's path in the container, for faults.
    at: PathBuf,
    volume: Volume,
    /// The image's directory at that path, if it has one.
    image: Option<OwnedFd>,
    stage: Stage,
    /// The lock that keeps others from filling it.
    _lock: OwnedFd,
}

/// The current stage of populating a volume.
enum Stage {
    /// Leftovers of a mountd that died are removed.
    Clear,
    /// The image is copied.
    Copy(Box<Tree>),
    /// The copy is moved to its place, in passes over its directory. `moved`: whether this pass has moved
    /// anything.
    Move { from: OwnedFd, names: OwningIter, moved: bool },
    /// Everything is in its place, and the leftover directory is removed.
    Tidy,
}

/// A copy in progress.
struct Tree {
    scratch: OwnedFd,
    levels: Vec<Level>,
    file: Option<Copy>,
    /// Copied files that may have further links, by device and inode: the path of the copy below the scratch.
    links: BTreeMap<(u64, u64), PathBuf>,
    /// The total length of these paths, in bytes.
    links_size: usize,
    /// How many names appeared again.
    repeats: usize,
}

/// A directory that is being copied.
struct Level {
    name: CString,
    stat: FileStat,
    from: OwnedFd,
    entries: OwningIter,
    to: OwnedFd,
}

/// A file that is being copied.
struct Copy {
    name: CString,
    stat: FileStat,
    from: OwnedFd,
    to: OwnedFd,
    count: u64,
}

impl Population {
    /// Begins to populate a volume if it is new and the image has a directory at its path, or resumes moving
    /// a complete copy. None: there is nothing to do.
    fn begin(
        source: &Source<'_>,
        bind: &Bind<'_>,
        volume: Volume,
        lock: OwnedFd,
    ) -> Result<Option<Population>, Fault> {
        let fault = |doing: &'static str| {
            move |errno| Fault::errno(format!("{doing} the volume for"), bind.at.display(), errno)
        };
        let is_new = match content(&volume.data) {
            Ok(content) => content == Content::New,
            // The volume is a file of the share.
            Err(Errno::ENOTDIR) => return Ok(None),
            Err(errno) => return Err(fault("looking into")(errno)),
        };
        let whole = match openat2(&volume.root, Path::new(WHOLE), directory(), 0, Resolve::Name) {
            Ok(whole) => Some(whole),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => None,
            Err(errno) => return Err(fault("looking into")(errno)),
        };
        if !is_new && whole.is_none() {
            return Ok(None);
        }
        // The image as it is: mounts over it in a container are not part of the image.
        let image = match openat2(source.open()?, bind.at, directory(), 0, Resolve::InRoot) {
            Ok(image) => Some(image),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => None,
            Err(errno) => return Err(fault("looking at the image for")(errno)),
        };
        let stage = match (whole, &image) {
            (Some(whole), _) => Stage::moving(whole).map_err(fault("populating"))?,
            (None, Some(_)) => Stage::Clear,
            (None, None) => return Ok(None),
        };
        Ok(Some(Population { at: bind.at.to_owned(), volume, image, stage, _lock: lock }))
    }

    /// Works until the deadline `until`; returns whether the volume is whole.
    fn advance(&mut self, home: &Home, until: Instant) -> Result<bool, Fault> {
        loop {
            let step = match &mut self.stage {
                Stage::Clear => self.clear(until),
                Stage::Copy(tree) if tree.is_complete() => self.complete(),
                Stage::Copy(tree) => match tree.advance(home, &self.at) {
                    Ok(()) => Ok(()),
                    Err((path, errno)) => {
                        let doing = format!("populating the volume for {} with", self.at.display());
                        return Err(Fault::errno(doing, path.display(), errno));
                    }
                },
                Stage::Move { .. } => self.move_on(),
                Stage::Tidy => match remove(&self.volume.root, WHOLE.as_ref(), 0, until) {
                    Ok(true) => return Ok(true),
                    result => result.map(drop),
                },
            };
            step.fault("populating the volume for", self.at.display())?;
            if Instant::now() >= until {
                return Ok(false);
            }
        }
    }

    fn clear(&mut self, until: Instant) -> Result<(), Errno> {
        let Some(image) = &self.image else { return Err(Errno::ENOENT) };
        if remove(&self.volume.root, SCRATCH.as_ref(), 0, until)? {
            mkdirat(&self.volume.root, SCRATCH, Mode::S_IRWXU)?;
            let scratch = openat2(&self.volume.root, Path::new(SCRATCH), directory(), 0, Resolve::Name)?;
            self.stage = Stage::Copy(Box::new(Tree::begin(clone(image)?, scratch)?));
        }
        Ok(())
    }

    /// Renames the complete copy. From then on it is moved to its place, even if this mountd dies.
    fn complete(&mut self) -> Result<(), Errno> {
        let (root, Stage::Copy(tree)) = (&self.volume.root, &self.stage) else { return Ok(()) };
        rename(root, SCRATCH, root, WHOLE)?;
        let whole = openat2(root, Path::new(WHOLE), directory(), 0, Resolve::Name)?;
        let id = |file: &OwnedFd| fstat(file).map(|stat| (stat.st_dev, stat.st_ino));
        if id(&whole)? != id(&tree.scratch)? {
            // The directory is not our copy: another guest fills the same export, or a container tampers with
            // the share.
            rename(root, WHOLE, root, SCRATCH)?;
            self.stage = Stage::Clear;
            return Err(Errno::EBUSY);
        }
        self.stage = Stage::moving(whole)?;
        Ok(())
    }

    /// Moves the next name of the copy to its place.
    fn move_on(&mut self) -> Result<(), Errno> {
        let Stage::Move { from, names, moved } = &mut self.stage else { return Ok(()) };
        match names.next() {
            Some(entry) => {
                let entry = entry?;
                let name = entry.file_name();
                if name == c"." || name == c".." {
                    return Ok(());
                }
                match rename(from, name, &self.volume.data, name) {
                    Ok(()) => *moved = true,
                    // Another container has made this name meanwhile; it is not overwritten.
                    Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(errno),
                }
            }
            // Moving names while the directory is read may hide others, so a further pass follows.
            None if *moved => self.stage = Stage::moving(clone(from)?)?,
            None => {
                let image = self.image.as_ref().unwrap_or(from);
                let data = openat2(&self.volume.data, Path::new("."), directory(), 0, Resolve::Name)?;
                keep_metadata(image, &data, &fstat(image)?)?;
                self.stage = Stage::Tidy;
            }
        }
        Ok(())
    }

    /// Undoes an unfinished copy. Afterwards the volume is as it was, or its complete copy will be moved on
    /// later.
    fn undo(self) {
        // In the other stages, nothing that this population made needs to be removed.
        let Stage::Copy(tree) = self.stage else { return };
        drop(tree);
        if let Err(errno) = remove(&self.volume.root, SCRATCH.as_ref(), 0, Instant::now() + UNDO) {
            log::warn!("{}", Fault::errno("clearing the volume for", self.at.display(), errno));
        }
    }
}

impl Stage {
    fn moving(from: OwnedFd) -> Result<Stage, Errno> {
        let names = openat2(&from, Path::new("."), directory(), 0, Resolve::Name)?;
        Ok(Stage::Move { from, names: Dir::from_fd(names)?.into_iter(), moved: false })
    }
}

fn directory() -> i32 {
    libc_flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY)
}

fn clone(file: &OwnedFd) -> Result<OwnedFd, Errno> {
    file.try_clone().map_err(|_| Errno::EMFILE)
}

impl Tree {
    fn begin(image: OwnedFd, scratch: OwnedFd) -> Result<Tree, Errno> {
        let to = clone(&scratch)?;
        let (levels, links) = (Vec::new(), BTreeMap::new());
        let mut tree = Tree { scratch, levels, file: None, links, links_size: 0, repeats: 0 };
        tree.enter(c"".to_owned(), image, to)?;
        Ok(tree)
    }

    fn is_complete(&self) -> bool {
        self.levels.is_empty() && self.file.is_none()
    }

    /// Copies the next chunk of a file, or the next name. The path of an error is relative to the volume.
    fn advance(&mut self, home: &Home, at: &Path) -> Result<(), (PathBuf, Errno)> {
        let done = match self.file {
            Some(_) => self.copy_on(),
            None => self.step(home, at),
        };
        done.map_err(|(name, errno)| (self.path(&name), errno))
    }

    /// The path, below the scratch, of a name in the directory that is being copied.
    fn path(&self, name: &CStr) -> PathBuf {
        let names = self.levels.iter().map(|level| level.name.as_c_str()).chain([name]);
        let names = names.filter(|name| !name.is_empty());
        names.map(|name| OsStr::from_bytes(name.to_bytes())).collect()
    }

    fn enter(&mut self, name: CString, from: OwnedFd, to: OwnedFd) -> Result<(), Errno> {
        let stat = fstat(&from)?;
        let entries = Dir::from_fd(clone(&from)?)?.into_iter();
        self.levels.push(Level { name, stat, from, entries, to });
        Ok(())
    }

    /// Copies the next name of the current directory, or finishes the directory.
    fn step(&mut self, home: &Home, at: &Path) -> Result<(), (CString, Errno)> {
        let Some(level) = self.levels.last_mut() else { return Ok(()) };
        match level.entries.next() {
            None => {
                let Some(level) = self.levels.pop() else { return Ok(()) };
                let done = keep_metadata(&level.from, &level.to, &level.stat);
                done.map_err(|errno| (level.name, errno))
            }
            Some(Err(errno)) => Err((c"".to_owned(), errno)),
            Some(Ok(entry)) => match entry.file_name() {
                name if name == c"." || name == c".." => Ok(()),
                name => match self.entry(home, at, name) {
                    Err(Errno::EEXIST) if self.repeats < REPEATS => {
                        self.repeats += 1;
                        Ok(())
                    }
                    result => result.map_err(|errno| (name.to_owned(), errno)),
                },
            },
        }
    }

    fn entry(&mut self, home: &Home, at: &Path, name: &CStr) -> Result<(), Errno> {
        let path = self.path(name);
        let Some(level) = self.levels.last() else { return Ok(()) };
        let as_path = Path::new(OsStr::from_bytes(name.to_bytes()));
        let look = libc_flags(OFlag::O_PATH | OFlag::O_NOFOLLOW);
        let found = match openat2(&level.from, as_path, look, 0, Resolve::Name) {
            Ok(found) => found,
            // It was removed meanwhile.
            Err(Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(errno),
        };
        let stat = fstat(&found)?;
        match kind(&stat) {
            SFlag::S_IFDIR if self.levels.len() >= DEPTH => Err(Errno::ENAMETOOLONG),
            SFlag::S_IFDIR => {
                mkdirat(&level.to, name, Mode::S_IRWXU)?;
                let flags = libc_flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY);
                let from = openat2(&found, Path::new("."), flags, 0, Resolve::Name)?;
                let to = openat2(&level.to, as_path, flags, 0, Resolve::Name)?;
                self.enter(name.to_owned(), from, to)
            }
            SFlag::S_IFREG => self.file(home, name, path, &found, stat),
            SFlag::S_IFLNK => {
                symlinkat(readlinkat(&found, c"")?.as_os_str(), &level.to, name)?;
                keep_owner_and_times(&level.to, name, &stat)
            }
            special @ (SFlag::S_IFIFO | SFlag::S_IFSOCK) => {
                mknodat(&level.to, name, special, mode(&stat), 0)?;
                keep_owner_and_times(&level.to, name, &stat)
            }
            _ => {
                // Devices would not work on a volume: it is mounted with nodev.
                log::info!("{}: the device {} is left out", at.display(), path.display());
                Ok(())
            }
        }
    }

    fn file(
        &mut self,
        home: &Home,
        name: &CStr,
        path: PathBuf,
        found: &OwnedFd,
        stat: FileStat,
    ) -> Result<(), Errno> {
        let Some(level) = self.levels.last() else { return Ok(()) };
        let id = (stat.st_dev, stat.st_ino);
        if let Some(first) = self.links.get(&id) {
            let first = openat2(&self.scratch, first, libc_flags(OFlag::O_PATH), 0, Resolve::NoMounts)?;
            return linkat(&first, c"", &level.to, name, AtFlags::AT_EMPTY_PATH);
        }
        let flags = libc_flags(OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW);
        let as_path = Path::new(OsStr::from_bytes(name.to_bytes()));
        let to = openat2(&level.to, as_path, flags, 0o600, Resolve::Name)?;
        let length = path.as_os_str().len();
        if stat.st_nlink > 1 && length < PATH_MAX && self.links_size + length <= LINKS {
            self.links_size += length;
            self.links.insert(id, path);
        }
        let from = home.reopen(found, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        self.file = Some(Copy { name: name.to_owned(), stat, from, to, count: 0 });
        Ok(())
    }

    /// Copies the next chunk of the file. A file that grows meanwhile is copied up to its original size.
    fn copy_on(&mut self) -> Result<(), (CString, Errno)> {
        let Some(mut copy) = self.file.take() else { return Ok(()) };
        match copy.chunk() {
            Ok(true) => Ok(()),
            Ok(false) => {
                self.file = Some(copy);
                Ok(())
            }
            Err(errno) => Err((copy.name, errno)),
        }
    }
}

impl Copy {
    /// Copies a chunk; returns whether it was the last.
    fn chunk(&mut self) -> Result<bool, Errno> {
        let size = u64::try_from(self.stat.st_size).unwrap_or(0);
        let mut bytes = vec![0; usize::try_from(size - self.count).unwrap_or(CHUNK).min(CHUNK)];
        let count = match read(&self.from, &mut bytes) {
            Err(Errno::EINTR) => return Ok(false),
            count => count?,
        };
        let mut bytes = bytes.get(..count).unwrap_or_default();
        let mut at = self.count;
        self.count += count as u64;
        // A chunk of zeros is not written, which leaves a hole.
        if bytes.iter().any(|&byte| byte != 0) {
            while !bytes.is_empty() {
                let written = pwrite(&self.to, bytes, i64::try_from(at).map_err(|_| Errno::EFBIG)?)?;
                at += written as u64;
                bytes = bytes.get(written..).unwrap_or_default();
            }
        } else if count > 0 && self.count < size {
            self.jump(size)?;
        }
        if count > 0 && self.count < size {
            return Ok(false);
        }
        ftruncate(&self.to, i64::try_from(self.count).map_err(|_| Errno::EFBIG)?)?;
        keep_metadata(&self.from, &self.to, &self.stat).map(|()| true)
    }

    /// Jumps to where data begin again: a hole takes as long to read as data, and a huge one costs nothing to
    /// make. A filesystem that does not report its holes (9p) reports only data.
    fn jump(&mut self, size: u64) -> Result<(), Errno> {
        let at = i64::try_from(self.count).map_err(|_| Errno::EFBIG)?;
        match lseek(&self.from, at, Whence::SeekData) {
            Ok(next) => self.count = u64::try_from(next).unwrap_or(size).clamp(self.count, size),
            // There are no data up to the end.
            Err(Errno::ENXIO) => self.count = size,
            // The offset is unchanged, and reading continues there.
            Err(_) => {}
        }
        Ok(())
    }
}

/// Renames without replacing an existing name, where the filesystem supports RENAME_NOREPLACE; else a plain
/// rename.
fn rename<P: ?Sized + nix::NixPath>(from: &OwnedFd, name: &P, to: &OwnedFd, new: &P) -> Result<(), Errno> {
    match renameat2(from, name, to, new, RenameFlags::RENAME_NOREPLACE) {
        Err(Errno::EINVAL) => renameat(from, name, to, new),
        result => result,
    }
}

fn mode(stat: &FileStat) -> Mode {
    Mode::from_bits_truncate(stat.st_mode)
}

/// Copies the owner, mode, attributes and times of a file or directory, in an order in which no step undoes
/// another.
fn keep_metadata(from: &OwnedFd, to: &OwnedFd, stat: &FileStat) -> Result<(), Errno> {
    fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(to, mode(stat))?;
    keep_attributes(from, to)?;
    let (accessed, modified) = times(stat);
    futimens(to, &accessed, &modified)
}

/// Copies the owner and times of a link, a FIFO or a socket, which are not opened.
fn keep_owner_and_times(directory: &OwnedFd, name: &CStr, stat: &FileStat) -> Result<(), Errno> {
    let (user, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchownat(directory, name, Some(user), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let (accessed, modified) = times(stat);
    utimensat(directory, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)
}

fn times(stat: &FileStat) -> (TimeSpec, TimeSpec) {
    (TimeSpec::new(stat.st_atime, stat.st_atime_nsec), TimeSpec::new(stat.st_mtime, stat.st_mtime_nsec))
}

/// Copies the extended attributes that belong to the file itself: user attributes, capabilities and ACLs. If
/// the image's filesystem has no attributes, none are copied.
fn keep_attributes(from: &OwnedFd, to: &OwnedFd) -> Result<(), Errno> {
    let names = match xattr::list(from) {
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => return Ok(()),
        names => names?,
    };
    for name in names {
        let kept = [&b"user."[..], b"security.capability", b"system.posix_acl_"];
        if !kept.iter().any(|prefix| name.to_bytes().starts_with(prefix)) {
            continue;
        }
        let set = xattr::get(from, &name).and_then(|value| xattr::set(to, &name, &value));
        match set {
            Ok(()) | Err(Errno::ENODATA) => {}
            Err(errno @ (Errno::EOPNOTSUPP | Errno::EPERM)) => {
                log::warn!("{}", Fault::errno("going without the attribute", name.to_string_lossy(), errno));
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Removes a name of a directory and everything below it, until the deadline `until`; returns whether it is
/// gone. A missing name is no error.
fn remove(parent: impl AsFd, name: &OsStr, depth: usize, until: Instant) -> Result<bool, Errno> {
    match unlinkat(parent.as_fd(), name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(true),
        // Filesystems differ in which of the two errors they return for a directory.
        Err(Errno::EISDIR | Errno::EPERM) if depth <= DEPTH => {}
        Err(errno) => return Err(errno),
    }
    let opened = openat2(parent.as_fd(), Path::new(name), directory(), 0, Resolve::Name)?;
    loop {
        let again = openat2(&opened, Path::new("."), directory(), 0, Resolve::Name)?;
        // Removing names while reading may skip some, so the directory is read again until it is empty.
        let mut entries = Dir::from_fd(again)?;
        let names = some_names(entries.iter().map(|entry| Ok(entry?.file_name().to_owned())))?;
        if names.is_empty() {
            return unlinkat(parent.as_fd(), name, UnlinkatFlags::RemoveDir).map(|()| true);
        }
        for name in names {
            let gone = remove(&opened, OsStr::from_bytes(name.to_bytes()), depth + 1, until)?;
            // At least one name is removed in each call.
            if !gone || Instant::now() >= until {
                return Ok(false);
            }
        }
    }
}

/// The first names of a directory that is being removed. An unreadable directory returns the same error
/// forever, so the first error ends the reading.
fn some_names(names: impl Iterator<Item = Result<CString, Errno>>) -> Result<Vec<CString>, Errno> {
    let dots = |name: &CString| name.as_c_str() == c"." || name.as_c_str() == c"..";
    let inside = |name: &Result<CString, Errno>| !name.as_ref().is_ok_and(dots);
    names.filter(inside).take(256).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_cannot_be_read_is_an_error_and_not_a_wait() {
        let names = |names: &[&CStr]| names.iter().map(|&name| Ok(name.to_owned())).collect::<Vec<_>>();
        let broken = || names(&[c".", c"file"]).into_iter().chain(std::iter::repeat(Err(Errno::EIO)));
        assert_eq!(some_names(broken()), Err(Errno::EIO));
        let whole = names(&[c".", c"a", c"..", c"b"]).into_iter();
        assert_eq!(some_names(whole), Ok(vec![c"a".to_owned(), c"b".to_owned()]));
        assert_eq!(some_names(std::iter::repeat(Ok(c"many".to_owned()))).unwrap().len(), 256);
    }
}
