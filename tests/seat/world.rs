//! The processes of a guest as seen from outside, and their pids as a seat sees them.

use std::fs;
use std::time::{Duration, Instant};

use super::guest::processes::{children, status};

/// The command lines of the containers' processes. Each sleeps for a different number of seconds, by which
/// the test finds it.
pub const CONTAINER_ROOT: &str = "sleep 100001";
pub const CONTAINER_USER: &str = "sleep 100002";
pub const OTHER_ROOT: &str = "sleep 100003";
pub const OTHER_USER: &str = "sleep 100004";

/// The names of the helpers.
pub const HELPERS: [&str; 4] = ["netd", "mountd", "execd", "streamd"];

/// How long a helper may take to be replaced.
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest whose PID 1 has the pid `init` on this machine.
pub struct World {
    pub init: i32,
    /// Whether the guest is a VM, with its own kernel that the effects may change.
    pub vm: bool,
}

impl World {
    /// Waits for a process by its name in ps(1) or by its command line. Of several mountds it returns the one
    /// with the lowest pid.
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
            // A successor has its name before it has its filter. A process that has ended keeps its name
            // until it is reaped.
            text.replace('\0', " ").trim_end() == name && is_confined(*pid) && !is_over(*pid)
        };
        children(self.init).into_iter().filter(named).min()
    }

    /// The pid of one process in the PID namespace of another; none if it is not visible there.
    pub fn number(&self, name: &str, seat: i32) -> Option<u64> {
        // proc_pid_status(5): NSpid lists the pid in each PID namespace, from the reader's own inwards. The
        // pod's PID namespace is inside the guest's.
        let numbers =
            |pid: i32| status(pid, "NSpid").split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let depth = numbers(seat).len();
        numbers(self.pid(name)).get(depth - 1).map(|number| number.parse().unwrap())
    }
}

/// Whether a process has its filter, the last step of its confinement (proc_pid_status(5)).
fn is_confined(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line == "Seccomp:\t2")
}

fn is_over(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}
