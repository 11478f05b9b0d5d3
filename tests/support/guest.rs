//! A guest without a VM: namespaces of one thread, laid out as src/init/root.rs lays out a guest.

use std::cell::RefCell;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;

use hyperinit::ids::{ContainerId, Pid};
use hyperinit::paths;
use hyperinit::sys::mount::enter_new_namespace;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::sys::wait::{WaitStatus, waitpid};

use super::DEADLINE;
use super::limits::allow_open_files;

/// The directory of the test's own files in the guest's mount namespace.
pub const SCRATCH: &str = "/run/test";

/// The guest of one test.
pub struct Guest {
    /// The path of this guest's cgroup in the machine's whole hierarchy.
    cgroup: Option<PathBuf>,
    /// The pod inits.
    inits: RefCell<Vec<Pid>>,
    /// Init's other children, which the test may have to reap.
    children: RefCell<Vec<Pid>>,
}

/// Runs a test in a guest that has no cgroup v2.
pub fn guest(test: impl FnOnce(&Guest) + Send + 'static) {
    run(false, test);
}

/// Runs a test in a guest that has cgroup v2.
pub fn guest_with_cgroups(test: impl FnOnce(&Guest) + Send + 'static) {
    run(true, test);
}

fn run(cgroups: bool, test: impl FnOnce(&Guest) + Send + 'static) {
    assert!(
        nix::unistd::geteuid().is_root(),
        "these tests make namespaces: run them as root (sudo make test)"
    );
    let thread = std::thread::spawn(move || {
        let guest = Guest::new(cgroups);
        let outcome = catch_unwind(AssertUnwindSafe(|| test(&guest)));
        guest.end();
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
    });
    if let Err(panic) = thread.join() {
        resume_unwind(panic);
    }
}

