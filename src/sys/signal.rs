//! Signals and exits by number: nix's types have no real-time signals, and the exit of a process that was
//! killed by one must not be lost.

use nix::errno::Errno;

use hyperinit_protocol::ids::{Pid, Signal};

/// One child that was reaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The child's process number.
    pub pid: Pid,
    /// Its exit code, or 128+n when signal n killed it (protocol.md «Streams»).
    pub status: u8,
    /// Whether SIGSYS killed it: it made a system call for which its filter kills the process.
    pub by_filter: bool,
}

/// Reaps one child if one has exited; never waits. ECHILD if there is no child at all.
pub fn reap() -> Result<Option<Exit>, Errno> {
    // SAFETY: an all-zero siginfo_t is a valid one.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is ours and outlives the call; P_ALL takes no id.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOHANG) };
    Errno::result(result)?;
    // SAFETY: waitid filled in the SIGCHLD fields, or left the pid 0 if no child has exited.
    let (pid, value) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let status = match info.si_code {
        libc::CLD_EXITED => value & 0xff,
        _ => 128 + (value & 0x7f),
    };
    let by_filter = info.si_code != libc::CLD_EXITED && value & 0x7f == libc::SIGSYS;
    Ok(Some(Exit { pid: Pid(pid), status: u8::try_from(status).unwrap_or(255), by_filter }))
}

/// Whether `pid` is a child of this process that has not been reaped yet.
pub fn is_child(pid: Pid) -> bool {
    let Ok(id) = libc::id_t::try_from(pid.0) else { return false };
    // SAFETY: an all-zero siginfo_t is a valid one.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: `info` is ours and outlives the call; with WNOWAIT the child stays as it is.
    unsafe { libc::waitid(libc::P_PID, id, &mut info, flags) == 0 }
}

/// Sends a signal to a process, or to its process group. The caller must be the only reaper of `pid`, so that
/// the number cannot have been reused.
pub fn kill(pid: Pid, signal: i32, group: bool) -> Result<(), Errno> {
    if pid.0 <= 1 {
        // 0, -1 and 1 would mean the own group, every process, and PID 1 itself.
        return Err(Errno::EINVAL);
    }
    // SAFETY: kill reads nothing of this process's memory.
    Errno::result(unsafe { libc::kill(if group { -pid.0 } else { pid.0 }, signal) }).map(drop)
}

/// A set of signals, which may include real-time signals.
#[derive(Clone, Copy)]
pub struct Set(libc::sigset_t);

impl Set {
    /// A set of the given signals.
    pub fn of(signals: impl IntoIterator<Item = Signal>) -> Set {
        // SAFETY: an all-zero set is a valid one.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: writes to the set and to nothing else.
        unsafe { libc::sigemptyset(&raw mut set) };
        for signal in signals {
            // SAFETY: writes to the set and to nothing else. The C library refuses the two signals that it
            // reserves for itself.
            unsafe { libc::sigaddset(&raw mut set, signal.get()) };
        }
        Set(set)
    }

    /// Blocks these signals and no others in the calling thread, and in threads that it starts later.
    pub fn block_only(&self) -> Result<(), Errno> {
        // SAFETY: the set outlives the call; the old set is not asked for.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
        // pthread_sigmask returns the error number instead of setting errno.
        if result == 0 { Ok(()) } else { Err(Errno::from_raw(result)) }
    }

    /// Waits for one of these signals and takes it. Every thread must block all of them.
    pub fn wait(&self) -> Result<Signal, Errno> {
        loop {
            // SAFETY: the set outlives the call; no siginfo is asked for.
            let number = unsafe { libc::sigwaitinfo(&raw const self.0, std::ptr::null_mut()) };
            match Errno::result(number) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
                Ok(number) => return Signal::try_from(i64::from(number)).map_err(|_| Errno::EINVAL),
            }
        }
    }
}

/// Whether this process ignores a signal, possibly because the process that started it wanted that
/// (nohup(1)).
pub fn is_ignored(signal: Signal) -> bool {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: writes the disposition to `action`, which outlives the call, and changes nothing.
    let asked = unsafe { libc::sigaction(signal.get(), std::ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Makes the kernel keep exited children until they are waited for, even if this process was started with
/// SIGCHLD ignored.
pub fn keep_children() {
    // SAFETY: SIG_DFL is no handler, and no part of this program sets one for SIGCHLD.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_everyone() {
        for pid in [1, 0, -1, i32::MIN] {
            assert_eq!(kill(Pid(pid), 0, false), Err(Errno::EINVAL));
        }
        assert!(!is_child(Pid(1)) && !is_child(Pid(-1)));
    }
}
