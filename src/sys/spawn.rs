//! The two ways to make a process of the guest before execd exists: init forks the warden, and the warden
//! clones and executes the helpers.

use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;

use hyperinit_protocol::ids::Pid;

/// Which side of a fork this is.
pub enum Forked {
    /// The new process.
    Child,
    /// The old process, with the child's number.
    Parent(Pid),
}

/// Forks. EINVAL if the process has more than one thread: the child would lack the others and could never get
/// what they hold, such as locks.
pub fn fork() -> Result<Forked, Errno> {
    if threads() != Some(1) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: there is one thread (checked above), so no lock and no allocator is in use elsewhere.
    match Errno::result(unsafe { libc::fork() })? {
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(Pid(pid))),
    }
}

/// The number of threads of this process; `None` if /proc does not tell.
fn threads() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

/// Closes descriptors that a forked child inherited and that only its parent still uses.
pub fn close_in_child(numbers: &[RawFd]) {
    for &number in numbers {
        // SAFETY: called in the child of `fork` only, where the owners copied from the parent are never
        // dropped (the child leaves by exit). Closing a number that is not open only returns an error.
        unsafe { libc::close(number) };
    }
}

/// Makes a close-on-exec duplicate whose number is at least `minimum`.
pub fn duplicate_above(fd: &OwnedFd, minimum: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: `fd` is open for the length of the call.
    let number = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, minimum) })?;
    // SAFETY: the kernel has just made this descriptor, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The sibling's stack until it executes: enough for a few frames of system call wrappers.
#[repr(C, align(16))]
struct Stack([MaybeUninit<u8>; 32 << 10]);

/// What the sibling needs. Everything that allocates is done before the clone.
struct Plan<'a> {
    binary: RawFd,
    arguments: &'a [*const libc::c_char],
    environment: &'a [*const libc::c_char],
    moves: &'a [(RawFd, RawFd)],
    highest: RawFd,
}

/// Clones a sibling (a child of the caller's parent) that executes `binary` with `arguments` and an empty
/// environment. It inherits descriptors 1 and 2, unless `moves` replaces them, and those of `moves` as (from,
/// to); all others are closed. Every `from` must be above every `to`.
///
/// The caller waits until the sibling executes, and the two share memory until then. If the sibling had a
/// copy, each page that the caller writes to afterwards would cost another page; when no page is free, the
/// kernel's own writes to the caller's memory (rseq(2), received data) would kill the caller or fail.
///
/// Fails if the clone fails. If the execution fails, the sibling exits with 127.
pub fn spawn_sibling(
    binary: &OwnedFd,
    arguments: &[CString],
    moves: &[(RawFd, RawFd)],
) -> Result<Pid, Errno> {
    let highest = moves.iter().map(|&(_, to)| to).max().unwrap_or(2).max(2);
    if moves.iter().any(|&(from, _)| from <= highest) || binary.as_raw_fd() <= highest {
        return Err(Errno::EINVAL);
    }
    let arguments: Vec<*const libc::c_char> =
        arguments.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect();
    let environment = [ptr::null::<libc::c_char>()];
    let plan =
        Plan { binary: binary.as_raw_fd(), arguments: &arguments, environment: &environment, moves, highest };
    let mut stack = Stack([MaybeUninit::uninit(); 32 << 10]);
    let top = stack.0.as_mut_ptr_range().end.cast::<libc::c_void>();
    let flags = libc::CLONE_PARENT | libc::CLONE_VM | libc::CLONE_VFORK;
    // SAFETY: the stack and the plan outlive the sibling's use of them, because CLONE_VFORK resumes this
    // thread only when the sibling has executed or exited. Until then the sibling writes only to its stack
    // and to errno, which is read after the clone only if the clone has failed.
    let pid = unsafe { libc::clone(child, top, flags, ptr::from_ref(&plan).cast_mut().cast()) };
    Errno::result(pid).map(Pid)
}

/// The sibling's side: only system calls, no allocation, and it never returns.
extern "C" fn child(plan: *mut libc::c_void) -> libc::c_int {
    const EMPTY: &CStr = c"";
    // SAFETY: the pointer is the plan of `spawn_sibling`, which waits.
    let &Plan { binary, arguments, environment, moves, highest } = unsafe { &*plan.cast::<Plan<'_>>() };
    for &(from, to) in moves {
        // SAFETY: dup2 changes descriptors of this process only (no CLONE_FILES), and no other code runs in
        // it.
        unsafe { libc::dup2(from, to) };
    }
    for number in (3..=highest).filter(|number| !moves.iter().any(|(_, to)| to == number)) {
        // SAFETY: closes a descriptor of this process only, in which no other code runs; `binary` is above.
        unsafe { libc::close(number) };
    }
    // SAFETY: descriptors above the inherited numbers are marked close-on-exec, not closed: `binary` is still
    // needed.
    unsafe {
        libc::syscall(libc::SYS_close_range, highest + 1, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_uint)
    };
    // SAFETY: an all-zero set is the empty one of the kernel's size. init blocks signals; helpers must not.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            [0u64; 2].as_ptr(),
            ptr::null_mut::<u64>(),
            8,
        )
    };
    // SAFETY: both arrays end with a null pointer and their strings outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            binary,
            EMPTY.as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    // SAFETY: _exit ends this process without running the parent's exit handlers.
    unsafe { libc::_exit(127) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duplicate_is_high_and_close_on_exec() {
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let moved = duplicate_above(&null, 64).unwrap();
        assert!(moved.as_raw_fd() >= 64);
    }

    #[test]
    fn descriptors_in_the_way_are_refused() {
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let low = null.as_raw_fd();
        assert_eq!(spawn_sibling(&null, &[], &[(low, low + 1)]).unwrap_err(), Errno::EINVAL);
    }

    #[test]
    fn who_starts_another_needs_no_page_more() {
        use nix::sys::resource::{UsageWho, getrusage};

        const PAGES: usize = 256;
        let program = OwnedFd::from(std::fs::File::open("/bin/true").unwrap());
        let program = duplicate_above(&program, 64).unwrap();
        let mut memory = vec![1u8; PAGES * 4096];
        let mut touch = || memory.iter_mut().step_by(4096).for_each(|byte| *std::hint::black_box(byte) += 1);
        touch();
        let faults = || getrusage(UsageWho::RUSAGE_THREAD).unwrap().minor_page_faults();
        let before = faults();
        let pid = spawn_sibling(&program, &[c"true".to_owned()], &[]).unwrap();
        touch();
        let more = faults() - before;
        assert!(pid.0 > 0 && more < PAGES as i64 / 2, "{more} faults");
    }
}
