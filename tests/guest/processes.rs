//! The processes of a local guest, as this machine sees them.

use std::fs;
use std::time::Instant;

use nix::libc;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::{Guest, PATIENCE};

/// The names of a guest's processes in ps(1), PID 1 first.
pub const NAMES: [&str; 7] = ["init", "warden", "netd", "mountd", "execd", "streamd", "podinit"];

/// Every process of this machine.
fn all() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The parent of a process.
fn parent(pid: i32) -> Option<i32> {
    // proc_pid_stat(5): after the name in brackets come the state and the parent.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

/// The children of a process, with those not reaped yet. In a guest every process is a child of init.
pub fn children(of: i32) -> Vec<i32> {
    all().filter(|&pid| parent(pid) == Some(of)).collect()
}

/// The pids of the guest's processes with this name in ps(1). The guest's log is the standard error of PID 1,
/// which is the parent of all others. The others log through sockets, and no process of a container does.
pub fn processes(guest: &Guest, name: &str) -> Vec<i32> {
    let log = guest.directory.join("guest/console.log");
    let comm = |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let stderr = |pid: i32| fs::read_link(format!("/proc/{pid}/fd/2")).unwrap_or_default();
    let named = all().filter(|&pid| comm(pid).trim_end() == name);
    let is_init = |pid: i32| comm(pid).trim_end() == "init" && stderr(pid) == log;
    let by_init =
        |pid: i32| stderr(pid).to_string_lossy().starts_with("socket:") && parent(pid).is_some_and(is_init);
    named.filter(|&pid| is_init(pid) || by_init(pid)).collect()
}

/// Waits for exactly one process of that name whose pid is not `old`.
pub fn process(guest: &Guest, name: &str, old: Option<i32>) -> i32 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let [pid] = processes(guest, name)[..]
            && Some(pid) != old
        {
            return pid;
        }
        assert!(Instant::now() < deadline, "no {name} comes up\n{}", guest.log());
        std::thread::yield_now();
    }
}

/// Sends SIGKILL.
pub fn kill_hard(pid: i32) {
    nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// Kills helpers and waits for their successors. A request sent earlier may still go to a dying helper, and
/// then fails.
pub fn replace(guest: &Guest, names: &[&str]) {
    let old: Vec<_> = names.iter().map(|&name| (name, process(guest, name, None))).collect();
    old.iter().for_each(|&(_, pid)| kill_hard(pid));
    for (name, pid) in old {
        process(guest, name, Some(pid));
    }
}

/// Waits until PID 1 or a helper is idle: it waits for its next event or request. /proc/PID/syscall names no
/// call while a process is runnable, so an idle process has dealt with everything sent to it before.
pub fn wait_for_rest(guest: &Guest, name: &str) {
    // The calls by which the C library of each architecture waits for epoll events.
    #[cfg(target_arch = "x86_64")]
    const EVENTS: [i64; 2] = [libc::SYS_epoll_wait, libc::SYS_epoll_pwait];
    #[cfg(not(target_arch = "x86_64"))]
    const EVENTS: [i64; 1] = [libc::SYS_epoll_pwait];
    let calls = if name == "init" { &EVENTS[..] } else { &[libc::SYS_recvmsg] };
    let pid = process(guest, name, None);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
        let call = text.split(' ').next().and_then(|number| number.parse().ok());
        if call.is_some_and(|call: i64| calls.contains(&call)) {
            return;
        }
        assert!(Instant::now() < deadline, "{name} is always at work: {text}\n{}", guest.log());
        std::thread::yield_now();
    }
}

/// The value of a line of /proc/PID/status.
pub fn status(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
}
