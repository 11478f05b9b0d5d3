//! The end of everything in a container.

use std::fs;
use std::io::{ErrorKind, Read, Seek};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::{ContainerId, Pid};
use hyperinit::paths;
use hyperinit::sys::signal;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::stat;

use super::tree::Home;

/// How long the killed may take to die; one in the kernel's hands (a disk that hangs) may never.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Kills everything in the container and waits until nothing of it runs.
pub fn container(_home: &Home, id: &ContainerId) -> Result<(), Fault> {
    let cgroup = paths::container_cgroup(id);
    match fs::write(cgroup.join("cgroup.kill"), "1") {
        Ok(()) => until_empty(&cgroup, id),
        // No cgroup v2, or a kernel before 5.14.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
            by_namespace(id)
        }
        Err(error) => Err(Fault::io("killing", id, &error)),
    }
}

/// cgroup.events changes when the last process, zombies not counted, is gone; poll(2) tells.
fn until_empty(cgroup: &Path, id: &ContainerId) -> Result<(), Fault> {
    let path = cgroup.join("cgroup.events");
    let mut file = fs::File::open(&path).fault("opening", path.display())?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        // The kernel wakes whoever polls for what has changed since that very descriptor was read.
        let mut text = String::new();
        file.rewind().and_then(|()| file.read_to_string(&mut text)).fault("reading", path.display())?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Fault::new("killing", id, "something in it does not die"));
        }
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
        let timeout = PollTimeout::try_from(left.min(Duration::from_secs(1))).unwrap_or(PollTimeout::MAX);
        poll(&mut fds, timeout).fault("waiting for the end of", id)?;
    }
}

/// Without a cgroup: whoever is in the container's mount namespace, until nobody new is found. A process that forks
/// faster than this walk ends with the pod.
fn by_namespace(id: &ContainerId) -> Result<(), Fault> {
    let kept = paths::container_mount_ns(id);
    let namespace = match stat(&kept) {
        Ok(stat) => (stat.st_dev, stat.st_ino),
        Err(Errno::ENOENT) => return Ok(()),
        Err(errno) => return Err(Fault::errno("looking at", kept.display(), errno)),
    };
    let deadline = Instant::now() + TIMEOUT;
    while Instant::now() < deadline {
        let mut found = false;
        for pid in processes()? {
            let own = stat(format!("/proc/{pid}/ns/mnt").as_str());
            if own.is_ok_and(|own| (own.st_dev, own.st_ino) == namespace) {
                found |= signal::kill(pid, nix::libc::SIGKILL, false).is_ok();
            }
        }
        if !found {
            return Ok(());
        }
    }
    Err(Fault::new("killing", id, "something in it does not die"))
}

fn processes() -> Result<Vec<Pid>, Fault> {
    let entries = fs::read_dir("/proc").fault("reading", "/proc")?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.parse().ok().map(Pid)).collect())
}
