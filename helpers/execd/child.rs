//! The process's side of a start, from the clone to execve: it enters the container, sets up its streams and
//! identity, and drops the privileges that it may not keep.
//!
//! After taking descriptors of its own, it becomes root. It is not dumpable (execd is not, and a clone
//! inherits that), so no process of the container can trace it or take its descriptors while it still holds
//! any of execd's.

use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::ContainerId;
use hyperinit::sandbox::{CapSet, ContainerProfile, Scoped, caps};
use hyperinit::spec::Process;
use hyperinit::sys::mount::{Resolve, clone_tree, move_mount, openat2};
use hyperinit::sys::process::{Program, become_standard, default_sigpipe, exit, keep_only, own_descriptors};
use hyperinit::sys::tty;
use hyperinit::sysctl;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{Resource, rlim_t, setrlimit};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat, major, minor};
use nix::sys::statfs::{FsType, fstatfs};
use nix::unistd::{Gid, Uid, fchdir, fchown, setgroups, setresgid, setresuid, setsid, write};

use super::accounts::{self, Identity};
use super::passwd_cache::{self, Copy, Files, GROUP, PASSWD};
use super::{report, setup};

/// The magic number of devpts (statfs(2)).
const DEVPTS_MAGIC: FsType = FsType(0x1cd1);

/// The pipe ends that become descriptors 0, 1 and 2. The tty takes the place of a missing one.
pub struct Stdio {
    /// The read end that becomes descriptor 0.
    pub stdin: Option<OwnedFd>,
    /// The write end that becomes descriptor 1.
    pub stdout: Option<OwnedFd>,
    /// The write end that becomes descriptor 2.
    pub stderr: Option<OwnedFd>,
}

impl Stdio {
    /// The pipe ends that are present.
    pub fn all(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.stdin, &self.stdout, &self.stderr].into_iter().flatten()
    }
}

/// Where a process runs.
pub enum Place<'a> {
    /// In a container.
    Container {
        /// The container's id.
        id: &'a ContainerId,
        /// The container's mount namespace.
        namespace: OwnedFd,
        /// Whether the process's tty also becomes the container's /dev/console.
        console: bool,
    },
    /// In the guest's own namespaces: the debugging door. The process has execd's privileges and no profile.
    Guest,
}

impl Place<'_> {
    /// The id of the container, if the process runs in one.
    pub fn container(&self) -> Option<&ContainerId> {
        match self {
            Place::Container { id, .. } => Some(id),
            Place::Guest => None,
        }
    }

    /// The container's mount namespace.
    pub fn namespace(&self) -> Option<&OwnedFd> {
        match self {
            Place::Container { namespace, .. } => Some(namespace),
            Place::Guest => None,
        }
    }

    /// The container's mount namespace, for execd to keep open until the process is ready.
    pub fn into_namespace(self) -> Option<OwnedFd> {
        match self {
            Place::Container { namespace, .. } => Some(namespace),
            Place::Guest => None,
        }
    }
}

/// Everything that a start needs, computed before the clone.
pub struct Start<'a> {
    /// The highest number among execd's descriptors that the process needs.
    pub last: RawFd,
    /// Where the process runs.
    pub place: &'a Place<'a>,
    /// The container's profile.
    pub profile: &'a ContainerProfile,
    /// The profile's scope for signals and abstract sockets.
    pub scoped: Scoped,
    /// The capabilities that a root process keeps.
    pub keep: CapSet,
    /// Whether execd's bounding set is wider than the profile.
    pub wide: bool,
    /// The guest's /proc.
    pub proc: &'a OwnedFd,
    /// The host's description of the process.
    pub process: &'a Process,
    /// The container's passwd and group files as far as execd has them in its cache.
    pub cached: Option<&'a Files>,
    /// The process's resource limits: resource, soft limit, hard limit.
    pub limits: &'a [(Resource, rlim_t, rlim_t)],
    /// The container's sysctls that this process sets: names and values.
    pub sysctls: &'a [(&'a String, &'a String)],
    /// The pod's hostname.
    pub hostname: &'a str,
    /// The process's ends of its pipes.
    pub stdio: Stdio,
}

