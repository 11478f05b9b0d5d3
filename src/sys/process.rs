//! How execd makes processes: cloned as init's children, into namespaces and a cgroup.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use hyperinit_protocol::ids::Pid;

/// clone3's arguments up to `cgroup` (clone(2)).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Which side of a clone this is.
pub enum Cloned {
    /// The new process. It has one thread and a copy of everything else.
    Child,
    /// The old one.
    Parent {
        /// The child's number in the caller's PID namespace.
        pid: Pid,
        /// The child itself: a number may be somebody else's once init has reaped it.
        pidfd: OwnedFd,
    },
}

/// Whether this process has no thread but the caller: EINVAL if it has.
pub fn check_single_threaded() -> Result<(), Errno> {
    // unshare(2): CLONE_THREAD has no effect but to fail where there is more than one thread.
    // SAFETY: unshare takes flags only.
    Errno::result(unsafe { libc::unshare(libc::CLONE_THREAD) }).map(drop)
}

/// Clones a sibling: a child of the caller's parent, which reaps it. `flags` are CLONE_NEW* flags, and
/// CLONE_FILES for a child that begins with [`own_descriptors`]; `cgroup` is a cgroup v2 directory to be born
/// in.
///
/// For a process that has one thread ([`check_single_threaded`]): what another one's locks guard, the child
/// could never use.
pub fn clone_sibling(flags: i32, cgroup: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: u64::from((libc::CLONE_PARENT | libc::CLONE_PIDFD | flags).cast_unsigned()),
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::try_from(cgroup.as_raw_fd()).map_err(|_| Errno::EBADF)?;
    }
    // SAFETY: execd, the only caller, has checked at its start that it has one thread, and starts none, so no
    // lock is held elsewhere; without CLONE_VM the child has its own copy of this memory; `args` and the
    // pidfd's place outlive the call.
    let pid =
        Errno::result(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent { pid: Pid(i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)?), pidfd })
}

/// linux/sched.h; libc has it as a number that does not fit an int everywhere.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Kills the process of a pidfd, whoever has its number by now.
pub fn kill(pidfd: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: no siginfo is passed, and the descriptor is open for the length of the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// Gives a process that was cloned with CLONE_FILES descriptors of its own: those up to `last`. What its
/// parent has above is neither copied nor closed, so that this costs the same however much that is.
pub fn own_descriptors(last: RawFd) -> Result<(), Errno> {
    let first = u32::try_from(last).map_err(|_| Errno::EBADF)? + 1;
    // SAFETY: takes numbers only, and closes none of the parent's: what is closed is a copy that nobody has
    // used.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
    Errno::result(result).map(drop)
}

/// The first descriptor behind the standard streams.
const FIRST: RawFd = 3;

/// Closes every descriptor but 0, 1, 2 and `kept`, which become the numbers 3, 4, … and stay close-on-exec.
/// EINVAL if one of them has such a number already. For a freshly cloned process that never returns to the
/// owners of what is closed.
pub fn keep_only(kept: &[BorrowedFd<'_>]) -> Result<Vec<OwnedFd>, Errno> {
    let numbers = (FIRST..).take(kept.len());
    let next = FIRST + RawFd::try_from(kept.len()).map_err(|_| Errno::EINVAL)?;
    if kept.iter().any(|fd| fd.as_raw_fd() < next) {
        return Err(Errno::EINVAL);
    }
    for (fd, number) in kept.iter().zip(numbers.clone()) {
        // SAFETY: whoever owned that number in the process this one was cloned from never runs here; see
        // above.
        Errno::result(unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) })?;
    }
    // SAFETY: takes numbers only; the owners never run here, see above.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, next, u32::MAX, 0) })?;
    // SAFETY: the descriptors were made above, and nobody else uses their numbers.
    Ok(numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect())
}

