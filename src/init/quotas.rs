//! Quotas that the kernel keeps for each user, or for everybody together: a container's root is the user that
//! PID 1 is, and may become any other. So none of them may end before the pod's memory does, where the kernel
//! charges the memory behind it to the pod; what it charges to nobody gets a share of the VM's memory.
//! docs/limits.md has each of them, and what was seen.

use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::boot::{warn, write};
use super::settings::Settings;
use crate::cgroups;
use crate::fault::Fault;

/// What the kernel charges to whoever has it, by file of /proc/sys: as many as there can be. (In the kernel's
/// file: fs/eventpoll.c, fs/notify/inotify/inotify_user.c, fs/file_table.c, fs/pipe.c.)
const CHARGED: [(&str, &str); 5] = [
    // Open files of all processes. Only who has CAP_SYS_ADMIN may have more: streamd, netd and PID 1 have
    // not.
    ("fs/file-max", "9223372036854775807"),
    // ENOSPC for PID 1 and streamd; the kernel's own is a twenty-fifth of memory for each user.
    ("fs/epoll/max_user_watches", "9223372036854775807"),
    // EMFILE and ENOSPC for mountd, while it waits for a disk.
    ("fs/inotify/max_user_instances", "2147483647"),
    ("fs/inotify/max_user_watches", "2147483647"),
    // No limit; a user's pipes beyond it would have two pages each.
    ("fs/pipe-user-pages-soft", "0"),
];

/// `fs.nr_open`, the highest limit of open files that a container may be given: as systemd sets it on hosts,
/// where containers' limits come from. The kernel's own is a thousandth of it.
const NR_OPEN: u64 = 1_073_741_816;
/// RLIMIT_NOFILE of the guest's own processes: the most that the kernel knows (`sysctl_nr_open_max` of its
/// fs/file.c), and more than a container is ever given. Descriptors on their way in sockets are counted by
/// user, all together, and compared with the limit of the one who sends (unix(7)): what a container can have
/// under way under its limit is below this one.
const FILES: u64 = 2_147_483_584;
const _: () =
    assert!(FILES > NR_OPEN + 253, "a packet that is let through may carry so many more (SCM_MAX_FD)");
/// The same in a namespace, whose machine sets its own `fs.nr_open`.
const FILES_OF_A_MACHINE: u64 = 1_000_000;

/// What connection tracking may take of a VM's memory: a small part of what the guest keeps to itself
/// (`cgroups::RESERVE`), since the kernel charges it to nobody.
const CONNECTIONS_SHARE: u64 = 64;
/// What it takes for a connection, in bytes: the entry and its extensions, as the kernel's allocator rounds
/// them.
const CONNECTION: u64 = 512;
/// For how many seconds it keeps an idle one, as the C original sets it.
const IDLE: u64 = 300;

/// Sets them. In a namespace they are the machine's.
pub fn set(settings: &Settings) {
    if settings.local.is_some() {
        raise_files(settings, FILES_OF_A_MACHINE);
        return;
    }
    for (file, value) in CHARGED {
        write(&format!("/proc/sys/{file}"), value);
    }
    // A limit may be no higher than this is at the moment; containers get theirs later.
    write("/proc/sys/fs/nr_open", &FILES.to_string());
    raise_files(settings, FILES);
    write("/proc/sys/fs/nr_open", &NR_OPEN.to_string());
    match cgroups::memory("MemTotal") {
        Ok(memory) => track(connections(memory)),
        Err(fault) => log::warn!("{fault}"),
    }
}

/// The guest's own limit of open files, which the warden and the helpers inherit.
fn raise_files(settings: &Settings, limit: u64) {
    const FILES: Resource = Resource::RLIMIT_NOFILE;
    if let Err(errno) = setrlimit(FILES, limit, limit) {
        warn(settings, &Fault::errno("setting", format!("{FILES:?} to {limit}"), errno));
        // In a namespace whose owner may not raise limits, at least all that it has.
        let _ = getrlimit(FILES).and_then(|(_, hard)| setrlimit(FILES, hard, hard));
    }
}

/// How many connections a VM with so much memory tracks.
fn connections(memory: u64) -> u64 {
    memory / CONNECTIONS_SHARE / CONNECTION
}

/// It only does where ports are mapped. Here and not with the first white list: netd has no files, and this
/// asks nothing of anybody.
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
