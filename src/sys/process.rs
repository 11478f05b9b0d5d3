//! How execd makes processes: it clones them as children of init, into namespaces and a cgroup.

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
    /// The old process.
    Parent {
        /// The child's number in the caller's PID namespace.
        pid: Pid,
        /// The child's pidfd, which stays valid: once init has reaped the child, the number may belong to
        /// another process.
        pidfd: OwnedFd,
    },
}

/// Checks that the caller is the only thread of this process: EINVAL if not.
pub fn check_single_threaded() -> Result<(), Errno> {
    // unshare(2): CLONE_THREAD has no effect, except that it fails if there is more than one thread.
    // SAFETY: unshare takes flags only.
    Errno::result(unsafe { libc::unshare(libc::CLONE_THREAD) }).map(drop)
}

/// Clones a sibling: a child of the caller's parent, which reaps it. `flags` are CLONE_NEW* flags, and
/// CLONE_FILES for a child that begins with [`own_descriptors`]. `cgroup` is the cgroup v2 directory in which
/// the child is created.
///
/// The process must have one thread ([`check_single_threaded`]): the child could never use what is guarded by
/// another thread's locks.
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
    // SAFETY: execd, the only caller, has checked at its start that it has one thread, and it starts none, so
    // no other thread holds a lock. Without CLONE_VM the child has its own copy of this memory. `args` and
    // the pidfd's place outlive the call.
    let pid =
        Errno::result(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    if pid == 0 {
        return Ok(Cloned::Child);
    }
    // SAFETY: the kernel has just made this descriptor, and nothing else knows its number.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Cloned::Parent { pid: Pid(i32::try_from(pid).map_err(|_| Errno::EOVERFLOW)?), pidfd })
}

/// linux/sched.h. libc's constant has a type that this number does not fit on every target.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Kills the process of a pidfd, even if another process has its number by now.
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

/// Gives a process that was cloned with CLONE_FILES its own descriptors, numbers 0 to `last`. The parent's
/// descriptors above `last` are neither copied nor closed, so the cost does not depend on how many there are.
pub fn own_descriptors(last: RawFd) -> Result<(), Errno> {
    let first = u32::try_from(last).map_err(|_| Errno::EBADF)? + 1;
    // SAFETY: takes numbers only, and closes none of the parent's descriptors: only copies that were never
    // used are closed.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
    Errno::result(result).map(drop)
}

/// The first descriptor after the standard streams.
const FIRST: RawFd = 3;

/// Closes every descriptor but 0, 1, 2 and `kept`, which become the numbers 3, 4, … and stay close-on-exec.
/// EINVAL if one of `kept` has such a number already. Only for a freshly cloned process that never returns to
/// the owners of the closed descriptors.
pub fn keep_only(kept: &[BorrowedFd<'_>]) -> Result<Vec<OwnedFd>, Errno> {
    let numbers = (FIRST..).take(kept.len());
    let next = FIRST + RawFd::try_from(kept.len()).map_err(|_| Errno::EINVAL)?;
    if kept.iter().any(|fd| fd.as_raw_fd() < next) {
        return Err(Errno::EINVAL);
    }
    for (fd, number) in kept.iter().zip(numbers.clone()) {
        // SAFETY: the owner of that number in the process from which this one was cloned never runs here; see
        // above.
        Errno::result(unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) })?;
    }
    // SAFETY: takes numbers only; the owners never run here, see above.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, next, u32::MAX, 0) })?;
    // SAFETY: the descriptors were made above, and no other code uses their numbers.
    Ok(numbers.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect())
}

/// Closes every descriptor but 2, the log. Only for a freshly cloned process that never returns to their
/// owners.
pub fn close_all_but_log() -> Result<(), Errno> {
    for (first, last) in [(0, 1), (3, u32::MAX)] {
        // SAFETY: takes numbers only; the owners never run here, see above.
        Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    }
    Ok(())
}

/// Duplicates `fd` as descriptor `number` (0, 1 or 2), without close-on-exec.
pub fn become_standard(fd: BorrowedFd<'_>, number: RawFd) -> Result<(), Errno> {
    // SAFETY: called in a freshly cloned process for the standard streams, which std never closes.
    Errno::result(unsafe { libc::dup2(fd.as_raw_fd(), number) }).map(drop)
}

