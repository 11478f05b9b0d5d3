//! The pod's cgroup, and how a VM is shared out between its containers and the guest, whose own processes
//! stay in the root.
//!
//! What a container does to itself stays below the pod's limits: the kernel ends a container's process, or
//! refuses it another, before the guest has nothing left. What the kernel lacks (a controller, cgroup v2) is
//! missing and nothing more; `oom_score_adj` still tells the kernel whom to take first.
//!
//! The guest has no cgroup of its own, and the pod no less weight than any other: both make each start slower
//! by a tenth, and a tty by two thirds (docs/decisions/guest-cgroup.md).

use std::path::Path;
use std::{fs, io};

use crate::fault::{Fault, OrFault};
use crate::ids::ContainerId;
use crate::paths;

const MIB: u64 = 1 << 20;
/// Of the memory that is free at boot the pod leaves the guest an eighth, within these bounds and never more
/// than half of it. The processes take 6 MiB; the rest is for files of 16 MiB on their way and for what the
/// kernel does not count to anybody.
const RESERVE: (u64, u64) = (16 * MIB, 128 * MIB);
/// What is shared out. A kernel may lack any of them.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// What is also shared out between containers. Processor time: beside a fork bomb of another's nothing would
/// start. Memory is not, for the protocol has no limit of a container's.
const BETWEEN_CONTAINERS: [&str; 2] = ["cpu", "pids"];
/// Documentation/admin-guide/sysctl/vm.rst: when the VM itself has no memory left, for what the kernel
/// charges to nobody, the process ends that asks for more and not the largest one. The guest's own never end
/// (`oom_score_adj`).
const KILL_WHO_ASKS: &str = "/proc/sys/vm/oom_kill_allocating_task";
/// sched(7): without it each of the guest's processes weighs as much as the pod, and not all of them
/// together.
const AUTOGROUP: &str = "/proc/sys/kernel/sched_autogroup_enabled";

/// Makes the pod's.
pub fn make() -> Result<(), Fault> {
    fs::create_dir_all(paths::POD_CGROUP).fault("making", paths::POD_CGROUP)
}

/// Shares a VM out, as far as its kernel can.
pub fn share_out() {
    let file = Path::new(paths::CGROUP).join("cgroup.controllers");
    let text = match fs::read_to_string(&file).fault("reading", file.display()) {
        Ok(text) => text,
        Err(fault) => return unshared(&fault),
    };
    let has = |controller: &str| text.split_whitespace().any(|other| other == controller);
    for missing in CONTROLLERS.into_iter().filter(|controller| !has(controller)) {
        unshared(&Fault::new("enabling", missing, "the kernel has no such controller"));
    }
    for (cgroup, controllers) in
        [(paths::CGROUP, &CONTROLLERS[..]), (paths::POD_CGROUP, &BETWEEN_CONTAINERS[..])]
    {
        let words: Vec<_> = controllers.iter().filter(|controller| has(controller)).copied().collect();
        // Each write stops every start and end of a process, so all in one. If the kernel refuses one, it
        // refuses all.
        if enable(cgroup, &words).is_err() {
            let faults = words.iter().filter_map(|&word| enable(cgroup, &[word]).err());
            faults.for_each(|fault| unshared(&fault));
        }
    }
    // Only where the pod has a weight: without either, each of its tasks would weigh as much as PID 1.
    if Path::new(paths::POD_CGROUP).join("cpu.weight").exists() {
        // Not every kernel knows it.
        let _ = fs::write(AUTOGROUP, "0");
    }
    for (controller, share) in [("memory", share_memory as fn() -> Result<(), Fault>), ("pids", count_tasks)]
    {
        if has(controller)
            && let Err(fault) = share()
        {
            unshared(&fault);
        }
    }
}

fn unshared(fault: &Fault) {
    log::warn!("the pod is not kept to its share: {fault}");
}

/// Makes a container's, with its share of the pod's. NotFound: the kernel has no cgroup v2.
///
/// Processor time is divided evenly between containers that want it. One container cannot have all of the
/// pod's tasks: the others can still start some.
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
fn enable(cgroup: &str, controllers: &[&str]) -> Result<(), Fault> {
    let words: Vec<_> = controllers.iter().map(|controller| format!("+{controller}")).collect();
    let path = Path::new(cgroup).join("cgroup.subtree_control");
    fs::write(&path, words.join(" ")).fault(&format!("enabling {} in", controllers.join(" ")), path.display())
}

fn share_memory() -> Result<(), Fault> {
    let (total, free) = (memory("MemTotal")?, memory("MemAvailable")?);
    let reserve = reserve(free);
    let pods = free.saturating_sub(reserve);
    let kept = total.saturating_sub(pods);
    fs::write(paths::NOT_THE_PODS, kept.to_string()).fault("writing", paths::NOT_THE_PODS)?;
    set(paths::POD_CGROUP, "memory.max", pods)?;
    // Only where the pod has a limit, at which the largest of its processes ends: without, whoever asks may
    // be anybody.
    fs::write(KILL_WHO_ASKS, "1").fault("writing 1 to", KILL_WHO_ASKS)
}

/// Processes and threads: the kernel has room for so many, its own included.
fn count_tasks() -> Result<(), Fault> {
    let (threads, pids) =
        (read_number("/proc/sys/kernel/threads-max")?, read_number("/proc/sys/kernel/pid_max")?);
    set(paths::POD_CGROUP, "pids.max", tasks(threads.min(pids)))
}

/// What of so many free bytes is the guest's own.
fn reserve(free: u64) -> u64 {
    let (least, most) = RESERVE;
    (free / 8).clamp(least, most).min(free / 2)
}

/// What of so many tasks is the pod's, or of the pod's a container's: a quarter stays for the kernel's
/// threads and the guest, or for the other containers.
fn tasks(all: u64) -> u64 {
    all / 4 * 3
}

/// A line of /proc/meminfo, in bytes.
pub fn memory(key: &str) -> Result<u64, Fault> {
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
