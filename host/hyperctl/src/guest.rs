//! A running guest: its hyperinit or QEMU process, which never outlives hyperctl.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hyperinit_client::mux::{MUX_SOCKET, is_served};
use hyperinit_client::{CONTROL_SOCKET, STREAM_SOCKET, VSOCK_SOCKET};
use hyperinit_protocol::fault::{Fault, OrFault};
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use super::cgroup::Cgroup;
use super::service::{Running, Service};
use super::volumes::Bind;

/// The file with the guest's log and QEMU's error messages.
pub const CONSOLE: &str = "console.log";
/// QEMU's own control socket.
pub const QMP_SOCKET: &str = "qmp.sock";
/// The socket of the vsock device's program.
pub const VHOST_SOCKET: &str = "vhost.sock";
/// The socket where QEMU connects to virtiofsd.
pub const VIRTIOFS_SOCKET: &str = "virtiofs.sock";
/// The share's name in STARTPOD's `shareDir`: the tag of the 9p or virtiofs device, and its substitute in a
/// local guest.
pub const SHARE_TAG: &str = "share_dir";
/// How long to wait for the lock on the guest's directory. A guest whose hyperctl was killed dies at once,
/// but takes a moment to disappear.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// The interval between two attempts to take the lock, or two looks for the sockets.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// How many bytes at the end of the log are searched for its last lines.
const TAIL: u64 = 16 << 10;
/// The kernel's message when it panics. The lines after it only say where.
const PANIC: &str = "Kernel panic";
/// The message of an init that gives up. It then exits, or powers its VM off.
const CANNOT_BOOT: &str = "init: the guest cannot boot: ";
/// QEMU's message when a signal ends it; the rest of the line names the sender. QEMU's exit status is then 0.
const QEMU_SIGNALLED: &str = "qemu-system-x86_64: terminating on signal ";
/// How long a guest may outlive one of its services. At an orderly end both end at nearly the same time, in
/// either order.
const ALONE: Duration = Duration::from_secs(5);
/// How long to wait for the sockets of a guest that is being started.
const STARTING: Duration = Duration::from_secs(5);

/// What to start, and in which directory.
#[derive(Debug, PartialEq)]
pub struct Plan {
    /// The guest's directory, which holds its sockets and its log.
    pub directory: PathBuf,
    /// hyperinit or QEMU. It runs in the directory, so the paths of the sockets are short however long the
    /// directory's path is.
    pub program: PathBuf,
    /// The program's arguments.
    pub arguments: Vec<std::ffi::OsString>,
    /// Whether the program is PID 1 of new namespaces.
    pub namespaces: bool,
    /// Bind mounts that are made for the program before it starts, in a mount namespace of its own.
    pub binds: Vec<Bind>,
    /// The services that have to run before the program starts and for as long as it runs.
    pub services: Vec<Service>,
}

/// A running guest. Dropping it kills the guest and removes its sockets.
pub struct Guest {
    directory: PathBuf,
    child: Arc<Mutex<Child>>,
    parent: Option<JoinHandle<()>>,
    cgroup: Option<Cgroup>,
    /// Holds the lock on the directory.
    _console: File,
}

impl Guest {
    /// Starts the guest. `ended` is called once the guest is gone, whatever the cause.
    pub fn start(plan: Plan, ended: impl FnOnce(ExitStatus) + Send + 'static) -> Result<Guest, Fault> {
        Guest::start_behind(plan, |_| Ok(()), ended).map(|(guest, ())| guest)
    }

    /// Like [`Guest::start`], but calls `first` when the directory belongs to this guest, before any of the
    /// guest's sockets exists there.
    pub fn start_behind<T>(
        plan: Plan,
        first: impl FnOnce(&Path) -> Result<T, Fault>,
        ended: impl FnOnce(ExitStatus) + Send + 'static,
    ) -> Result<(Guest, T), Fault> {
        let console = claim(&plan.directory)?;
        let made = first(&plan.directory)?;
        let cgroup = if plan.namespaces { Cgroup::make() } else { None };
        let mut command = command(&plan, cgroup.as_ref());
        command.stdin(Stdio::null());
        let output = || console.try_clone().fault("duplicating", CONSOLE);
        command.stdout(output()?).stderr(output()?);
        let (started, result) = sync_channel(1);
        let before = Before {
            namespaces: plan.namespaces,
            services: plan.services.clone(),
            directory: plan.directory.clone(),
            console: console.try_clone().fault("duplicating", CONSOLE)?,
        };
        // The parent-death signal follows the thread that made the child (prctl(2)), and
        // unshare(CLONE_NEWPID) applies to the children of the calling thread (unshare(2)). So one thread
        // does both and stays.
        let parent = std::thread::spawn(move || bring_up(command, before, &started, ended));
        let child = result
            .recv()
            .unwrap_or_else(|_| Err(Fault::new("starting", "the guest", "its thread is gone")))?;
        let parent = Some(parent);
        Ok((Guest { directory: plan.directory, child, parent, cgroup, _console: console }, made))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // `Child::kill` does nothing if the child has been reaped.
        let _ = self.child.lock().unwrap_or_else(PoisonError::into_inner).kill();
        if let Some(parent) = self.parent.take() {
            let _ = parent.join();
        }
        drop(self.cgroup.take());
        remove_sockets(&self.directory);
    }
}

