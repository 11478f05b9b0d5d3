//! Early boot: what PID 1 does before everything else (protocol.md «Guest set-up at boot»).

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::utsname::uname;

use super::modules;
use super::settings::{Settings, USERS_NETWORK};
use crate::fault::{Fault, OrFault};
use crate::logger;
use crate::sys::heap;
use crate::sys::mount::{clone_tree, set_attributes};

/// RLIMIT_NPROC and RLIMIT_SIGPENDING, as the C original sets them.
const PROCESSES: u64 = 30_604;

/// Whether the kernel expedites its RCU grace periods: `rcupdate.rcu_expedited` of its command line.
const EXPEDITED: &str = "/sys/kernel/rcu_expedited";

/// Blocks every signal, as the first step: from here on signals are data. Children unblock them before they
/// execute. Signals that the kernel sends for a fault of this process stay unblocked, because a blocked one
/// would kill the process without its handler.
pub fn block_signals() -> Result<SignalFd, Fault> {
    let mut all = SigSet::all();
    for own in [
        Signal::SIGABRT,
        Signal::SIGBUS,
        Signal::SIGFPE,
        Signal::SIGILL,
        Signal::SIGSEGV,
        Signal::SIGSYS,
        Signal::SIGTRAP,
    ] {
        all.remove(own);
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), None).fault("blocking", "signals")?;
    SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).fault("opening", "a signalfd")
}

/// The result of [`early`].
#[derive(Default)]
pub struct Early {
    /// How long loading the modules took.
    pub modules: Duration,
    /// The value that [`calm`] restores.
    pub expedited: Option<String>,
}

/// Brings a VM to the state that a namespace starts in: /proc, /sys, /dev, a log, the kernel command line,
/// modules.
pub fn early(settings: &mut Settings) -> Result<Early, Fault> {
    if settings.local.is_some() {
        logger::start("init", settings.log, false);
        return Ok(Early::default());
    }
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount_kernel(kind, at)?;
    }
    let expedited = hurry();
    let cmdline = std::fs::read_to_string("/proc/cmdline").fault("reading", "/proc/cmdline")?;
    let warnings = settings.add_cmdline(&cmdline);
    log_to_kernel()?;
    logger::start("init", settings.log, true);
    for warning in warnings {
        log::warn!("{warning}");
    }
    // The kernel refuses only if PID 1 already leads a session.
    let _ = nix::unistd::setsid();
    let began = Instant::now();
    modules::load_all(&Path::new("/lib/modules").join(uname().fault("asking", "uname")?.release()))?;
    // A kernel that is built without modules does not have the setting.
    const NO_MORE: &str = "/proc/sys/kernel/modules_disabled";
    if Path::new(NO_MORE).exists() {
        write(NO_MORE, "1");
    }
    Ok(Early { modules: began.elapsed(), expedited })
}

/// Makes the kernel interrupt other processors instead of waiting for them. Loading modules and making mounts
/// and cgroups would wait some dozen times for milliseconds each, and at boot there is no process yet that
/// the interrupts could disturb. Returns the value that [`calm`] restores: the kernel command line may have
/// asked for it permanently. On a kernel without the setting boot takes longer.
fn hurry() -> Option<String> {
    let before = std::fs::read_to_string(EXPEDITED).ok()?;
    std::fs::write(EXPEDITED, "1").ok().map(|()| before)
}

/// Ends [`hurry`].
pub fn calm(before: Option<String>) {
    if let Some(before) = before {
        write(EXPEDITED, &before);
    }
}

/// Mounts one of the kernel's filesystems. Makes the directory if the image lacks it.
pub fn mount_kernel(kind: &str, at: &str) -> Result<(), Fault> {
    let _ = std::fs::create_dir_all(at);
    let flags = match kind {
        "devtmpfs" => MsFlags::MS_NOSUID,
        _ => MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
    };
    match mount(Some(kind), at, Some(kind), flags, None::<&str>) {
        // The kernel may have mounted devtmpfs itself (CONFIG_DEVTMPFS_MOUNT).
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(errno) => Err(Fault::errno(format!("mounting {kind} on"), at, errno)),
    }
}