impl Guest {
    fn new(cgroups: bool) -> Guest {
        let own = CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
        unshare(own).expect("making namespaces");
        enter_new_namespace().expect("making a mount namespace");
        settle();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
        for (path, mode) in
            [(paths::RUN, 0o711), (paths::CONTAINERS, 0o700), (paths::LOCAL_SHARE, 0o755), (SCRATCH, 0o755)]
        {
            fs::create_dir_all(path).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
        devices();
        Guest { cgroup: cgroups.then(cgroup), inits: RefCell::default(), children: RefCell::default() }
    }

    /// Kills and reaps what is left, and removes the cgroups.
    fn end(&self) {
        let raw = |pid: &Pid| nix::unistd::Pid::from_raw(pid.0);
        let (inits, children) = (self.inits.take(), self.children.take());
        for pid in inits.iter().chain(&children) {
            let _ = kill(raw(pid), Signal::SIGKILL);
        }
        for pid in &children {
            let _ = waitpid(raw(pid), None);
        }
        // A pod init cannot be waited for: it ends only when everyone in its namespace is reaped, including a
        // process whose start failed, which the test does not know. Processes left over end with the test's
        // own process.
        if let Some(cgroup) = &self.cgroup {
            let _ = fs::write(cgroup.join("cgroup.kill"), "1");
            until_empty(cgroup);
            for container in fs::read_dir(paths::POD_CGROUP).unwrap().flatten() {
                let _ = fs::remove_dir(container.path());
            }
            fs::remove_dir(paths::POD_CGROUP).unwrap();
            fs::remove_dir(cgroup).unwrap();
        }
    }

    /// Registers a pod init, to be killed at the end.
    pub fn adopt_init(&self, pid: Pid) {
        self.inits.borrow_mut().push(pid);
    }

    /// Registers another child of init, to be killed and reaped at the end.
    pub fn adopt(&self, pid: Pid) {
        self.children.borrow_mut().push(pid);
    }

    /// Waits for a child of init. Returns its exit code, or 128+n if signal n killed it.
    pub fn wait(&self, pid: Pid) -> i32 {
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let _ = sender.send(waitpid(nix::unistd::Pid::from_raw(pid.0), None));
        });
        let status = receiver.recv_timeout(DEADLINE).expect("the process does not end");
        self.children.borrow_mut().retain(|&child| child != pid);
        self.inits.borrow_mut().retain(|&child| child != pid);
        match status.unwrap() {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
            other => panic!("{other:?}"),
        }
    }

    /// Sends a signal to a child of init.
    pub fn kill(&self, pid: Pid, signal: Signal) {
        kill(nix::unistd::Pid::from_raw(pid.0), signal).unwrap();
    }

    /// Runs `look` in a container's mount namespace, with the text of its mountinfo.
    pub fn inside<T: Send>(&self, container: &str, look: impl FnOnce(&str) -> T + Send) -> T {
        let id = ContainerId::try_from(container.to_owned()).unwrap();
        let kept = open(&paths::container_mount_ns(&id), OFlag::O_RDONLY, Mode::empty()).unwrap();
        std::thread::scope(|scope| {
            let looking = scope.spawn(|| {
                let own = open("/proc/thread-self", OFlag::O_PATH, Mode::empty()).unwrap();
                unshare(CloneFlags::CLONE_FS).unwrap();
                setns(&kept, CloneFlags::CLONE_NEWNS).unwrap();
                let mounts = openat(&own, "mountinfo", OFlag::O_RDONLY, Mode::empty()).unwrap();
                look(&std::io::read_to_string(fs::File::from(mounts)).unwrap())
            });
            looking.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// This guest's mountinfo.
    pub fn mounts(&self) -> String {
        fs::read_to_string("/proc/thread-self/mountinfo").unwrap()
    }
}

/// Sets what a thread or a new network namespace inherits to fixed values, so that tests behave the same on
/// every machine.
pub fn settle() {
    allow_open_files();
    umask(Mode::from_bits_truncate(0o022));
    let net = Path::new("/proc/sys/net/ipv4");
    fs::write(net.join("ip_forward"), "0").unwrap();
    for of in ["all", "default", "lo"] {
        fs::write(net.join("conf").join(of).join("rp_filter"), "0").unwrap();
    }
}

/// Waits until a killed cgroup is empty. Processes die with a delay, and cgroup.events tells of the last.
fn until_empty(cgroup: &Path) {
    let events = fs::File::open(cgroup.join("cgroup.events")).unwrap();
    while !fs::read_to_string(cgroup.join("cgroup.events")).unwrap().contains("populated 0") {
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        let ready = poll(&mut fds, PollTimeout::try_from(DEADLINE).unwrap()).unwrap();
        assert!(ready > 0, "something in {} does not die", cgroup.display());
    }
}

/// A private /dev, so that no test touches the machine's.
fn devices() {
    mount(Some("tmpfs"), "/dev", Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=755")).unwrap();
    for (name, major, minor) in
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)]
    {
        node(name, SFlag::S_IFCHR, major, minor);
    }
}

/// A device node in the guest's /dev.
pub fn node(name: &str, kind: SFlag, major: u64, minor: u64) {
    let path = Path::new("/dev").join(name);
    mknod(&path, kind, Mode::from_bits_truncate(0o666), makedev(major, minor)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
}

/// Makes a cgroup that the guest sees as the root of the hierarchy.
fn cgroup() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let all = Path::new(SCRATCH).join("cgroup");
    fs::create_dir(&all).unwrap();
    match mount(Some("cgroup2"), &all, Some("cgroup2"), MsFlags::empty(), None::<&str>) {
        Err(errno @ (Errno::ENODEV | Errno::EPERM | Errno::EBUSY)) => {
            panic!("this test needs a kernel with cgroup v2 (CONFIG_CGROUPS): {errno}")
        }
        mounted => mounted.unwrap(),
    }
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let own = all.join(format!("hyperinit-test-{}-{number}", std::process::id()));
    fs::create_dir(&own).unwrap();
    mount(Some(&own), paths::CGROUP, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    fs::create_dir(paths::POD_CGROUP).unwrap();
    own
}