/// Closes every descriptor but 2, the log. For a freshly cloned process that never returns to their owners.
pub fn close_all_but_log() -> Result<(), Errno> {
    for (first, last) in [(0, 1), (3, u32::MAX)] {
        // SAFETY: takes numbers only; the owners never run here, see above.
        Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    }
    Ok(())
}

/// Makes `fd` also descriptor `number` (0, 1 or 2), without close-on-exec.
pub fn become_standard(fd: BorrowedFd<'_>, number: RawFd) -> Result<(), Errno> {
    // SAFETY: called in a freshly cloned process for the standard streams, which std never closes.
    Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), number) }).map(drop)
}

/// What execve takes, made beforehand: between this and the call nothing is allocated.
pub struct Program {
    candidates: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// The paths to try in order, the arguments, the environment. EINVAL when one contains a zero byte.
    pub fn new(
        candidates: Vec<String>,
        arguments: &[String],
        environment: &[String],
    ) -> Result<Program, Errno> {
        let all = |words: &[String]| {
            words
                .iter()
                .map(|word| CString::new(word.as_str()).map_err(|_| Errno::EINVAL))
                .collect::<Result<_, _>>()
        };
        Ok(Program {
            candidates: all(&candidates)?,
            arguments: all(arguments)?,
            environment: all(environment)?,
        })
    }

    /// Executes the first candidate that can be; returns why none could, and which one it was. As execvp(3)
    /// has it: one that is there but may not be executed is the answer if no other can be.
    pub fn execute(&self) -> (Errno, &CStr) {
        let pointers = |words: &[CString]| -> Vec<*const libc::c_char> {
            words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        let mut answer = (Errno::ENOENT, self.arguments.first().map_or(c"", CString::as_c_str));
        for candidate in &self.candidates {
            // SAFETY: the path and both arrays, each ended by a null, live in `self` and outlive the call.
            unsafe { libc::execve(candidate.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
            match Errno::last() {
                Errno::ENOENT | Errno::ENOTDIR => {}
                Errno::EACCES => answer = (Errno::EACCES, candidate),
                errno => return (errno, candidate),
            }
        }
        answer
    }
}

/// The kernel's `struct sigaction`: glibc's call refuses the signals that it keeps to itself.
#[repr(C)]
#[derive(Default)]
struct KernelAction {
    handler: usize,
    flags: libc::c_ulong,
    restorer: usize,
    mask: u64,
}

/// No signal is ignored but SIGPIPE. A program inherits what is ignored, and whoever started this one may
/// ignore some: glibc's posix_spawn leaves one of its own ignored.
pub fn ignore_nothing() -> Result<(), Errno> {
    let (default, mut old) = (KernelAction::default(), KernelAction::default());
    let size = size_of::<u64>();
    for signal in (1..=64).filter(|&signal| signal != libc::SIGPIPE) {
        let none = ptr::null::<KernelAction>();
        // SAFETY: reads the disposition into `old`, which outlives the call.
        let asked = unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, none, &raw mut old, size) };
        Errno::result(asked)?;
        if old.handler != libc::SIG_IGN {
            continue;
        }
        let none = ptr::null_mut::<KernelAction>();
        // SAFETY: SIG_DFL is no handler; `default` is complete and outlives the call.
        let set = unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, none, size) };
        Errno::result(set)?;
    }
    Ok(())
}

/// Blocks the signal that releases a start (SIGCONT: one that comes too often does no harm), so that it is
/// not lost before [`wait_for_release`] asks for it.
pub fn await_release() -> Result<(), Errno> {
    mask(libc::SIG_BLOCK)
}

/// Waits for the release, and lets the signal through again. EAGAIN: it did not come in time. Only the
/// parent, which is init, can release: any other process that may signal this one is not believed.
pub fn wait_for_release(limit: Duration) -> Result<(), Errno> {
    let until = Instant::now() + limit;
    let set = release_set();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left =
            libc::timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        // SAFETY: an all-zero siginfo_t is a valid one.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set, the siginfo and the limit outlive the call.
        let result = unsafe { libc::sigtimedwait(&raw const set, &raw mut info, &raw const left) };
        match Errno::result(result) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
            Ok(_) if is_from_parent(&info) => return mask(libc::SIG_UNBLOCK),
            Ok(_) => {}
        }
    }
}

