//! System V objects of the pod (sysvipc(7)): they outlive the processes that made them, so the kernel finds
//! nobody to end when they fill the pod's memory, and the pod's other containers would stand still. So they
//! are bounded, in the pod's IPC namespace alone. Whoever needs more says so by the container's sysctls
//! (`kernel.sem`, `kernel.msgmni`, `kernel.shm_rmid_forced`).

use std::io::ErrorKind;

use hyperinit::cgroups;
use hyperinit::fault::Fault;

/// A full queue in bytes of the kernel's memory: `kernel.msgmnb` (16,384) messages of one byte, which take 64
/// each.
const QUEUE: u64 = 1 << 20;
/// Queues there may always be: what Linux had for decades.
const QUEUES_MIN: u64 = 16;
/// A semaphore in bytes of the kernel's memory (struct sem of ipc/sem.c).
const SEMAPHORE: u64 = 64;

/// Sets the bounds in the caller's IPC namespace. What cannot be set is logged, for a pod without them is
/// better than none.
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

/// The settings of a machine with so much memory, in bytes.
fn bounds(memory: u64) -> [(&'static str, String); 3] {
    let queues = (memory / 32 / QUEUE).max(QUEUES_MIN);
    let semaphores = memory / 64 / SEMAPHORE;
    [
        // A segment ends with the last process that has it attached, or with its maker if none has.
        ("shm_rmid_forced", "1".to_owned()),
        ("msgmni", queues.to_string()),
        // Semaphores of a set, of all, operations of a call, sets: but for the second the kernel's own.
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