/// The arguments of execve, prepared beforehand so that [`Program::execute`] converts no strings.
pub struct Program {
    candidates: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    /// Takes the paths to try in order, the arguments and the environment. EINVAL if one of them contains a
    /// zero byte.
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

    /// Executes the first candidate that can be executed. It returns only if none can, with the reason and
    /// the candidate in question. As with execvp(3), a candidate that exists but may not be executed is
    /// reported only if no other can be executed.
    pub fn execute(&self) -> (Errno, &CStr) {
        let pointers = |words: &[CString]| -> Vec<*const libc::c_char> {
            words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect()
        };
        let (arguments, environment) = (pointers(&self.arguments), pointers(&self.environment));
        let mut answer = (Errno::ENOENT, self.arguments.first().map_or(c"", CString::as_c_str));
        for candidate in &self.candidates {
            // SAFETY: the path is in `self`, and both arrays, each ended by a null, point to strings in
            // `self`; all outlive the call.
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

/// The kernel's `struct sigaction`, because glibc's call refuses the signals that it reserves for itself.
#[repr(C)]
#[derive(Default)]
struct KernelAction {
    handler: usize,
    flags: libc::c_ulong,
    restorer: usize,
    mask: u64,
}

/// Resets every ignored signal but SIGPIPE to its default. A program inherits ignored signals, and the
/// process that started this one may have ignored some: glibc's posix_spawn leaves one of its own ignored.
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

/// Blocks the signal that releases a start, so that it is not lost if it comes before [`wait_for_release`].
/// It is SIGCONT, because an extra SIGCONT does no harm.
pub fn await_release() -> Result<(), Errno> {
    mask(libc::SIG_BLOCK)
}

/// Waits for the release, and unblocks the signal again. EAGAIN: it did not come in time. Only a signal from
/// the parent, which is init, counts; other processes that may signal this one cannot release it.
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

/// Whether this process's parent sent a signal by kill(2). Both numbers are 0 if the parent is outside this
/// process's PID namespace, and no sender inside the namespace has the number 0. The kernel does not let a
/// process claim SI_USER with the number of another (sigqueue(3)).
fn is_from_parent(info: &libc::siginfo_t) -> bool {
    // SAFETY: the kernel has filled in the sender of every signal that a process sends, and zero is a valid
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

/// Makes `name` the whole command line of this process, as others read it (proc_pid_cmdline(5)). Only for a
/// freshly cloned process that no longer reads its arguments. The name is truncated to the space that they
/// had.
pub fn set_command_line(name: &CStr) -> Result<(), Errno> {
    let stat = std::fs::read_to_string("/proc/self/stat").map_err(|_| Errno::ENOENT)?;
    let (start, end) = arguments(&stat).ok_or(Errno::EINVAL)?;
    let length = name.count_bytes().min(end - start - 1);
    // SAFETY: the kernel has put the arguments there, on the stack that it made for this process, below
    // everything that a program uses of the stack. The process has one thread, and nothing refers to the
    // arguments: std's `args` returns copies.
    unsafe {
        let place = ptr::with_exposed_provenance_mut::<u8>(start);
        ptr::copy_nonoverlapping(name.as_ptr().cast::<u8>(), place, length);
        ptr::write_bytes(place.add(length), 0, end - start - length);
    }
    // If the call below is not permitted, zeros after the name do no harm.
    let end = start + length + 1;
    // SAFETY: sets a number of this process that only tells other processes where to read.
    let _ = unsafe { libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_ARG_END, end, 0, 0) };
    Ok(())
}

/// The start and end address of the arguments, from the text of a /proc/PID/stat; `None` if they are empty.
fn arguments(stat: &str) -> Option<(usize, usize)> {
    // proc_pid_stat(5): arg_start is field 48. Field 2, the name, may contain any character.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(48 - 3).map(str::parse);
    let (start, end) = (fields.next()?.ok()?, fields.next()?.ok()?);
    (0 < start && start < end).then_some((start, end))
}

/// Restores SIGPIPE's default, which kills: programs expect it, and Rust's runtime has changed it.
pub fn default_sigpipe() {
    // SAFETY: SIG_DFL is not a handler; called in a freshly cloned process with one thread.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Ends this process at once, without the exit handlers that belong to the process it was cloned from.
pub fn exit(code: i32) -> ! {
    // SAFETY: _exit does not return and runs no code of this program.
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
