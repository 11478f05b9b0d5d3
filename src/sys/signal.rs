//! Signals and exits by number: nix's types know no real-time signal, and an exit by one must not be lost.

use nix::errno::Errno;

use hyperinit_protocol::ids::{Pid, Signal};

/// One child that was reaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Which.
    pub pid: Pid,
    /// Its exit code, or 128+n when signal n killed it (protocol.md «Streams»).
    pub status: u8,
    /// Whether SIGSYS ended it: it made a call that its filter ends a process for.
    pub by_filter: bool,
}

/// Reaps one child if one has exited; never waits. ECHILD when there is no child at all.
pub fn reap() -> Result<Option<Exit>, Errno> {
    // SAFETY: an all-zero siginfo_t is a valid one.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is ours and outlives the call; P_ALL takes no id.
    let result = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOHANG) };
    Errno::result(result)?;
    // SAFETY: waitid filled the SIGCHLD fields, or left the pid 0 when nobody has exited.
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

/// Sends a signal to a process, or to its process group. The caller is the only reaper of `pid`, so the
/// number cannot belong to anybody else yet.
pub fn kill(pid: Pid, signal: i32, group: bool) -> Result<(), Errno> {
    if pid.0 <= 1 {
        // 0, -1 and 1 mean groups, everyone and ourselves.
        return Err(Errno::EINVAL);
    }
    // SAFETY: kill reads nothing of this process's memory.
    Errno::result(unsafe { libc::kill(if group { -pid.0 } else { pid.0 }, signal) }).map(drop)
}

/// A set of signals, real-time ones among them.
#[derive(Clone, Copy)]
pub struct Set(libc::sigset_t);

impl Set {
    /// The set of these.
    pub fn of(signals: impl IntoIterator<Item = Signal>) -> Set {
        // SAFETY: an all-zero set is a valid one.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: writes to the set and to nothing else.
        unsafe { libc::sigemptyset(&raw mut set) };
        for signal in signals {
            // SAFETY: writes to the set and to nothing else. The C library refuses the two signals that it
            // keeps to itself.
            unsafe { libc::sigaddset(&raw mut set, signal.get()) };
        }
        Set(set)
    }

    /// Blocks these and no other signals in the calling thread, and in the threads that it starts from now
    /// on.
    pub fn block_only(&self) -> Result<(), Errno> {
        // SAFETY: the set outlives the call; no old one is asked for.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
        // It returns the number instead of setting errno.
        if result == 0 { Ok(()) } else { Err(Errno::from_raw(result)) }
    }

    /// Waits for one of them, which every thread has to block, and takes it.
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

/// Whether this process ignores a signal, as whoever started it may have wanted (nohup(1)).
pub fn is_ignored(signal: Signal) -> bool {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: writes the disposition to `action`, which outlives the call, and changes nothing.
    let asked = unsafe { libc::sigaction(signal.get(), std::ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Has the kernel keep children that have exited until they are waited for, also if whoever started this
/// process ignored SIGCHLD.
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
