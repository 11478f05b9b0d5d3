//! The cgroup v2 of a local guest: it is the root of the guest's cgroup namespace, and the pod's cgroups are
//! below it.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long the last processes may take to leave the cgroup of a guest that is gone.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(5);
/// The beginning of the cgroups' names, followed by hyperctl's process number.
const PREFIX: &str = "hyperctl-";

/// A cgroup. Dropping it kills its processes and removes it.
#[derive(Debug)]
pub struct Cgroup(PathBuf);

impl Cgroup {
    /// Makes a cgroup below hyperctl's own; `None` if this machine has no cgroup v2 that can be written.
    pub fn make() -> Option<Cgroup> {
        // The paths of other mounts need not be UTF-8.
        let read = |path| fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let parent = own(&read("/proc/self/mountinfo")?, &read("/proc/self/cgroup")?)?;
        sweep(&parent);
        let directory = parent.join(format!("{PREFIX}{}", std::process::id()));
        match fs::create_dir(&directory) {
            Ok(()) => Some(Cgroup(directory)),
            Err(error) => {
                log::warn!("the guest has no cgroup: making {}: {error}", directory.display());
                None
            }
        }
    }

    /// The cgroup's directory.
    pub fn directory(&self) -> &Path {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Before Linux 5.14 this file does not exist; there the end of the PID namespace has killed the
        // processes.
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        wait_until_empty(&self.0);
        remove(&self.0);
    }
}

/// The directory of this process's cgroup, from /proc/self/mountinfo and /proc/self/cgroup (proc(5),
/// cgroups(7)).
fn own(mountinfo: &str, cgroup: &str) -> Option<PathBuf> {
    let path = Path::new(cgroup.lines().find_map(|line| line.strip_prefix("0::"))?);
    mountinfo.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        if filesystem.split(' ').next() != Some("cgroup2") {
            return None;
        }
        let mut fields = mount.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        // A mount of a part of the hierarchy contains the own cgroup only if that is below the part.
        Some(Path::new(at).join(path.strip_prefix(root).ok()?))
    })
}

/// Removes the cgroups that killed hyperctls have left. No process runs in them.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            remove(&entry.path());
        }
    }
}

fn wait_until_empty(directory: &Path) {
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    // The kernel announces changes of the file's content as POLLPRI.
    let Ok(events) = fs::File::open(directory.join("cgroup.events")) else { return };
    loop {
        let text = fs::read_to_string(directory.join("cgroup.events")).unwrap_or_default();
        let left = deadline.saturating_duration_since(Instant::now());
        if !text.contains("populated 1") || left.is_zero() {
            return;
        }
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        let _ = poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX));
    }
}

/// Removes a cgroup with the cgroups below it. The files in it are the kernel's and go with it.
fn remove(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    if let Err(error) = fs::remove_dir(directory) {
        log::warn!("removing {}: {error}", directory.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
         40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd\n\
         41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_own_cgroup_is_found_below_the_mount() {
        let at = |mountinfo, cgroup| own(mountinfo, cgroup);
        let unified = Path::new("/sys/fs/cgroup/unified");
        assert_eq!(at(MOUNTS, "5:devices:/x\n0::/\n").as_deref(), Some(unified));
        assert_eq!(at(MOUNTS, "0::/user.slice/a b\n"), Some(unified.join("user.slice/a b")));
        let part = "41 31 0:38 /machine /sys/fs/cgroup rw - cgroup2 none rw\n";
        assert_eq!(at(part, "0::/machine/m1\n"), Some(PathBuf::from("/sys/fs/cgroup/m1")));
        assert_eq!(at(part, "0::/elsewhere\n"), None);
        assert_eq!(at("", "0::/\n"), None);
        assert_eq!(at(MOUNTS, "5:devices:/x\n"), None, "no cgroup v2 at all");
    }
}
