//! A cache of the containers' passwd and group files. Opening one on the share costs several round trips to
//! the host, and a start needs little else from the share.
//!
//! The process reads the files, because only it is in the container. execd keeps the texts for the next
//! process, which only checks the files' times and sizes, and the guest has those.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyperinit::fault::Fault;
use hyperinit::ids::ContainerId;
use nix::sys::stat::{FileStat, stat};
use serde::{Deserialize, Serialize};

use super::accounts;

/// The container's users.
pub const PASSWD: &str = "/etc/passwd";
/// The container's groups.
pub const GROUP: &str = "/etc/group";
/// The largest number of containers whose files are cached. Each text is shorter than a report (4 kB).
const FILES_MAX: usize = 64;
/// A file that changed less than this ago might change again without a change of its times.
const SETTLED: Duration = Duration::from_secs(2);

/// A text, and the version of the file that it was read from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copy {
    version: Version,
    text: String,
}

/// The two files of one container, as far as they are cached or a process had to read them.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Files {
    /// The copy of [`PASSWD`].
    pub passwd: Option<Copy>,
    /// The copy of [`GROUP`].
    pub group: Option<Copy>,
}

#[cfg(test)]
impl Copy {
    /// A copy of an arbitrary file version, for tests.
    pub fn of_text(text: String) -> Copy {
        Copy { version: Version { device: 1, inode: 2, size: 3, modified: (4, 5), changed: (6, 7) }, text }
    }
}

/// Distinguishes two files, or two states of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Version {
    device: u64,
    inode: u64,
    size: i64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Version {
    fn of(stat: &FileStat) -> Version {
        Version {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// Whether the file is old enough that a later change is certain to change its version.
    fn is_settled(&self, now: Duration) -> bool {
        let last = self.modified.0.max(self.changed.0);
        u64::try_from(last).is_ok_and(|last| Duration::from_secs(last) + SETTLED <= now)
    }
}

/// Returns the text of one of the two files, called in the container. If the cached version is current,
/// its text is returned; else the file is read, and the second value is the copy for execd to keep, if
/// the file is settled.
pub fn read(path: &str, cached: Option<&Copy>) -> Result<(String, Option<Copy>), Fault> {
    let now = stat(path).ok().map(|stat| Version::of(&stat));
    if let (Some(now), Some(copy)) = (now, cached)
        && copy.version == now
    {
        return Ok((copy.text.clone(), None));
    }
    let (text, stat) = accounts::read(path)?;
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let version = stat.map(|stat| Version::of(&stat)).filter(|version| version.is_settled(clock));
    let copy = version.map(|version| Copy { version, text: text.clone() });
    Ok((text, copy))
}

/// The files that execd keeps, by container.
#[derive(Default)]
pub struct PasswdCache(BTreeMap<ContainerId, Files>);

impl PasswdCache {
    /// The cached files of a container, if there are any.
    pub fn of(&self, container: &ContainerId) -> Option<&Files> {
        self.0.get(container)
    }

    /// Remembers files that a process has read.
    pub fn keep(&mut self, container: &ContainerId, read: Files) {
        if read == Files::default() {
            return;
        }
        if self.0.len() >= FILES_MAX && !self.0.contains_key(container) {
            self.0.pop_first();
        }
        let known = self.0.entry(container.clone()).or_default();
        known.passwd = read.passwd.or(known.passwd.take());
        known.group = read.group.or(known.group.take());
    }

    /// Forgets a container's files: a new container with that id begins.
    pub fn forget(&mut self, container: &ContainerId) {
        self.0.remove(container);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(seconds: i64) -> Version {
        Version { device: 1, inode: 2, size: 3, modified: (seconds, 4), changed: (7, 0) }
    }

    #[test]
    fn a_file_that_was_just_changed_is_not_remembered() {
        let now = Duration::from_secs(1000);
        assert!(version(998).is_settled(now));
        assert!(!version(999).is_settled(now) && !version(1500).is_settled(now));
    }

    #[test]
    fn the_same_file_is_not_read_again_and_another_is() {
        // An existing, old file. Its path is relative to the working directory, which serves as the root of
        // the lookup.
        let path = "Cargo.toml";
        let version = Version::of(&stat(path).unwrap());
        let cached = Copy { version, text: "remembered".to_owned() };
        assert_eq!(read(path, Some(&cached)).unwrap(), ("remembered".to_owned(), None));
        let other = Copy { version: Version { size: version.size + 1, ..version }, ..cached };
        let (text, _) = read(path, Some(&other)).unwrap();
        assert!(text.contains("[package]"));
        assert_eq!(read("no-such-file", None).unwrap(), (String::new(), None));
    }

    #[test]
    fn no_more_is_remembered_than_so_much() {
        let mut cache = PasswdCache::default();
        let id = |number: usize| ContainerId::try_from(format!("c{number}")).unwrap();
        let copy = |seconds| Some(Copy { version: version(seconds), text: String::new() });
        for number in 0..3 * FILES_MAX {
            cache.keep(&id(number), Files { passwd: copy(0), group: None });
            assert!(cache.of(&id(number)).is_some() && cache.0.len() <= FILES_MAX);
        }
        let last = id(3 * FILES_MAX - 1);
        cache.keep(&last, Files { passwd: None, group: copy(1) });
        assert_eq!(cache.of(&last), Some(&Files { passwd: copy(0), group: copy(1) }), "each by itself");
        cache.forget(&last);
        assert!(cache.of(&last).is_none());
    }
}
