//! Follows a helper of a local guest call by call (ptrace), so that it dies exactly where a test wants.

use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::Guest;
use super::processes::{kill_hard, process};

/// A helper that stops before and after each system call.
pub struct Followed {
    process: Pid,
    /// The warden that started the helper. Until the helper has set its own name, it still has the warden's.
    warden: Option<Pid>,
}

impl Followed {
    /// Kills the helper of that name and follows the one that the warden starts in its place, from before its
    /// first instruction.
    pub fn successor(guest: &Guest, name: &str) -> Followed {
        let warden = Pid::from_raw(process(guest, "warden", None));
        Followed::born(warden, || kill_hard(process(guest, name, None)))
    }

    /// Kills this helper and follows its successor in the same way. Panics for a helper from `running`.
    pub fn replace(self) -> Followed {
        let warden = self.warden.expect("a helper that was born so");
        Followed::born(warden, || self.kill())
    }

    fn born(warden: Pid, dies: impl FnOnce()) -> Followed {
        ptrace::seize(warden, Options::PTRACE_O_TRACEVFORK | Options::PTRACE_O_TRACESYSGOOD).unwrap();
        dies();
        match waitpid(warden, Some(WaitPidFlag::__WALL)).unwrap() {
            WaitStatus::PtraceEvent(..) => {}
            other => panic!("{other:?}"),
        }
        let child = Pid::from_raw(i32::try_from(ptrace::getevent(warden).unwrap()).unwrap());
        waitpid(child, Some(WaitPidFlag::__WALL)).unwrap();
        ptrace::detach(warden, None).unwrap();
        Followed { process: child, warden: Some(warden) }
    }

    /// Follows a helper that already runs.
    pub fn running(guest: &Guest, name: &str) -> Followed {
        let pid = Pid::from_raw(process(guest, name, None));
        ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(pid).unwrap();
        waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap();
        Followed { process: pid, warden: None }
    }

    /// The pid of the helper.
    pub fn pid(&self) -> i32 {
        self.process.as_raw()
    }

    /// Lets the helper run for `stops` stops, or until `over` says so. Returns the number of stops.
    pub fn follow(&self, stops: usize, over: impl Fn() -> bool) -> usize {
        let mut signal = None;
        for stop in 0..stops {
            ptrace::syscall(self.process, signal.take()).unwrap();
            let status = loop {
                match waitpid(self.process, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).unwrap() {
                    WaitStatus::StillAlive if over() => return stop,
                    WaitStatus::StillAlive => std::thread::yield_now(),
                    status => break status,
                }
            };
            match status {
                WaitStatus::Stopped(_, other) => signal = Some(other),
                WaitStatus::PtraceSyscall(_) | WaitStatus::PtraceEvent(..) => {}
                other => panic!("it ended by itself: {other:?}"),
            }
        }
        stops
    }

    /// Sends SIGKILL and waits for the end: PID 1 can reap the helper only once its tracer has.
    pub fn kill(self) {
        kill_hard(self.process.as_raw());
        while !matches!(
            waitpid(self.process, Some(WaitPidFlag::__WALL)),
            Ok(WaitStatus::Signaled(..) | WaitStatus::Exited(..)) | Err(_)
        ) {}
    }

    /// Detaches from the helper wherever it is.
    pub fn leave(self) {
        let _ = ptrace::interrupt(self.process);
        let _ = waitpid(self.process, Some(WaitPidFlag::__WALL));
        ptrace::detach(self.process, None).unwrap();
    }
}

impl Drop for Followed {
    /// A guest cannot end while one of its processes is still traced, so a failing test kills the helper.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = nix::sys::signal::kill(self.process, nix::sys::signal::Signal::SIGKILL);
            let _ = waitpid(self.process, Some(WaitPidFlag::__WALL));
        }
    }
}
