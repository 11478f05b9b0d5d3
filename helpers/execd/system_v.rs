//! Bounds the System V objects of the pod (sysvipc(7)). They outlive the processes that made them, so when
//! they fill the pod's memory, the OOM killer finds no process whose end would free it, and the pod's other
//! containers would stall. So they are bounded, in the pod's IPC namespace alone. A container that needs more
//! sets its sysctls (`kernel.sem`, `kernel.msgmni`, `kernel.shm_rmid_forced`).

use std::io::ErrorKind;

use hyperinit::cgroups;
use hyperinit::fault::Fault;

/// The kernel memory of a full queue, in bytes: `kernel.msgmnb` (16,384) messages of one byte, which take 64
/// bytes each.
const QUEUE: u64 = 1 << 20;
/// The number of queues that is always allowed: Linux's limit for decades.
const QUEUES_MIN: u64 = 16;
/// The kernel memory of a semaphore, in bytes (struct sem of ipc/sem.c).
const SEMAPHORE: u64 = 64;

/// Sets the bounds in the caller's IPC namespace. A failure is only logged, because a pod without a bound is
/// better than no pod.
pub fn bound() {
    let memory = match cgroups::memory("MemTotal") {
        Ok(memory) => memory,
        Err(fault) => return log::warn!("{fault}"),
    };
    for (name, value) in bounds(memory) {
        match std::fs::write(format!("/proc/sys/kernel/{name}"), &value) {
            // A kernel without System V objects.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => log::warn!("{}", Fault::io(format!("setting to {value:?}"), name, &error)),
            Ok(()) => {}
        }
    }
}

/// The settings for a machine with `memory` bytes of memory.
fn bounds(memory: u64) -> [(&'static str, String); 3] {
    let queues = (memory / 32 / QUEUE).max(QUEUES_MIN);
    let semaphores = memory / 64 / SEMAPHORE;
    [
        // A segment is destroyed with the last process that has it attached, or with its maker if none has.
        ("shm_rmid_forced", "1".to_owned()),
        ("msgmni", queues.to_string()),
        // Semaphores in a set, semaphores in all, operations in a call, sets. All but the second are the
        // kernel's defaults.
        ("sem", format!("32000 {semaphores} 500 32000")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_take_a_small_part_of_memory() {
        let values = |memory| bounds(memory).map(|(_, value)| value);
        assert_eq!(values(128 << 20), ["1", "16", "32000 32768 500 32000"]);
        assert_eq!(values(4 << 30), ["1", "128", "32000 1048576 500 32000"]);
    }
}
