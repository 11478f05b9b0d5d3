//! Every process of the guest is made to call what its filter does not allow: the log names it, the call and
//! its arguments.
//!
//! At its next system call the number is another one (ptrace), so the process is the real one, in its place
//! and confined.

#![cfg(target_arch = "x86_64")]

use std::os::unix::fs::PermissionsExt;

use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;

use super::answers;
use super::guest::followed::Followed;
use super::guest::processes::process;
use super::guest::{Guest, Kind};
use super::witness::Witness;

/// A call that none of them may make: its name, its number, its arguments.
const CALL: (&str, i64, [u64; 4]) = ("openat", libc::SYS_openat, [0x1_0000_0007, 0x10, 0x80000, 0x5]);
/// As the log has it: the low 32 bits of the arguments.
const NAMED: &str = "seccomp: the system call openat (257) is not allowed: 0x7 0x10 0x80000 0x5";

/// The next call of a process is this one. The registers as they were, at the entry to it.
fn make_call(pid: Pid, number: i64, arguments: [u64; 4]) -> libc::user_regs_struct {
    ptrace::syscall(pid, None).unwrap();
    assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::PtraceSyscall(_)));
    let before = ptrace::getregs(pid).unwrap();
    let [rdi, rsi, rdx, r10] = arguments;
    let orig_rax = u64::try_from(number).unwrap();
    ptrace::setregs(pid, libc::user_regs_struct { orig_rax, rdi, rsi, rdx, r10, ..before }).unwrap();
    before
}

/// After the call: its result, and the process goes on with the one that it had wanted to make.
fn take_back(pid: Pid, before: libc::user_regs_struct) -> i64 {
    let result = ptrace::getregs(pid).unwrap().rax.cast_signed();
    // Two bytes back is the instruction that makes the call.
    let again = libc::user_regs_struct { rax: before.orig_rax, rip: before.rip - 2, ..before };
    ptrace::setregs(pid, again).unwrap();
    result
}

#[test]
fn a_helper_that_its_filter_ends_is_named_with_the_call() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    for name in ["netd", "mountd", "streamd"] {
        let from = guest.log().len();
        let followed = Followed::running(&guest, name);
        let pid = Pid::from_raw(followed.pid());
        make_call(pid, CALL.1, CALL.2);
        if name == "mountd" {
            // It may open files, and execute none.
            let mut other = ptrace::getregs(pid).unwrap();
            other.orig_rax = u64::try_from(libc::SYS_execve).unwrap();
            ptrace::setregs(pid, other).unwrap();
        }
        ptrace::cont(pid, None).unwrap();
        assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(_, Signal::SIGSYS)));
        ptrace::cont(pid, Signal::SIGSYS).unwrap();
        assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Exited(_, 159)));
        let named =
            if name == "mountd" { NAMED.replace("openat (257)", "execve (59)") } else { NAMED.to_owned() };
        guest.wait_for_log(from, &format!("{name}: {named}"));
        guest.wait_for_log(from, &format!("{name} is gone (159)"));
        process(&guest, name, Some(pid.as_raw()));
        answers(&guest, name);
        witness.checks(name, name != "streamd");
    }
}

#[test]
fn one_that_cannot_say_it_itself_is_named_by_init() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let from = guest.log().len();
    let followed = Followed::running(&guest, "netd");
    let pid = Pid::from_raw(followed.pid());
    // All signals are blocked, as while a thread starts: by a call that it may make.
    let before = make_call(pid, libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as u64, 0, 0, 8]);
    let set = before.rsp - 512;
    ptrace::write(pid, set as ptrace::AddressType, -1).unwrap();
    ptrace::setregs(pid, libc::user_regs_struct { rsi: set, ..ptrace::getregs(pid).unwrap() }).unwrap();
    ptrace::syscall(pid, None).unwrap();
    waitpid(pid, None).unwrap();
    assert_eq!(take_back(pid, before), 0);
    make_call(pid, CALL.1, CALL.2);
    ptrace::cont(pid, None).unwrap();
    assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(_, Signal::SIGSYS)));
    // No handler any more: the kernel has put the default in its place.
    ptrace::cont(pid, Signal::SIGSYS).unwrap();
    assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Signaled(_, Signal::SIGSYS, _)));
    guest.wait_for_log(from, "init: netd was ended by its filter (SIGSYS)");
    guest.wait_for_log(from, "netd is gone (159)");
    process(&guest, "netd", Some(pid.as_raw()));
    answers(&guest, "netd");
    witness.checks("netd", true);
}

