//! The processes of a guest, as whoever stands outside sees them, and their numbers where a seat is.

use std::fs;
use std::time::{Duration, Instant};

use super::guest::processes::{children, status};

/// What the containers' processes execute: each sleeps for another number of seconds, by which it is found.
pub const CONTAINER_ROOT: &str = "sleep 100001";
pub const CONTAINER_USER: &str = "sleep 100002";
pub const OTHER_ROOT: &str = "sleep 100003";
pub const OTHER_USER: &str = "sleep 100004";

/// The helpers.
pub const HELPERS: [&str; 4] = ["netd", "mountd", "execd", "streamd"];

/// How long a helper may take to have a successor.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest whose PID 1 has this number here.
pub struct World {
    pub init: i32,
    /// A VM, which has a kernel of its own to try things on.
    pub vm: bool,
}

impl World {
    /// A process by its name in ps(1), or by its command line. The first of several mountds.
    pub fn pid(&self, name: &str) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(pid) = self.find(name) {
                return pid;
            }
            assert!(Instant::now() < deadline, "there is no {name}");
            std::thread::yield_now();
        }
    }

    fn find(&self, name: &str) -> Option<i32> {
        if name == "init" {
            return Some(self.init);
        }
        let named = |pid: &i32| {
            let file = if name.contains(' ') { "cmdline" } else { "comm" };
            let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
            // A successor has its name before it has its filter. What has ended keeps its name until it is
            // reaped.
            text.replace('\0', " ").trim_end() == name && is_confined(*pid) && !is_over(*pid)
        };
        children(self.init).into_iter().filter(named).min()
    }

    /// The number of one process in the PID namespace of another; none if it has none there.
    pub fn number(&self, name: &str, seat: i32) -> Option<u64> {
        // proc_pid_status(5): the number in each PID namespace, from the reader's own inwards. A guest has
        // one inside its own.
        let numbers =
            |pid: i32| status(pid, "NSpid").split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let depth = numbers(seat).len();
        numbers(self.pid(name)).get(depth - 1).map(|number| number.parse().unwrap())
    }
}

/// Whether a process has its filter: that is the last step of its confinement (proc_pid_status(5)).
fn is_confined(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line == "Seccomp:\t2")
}

fn is_over(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}