/// The descriptors that the process keeps beside its standard streams, after it has closed all others of
/// execd's.
struct Own {
    /// The report socket to execd.
    report: OwnedFd,
    /// The guest's /proc.
    proc: OwnedFd,
    /// The container's mount namespace.
    namespace: Option<OwnedFd>,
}

impl Start<'_> {
    /// Executes the program or exits; it never returns. So nothing that execd owned at the clone is dropped
    /// here.
    pub fn run(&self, report: OwnedFd) -> ! {
        let Own { report, proc, namespace } = match self.own(&report) {
            Ok(own) => own,
            Err(fault) => leave(&report, &fault),
        };
        // As root: only root may change the kernel's settings, and anything made on the way belongs to root.
        let begun = caps::become_root().and_then(|()| sysctl::set_all(&proc, self.sysctls));
        let program = match begun.and_then(|()| enter(proc, namespace)).and_then(|()| self.prepare(&report)) {
            Ok(program) => program,
            Err(fault) => leave(&report, &fault),
        };
        if !report::released(report::RELEASE_TIMEOUT) {
            // Exit without a message: the host was told that this start failed, and knows no stream for it.
            exit(125)
        }
        let (errno, path) = program.execute();
        complain(format!("{}: {}\n", path.to_string_lossy(), errno.desc()).as_bytes());
        exit(exit_code(errno))
    }

    /// Gives the process a descriptor table of its own and closes all of execd's descriptors that it does not
    /// need. Those include pipe ends of other starts: otherwise stopping this process would keep the streams
    /// of those starts from ending.
    fn own(&self, report: &OwnedFd) -> Result<Own, Fault> {
        // This comes first: until now the process shares execd's descriptor table and must not change it.
        own_descriptors(self.last).fault("taking", "descriptors of its own")?;
        let Stdio { stdin, stdout, stderr } = &self.stdio;
        for (number, pipe) in [(0, stdin), (1, stdout), (2, stderr)] {
            if let Some(pipe) = pipe {
                become_standard(pipe.as_fd(), number).fault("setting up", "standard streams")?;
            }
        }
        let needed = [Some(report), Some(self.proc), self.place.namespace()];
        let needed: Vec<_> = needed.into_iter().flatten().map(AsFd::as_fd).collect();
        let mut kept = keep_only(&needed).fault("closing", "execd's descriptors")?.into_iter();
        let missing = || Fault::new("closing", "execd's descriptors", "one is missing");
        let (report, proc) = kept.next().zip(kept.next()).ok_or_else(missing)?;
        Ok(Own { report, proc, namespace: kept.next() })
    }

    /// Does everything else that can fail, then reports that the process is ready.
    fn prepare(&self, report: &OwnedFd) -> Result<Program, Fault> {
        let (identity, read) = self.identity()?;
        let environment = setup::environment(self.process, &identity, self.hostname);
        let candidates =
            setup::candidates(self.process.args.first().map_or("", String::as_str), &environment);
        let program = Program::new(candidates, &self.process.args, &environment)
            .fault("reading", "the arguments and the environment")?;
        setsid().fault("making", "a session")?;
        if let Some(master) = self.standard_streams(&identity)? {
            report::tty(report, master.as_fd()).fault("handing over", "the tty")?;
        }
        self.enter_workdir()?;
        default_sigpipe();
        // Limits are set late: a low one is meant for the program and must not hinder its start.
        for &(resource, soft, hard) in self.limits {
            setrlimit(resource, soft, hard).fault("setting", format!("{resource:?}"))?;
        }
        self.give_up(&identity)?;
        report::ready(report, read).fault("reporting to", "execd")?;
        Ok(program)
    }

    /// The process's identity by the container's files, and those of the files that it had to read.
    fn identity(&self) -> Result<(Identity, Files), Fault> {
        let known = |file: fn(&Files) -> Option<&Copy>| self.cached.and_then(file);
        let (text, passwd) = passwd_cache::read(PASSWD, known(|files| files.passwd.as_ref()))?;
        let mut group = None;
        let identity = accounts::identify(self.process, &text, || {
            let (text, read) = passwd_cache::read(GROUP, known(|files| files.group.as_ref()))?;
            group = read;
            Ok(text)
        })?;
        Ok((identity, Files { passwd, group }))
    }

    /// Completes the standard streams: each is a pipe by now, or becomes the tty. Returns the tty's master,
    /// if there is one.
    fn standard_streams(&self, identity: &Identity) -> Result<Option<OwnedFd>, Fault> {
        let Stdio { stdin, stdout, stderr } = &self.stdio;
        let terminal = if self.process.terminal { Some(self.terminal(identity)?) } else { None };
        let (master, slave) = terminal.map_or((None, None), |(master, slave)| (Some(master), Some(slave)));
        let (zero, one, two) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
        let streams = [(zero.as_fd(), 0, stdin), (one.as_fd(), 1, stdout), (two.as_fd(), 2, stderr)];
        for (stream, number, pipe) in streams {
            match (pipe, &slave) {
                // The pipe belongs to execd's user. Its new owner may open it again as /dev/stdout.
                (Some(_), _) => {
                    let (user, group) = (Uid::from_raw(identity.uid), Gid::from_raw(0));
                    fchown(stream, Some(user), Some(group)).fault("giving away", "a pipe")?;
                }
                (None, Some(slave)) => {
                    become_standard(slave.as_fd(), number).fault("setting up", "standard streams")?;
                }
                (None, None) => return Err(Fault::new("setting up", "standard streams", "one is missing")),
            }
        }
        Ok(master)
    }

    /// Enters the working directory. The kernel's magic links in /proc could lead out of the root, so they
    /// are not followed.
    fn enter_workdir(&self) -> Result<(), Fault> {
        let workdir = self.process.workdir.as_str();
        if matches!(workdir, "" | "/") {
            // setns(2) has already set the working directory to the root.
            return Ok(());
        }
        let flags = (OFlag::O_PATH | OFlag::O_DIRECTORY).bits();
        openat2(AT_FDCWD, Path::new(workdir), flags, 0, Resolve::InRoot)
            .and_then(fchdir)
            .fault("entering the workdir", workdir)
    }

    /// Opens a tty of the container's own devpts; returns its master and slave. Anything else at the path is
    /// refused, and the slave is opened by descriptor, without a path.
    fn terminal(&self, identity: &Identity) -> Result<(OwnedFd, OwnedFd), Fault> {
        let path = "/dev/pts/ptmx";
        let flags = (OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK).bits();
        let master = inside(path, flags)?;
        let stat = fstat(&master).fault("looking at", path)?;
        let device = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR
            && (major(stat.st_rdev), minor(stat.st_rdev)) == (5, 2);
        let genuine = fstatfs(&master).fault("looking at", path)?.filesystem_type() == DEVPTS_MAGIC;
        if !device || !genuine {
            return Err(Fault::new("opening", path, "it is not a devpts's ptmx"));
        }
        let slave = tty::open_peer(&master).fault("opening", "the tty")?;
        let (user, group) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.tty_group));
        fchown(&slave, Some(user), Some(group)).fault("giving away", "the tty")?;
        fchmod(&slave, Mode::from_bits_truncate(0o620)).fault("setting the mode of", "the tty")?;
        tty::make_controlling(&slave).fault("taking", "the tty")?;
        if let Place::Container { console: true, .. } = self.place {
            let console = inside("/dev/console", OFlag::O_PATH.bits())?;
            let tree = clone_tree(&slave, false).fault("cloning", "the tty")?;
            move_mount(&tree, &console).fault("binding the tty on", "/dev/console")?;
        }
        Ok((master, slave))
    }

    /// Drops privileges in this order: the filter is loaded while CAP_SYS_ADMIN is held (so no_new_privs is
    /// not needed), then the user is set, then the capabilities. A root process keeps the profile's
    /// capabilities, any other process none. No capability is inheritable (CVE-2022-29162). If the debugging
    /// door is closed, the bounding set has been the profile's since execd was confined.
    fn give_up(&self, identity: &Identity) -> Result<(), Fault> {
        let groups: Vec<Gid> = identity.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
        let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
        setgroups(&groups).fault("setting", "supplementary groups")?;
        setresgid(gid, gid, gid).fault("becoming group", gid)?;
        let keep = match self.place {
            Place::Container { .. } => {
                if self.wide {
                    caps::drop_bounding(self.profile.capabilities())?;
                }
                if self.profile.no_new_privs() {
                    caps::no_new_privs()?;
                }
                self.scoped.enter()?;
                self.profile.load_filter()?;
                self.keep
            }
            Place::Guest => caps::permitted()?,
        };
        setresuid(uid, uid, uid).fault("becoming user", uid)?;
        let keep = if uid.is_root() { keep } else { CapSet::default() };
        caps::set(keep, keep, CapSet::default())?;
        // The change of user has set dumpability to the value of fs.suid_dumpable. After execve the program
        // is dumpable like any other.
        caps::not_dumpable()
    }
}

