//! The pod init: PID 1 of the pod's namespaces. It reaps orphaned processes there, and does nothing else.

use std::convert::Infallible;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::logger;
use hyperinit::paths;
use hyperinit::sandbox::{CapSet, Policy, caps};
use hyperinit::spec::HOSTNAME_MAX;
use hyperinit::sys::process::{self, Cloned, clone_sibling};
use hyperinit::sys::signal;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::stat::Mode;
use nix::unistd::sethostname;

use super::passwd_cache::Files;
use super::{report, system_v};

/// The namespaces that execd enters with the pod, and leaves with it.
const KINDS: [(&str, CloneFlags); 3] =
    [("pid", CloneFlags::CLONE_NEWPID), ("uts", CloneFlags::CLONE_NEWUTS), ("ipc", CloneFlags::CLONE_NEWIPC)];

/// execd's own namespaces: the guest's.
pub struct Namespaces(Vec<(OwnedFd, CloneFlags)>);

impl Namespaces {
    /// Opens execd's own namespaces.
    pub fn own() -> Result<Namespaces, Fault> {
        KINDS
            .into_iter()
            .map(|(name, kind)| Ok((file(&format!("/proc/self/ns/{name}"))?, kind)))
            .collect::<Result<_, _>>()
            .map(Namespaces)
    }

    /// Enters the guest's namespaces: the next clone is born there.
    pub fn enter(&self) -> Result<(), Fault> {
        self.0.iter().try_for_each(|(fd, kind)| setns(fd, *kind).fault("entering", "a namespace"))
    }
}

fn file(path: &str) -> Result<OwnedFd, Fault> {
    open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).fault("opening", path)
}

/// Opens the guest's /proc, through which a process changes its own settings before it enters a container.
pub fn guest_proc() -> Result<OwnedFd, Fault> {
    open("/proc", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", "/proc")
}

/// Enters the kept namespaces of the pod: every process cloned from now on is in them.
pub fn join() -> Result<(), Fault> {
    let kept = KINDS
        .into_iter()
        .map(|(name, kind)| Ok((file(&format!("{}/{name}", paths::POD_NS))?, kind)))
        .collect::<Result<_, Fault>>()?;
    Namespaces(kept).enter()
}

/// Keeps the namespaces of the pod init as files. So they outlive execd, mountd can work in them, and
/// `nsenter` finds them.
pub fn keep(namespaces: &[OwnedFd]) -> Result<(), Fault> {
    if namespaces.len() != paths::POD_NAMESPACES.len() {
        return Err(Fault::new("keeping", "the pod's namespaces", "the pod init has not handed them over"));
    }
    for (name, namespace) in paths::POD_NAMESPACES.into_iter().zip(namespaces) {
        let file = format!("{}/{name}", paths::POD_NS);
        std::fs::write(&file, "").fault("making", &file)?;
        let from = format!("/proc/self/fd/{}", namespace.as_raw_fd());
        mount(Some(from.as_str()), file.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .fault("keeping the namespace", &file)?;
    }
    Ok(())
}

/// Begins the start of the pod init.
pub fn start(home: &Namespaces, policy: &Policy, hostname: &str) -> Result<report::Start, Fault> {
    if hostname.len() > HOSTNAME_MAX || hostname.contains('\0') {
        return Err(Fault::new("reading", "hostname", "it is longer than 64 bytes, or contains a zero"));
    }
    // An execd that has served an earlier pod is still in that pod's namespaces.
    home.enter()?;
    let (ours, theirs) = report::pair()?;
    let namespaces = nix::libc::CLONE_NEWPID | nix::libc::CLONE_NEWNS | nix::libc::CLONE_NEWUTS;
    match clone_sibling(namespaces, None).fault("cloning", "the pod init")? {
        Cloned::Parent { pid, pidfd } => Ok(report::Start::new(pid, pidfd, (ours, theirs))),
        Cloned::Child => {
            drop(ours);
            logger::name("podinit");
            // Every container sees this command line. If it cannot be set, the process merely shows another
            // one.
            if let Err(errno) = process::set_command_line(c"podinit") {
                log::warn!("{}", Fault::errno("setting", "its command line", errno));
            }
            let Err(fault) = live(policy, hostname, &theirs);
            report::fault(&theirs, &fault);
            process::exit(1)
        }
    }
}

fn live(policy: &Policy, hostname: &str, report: &OwnedFd) -> Result<Infallible, Fault> {
    caps::become_root()?;
    // As root: the root of the pod's message queues (mq_overview(7)) belongs to the maker of this namespace.
    unshare(CloneFlags::CLONE_NEWIPC).fault("making", "the pod's IPC namespace")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).fault("making private", "/")?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, None::<&str>).fault("mounting", "/proc")?;
    sethostname(hostname).fault("setting the hostname", hostname)?;
    system_v::bound();
    let children = SigSet::from(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&children), None).fault("blocking", "SIGCHLD")?;
    // The pod init may always open its own namespaces. Any other process would need CAP_SYS_PTRACE.
    for name in paths::POD_NAMESPACES {
        let namespace = file(&format!("/proc/self/ns/{name}"))?;
        report::namespace(report, namespace.as_fd()).fault("handing over", "a namespace")?;
    }
    report::ready(report, Files::default()).fault("reporting to", "execd")?;
    // Once the pod init is released, its mount namespace has been kept. It is the template of every
    // container's, and the pod must not see it.
    if !report::released(report::RELEASE_TIMEOUT) {
        return Err(Fault::new("waiting for", "init", "it was not told of this process"));
    }
    // From here on nothing of execd's is used or dropped.
    process::close_all_but_log().fault("closing", "execd's descriptors")?;
    // Every container sees PID 1 of the pod: any process can read its list of mounts, and one that may trace
    // it can reach their content. So its policy leaves it no mounts.
    policy.confine(CapSet::default())?;
    loop {
        match signal::reap() {
            Ok(Some(_)) => {}
            Ok(None) | Err(Errno::ECHILD) => {
                let _ = children.wait();
            }
            Err(errno) => return Err(Fault::errno("reaping", "orphans", errno)),
        }
    }
}
