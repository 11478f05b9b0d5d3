//! The pod's cgroup, and how a VM is divided between its containers and the guest's own processes, which stay
//! in the root cgroup.
//!
//! What a container consumes stays below the pod's limits: the kernel ends a process of a container, or
//! refuses it another, before the guest runs out. A missing kernel feature (a controller, cgroup v2) costs
//! only that limit; `oom_score_adj` still tells the kernel which process to end first.
//!
//! The guest has no cgroup of its own, and the pod has the default weight: each of the two would make every
//! start slower by a tenth, and a tty by two thirds (docs/decisions/guest-cgroup.md).

use std::path::Path;
use std::{fs, io};

use crate::fault::{Fault, OrFault};
use crate::ids::ContainerId;
use crate::paths;

const MIB: u64 = 1 << 20;
/// The guest keeps an eighth of the memory that is free at boot, within these bounds and never more than
/// half. Its processes take 6 MiB. The rest is for files of 16 MiB in transit and for kernel memory that is
/// charged to no cgroup.
const RESERVE: (u64, u64) = (16 * MIB, 128 * MIB);
/// The controllers of the pod. A kernel may lack any of them.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// The controllers that divide the pod between containers. Without a share of processor time nothing could
/// start beside another container's fork bomb. Memory is not divided, because the protocol has no limit for
/// one container.
const BETWEEN_CONTAINERS: [&str; 2] = ["cpu", "pids"];
/// Documentation/admin-guide/sysctl/vm.rst: when the VM itself runs out of memory, because of memory that is
/// charged to no cgroup, the kernel ends the process that asks for more and not the largest one. It never
/// ends the guest's own processes (`oom_score_adj`).
const KILL_WHO_ASKS: &str = "/proc/sys/vm/oom_kill_allocating_task";
/// sched(7): without it each of the guest's processes has the weight of the pod, instead of all of them
/// together.
const AUTOGROUP: &str = "/proc/sys/kernel/sched_autogroup_enabled";

/// Makes the pod's cgroup.
pub fn make() -> Result<(), Fault> {
    fs::create_dir_all(paths::POD_CGROUP).fault("making", paths::POD_CGROUP)
}

/// Divides a VM, as far as its kernel can.
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
        // Each write stops every start and end of a process, so one write enables all controllers. If the
        // kernel refuses one of them, it refuses all.
        if enable(cgroup, &words).is_err() {
            let faults = words.iter().filter_map(|&word| enable(cgroup, &[word]).err());
            faults.for_each(|fault| unshared(&fault));
        }
    }
    // Only if the pod has a weight: without both, each task of the pod would have the weight of PID 1.
    if Path::new(paths::POD_CGROUP).join("cpu.weight").exists() {
        // Some kernels do not have it.
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

/// Makes a container's cgroup, with its share of the pod. NotFound: the kernel has no cgroup v2.
///
/// Processor time is divided evenly between the containers that want it. No container can use all tasks of
/// the pod, so the others can still start some.
pub fn make_container(id: &ContainerId) -> io::Result<()> {
    let cgroup = paths::container_cgroup(id);
    fs::create_dir(&cgroup)?;
    // A local guest's pod is not limited, and a kernel may lack the controller.
    let pods = fs::read_to_string(Path::new(paths::POD_CGROUP).join("pids.max")).unwrap_or_default();
    match pods.trim_end().parse::<u64>() {
        Ok(pods) => fs::write(cgroup.join("pids.max"), tasks(pods).to_string()),
        Err(_) => Ok(()),
    }
}

/// Adds plugged memory to the pod's limit.
pub fn follow_memory() -> Result<(), Fault> {
    let max = Path::new(paths::POD_CGROUP).join("memory.max");
    if !max.exists() {
        return Ok(());
    }
    let kept = read_number(paths::NOT_THE_PODS)?;
    set(paths::POD_CGROUP, "memory.max", memory("MemTotal")?.saturating_sub(kept))
}

/// Enables a controller for the children of a cgroup.
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
    // Only if the pod has a limit, at which its largest process ends. Without a limit, the process that asks
    // for memory may be any process.
    fs::write(KILL_WHO_ASKS, "1").fault("writing 1 to", KILL_WHO_ASKS)
}

/// How many processes and threads the kernel has room for, its own included.
fn count_tasks() -> Result<(), Fault> {
    let (threads, pids) =
        (read_number("/proc/sys/kernel/threads-max")?, read_number("/proc/sys/kernel/pid_max")?);
    set(paths::POD_CGROUP, "pids.max", tasks(threads.min(pids)))
}

/// The guest's part of this many free bytes.
fn reserve(free: u64) -> u64 {
    let (least, most) = RESERVE;
    (free / 8).clamp(least, most).min(free / 2)
}

/// The pod's part of this many tasks, or a container's part of the pod's: a quarter stays for the kernel's
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