/// Makes standard input /dev/null, and standard output and error the kernel's log, which never blocks its
/// writer.
fn log_to_kernel() -> Result<(), Fault> {
    // By default the kernel drops lines of user space after ten. The kernel expects the newline.
    write("/proc/sys/kernel/printk_devkmsg", "on\n");
    let null = File::open("/dev/null").fault("opening", "/dev/null")?;
    let kmsg = OpenOptions::new().write(true).open("/dev/kmsg").fault("opening", "/dev/kmsg")?;
    let log = |result: Result<(), Errno>| result.fault("redirecting", "standard streams");
    log(nix::unistd::dup2_stdin(null.as_fd()))?;
    log(nix::unistd::dup2_stdout(kmsg.as_fd()))?;
    log(nix::unistd::dup2_stderr(kmsg.as_fd()))
}

/// Opens PID 1's own program, which is also every helper's, before the filesystem that it is on goes away.
///
/// The program gets a read-only mount of its own. A process that execd starts runs this program until it
/// executes the container's, and an image may name `/proc/self/exe` as its program. A file that is opened
/// through `/proc/PID/exe` is on the mount that was executed, so it cannot be written to, nor its mode
/// changed (CVE-2019-5736).
pub fn program() -> Result<OwnedFd, Fault> {
    const OWN: &str = "/proc/self/exe";
    let file = open(OWN, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).fault("opening", OWN)?;
    let mount = clone_tree(&file, false).fault("cloning the mount of", OWN)?;
    let attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
    set_attributes(&mount, attributes, false).fault("making read-only", OWN)?;
    let through = format!("/proc/self/fd/{}", mount.as_raw_fd());
    open(through.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).fault("opening again", OWN)
}

/// Leaves the first network namespace to the pod, and moves the guest to a new one, so that no container sees
/// the guest's own sockets. Links that the kernel finds, now or later, are in the first namespace and so the
/// pod's. Returns that namespace, or none if the kernel has no network namespaces or no room for one.
pub fn leave_network() -> Option<OwnedFd> {
    const OWN: &str = "/proc/self/ns/net";
    let left = open(OWN, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .fault("opening", OWN)
        .and_then(|network| unshare(CloneFlags::CLONE_NEWNET).fault("leaving", OWN).map(|()| network));
    left.inspect_err(|fault| log::warn!("the guest shares the pod's network: {fault}")).ok()
}

/// The network rights of a user in a VM. hyperctl sets them for a local guest.
pub fn network(settings: &Settings) {
    if settings.local.is_none() {
        for (path, value) in USERS_NETWORK {
            write(path, value);
        }
    }
}

/// Raises the limits of processes and signals, and exempts the guest's own processes from the memory killer.
pub fn limits(settings: &Settings) {
    let limits = [(Resource::RLIMIT_NPROC, PROCESSES), (Resource::RLIMIT_SIGPENDING, PROCESSES)];
    for (resource, limit) in limits {
        if let Err(errno) = setrlimit(resource, limit, limit) {
            warn(settings, &Fault::errno("setting", format!("{resource:?} to {limit}"), errno));
            // In a namespace whose owner may not raise limits, the soft limit becomes the hard one.
            let _ = getrlimit(resource).and_then(|(_, hard)| setrlimit(resource, hard, hard));
        }
    }
    // The memory killer takes a container's process before the guest's. execd resets the value for the
    // processes that it starts.
    const OOM: &str = "/proc/self/oom_score_adj";
    if let Err(error) = std::fs::write(OOM, "-1000") {
        warn(settings, &Fault::io("writing -1000 to", OOM, &error));
    }
}

/// Logs a limit that could not be raised. In a namespace the machine decides, and nothing is wrong.
pub fn warn(settings: &Settings, fault: &Fault) {
    let level = if settings.local.is_some() { log::Level::Info } else { log::Level::Warn };
    log::log!(level, "{fault}");
}

/// Reserves the memory that PID 1 and the warden may ever need (sys/heap.rs). `main` has tried before. In a
/// VM whose kernel was told at its start to count every reservation, the kernel stops counting for this one.
pub fn memory(settings: &Settings) {
    const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";
    let mut reserved = heap::reserve();
    if reserved.is_err() && settings.local.is_none() {
        let before = std::fs::read_to_string(OVERCOMMIT).unwrap_or_default();
        write(OVERCOMMIT, "0");
        reserved = heap::reserve();
        write(OVERCOMMIT, &before);
    }
    if let Err(errno) = reserved {
        log::warn!("{}", Fault::errno("reserving", "memory", errno));
    }
    heap::deepen_stack();
}

/// Writes a kernel setting. A setting that is missing or cannot be set is a warning.
pub fn write(path: &str, value: &str) {
    if let Err(error) = std::fs::write(path, value) {
        log::warn!("{}", Fault::io(format!("writing {} to", value.trim_end()), path, &error));
    }
}
