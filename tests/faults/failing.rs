//! A process of which one call fails: it stops before each, and the one that is meant does not happen.

use std::ops::Range;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// A call, its number, and what it fails with.
pub type Call = (&'static str, i64, Errno);

/// What a host that comes back needs.
pub const ACCEPT: Call = ("accept4", libc::SYS_accept4, Errno::EMFILE);

/// What the kernel says when it has no more, by call. Those that are not here do not fail for want of
/// something, or are the log's and the waiting. To give a memfd its size takes nothing, so that only a limit
/// of file sizes refuses it, which nobody here has.
const CALLS: &[Call] = &[
    ("dup", libc::SYS_dup, Errno::EMFILE),
    ("epoll_ctl", libc::SYS_epoll_ctl, Errno::ENOMEM),
    ("fchownat", libc::SYS_fchownat, Errno::EIO),
    ("fsconfig", libc::SYS_fsconfig, Errno::ENOMEM),
    ("fsmount", libc::SYS_fsmount, Errno::EMFILE),
    ("fsopen", libc::SYS_fsopen, Errno::EMFILE),
    ("fstat", libc::SYS_fstat, Errno::EIO),
    ("getdents64", libc::SYS_getdents64, Errno::EIO),
    ("linkat", libc::SYS_linkat, Errno::ENOSPC),
    ("memfd_create", libc::SYS_memfd_create, Errno::EMFILE),
    ("mkdirat", libc::SYS_mkdirat, Errno::ENOSPC),
    ("mkdir", libc::SYS_mkdir, Errno::ENOSPC),
    ("mknodat", libc::SYS_mknodat, Errno::ENOSPC),
    ("mmap", libc::SYS_mmap, Errno::ENOMEM),
    ("mount", libc::SYS_mount, Errno::ENOMEM),
    ("mount_setattr", libc::SYS_mount_setattr, Errno::ENOMEM),
    ("move_mount", libc::SYS_move_mount, Errno::ENOMEM),
    ("newfstatat", libc::SYS_newfstatat, Errno::EIO),
    ("open", libc::SYS_open, Errno::EMFILE),
    ("open_tree", libc::SYS_open_tree, Errno::EMFILE),
    ("openat", libc::SYS_openat, Errno::EMFILE),
    ("openat2", libc::SYS_openat2, Errno::EMFILE),
    ("pidfd_open", libc::SYS_pidfd_open, Errno::EMFILE),
    ("pipe2", libc::SYS_pipe2, Errno::EMFILE),
    ("pread64", libc::SYS_pread64, Errno::EIO),
    ("pwrite64", libc::SYS_pwrite64, Errno::ENOSPC),
    ("sendmsg", libc::SYS_sendmsg, Errno::ENOBUFS),
    ("sendto", libc::SYS_sendto, Errno::ENOBUFS),
    ("setns", libc::SYS_setns, Errno::ENOMEM),
    ("socketpair", libc::SYS_socketpair, Errno::EMFILE),
    ("statx", libc::SYS_statx, Errno::EIO),
    ("symlinkat", libc::SYS_symlinkat, Errno::ENOSPC),
    ("unshare", libc::SYS_unshare, Errno::ENOMEM),
];

/// The same of streamd's loop alone: what it takes, gives and hears may find no memory. (The others write to
/// their log alone.)
const STREAMS: &[Call] = &[
    ("fallocate", libc::SYS_fallocate, Errno::ENOMEM),
    ("recvmsg", libc::SYS_recvmsg, Errno::ENOMEM),
    ("sendfile", libc::SYS_sendfile, Errno::ENOBUFS),
    ("splice", libc::SYS_splice, Errno::ENOMEM),
    ("write", libc::SYS_write, Errno::ENOMEM),
];

/// And of PID 1's, who hears helpers and the warden.
const INITS: &[Call] = &[("recvmsg", libc::SYS_recvmsg, Errno::ENOMEM)];

/// And of the warden's: without it a helper that dies stays dead.
const WARDENS: &[Call] = &[
    ("clone", libc::SYS_clone, Errno::EAGAIN),
    ("fcntl", libc::SYS_fcntl, Errno::EMFILE),
    ("recvmsg", libc::SYS_recvmsg, Errno::ENOMEM),
];

/// What of a process's calls may fail.
pub fn calls_of(name: &str) -> Vec<Call> {
    let own = match name {
        "streamd" => STREAMS,
        "init" => INITS,
        "warden" => WARDENS,
        _ => &[],
    };
    [CALLS, &[ACCEPT], own].concat()
}

/// The call that failed.
pub struct Failed {
    pub call: &'static str,
    pub errno: Errno,
    /// The process has died of it.
    pub died: bool,
}

/// A process that stops at each call.
pub struct Failing(Pid);

impl Failing {
    /// Takes hold of a running process.
    pub fn seize(pid: i32) -> Failing {
        let pid = Pid::from_raw(pid);
        ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(pid).unwrap();
        waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap();
        Failing(pid)
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.0.as_raw()
    }

    /// Lets it go on until `over`, and fails the calls of these numbers of these. None: it has made fewer.
    /// PID 1 may kill it meanwhile, wherever it stands (ESRCH): whoever traces it has to hear of that before
    /// its parent can.
    pub fn fail(self, calls: &[Call], which: Range<usize>, over: impl Fn() -> bool) -> Option<Failed> {
        let (mut signal, mut inside, mut seen) = (None, false, 0);
        let mut failed: Option<Failed> = None;
        // Whether the call that it is in is the one.
        let mut this = None;
        loop {
            unless_killed(ptrace::syscall(self.0, signal.take()));
            let status = loop {
                match waitpid(self.0, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).unwrap() {
                    // Not in the middle of the one, whose answer is still the other call's.
                    WaitStatus::StillAlive if this.is_none() && over() => return failed,
                    WaitStatus::StillAlive => std::thread::yield_now(),
                    status => break status,
                }
            };
            match status {
                WaitStatus::PtraceSyscall(_) => {
                    inside = !inside;
                    let Some(mut registers) = unless_killed(ptrace::getregs(self.0)) else { continue };
                    if !inside {
                        if let Some((errno, rdi)) = this.take() {
                            registers.rax = (-i64::from(errno as i32)).cast_unsigned();
                            registers.rdi = rdi;
                            unless_killed(ptrace::setregs(self.0, registers));
                        }
                        continue;
                    }
                    let number = registers.orig_rax.cast_signed();
                    let Some(&(call, _, errno)) = calls.iter().find(|(_, one, _)| *one == number) else {
                        continue;
                    };
                    if which.contains(&seen) {
                        // In its place one that every filter allows and that does nothing: close(-1).
                        this = Some((errno, registers.rdi));
                        registers.orig_rax = libc::SYS_close.cast_unsigned();
                        registers.rdi = u64::MAX;
                        unless_killed(ptrace::setregs(self.0, registers));
                        failed = Some(Failed { call, errno, died: false });
                    }
                    seen += 1;
                }
                WaitStatus::Stopped(_, other) => signal = Some(other),
                WaitStatus::PtraceEvent(..) => {}
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    while !over() {
                        std::thread::yield_now();
                    }
                    return failed.map(|failed| Failed { died: true, ..failed });
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// What came of a request to trace; none if the process is being killed.
fn unless_killed<T>(result: nix::Result<T>) -> Option<T> {
    match result {
        Err(Errno::ESRCH) => None,
        result => Some(result.unwrap()),
    }
}

/// Leaves it to itself, also when the test fails: a guest with a process that stands, or of whose end nobody
/// has heard, never ends.
impl Drop for Failing {
    fn drop(&mut self) {
        // It can be left while it stands, and only then.
        while ptrace::detach(self.0, None).is_err() {
            let _ = ptrace::interrupt(self.0);
            if waitpid(self.0, Some(WaitPidFlag::__WALL)).is_err() {
                return;
            }
        }
    }
}
