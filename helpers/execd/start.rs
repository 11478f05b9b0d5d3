//! execd's side of a start: it makes the pipes, clones the process and, when that is ready, hands its streams
//! to streamd.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::{ContainerId, ProcessId, StreamId};
use hyperinit::paths;
use hyperinit::spec::Process;
use hyperinit::sys::process::{self, Cloned, clone_sibling};
use hyperinit::sysctl::{self, Sysctls};
use hyperinit::wire::streamd::Streams as Packet;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc::CLONE_FILES;
use nix::sys::stat::Mode;
use nix::sys::utsname::uname;
use nix::unistd::pipe2;

use super::child::{self, Place, Stdio};
use super::streams::Ends;
use super::{Execd, setup};
use super::{pod, report};

/// What a start in progress will become: the pod init, or a process of a container or of the guest.
pub enum Becoming {
    /// The pod init.
    PodInit,
    /// A process with streams.
    Process(Box<Beginning>),
}

/// The descriptors and names that execd keeps for a process until it is ready.
pub struct Beginning {
    id: ProcessId,
    container: Option<ContainerId>,
    packet: Packet,
    stdin: Option<OwnedFd>,
    output: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// Descriptors that the process needs. They stay open here, because it may still share execd's
    /// descriptors.
    _needed: (Stdio, Option<OwnedFd>),
}

