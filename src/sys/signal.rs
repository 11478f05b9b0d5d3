//! Signals and exits by number: nix's types know no real-time signal, and an exit by one must not be lost.

use nix::errno::Errno;

use crate::ids::Pid;

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

/// Sends a signal to a process, or to its process group. The caller is the only reaper of `pid`, so the number
/// cannot belong to anybody else yet.
pub fn kill(pid: Pid, signal: i32, group: bool) -> Result<(), Errno> {
    if pid.0 <= 1 {
        // 0, -1 and 1 mean groups, everyone and ourselves.
        return Err(Errno::EINVAL);
    }
    // SAFETY: kill reads nothing of this process's memory.
    Errno::result(unsafe { libc::kill(if group { -pid.0 } else { pid.0 }, signal) }).map(drop)
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
