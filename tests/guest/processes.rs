//! A local guest's own processes, as this machine sees them.

use std::fs;
use std::time::Instant;

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::{Guest, PATIENCE};

/// Their names in ps(1), PID 1 first.
pub const NAMES: [&str; 7] = ["init", "warden", "netd", "mountd", "execd", "streamd", "podinit"];

/// The guest's processes on this machine, by the name that they have in ps(1).
pub fn processes(guest: &Guest, name: &str) -> Vec<i32> {
    let log = guest.directory.join("guest/console.log");
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let own = |path: &str| format!("/proc/{pid}/{path}");
        fs::read_to_string(own("comm")).is_ok_and(|comm| comm.trim_end() == name)
            && fs::read_link(own("fd/2")).is_ok_and(|stderr| stderr == log)
    })
    .collect()
}

/// The one process of that name, as soon as there is one that is not `old`.
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

/// SIGKILL.
pub fn kill_hard(pid: i32) {
    nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

/// A line of /proc/PID/status, without its key.
pub fn status(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim().to_owned()
}
