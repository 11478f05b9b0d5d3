//! The guest's two cgroups, and how a VM is shared out between them: the guest's own processes are in one, the pod's
//! containers in the other.
//!
//! What a container does to itself stays below the pod's limits: the kernel ends a container's process, or refuses it
//! another, before the guest has nothing left. What the kernel lacks (a controller, cgroup v2) is missing and nothing more;
//! `oom_score_adj` still tells the kernel whom to take first.

use std::path::Path;
use std::{fs, io};

use crate::fault::{Fault, OrFault};
use crate::ids::ContainerId;
use crate::paths;

const MIB: u64 = 1 << 20;
/// Of the memory that is free at boot an eighth is the guest's own, within these bounds and never more than half of it. The
/// processes take 6 MiB; the rest is for files of 16 MiB on their way and for what the kernel does not count to anybody.
const RESERVE: (u64, u64) = (16 * MIB, 128 * MIB);
/// Of the processor's time the guest's processes get ten parts for each of the pod's, if they want it: what they do is short,
/// and a host waits for it.
const WEIGHT: &str = "1000";

/// Makes both, and moves the caller to the guest's: its children are born there. Before any other process is started.
pub fn make() -> Result<(), Fault> {
    for cgroup in [paths::GUEST_CGROUP, paths::POD_CGROUP] {
        fs::create_dir_all(cgroup).fault("making", cgroup)?;
    }
    let procs = Path::new(paths::GUEST_CGROUP).join("cgroup.procs");
    fs::write(&procs, "0").fault("moving to", procs.display())
}

/// Shares a VM out, as far as its kernel can.
pub fn share_out() {
    for (controller, share) in
        [("cpu", weigh as fn() -> Result<(), Fault>), ("memory", share_memory), ("pids", count_tasks)]
    {
        let shared = enable(paths::CGROUP, controller).and_then(|()| share());
        if let Err(fault) = shared {
            log::warn!("the pod is not kept to its share: {fault}");
        }
    }
}

/// Makes a container's, with its share of the pod's. NotFound: the kernel has no cgroup v2.
///
/// Processor time is divided evenly between containers that want it. One container cannot have all of the pod's tasks: the
/// others can still start some.
pub fn make_container(id: &ContainerId) -> io::Result<()> {
    let cgroup = paths::container_cgroup(id);
    fs::create_dir(&cgroup)?;
    // A machine's is not limited; nor where the kernel has no such controller.
    let pods = fs::read_to_string(Path::new(paths::POD_CGROUP).join("pids.max")).unwrap_or_default();
    match pods.trim_end().parse::<u64>() {
        Ok(pods) => fs::write(cgroup.join("pids.max"), tasks(pods).to_string()),
        Err(_) => Ok(()),
    }
}

/// Memory was plugged: it is the pod's.
pub fn follow_memory() -> Result<(), Fault> {
    let max = Path::new(paths::POD_CGROUP).join("memory.max");
    if !max.exists() {
        return Ok(());
    }
    let kept = read_number(paths::NOT_THE_PODS)?;
    set(paths::POD_CGROUP, "memory.max", memory("MemTotal")?.saturating_sub(kept))
}

/// Has the kernel divide something between the children of a cgroup.
fn enable(cgroup: &str, controller: &str) -> Result<(), Fault> {
    let file = Path::new(cgroup).join("cgroup.subtree_control");
    fs::write(&file, format!("+{controller}")).fault("enabling", controller)
}

fn weigh() -> Result<(), Fault> {
    set(paths::GUEST_CGROUP, "cpu.weight", WEIGHT)?;
    // Between containers too: beside a fork bomb of another's nothing would start.
    enable(paths::POD_CGROUP, "cpu")
}

fn share_memory() -> Result<(), Fault> {
    let (total, free) = (memory("MemTotal")?, memory("MemAvailable")?);
    let reserve = reserve(free);
    let pods = free.saturating_sub(reserve);
    let kept = total.saturating_sub(pods);
    fs::write(paths::NOT_THE_PODS, kept.to_string()).fault("writing", paths::NOT_THE_PODS)?;
    set(paths::GUEST_CGROUP, "memory.min", reserve)?;
    set(paths::POD_CGROUP, "memory.max", pods)
}

/// Processes and threads: the kernel has room for so many, its own included.
fn count_tasks() -> Result<(), Fault> {
    let (threads, pids) =
        (read_number("/proc/sys/kernel/threads-max")?, read_number("/proc/sys/kernel/pid_max")?);
    set(paths::POD_CGROUP, "pids.max", tasks(threads.min(pids)))?;
    enable(paths::POD_CGROUP, "pids")
}

/// What of so many free bytes is the guest's own.
fn reserve(free: u64) -> u64 {
    let (least, most) = RESERVE;
    (free / 8).clamp(least, most).min(free / 2)
}

/// What of so many tasks is the pod's, or of the pod's a container's: a quarter stays for the kernel's threads and the guest,
/// or for the other containers.
fn tasks(all: u64) -> u64 {
    all / 4 * 3
}

/// A line of /proc/meminfo, in bytes.
fn memory(key: &str) -> Result<u64, Fault> {
    const FILE: &str = "/proc/meminfo";
    let text = fs::read_to_string(FILE).fault("reading", FILE)?;
    kilobytes(&text, key).ok_or_else(|| Fault::new("reading", FILE, format!("it has no {key}")))
}

fn kilobytes(meminfo: &str, key: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

fn read_number(path: &str) -> Result<u64, Fault> {
    let text = fs::read_to_string(path).fault("reading", path)?;
    text.trim_end().parse().map_err(|_| Fault::new("reading", path, "it is not a number"))
}

fn set(cgroup: &str, file: &str, value: impl ToString) -> Result<(), Fault> {
    let path = Path::new(cgroup).join(file);
    fs::write(&path, value.to_string()).fault("writing to", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_guest_and_a_large_one_leave_room_for_both() {
        assert_eq!(reserve(40 * MIB), 16 * MIB);
        assert_eq!(reserve(416 * MIB), 52 * MIB);
        assert_eq!(reserve(64 << 30), 128 * MIB);
        assert_eq!((reserve(20 * MIB), reserve(0)), (10 * MIB, 0), "never more than half");
        assert_eq!((tasks(536), tasks(32_768)), (402, 24_576));
    }

    #[test]
    fn meminfo_counts_in_kilobytes() {
        let text = "MemTotal:         468416 kB\nMemAvailable:     421352 kB\nHugePages_Total:       0\n";
        assert_eq!(kilobytes(text, "MemTotal"), Some(468_416 << 10));
        assert_eq!(kilobytes(text, "MemAvailable"), Some(421_352 << 10));
        assert_eq!(kilobytes(text, "Mem"), None);
        assert_eq!(kilobytes(text, "HugePages_Total"), None);
    }
}
