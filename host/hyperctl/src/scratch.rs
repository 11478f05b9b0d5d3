//! A directory for as long as hyperctl runs. What one that was killed has left, the next one removes.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use hyperinit_protocol::fault::{Fault, OrFault};
use nix::fcntl::OFlag;
use nix::unistd::geteuid;
use tempfile::TempDir;

/// What the names of these directories begin with.
const PREFIX: &str = "hyperctl-";
/// The file by which they are known, beside what else may have such a name. It is locked as long as its
/// hyperctl lives.
const LOCK: &str = "hyperctl.lock";
/// Where hyperctl makes files in one, the deepest first. Any other directory is a place that something was
/// bound on, in a namespace that is gone with whoever saw it; should something be bound there still, it is
/// not entered.
const OURS: [&str; 5] = ["share/volumes", "share", "guest", "floor", ""];

/// Dropping it removes it with all that is in it.
#[derive(Debug)]
pub struct Scratch {
    // In this order: it is nobody's when it is gone, and not before.
    directory: TempDir,
    _lock: File,
}

impl Scratch {
    /// Makes one where temporary files are.
    pub fn make() -> Result<Scratch, Fault> {
        Scratch::make_in(&std::env::temp_dir())
    }

    fn make_in(place: &Path) -> Result<Scratch, Fault> {
        sweep(place);
        loop {
            let made = tempfile::Builder::new().prefix(PREFIX).tempdir_in(place);
            let directory = made.fault("making a temporary directory in", place.display())?;
            let path = directory.path().join(LOCK);
            let lock = File::create_new(&path).fault("making", path.display())?;
            // Whoever sweeps in this moment may have taken it for one that was left.
            if is_locked(&lock, &path) {
                return Ok(Scratch { directory, _lock: lock });
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Locks a file, if nobody else has; and if it is still the one that has that name.
fn is_locked(file: &File, path: &Path) -> bool {
    let number = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    file.try_lock().is_ok() && file.metadata().ok().map(number) == fs::symlink_metadata(path).ok().map(number)
}

/// Removes those of this user's that are nobody's.
fn sweep(place: &Path) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let is_one = entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes())
            && entry
                .metadata()
                .is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == geteuid().as_raw());
        if !is_one {
            continue;
        }
        let path = entry.path().join(LOCK);
        let flags = (OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits();
        if let Ok(lock) = File::options().read(true).custom_flags(flags).open(&path)
            && is_locked(&lock, &path)
        {
            remove(&entry.path());
        }
    }
}

/// Removes what hyperctl makes in one, and nothing else.
fn remove(directory: &Path) {
    for ours in OURS {
        let at = directory.join(ours);
        for entry in fs::read_dir(&at).into_iter().flatten().flatten() {
            // What cannot be removed stays where it is. The lock goes last: by it the rest is found again,
            // should this be as far as hyperctl comes.
            let _ = match entry.file_type() {
                Ok(kind) if kind.is_dir() => fs::remove_dir(entry.path()),
                _ if ours.is_empty() && entry.file_name() == LOCK => Ok(()),
                _ => fs::remove_file(entry.path()),
            };
        }
    }
    let removed = fs::remove_file(directory.join(LOCK)).and_then(|()| fs::remove_dir(directory));
    if let Err(error) = removed {
        log::warn!("removing what a hyperctl has left, {}: {error}", directory.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a hyperctl that was killed has left.
    fn leave(place: &Path) -> std::path::PathBuf {
        let mut scratch = Scratch::make_in(place).unwrap();
        scratch.directory.disable_cleanup(true);
        scratch.path().to_owned()
    }

    #[test]
    fn what_was_left_goes_and_what_is_in_use_stays() {
        let place = tempfile::tempdir().unwrap();
        let used = Scratch::make_in(place.path()).unwrap();
        let left = leave(place.path());
        for directory in ["share/rootfs", "share/volumes/0", "guest", "floor"] {
            fs::create_dir_all(left.join(directory)).unwrap();
        }
        for file in ["console.log", "ctl.sock", "share/volumes/1", "guest/console.log"] {
            fs::write(left.join(file), "").unwrap();
        }
        // They only have such a name.
        fs::create_dir(place.path().join("hyperctl-mine")).unwrap();
        fs::write(place.path().join("hyperctl-notes"), "").unwrap();
        let further = Scratch::make_in(place.path()).unwrap();
        assert!(!left.exists() && used.path().join(LOCK).exists());
        drop(used);
        drop(further);
        let mut names: Vec<_> = fs::read_dir(place.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["hyperctl-mine", "hyperctl-notes"]);
    }

    #[test]
    fn what_somebody_else_has_put_there_is_not_removed() {
        let place = tempfile::tempdir().unwrap();
        let left = leave(place.path());
        let data = left.join("share/rootfs/data");
        fs::create_dir_all(data.parent().unwrap()).unwrap();
        fs::write(&data, "kept").unwrap();
        drop(Scratch::make_in(place.path()).unwrap());
        assert_eq!(fs::read_to_string(&data).unwrap(), "kept");
    }
}