/// Whether a signal was sent by kill(2) of this process's parent. Both numbers are 0 if the parent is outside
/// of this process's PID namespace, and no sender inside has that number. The kernel lets nobody claim
/// SI_USER with another's number (sigqueue(3)).
fn is_from_parent(info: &libc::siginfo_t) -> bool {
    // SAFETY: the kernel has filled in the sender for every signal that a process sends, and zeros are a
    // number too.
    let (sender, parent) = unsafe { (info.si_pid(), libc::getppid()) };
    info.si_code == libc::SI_USER && sender == parent
}

fn mask(how: i32) -> Result<(), Errno> {
    let set = release_set();
    // SAFETY: the set outlives the call; called in a freshly cloned process with one thread.
    Errno::result(unsafe { libc::sigprocmask(how, &raw const set, ptr::null_mut()) }).map(drop)
}

fn release_set() -> libc::sigset_t {
    // SAFETY: an all-zero set is a valid one, and both calls only write to it.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCONT);
        set
    }
}

/// Makes `name` the whole command line of this process, as others read it (proc_pid_cmdline(5)). For a
/// freshly cloned process that reads its arguments no more; the name is cut to what they had room for.
pub fn set_command_line(name: &CStr) -> Result<(), Errno> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|_| Errno::ENOENT)?;
    let (start, end) = arguments(&stat).ok_or(Errno::EINVAL)?;
    let length = name.count_bytes().min(end - start - 1);
    // SAFETY: the kernel has put the arguments there, on the stack that it made for this process, below
    // everything that a program uses of it. It has one thread, and nothing refers to them: what std's `args`
    // has handed out are copies.
    unsafe {
        let place = ptr::with_exposed_provenance_mut::<u8>(start);
        ptr::copy_nonoverlapping(name.as_ptr().cast::<u8>(), place, length);
        ptr::write_bytes(place.add(length), 0, end - start - length);
    }
    // Zeros behind the name are no matter where this is not allowed.
    let end = start + length + 1;
    // SAFETY: sets a number of this process's that only says where others read.
    let _ = unsafe { libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_ARG_END, end, 0, 0) };
    Ok(())
}

/// Where the arguments begin and end, from a /proc/PID/stat; they are not empty.
fn arguments(stat: &str) -> Option<(usize, usize)> {
    // proc_pid_stat(5): arg_start is field 48. The name, field 2, may have anything in it.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(48 - 3).map(str::parse);
    let (start, end) = (fields.next()?.ok()?, fields.next()?.ok()?);
    (0 < start && start < end).then_some((start, end))
}

/// Restores what a program expects and Rust's runtime changed: SIGPIPE kills.
pub fn default_sigpipe() {
    // SAFETY: SIG_DFL is no handler of ours; called in a freshly cloned process with one thread.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Ends this process at once, without the exit handlers that belong to the process it was cloned from.
pub fn exit(code: i32) -> ! {
    // SAFETY: _exit does not return and runs nothing of this program.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_the_arguments_is_found_whatever_the_name() {
        let numbers = |from: usize| (from..=52).map(|field| format!(" {field}")).collect::<String>();
        for name in ["init", "a) b (c", "1 2"] {
            let stat = format!("1 ({name}) S{}\n", numbers(4));
            assert_eq!(arguments(&stat), Some((48, 49)));
        }
        for bad in ["", "1 (a) S 1", &format!("1 (a) S{}", numbers(4).replace(" 49", " 48"))] {
            assert_eq!(arguments(bad), None, "{bad}");
        }
        let own = std::fs::read_to_string("/proc/self/stat").unwrap();
        let (start, end) = arguments(&own).unwrap();
        assert_eq!(end - start, std::fs::read("/proc/self/cmdline").unwrap().len());
    }
}
