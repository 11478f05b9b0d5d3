//! Kills every process of a container.

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
use nix::fcntl::{OFlag, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

use super::tree::Home;

/// How long killed processes may take to die. One that hangs in the kernel (on a disk, for example) may never
/// die.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Kills every process of the container and waits until none runs. Fails if one is still alive after
/// `TIMEOUT`.
pub fn container(home: &Home, id: &ContainerId) -> Result<(), Fault> {
    let cgroup = paths::container_cgroup(id);
    match fs::write(cgroup.join("cgroup.kill"), "1") {
        Ok(()) => until_empty(&cgroup, id),
        // No cgroup v2, or a kernel before 5.14.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
            by_mounts(home, id)
        }
        Err(error) => Err(Fault::io("killing", id, &error)),
    }
}

/// Waits until the cgroup is empty. cgroup.events changes when its last process, zombies not counted, is
/// gone, and poll(2) reports the change.
fn until_empty(cgroup: &Path, id: &ContainerId) -> Result<(), Fault> {
    let path = cgroup.join("cgroup.events");
    let mut file = fs::File::open(&path).fault("opening", path.display())?;
    let deadline = Instant::now() + TIMEOUT;
    loop {
        // poll(2) reports changes since the last read of this same descriptor.
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

/// Without a cgroup: kills every process that sees mounts of the container, until a walk finds none. Any
/// process may read which mounts another sees. Reading its namespace would take CAP_SYS_PTRACE, which also
/// gives access to the memory of every process of the guest. This misses a process that forks faster than the
/// walk, or that has changed its root to a directory below which nothing is mounted; such a process ends with
/// the pod.
fn by_mounts(home: &Home, id: &ContainerId) -> Result<(), Fault> {
    let mounts = match home.in_namespace(id, || mounts(home, "self")) {
        Ok(mounts) => mounts,
        Err(fault) if fault.is(Errno::ENOENT) => return Ok(()),
        Err(fault) => return Err(fault),
    };
    let deadline = Instant::now() + TIMEOUT;
    while Instant::now() < deadline {
        let mut found = false;
        for pid in processes()? {
            // Mount numbers are unique in the whole kernel, so one mount is enough.
            let first = self::mounts(home, &pid.to_string()).ok().and_then(|seen| seen.into_iter().next());
            if first.is_some_and(|mount| mounts.contains(&mount)) {
                found |= signal::kill(pid, nix::libc::SIGKILL, false).is_ok();
            }
        }
        if !found {
            return Ok(());
        }
    }
    Err(Fault::new("killing", id, "something in it does not die"))
}

/// The numbers of the mounts that a process sees (proc_pid_mountinfo(5)), read from the guest's /proc.
fn mounts(home: &Home, process: &str) -> Result<Vec<u64>, Fault> {
    let path = format!("{process}/mountinfo");
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let file = openat(&home.proc, path.as_str(), flags, Mode::empty()).fault("opening", &path)?;
    let mut text = String::new();
    fs::File::from(file).read_to_string(&mut text).fault("reading", &path)?;
    Ok(text.lines().filter_map(|line| line.split(' ').next()?.parse().ok()).collect())
}

fn processes() -> Result<Vec<Pid>, Fault> {
    let entries = fs::read_dir("/proc").fault("reading", "/proc")?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    Ok(names.filter_map(|name| name.parse().ok().map(Pid)).collect())
}