/// What the parent thread needs to start the guest.
struct Before {
    namespaces: bool,
    services: Vec<Service>,
    directory: PathBuf,
    console: File,
}

/// The thread that is the guest's parent for as long as the guest lives.
fn bring_up(
    mut command: Command,
    before: Before,
    started: &SyncSender<Result<Arc<Mutex<Child>>, Fault>>,
    ended: impl FnOnce(ExitStatus),
) {
    // `Guest::start_behind` waits for what is sent to `started`.
    let Before { namespaces, services, directory, console } = before;
    let start = |service: &Service| service.start(&directory, &console);
    let services: Result<Vec<Running>, Fault> = services.iter().map(start).collect();
    let spawn = |mut services: Vec<Running>| {
        if let Some(connection) = services.iter_mut().find_map(|service| service.connection.take()) {
            command.stdin(connection);
        }
        let child = spawn(command, namespaces)?;
        Ok((services, child))
    };
    let (services, child) = match services.and_then(spawn) {
        Ok((services, child)) => (services, Arc::new(Mutex::new(child))),
        Err(fault) => return drop(started.send(Err(fault))),
    };
    // `Guest` and the guest's own output hold the lock on the log from here on.
    drop(console);
    let alive: Vec<Sender<()>> = services.iter().map(|service| watch(service, &directory, &child)).collect();
    let pid = child.lock().unwrap_or_else(PoisonError::into_inner).id();
    let _ = started.send(Ok(Arc::clone(&child)));
    // Only the `wait` below reaps the child, and it runs under the lock. Until then its pid is not reused.
    let pid = Pid::from_raw(pid.cast_signed());
    end_of(pid);
    drop(alive);
    if let Ok(status) = child.lock().unwrap_or_else(PoisonError::into_inner).wait() {
        ended(status);
    }
}

/// Kills the guest if one of its services ends first: a process that uses the share of a dead virtiofsd would
/// wait for ever. The caller drops the returned sender when the guest has ended.
fn watch(service: &Running, directory: &Path, child: &Arc<Mutex<Child>>) -> Sender<()> {
    let (alive, ended) = channel();
    let (pid, name, child) = (service.pid(), service.name(), Arc::clone(child));
    let console = directory.join(CONSOLE);
    std::thread::spawn(move || {
        let status = end_of(pid);
        if ended.recv_timeout(ALONE) == Err(RecvTimeoutError::Timeout) {
            // The log is the only place left for the message.
            let _ = File::options().append(true).open(console).and_then(|mut console| {
                writeln!(
                    console,
                    "hyperctl: {name} has ended ({status}), and the guest is nothing without it"
                )
            });
            let _ = child.lock().unwrap_or_else(PoisonError::into_inner).kill();
        }
    });
    alive
}

/// Waits for a child to end, without reaping it. Returns how it ended, as text for a person.
fn end_of(pid: Pid) -> String {
    loop {
        match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Err(Errno::EINTR) => {}
            Ok(WaitStatus::Exited(_, status)) => return format!("exit status: {status}"),
            Ok(WaitStatus::Signaled(_, signal, _)) => return format!("signal: {signal}"),
            other => return format!("{other:?}"),
        }
    }
}

fn spawn(mut command: Command, namespaces: bool) -> Result<Child, Fault> {
    if namespaces {
        unshare(CloneFlags::CLONE_NEWPID).fault("making", "a PID namespace")?;
    }
    command.spawn().fault("starting", "the guest")
}

/// The command `hyperctl exec-child`, in a process group of its own: hyperctl decides which of the signals of
/// a terminal's keys it passes on.
pub fn exec_child() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("exec-child").process_group(0);
    command
}

fn command(plan: &Plan, cgroup: Option<&Cgroup>) -> Command {
    let mut command = exec_child();
    if plan.namespaces {
        command.arg("--namespaces");
    }
    if let Some(cgroup) = cgroup {
        command.arg("--cgroup").arg(cgroup.directory());
    }
    add_binds(&mut command, &plan.binds);
    command.arg("--").arg(&plan.program).args(&plan.arguments).current_dir(&plan.directory);
    command
}

/// Adds the bind mounts that `hyperctl exec-child` makes before it executes the program.
pub fn add_binds(command: &mut Command, binds: &[Bind]) {
    for bind in binds {
        command.arg("--bind").args([&bind.from, &bind.to]);
    }
}

