//! The place of a real process: the test stops the process (ptrace) and makes it call what the test wants,
//! with the process's own user, capabilities, filters, namespaces, descriptors and root.
//!
//! A call that the filter traps does not happen. The test suppresses the signal (SIGSYS) that would end the
//! process, and the process goes on as if nothing had happened.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::answer::Answer;
use super::registers::{INSTRUCTION, Registers};

/// How much memory the arguments of one effect may take, below the stack of the process, in bytes.
const SCRATCH: u64 = 0x4000;

/// A stopped process that makes the calls that the test tells it to.
pub struct Seat {
    pid: Pid,
    /// The registers with which it continues in the end.
    saved: Registers,
    instruction: u64,
    memory: File,
    /// The next free byte of the scratch memory.
    free: u64,
    /// Signals that arrived while it was stopped.
    signals: Vec<Signal>,
    /// Whether it is a child made by another seat: it is killed when dropped.
    disposable: bool,
}

impl Seat {
    /// Stops a process in its current system call, or in its next one.
    pub fn take(pid: i32) -> Seat {
        let pid = Pid::from_raw(pid);
        let options =
            Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACEEXEC;
        ptrace::seize(pid, options).unwrap();
        ptrace::interrupt(pid).unwrap();
        waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap();
        let mut seat = Seat::of(pid, false);
        let mut code = [0; INSTRUCTION.len()];
        loop {
            seat.saved = Registers::of(pid);
            seat.instruction = seat.saved.instruction();
            if seat.memory.read_exact_at(&mut code, seat.instruction).is_ok() && code == INSTRUCTION {
                break;
            }
            assert!(seat.step(), "{pid} ends");
        }
        seat
    }

    fn of(pid: Pid, disposable: bool) -> Seat {
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
        let saved = Registers::of(pid);
        let instruction = saved.instruction();
        Seat { pid, saved, instruction, memory, free: 0, signals: Vec::new(), disposable }
    }

    /// The pid of the process, as the test sees it.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Forgets the arguments of earlier calls.
    pub fn clear(&mut self) {
        self.free = self.saved.free_stack() - SCRATCH;
    }

    /// Writes bytes into the memory of the process. Returns their address.
    pub fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.free;
        self.free = (at + bytes.len() as u64).next_multiple_of(16);
        assert!(self.free <= self.saved.free_stack(), "too much for the scratch memory");
        self.memory.write_all_at(bytes, at).unwrap();
        at
    }

    /// Writes a NUL-terminated text into the memory of the process. Returns its address.
    pub fn text(&mut self, text: &str) -> u64 {
        self.put(&[text.as_bytes(), &[0]].concat())
    }

    /// Writes 64-bit words in native order into the memory of the process. Returns their address.
    pub fn words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.put(&bytes)
    }

    /// Reads bytes from the memory of the process.
    pub fn look(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Makes a system call.
    pub fn call<const N: usize>(&mut self, number: i64, arguments: [u64; N]) -> Answer {
        self.call_and_watch(number, arguments).0
    }

    /// Makes a system call. The second value is the child that the call made, if any.
    fn call_and_watch<const N: usize>(&mut self, number: i64, arguments: [u64; N]) -> (Answer, Option<Pid>) {
        let mut all = [0; 6];
        all[..N].copy_from_slice(&arguments);
        self.saved.calling(self.instruction, number, all).give(self.pid);
        let mut child = None;
        // One stop at the entry of the call, one at its exit.
        for _ in 0..2 {
            loop {
                ptrace::syscall(self.pid, None).unwrap();
                match waitpid(self.pid, Some(WaitPidFlag::__WALL)).unwrap() {
                    WaitStatus::PtraceSyscall(_) => break,
                    WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_CLONE) => {
                        let number = ptrace::getevent(self.pid).unwrap();
                        child = Some(Pid::from_raw(i32::try_from(number).unwrap()));
                    }
                    WaitStatus::PtraceEvent(..) => {}
                    WaitStatus::Stopped(_, signal) => self.signals.push(signal),
                    other => panic!("call {number} {arguments:x?}: {other:?}"),
                }
            }
        }
        if self.is_trapped() {
            ptrace::syscall(self.pid, None).unwrap();
            let status = waitpid(self.pid, Some(WaitPidFlag::__WALL)).unwrap();
            assert!(matches!(status, WaitStatus::Stopped(_, Signal::SIGSYS)), "call {number}: {status:?}");
            return (Answer::Trapped, None);
        }
        let result = Registers::of(self.pid).result();
        let answer = match i32::try_from(-result) {
            Ok(errno @ 1..4096) => Answer::Refused(Errno::from_raw(errno)),
            _ => Answer::Done(result.cast_unsigned()),
        };
        (answer, child)
    }

    /// Whether SIGSYS from the filter is pending.
    fn is_trapped(&self) -> bool {
        // proc_pid_status(5): SigPnd is the set of signals pending for this thread.
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap();
        let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:")).unwrap();
        let pending = u64::from_str_radix(pending.trim(), 16).unwrap();
        pending >> (libc::SIGSYS - 1) & 1 == 1
    }

    /// A copy of the process, for what cannot be undone. It is killed when it is dropped. The error is the
    /// answer to clone.
    pub fn child(&mut self) -> Result<Seat, Answer> {
        // Without an exit signal: the parent gets none when the child ends.
        let (answer, child) = self.call_and_watch(libc::SYS_clone, [0; 5]);
        let Some(child) = child else { return Err(answer) };
        waitpid(child, Some(WaitPidFlag::__WALL)).unwrap();
        let mut seat = Seat::of(child, true);
        (seat.instruction, seat.free) = (self.instruction, self.free);
        Ok(seat)
    }

    /// Kills a child, and has its parent reap it.
    pub fn end_child(&mut self, child: Seat) {
        drop(child);
        let all = i64::from(libc::__WALL).cast_unsigned();
        let any = u64::MAX;
        self.call(libc::SYS_wait4, [any, 0, all, 0]);
    }

    /// Lets the process run to its next stop. False if it has ended.
    fn step(&mut self) -> bool {
        ptrace::syscall(self.pid, None).unwrap();
        match waitpid(self.pid, Some(WaitPidFlag::__WALL)).unwrap() {
            WaitStatus::Stopped(_, signal) => self.signals.push(signal),
            WaitStatus::PtraceSyscall(_) | WaitStatus::PtraceEvent(..) => {}
            _ => return false,
        }
        true
    }

    /// Lets the process continue where it was. The kernel restarts the interrupted call, as after any stop.
    fn leave(&mut self) -> nix::Result<()> {
        ptrace::interrupt(self.pid)?;
        ptrace::cont(self.pid, None)?;
        loop {
            match waitpid(self.pid, Some(WaitPidFlag::__WALL))? {
                WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_STOP) => break,
                WaitStatus::Stopped(_, signal) => {
                    self.signals.push(signal);
                    ptrace::cont(self.pid, None)?;
                }
                _ => ptrace::cont(self.pid, None)?,
            }
        }
        self.saved.give(self.pid);
        ptrace::detach(self.pid, self.signals.first().copied())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if self.disposable {
            let _ = nix::sys::signal::kill(self.pid, Signal::SIGKILL);
            while matches!(
                waitpid(self.pid, Some(WaitPidFlag::__WALL)),
                Ok(status) if !matches!(status, WaitStatus::Exited(..) | WaitStatus::Signaled(..))
            ) {}
        } else {
            // When a test fails, the process may stay stopped; it ends with the guest.
            let _ = self.leave();
        }
    }
}