/// Enters the container. It consumes both descriptors, so that none that leads out of the container is open
/// when the first path of an image is followed: `/proc/self/fd/N/..` is a path too (CVE-2024-21626).
fn enter(proc: OwnedFd, namespace: Option<OwnedFd>) -> Result<(), Fault> {
    be_killable(&proc)?;
    match namespace {
        Some(namespace) => setns(namespace, CloneFlags::CLONE_NEWNS).fault("entering", "the container"),
        None => Ok(()),
    }
}

/// Makes the process an ordinary candidate for the OOM killer, unlike execd, which is its last choice. The
/// process cannot lower the value again: a write with CAP_SYS_RESOURCE also sets the minimum that a process
/// without that capability may write later.
fn be_killable(proc: &OwnedFd) -> Result<(), Fault> {
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    nix::fcntl::openat(proc, "self/oom_score_adj", flags, Mode::empty())
        .and_then(|file| write(&file, b"0"))
        .map(drop)
        .fault("setting", "oom_score_adj")
}

/// Opens a file of the container's /dev, which mountd made, through no link.
fn inside(path: &str, flags: i32) -> Result<OwnedFd, Fault> {
    let below = Path::new(path.trim_start_matches('/'));
    openat2(AT_FDCWD, below, flags, 0, Resolve::NoLinks).fault("opening", path)
}

/// Reports a fault to execd and exits.
fn leave(report: &OwnedFd, fault: &Fault) -> ! {
    report::fault(report, fault);
    exit(125)
}

/// The exit status that a shell would give: 127 for not found, 126 for not executable, 125 for anything else.
fn exit_code(errno: Errno) -> i32 {
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => 127,
        Errno::EACCES | Errno::ENOEXEC | Errno::EISDIR | Errno::EPERM | Errno::ETXTBSY => 126,
        _ => 125,
    }
}

/// Writes a message to the process's own stderr.
fn complain(text: &[u8]) {
    let _ = write(std::io::stderr(), text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_as_a_shell_would() {
        assert_eq!(exit_code(Errno::ENOENT), 127);
        assert_eq!(exit_code(Errno::EACCES), 126);
        assert_eq!(exit_code(Errno::ENOEXEC), 126);
        assert_eq!(exit_code(Errno::E2BIG), 125);
    }
}