impl Execd {
    /// Begins the start of a process in a container.
    pub fn start(
        &mut self,
        container: &ContainerId,
        process: &Process,
        init: bool,
        hostname: &str,
        sysctls: &Sysctls,
    ) -> Result<(report::Start, Becoming), Fault> {
        if !self.joined {
            return Err(Fault::new("starting", &process.id, "execd has not joined the pod"));
        }
        sysctl::check(sysctls, &self.profile)?;
        if init {
            self.passwd_cache.forget(container);
        }
        // The guest keeps the namespace, as it does the cgroup, so no file of the container's can delay this.
        let kept = paths::container_mount_ns(container);
        let namespace = open(&kept, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .fault("opening the container's namespace", kept.display())?;
        let place = Place::Container { id: container, namespace, console: init && process.terminal };
        // This logs, so it runs here: the process's standard error is no longer the log.
        let sysctls = sysctl::others(sysctls, self.local);
        self.start_at(place, process, hostname, &sysctls)
    }

    /// Begins the start of a process in the guest's own namespaces: the debugging door.
    pub fn start_in_guest(&mut self, process: &Process) -> Result<(report::Start, Becoming), Fault> {
        if !self.debug_door {
            return Err(Fault::new("starting", &process.id, "the debugging door is closed"));
        }
        let hostname = uname().fault("asking for", "the guest's name")?;
        // The next clone belongs to the guest. Whether it succeeds or fails, later clones belong to the pod
        // again.
        self.home.enter()?;
        let started = self.start_at(Place::Guest, process, &hostname.nodename().to_string_lossy(), &[]);
        match self.joined.then(pod::join) {
            None | Some(Ok(())) => {}
            // The pod has ended, and execd was not told.
            Some(Err(fault)) if fault.is(Errno::ENOENT) => self.joined = false,
            Some(Err(fault)) => {
                // init does not know the process just started and never releases it, so it exits. execd's
                // successor begins in the pod.
                log::error!("{fault}");
                process::exit(1)
            }
        }
        started
    }

    fn start_at(
        &mut self,
        place: Place<'_>,
        process: &Process,
        hostname: &str,
        sysctls: &[(&String, &String)],
    ) -> Result<(report::Start, Becoming), Fault> {
        let packet = packet(process)?;
        let limits = match place {
            Place::Container { .. } => setup::limits(&process.rlimits, self.files)?,
            Place::Guest => setup::named_limits(&process.rlimits)?,
        };
        let cgroup = place.container().map_or(Ok(None), cgroup)?;
        let pipes = Pipes::new(&packet)?;
        let pair = report::pair()?;
        let needs = [&self.proc, &pair.1].into_iter().chain(place.namespace()).chain(pipes.theirs.all());
        let last = needs.map(AsRawFd::as_raw_fd).max().unwrap_or_default();
        // The process shares execd's descriptor table until it makes its own: copying and closing the outputs
        // kept for streamd would make each start slower than the one before. Until the process reports that
        // it is ready, nothing that it needs may be closed here.
        let cgroup = cgroup.as_ref().map(AsFd::as_fd);
        match clone_sibling(CLONE_FILES, cgroup).fault("cloning for", &process.id)? {
            // The process closes its copies of execd's ends itself, so that it notices when execd is gone.
            Cloned::Child => {
                let start = child::Start {
                    last,
                    place: &place,
                    profile: &self.profile,
                    scoped: self.scoped,
                    keep: self.keep,
                    wide: self.debug_door,
                    proc: &self.proc,
                    process,
                    cached: place.container().and_then(|id| self.passwd_cache.of(id)),
                    limits: &limits,
                    sysctls,
                    hostname,
                    stdio: pipes.theirs,
                };
                start.run(pair.1)
            }
            Cloned::Parent { pid, pidfd } => {
                let Pipes { stdin, output, stderr, theirs } = pipes;
                let (id, container) = (process.id.clone(), place.container().cloned());
                let needed = (theirs, place.into_namespace());
                let beginning = Beginning { id, container, packet, stdin, output, stderr, _needed: needed };
                Ok((report::Start::new(pid, pidfd, pair), Becoming::Process(Box::new(beginning))))
            }
        }
    }

    /// Completes the start of a process that is ready: hands its streams over, or keeps the pod init's
    /// namespaces. Afterwards init may be told.
    pub fn is_ready(&mut self, becoming: Becoming, ready: report::Ready) -> Result<(), Fault> {
        let Becoming::Process(beginning) = becoming else { return pod::keep(&ready.namespaces) };
        let Beginning { id, container, packet, stdin, output, stderr, .. } = *beginning;
        if let Some(container) = container {
            self.passwd_cache.keep(&container, ready.read);
        }
        let output =
            output.or(ready.tty).ok_or_else(|| Fault::new("starting", id, "its tty did not come"))?;
        self.streams.hand_over(Ends { packet, stdin, output, stderr })
    }
}

/// The packet for streamd. init has checked the stream numbers, and execd checks them again.
fn packet(process: &Process) -> Result<Packet, Fault> {
    let fault = |why| Fault::new("starting", &process.id, why);
    let stdio = StreamId::new(process.stdio).ok_or_else(|| fault("stdio is 0"))?;
    let stderr = StreamId::new(process.stderr);
    if !process.terminal && stderr.is_none() {
        return Err(fault("stderr is 0, and there is no tty"));
    }
    if stderr == Some(stdio) {
        return Err(fault("stdio and stderr are the same stream"));
    }
    Ok(Packet { stdio, stderr, terminal: process.terminal, stdin: !process.terminal, again: false })
}

/// Opens the container's cgroup; none if the kernel has no cgroup v2.
fn cgroup(container: &ContainerId) -> Result<Option<OwnedFd>, Fault> {
    let path = paths::container_cgroup(container);
    match open(&path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(Fault::errno("opening the cgroup", path.display(), errno)),
    }
}

/// The pipes of a process. The process itself makes its tty, in its container.
struct Pipes {
    stdin: Option<OwnedFd>,
    output: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    theirs: Stdio,
}

impl Pipes {
    fn new(packet: &Packet) -> Result<Pipes, Fault> {
        let pipe = |wanted: bool| {
            if wanted {
                pipe2(OFlag::O_CLOEXEC)
                    .fault("making", "a pipe")
                    .map(|(read, write)| (Some(read), Some(write)))
            } else {
                Ok((None, None))
            }
        };
        let (stdin_read, stdin) = pipe(packet.stdin)?;
        let (output, stdout_write) = pipe(!packet.terminal)?;
        let (stderr, stderr_write) = pipe(packet.stderr.is_some())?;
        let theirs = Stdio { stdin: stdin_read, stdout: stdout_write, stderr: stderr_write };
        Ok(Pipes { stdin, output, stderr, theirs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(terminal: bool, stdio: u64, stderr: u64) -> Process {
        serde_json::from_value(serde_json::json!({"terminal": terminal, "stdio": stdio, "stderr": stderr}))
            .unwrap()
    }

    #[test]
    fn every_process_has_its_streams() {
        assert!(packet(&process(false, 0, 2)).is_err());
        assert!(packet(&process(false, 1, 0)).is_err());
        assert!(packet(&process(false, 1, 1)).is_err());
        assert!(packet(&process(true, 1, 0)).unwrap().stderr.is_none());
        assert_eq!(packet(&process(false, 1, 2)).unwrap().fds(), 3);
        assert_eq!(packet(&process(true, 1, 2)).unwrap().fds(), 2);
    }
}
