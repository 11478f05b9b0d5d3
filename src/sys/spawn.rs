//! The two ways a process of the guest comes to be before execd exists: init forks the warden, the warden
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
    /// The old one; the child's number.
    Parent(Pid),
}

/// Forks. EINVAL when the process has threads: the child would miss them and what they hold.
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

/// How many threads this process has, if /proc tells.
fn threads() -> Option<usize> {
    Some(std::fs::read_dir("/proc/self/task").ok()?.count())
}

/// Closes descriptors that a forked child inherited and that only its parent goes on using.
pub fn close_in_child(numbers: &[RawFd]) {
    for &number in numbers {
        // SAFETY: called in the child of `fork` only, whose copies of the parent's owners never run their
        // drops (it leaves by exit); a number that is not open is an error and nothing more.
        unsafe { libc::close(number) };
    }
}

/// A close-on-exec duplicate with a number of at least `minimum`.
pub fn duplicate_above(fd: &OwnedFd, minimum: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: `fd` is open for the length of the call.
    let number = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, minimum) })?;
    // SAFETY: the kernel has just made this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// What the sibling has for a stack until it executes: a few frames of wrappers of system calls.
#[repr(C, align(16))]
struct Stack([MaybeUninit<u8>; 32 << 10]);

/// What the sibling's side needs. Everything that allocates is done before.
struct Plan<'a> {
    binary: RawFd,
    arguments: &'a [*const libc::c_char],
    environment: &'a [*const libc::c_char],
    moves: &'a [(RawFd, RawFd)],
    highest: RawFd,
}

/// Clones a sibling (a child of the caller's parent) that executes `binary` with `arguments` and no
/// environment. It inherits 1 and 2, if `moves` has no others, and `moves` as (from, to); everything else is
/// closed. Every `from` is above every `to`.
///
/// The caller waits for the execution, and its memory is the sibling's until then: with a copy, each page
/// that it writes to afterwards would take a page more, and where there is none the kernel's own writes
/// (rseq(2), what is received) end it or fail.
///
/// Fails when the clone fails; when the execution fails, the sibling exits with 127.
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
    // SAFETY: the stack and the plan outlive the sibling's use of them: by CLONE_VFORK this thread goes on
    // when it has executed or exited. Until then it writes to nothing but its stack and errno, which is read
    // after the clone only if that has failed.
    let pid = unsafe { libc::clone(child, top, flags, ptr::from_ref(&plan).cast_mut().cast()) };
    Errno::result(pid).map(Pid)
}

/// The sibling's side: only system calls, no allocation, and it never returns.
extern "C" fn child(plan: *mut libc::c_void) -> libc::c_int {
    const EMPTY: &CStr = c"";
    // SAFETY: what `spawn_sibling` has passed, which waits.
    let &Plan { binary, arguments, environment, moves, highest } = unsafe { &*plan.cast::<Plan<'_>>() };
    for &(from, to) in moves {
        // SAFETY: dup2 touches descriptors of this process only (no CLONE_FILES), which nothing else runs in.
        unsafe { libc::dup2(from, to) };
    }
    for number in (3..=highest).filter(|number| !moves.iter().any(|(_, to)| to == number)) {
        // SAFETY: closes a descriptor of this process only, which nothing else runs in; `binary` is above.
        unsafe { libc::close(number) };
    }
    // SAFETY: what is above the inherited numbers is marked close-on-exec, not closed: `binary` is still
    // needed.
    unsafe {
        libc::syscall(libc::SYS_close_range, highest + 1, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_uint)
    };
    // SAFETY: an all-zero set is the empty one of the kernel's size; init blocks signals, helpers do not.
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