#[test]
fn what_execd_the_pod_init_and_pid_1_may_not_do_does_not_happen() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    // execd's filter is a list of denials, which containers inherit: the call fails.
    let followed = Followed::running(&guest, "execd");
    let pid = Pid::from_raw(followed.pid());
    let before = make_call(pid, libc::SYS_reboot, [0; 4]);
    ptrace::syscall(pid, None).unwrap();
    assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::PtraceSyscall(_)));
    assert_eq!(take_back(pid, before), -i64::from(libc::EPERM));
    ptrace::detach(pid, None).unwrap();
    answers(&guest, "execd");
    assert_eq!(process(&guest, "execd", None), pid.as_raw());
    witness.checks("execd", true);
    // PID 1 is told, and goes on.
    let from = guest.log().len();
    let followed = Followed::running(&guest, "init");
    let pid = Pid::from_raw(followed.pid());
    let before = make_call(pid, CALL.1, CALL.2);
    ptrace::cont(pid, None).unwrap();
    assert!(matches!(waitpid(pid, None).unwrap(), WaitStatus::Stopped(_, Signal::SIGSYS)));
    // Only what it had wanted is lost: it waits for events again.
    assert!(before.orig_rax.cast_signed() == libc::SYS_epoll_wait, "{before:?}");
    ptrace::detach(pid, Signal::SIGSYS).unwrap();
    guest.wait_for_log(from, &format!("init: {NAMED}"));
    guest.wait_for_log(from, "init: waiting for events: Operation not permitted");
    answers(&guest, "execd");
    witness.checks("init", true);
    // The pod init dies of it, and the pod with it.
    let followed = Followed::running(&guest, "podinit");
    let pid = Pid::from_raw(followed.pid());
    make_call(pid, CALL.1, CALL.2);
    ptrace::detach(pid, None).unwrap();
    guest.wait_for_log(from, &format!("podinit: {NAMED}"));
    guest.wait_for_log(from, "the pod init is gone: the pod ends");
}

/// A program of a few bytes: `getpid` of 32-bit x86, then `exit(0)`.
fn old_call() -> Vec<u8> {
    let code: [u8; 18] =
        [0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, 0x90, 0x90];
    let (base, start) = (0x40_0000_u64, 120_u64);
    let size = start + code.len() as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut halves = |halves: &[u16]| halves.iter().for_each(|half| file.extend(half.to_le_bytes()));
    halves(&[2, 62, 1, 0]);
    [base + start, 64, 0].iter().for_each(|word| file.extend(word.to_le_bytes()));
    let mut halves = |halves: &[u16]| halves.iter().for_each(|half| file.extend(half.to_le_bytes()));
    halves(&[0, 0, 64, 56, 1, 0, 0, 0]);
    // One segment: all of it, readable and executable.
    halves(&[1, 0, 5, 0]);
    [0, base, base, size, size, 0x1000].iter().for_each(|word| file.extend(word.to_le_bytes()));
    file.extend(code);
    file
}

#[test]
fn a_containers_process_that_its_filter_ends_is_named() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let program = guest.share.join("image/rootfs/bin/old-call");
    std::fs::write(&program, old_call()).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let outcome = guest.exec("main", &["/bin/old-call"], json!({"id": "old"})).outcome();
    assert_eq!(
        outcome.status, 159,
        "{outcome:?}: without IA32 emulation (CONFIG_IA32_EMULATION) a kernel has no such calls"
    );
    guest.await_log("init: process old of container main was ended by its filter (SIGSYS)");
}