/// Claims the directory for this guest: the log is locked until hyperctl and the guest are both gone.
fn claim(directory: &Path) -> Result<File, Fault> {
    // Mode 0700: access to the sockets gives control of the guest.
    let private = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    private.fault("making", directory.display())?;
    let path = directory.join(CONSOLE);
    let open = File::options().create(true).append(true).open(&path);
    let console = open.fault("opening", path.display())?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match console.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN),
            Err(TryLockError::WouldBlock) => {
                return Err(Fault::new("using", directory.display(), "a guest is running there"));
            }
            Err(TryLockError::Error(error)) => return Err(Fault::io("locking", path.display(), &error)),
        }
    }
    console.set_len(0).fault("emptying", path.display())?;
    remove_sockets(directory);
    Ok(console)
}

fn remove_sockets(directory: &Path) {
    hide_channels(directory);
    for name in [MUX_SOCKET, QMP_SOCKET, VHOST_SOCKET, VIRTIOFS_SOCKET] {
        // Not every guest has all of these sockets.
        let _ = std::fs::remove_file(directory.join(name));
    }
}

/// Removes the sockets of the guest's channels. Existing connections stay, and no further client connects
/// only to wait in vain.
pub fn hide_channels(directory: &Path) {
    for name in [CONTROL_SOCKET, STREAM_SOCKET, VSOCK_SOCKET] {
        let _ = std::fs::remove_file(directory.join(name));
    }
}

/// Waits for the sockets of a guest that is being started, for at most `STARTING`. If they are still
/// missing, the attempt to connect reports which.
pub fn wait_for_sockets(directory: &Path) {
    let deadline = Instant::now() + STARTING;
    let there = |names: &[&str]| names.iter().all(|name| directory.join(name).exists());
    // If hyperctl serves the guest, its own socket exists before the guest's sockets do.
    while !is_served(directory)
        && !there(&[CONTROL_SOCKET, STREAM_SOCKET])
        && !there(&[VSOCK_SOCKET])
        && Instant::now() < deadline
    {
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The last `lines` lines of the guest's log, indented, or as many from the first kernel panic on, if that
/// comes earlier. Empty if the log has no lines.
pub fn last_words(directory: &Path, lines: usize) -> String {
    let all = last_lines(directory);
    let last = all.len().saturating_sub(lines);
    // The first match: the kernel repeats these words at the end of its trace.
    let last = all.iter().position(|line| line.contains(PANIC)).map_or(last, |panic| panic.min(last));
    all.iter().skip(last).take(lines).map(|line| format!("\n  {line}")).collect()
}

/// Whether the guest's log ends with a kernel panic, with an init that could not boot, or with a QEMU that
/// was ended by a signal. A VM's exit status does not tell: after these the machine is powered off or reset,
/// as after an orderly end.
pub fn gave_up(directory: &Path) -> bool {
    last_lines(directory).iter().any(|line| {
        // The kernel puts a timestamp before a line. The words count only at the beginning of the text: other
        // messages may quote them later in a line.
        let timed = line.strip_prefix('[').and_then(|line| line.split_once("] "));
        let text = timed.map_or(line.as_str(), |(_, text)| text);
        [PANIC, CANNOT_BOOT, QEMU_SIGNALLED].iter().any(|last| text.starts_with(last))
    })
}

/// The lines at the end of the guest's log that are not blank, without control characters, which a terminal
/// would act on.
fn last_lines(directory: &Path) -> Vec<String> {
    let tail = || -> std::io::Result<String> {
        let mut file = File::open(directory.join(CONSOLE))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.take(TAIL).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = tail().unwrap_or_default();
    let printable = |line: &str| line.chars().filter(|c| !c.is_control()).collect::<String>();
    text.lines().map(printable).filter(|line| !line.trim().is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_are_those_of_a_panic() {
        let directory = tempfile::tempdir().unwrap();
        let words = |lines: &[&str]| {
            std::fs::write(directory.path().join(CONSOLE), lines.join("\n")).unwrap();
            last_words(directory.path(), 2)
        };
        assert_eq!(words(&[]), "");
        assert_eq!(words(&["a", "b", "c"]), "\n  b\n  c");
        let panic = ["a", "Kernel panic - not syncing: no init", "b", "c", "---[ end Kernel panic ]---"];
        assert_eq!(words(&panic), "\n  Kernel panic - not syncing: no init\n  b");
    }

    #[test]
    fn a_guest_that_gave_up_has_said_so_at_the_beginning_of_a_line() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!gave_up(directory.path()), "no log");
        for (line, expected) in [
            ("[    1.5] Kernel panic - not syncing: no init\r", true),
            ("[    1.5] init: the guest cannot boot: init: opening /dev/x: no", true),
            ("init: the guest cannot boot: no", true),
            ("qemu-system-x86_64: terminating on signal 15 from pid 7 (bash)", true),
            ("[    1.5] init: forgetting the key Kernel panic - not syncing", false),
            ("[    1.5] init: [1] init: the guest cannot boot: no", false),
        ] {
            std::fs::write(directory.path().join(CONSOLE), format!("a\n{line}\nb\n")).unwrap();
            assert_eq!(gave_up(directory.path()), expected, "{line}");
        }
    }
}
