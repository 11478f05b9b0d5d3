//! Quotas that the kernel keeps for each user, or for all users together. A container's root is the same user
//! as PID 1, and may become any other. So no quota may run out before the pod's memory does, if the kernel
//! charges the memory behind it to the pod. A quota whose memory is charged to no cgroup gets a share of the
//! VM's memory. docs/limits.md lists the quotas and how each was tested.

use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::boot::{warn, write};
use super::settings::Settings;
use crate::cgroups;
use crate::fault::Fault;

/// Quotas whose memory the kernel charges to the process that uses it, by file of /proc/sys, at their
/// maximum. (The kernel's fs/eventpoll.c, fs/notify/inotify/inotify_user.c, fs/file_table.c, fs/pipe.c.)
const CHARGED: [(&str, &str); 5] = [
    // Open files of all processes. Only a process with CAP_SYS_ADMIN may exceed it, and streamd, netd and PID
    // 1 have no such capability.
    ("fs/file-max", "9223372036854775807"),
    // Beyond it PID 1 and streamd get ENOSPC. The kernel's default is a twenty-fifth of memory for each user.
    ("fs/epoll/max_user_watches", "9223372036854775807"),
    // Beyond it mountd gets EMFILE and ENOSPC while it waits for a disk.
    ("fs/inotify/max_user_instances", "2147483647"),
    ("fs/inotify/max_user_watches", "2147483647"),
    // Zero is no limit. Beyond a limit a user's pipes would have two pages each.
    ("fs/pipe-user-pages-soft", "0"),
];

/// `fs.nr_open`, the highest limit of open files that a container may get, as systemd sets it on hosts, from
/// which containers' limits come. The kernel's default is a thousandth of it.
const NR_OPEN: u64 = 1_073_741_816;
/// RLIMIT_NOFILE of the guest's own processes: the highest that the kernel accepts (`sysctl_nr_open_max` in
/// its fs/file.c), and more than any container gets. The kernel counts the descriptors in flight of all
/// processes of a user together, and compares the sum with the limit of the sender (unix(7)). So the
/// descriptors that a container may have in flight do not exhaust the guest's limit.
const FILES: u64 = 2_147_483_584;
const _: () =
    assert!(FILES > NR_OPEN + 253, "a packet that is let through may carry so many more (SCM_MAX_FD)");
/// The same limit in a namespace, whose machine sets `fs.nr_open`.
const FILES_OF_A_MACHINE: u64 = 1_000_000;

/// How much of a VM's memory connection tracking may take: a small part of the guest's reserve
/// (`cgroups::RESERVE`), because the kernel charges it to no cgroup.
const CONNECTIONS_SHARE: u64 = 64;
/// The memory of one connection in bytes: the entry and its extensions, as the kernel's allocator rounds
/// them.
const CONNECTION: u64 = 512;
/// How many seconds an idle connection is kept, as the C original sets it.
const IDLE: u64 = 300;

/// Sets the quotas in a VM. In namespaces they belong to the machine.
pub fn set(settings: &Settings) {
    if settings.local.is_some() {
        raise_files(settings, FILES_OF_A_MACHINE);
        return;
    }
    for (file, value) in CHARGED {
        write(&format!("/proc/sys/{file}"), value);
    }
    // A limit may not exceed the present `fs.nr_open`; the value for containers is set later.
    write("/proc/sys/fs/nr_open", &FILES.to_string());
    raise_files(settings, FILES);
    write("/proc/sys/fs/nr_open", &NR_OPEN.to_string());
    match cgroups::memory("MemTotal") {
        Ok(memory) => track(connections(memory)),
        Err(fault) => log::warn!("{fault}"),
    }
}

/// Sets the guest's own limit of open files, which the warden and the helpers inherit.
fn raise_files(settings: &Settings, limit: u64) {
    const FILES: Resource = Resource::RLIMIT_NOFILE;
    if let Err(errno) = setrlimit(FILES, limit, limit) {
        warn(settings, &Fault::errno("setting", format!("{FILES:?} to {limit}"), errno));
        // In a namespace whose owner may not raise limits, the soft limit becomes the hard one.
        let _ = getrlimit(FILES).and_then(|(_, hard)| setrlimit(FILES, hard, hard));
    }
}

/// How many connections a VM with this much memory tracks.
fn connections(memory: u64) -> u64 {
    memory / CONNECTIONS_SHARE / CONNECTION
}

/// The kernel tracks connections only where ports are mapped. The limit is set here and not with the first
/// white list, because netd can open no file.
fn track(connections: u64) {
    for (name, value) in [("max", connections), ("tcp_timeout_established", IDLE)] {
        let path = format!("/proc/sys/net/netfilter/nf_conntrack_{name}");
        if Path::new(&path).exists() {
            write(&path, &value.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_connections_together_take_a_small_part_of_memory() {
        assert_eq!(connections(128 << 20), 4096);
        assert_eq!(connections(4 << 30), 131_072);
    }
}
