//! What no policy may ever allow, whoever edits it: written down a second time, so that a rule that slips
//! into a file, or out of a list of denials, does not pass unseen.

use hyperinit::ids::HELPER_USERS;

use crate::machine::{Call, Verdict, run};
use crate::policy::Syscalls;
use crate::programs::ARCHITECTURES;
use crate::{policies, table};

/// Nobody, a container of the privileged profile included.
const NOBODY: &[&str] = &[
    "acct",
    "add_key",
    "bpf",
    "delete_module",
    "finit_module",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "open_by_handle_at",
    "perf_event_open",
    "quotactl",
    "quotactl_fd",
    "request_key",
    "swapoff",
    "swapon",
    "uselib",
    "userfaultfd",
];

/// No process that has a list of what it may do: programs, processes, other processes' memory, new sockets,
/// other users, and ways round a filter.
const CONFINED: &[&str] = &[
    "bind",
    "capset",
    "chroot",
    "connect",
    "execve",
    "execveat",
    "fanotify_init",
    "fork",
    "kcmp",
    "listen",
    "memfd_secret",
    "modify_ldt",
    "name_to_handle_at",
    "personality",
    "pidfd_getfd",
    "pidfd_open",
    "pkey_mprotect",
    "process_madvise",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "remap_file_pages",
    "seccomp",
    "setgid",
    "setgroups",
    "setregid",
    "setresgid",
    "setresuid",
    "setreuid",
    "setuid",
    "shmat",
    "socket",
    "socketpair",
    "syslog",
    "vfork",
];

/// Every one of these calls is refused, whatever its arguments: the answer does not look at them.
fn refused(name: &str, arch: &str, audit: u32, program: &[u64], calls: &[&str]) {
    for &call in calls {
        assert!(table(arch).exists(call), "{call} is no system call");
        let Some(number) = table(arch).number(call) else { continue };
        let run = run(program, &Call { arch: audit, number, arguments: [0; 6] });
        assert!(!matches!(run.verdict, Verdict::Allow), "{name} {arch} allows {call}");
        assert!(!run.looked, "{name} {arch} allows {call} with some arguments");
    }
}

#[test]
fn nobody_gets_what_nobody_may() {
    for (arch, audit) in ARCHITECTURES {
        for (name, policy) in policies(arch) {
            refused(&name, arch, audit, &policy.program, NOBODY);
            // The end of the guest is init's.
            if name != "init" {
                refused(&name, arch, audit, &policy.program, &["reboot"]);
            }
        }
    }
}

#[test]
fn a_confined_process_gets_no_program_and_no_socket() {
    for (arch, audit) in ARCHITECTURES {
        let mut confined = 0;
        for (name, policy) in policies(arch) {
            let unknown = Call { arch: audit, number: 599, arguments: [0; 6] };
            if run(&policy.program, &unknown).verdict == Verdict::Trap {
                refused(&name, arch, audit, &policy.program, CONFINED);
                confined += 1;
            }
        }
        assert_eq!(confined, 5, "init, mountd, netd, podinit, streamd");
    }
}

#[test]
fn no_confined_process_has_executable_memory_or_a_child() {
    const CLONE_VM: u64 = 0x100;
    const CLONE_THREAD: u64 = 0x1_0000;
    for (arch, audit) in ARCHITECTURES {
        for (name, policy) in policies(arch) {
            if !["init", "mountd", "netd", "podinit", "streamd"].contains(&name.as_str()) {
                continue;
            }
            let verdict = |call: &str, arguments: [u64; 6]| {
                let number = table(arch).number(call).unwrap();
                run(&policy.program, &Call { arch: audit, number, arguments }).verdict
            };
            for call in ["mmap", "mprotect"] {
                for protection in [4, 5, 6, 7, 1 << 40 | 4] {
                    let verdict = verdict(call, [0, 4096, protection, 0x22, 0, 0]);
                    assert_eq!(verdict, Verdict::Trap, "{name} {arch} {call} {protection:#x}");
                }
            }
            for flags in [0, 17, CLONE_VM, CLONE_THREAD, 1 << 28, 1 << 29 | CLONE_VM] {
                let verdict = verdict("clone", [flags, 0, 0, 0, 0, 0]);
                assert_eq!(verdict, Verdict::Trap, "{name} {arch} clone {flags:#x}");
            }
        }
    }
}

/// The warden opens none: the channels to the host are open before it has its filter.
#[test]
fn nobody_below_init_has_a_socket_to_the_host() {
    const AF_VSOCK: u64 = 40;
    for (arch, audit) in ARCHITECTURES {
        for (name, policy) in policies(arch) {
            let number = table(arch).number("socket").unwrap();
            for family in [AF_VSOCK, 1 << 32 | AF_VSOCK] {
                let call = Call { arch: audit, number, arguments: [family, 1, 0, 0, 0, 0] };
                let verdict = run(&policy.program, &call).verdict;
                assert!(!matches!(verdict, Verdict::Allow), "{name} {arch} allows socket {family:#x}");
            }
        }
    }
}

/// What opens the memory, the descriptors and the root of every process of the guest by files of /proc,
/// whatever the filter says of ptrace, process_vm_writev and pidfd_getfd.
#[test]
fn only_a_privileged_container_has_cap_sys_ptrace() {
    const CAP_SYS_PTRACE: u64 = 1 << 19;
    for (arch, _) in ARCHITECTURES {
        let having =
            policies(arch).into_iter().filter(|(_, policy)| policy.capabilities.0 & CAP_SYS_PTRACE != 0);
        let names: Vec<_> = having.map(|(name, _)| name).collect();
        // The warden has what it passes on.
        assert_eq!(names, ["container/privileged", "warden"], "{arch}");
    }
}

/// The kernel guards /proc/sys by the effective user and by no capability: a process of user 0 writes to all
/// of it. And no process of a container may do to a helper what a user may do to his own processes.
#[test]
fn who_is_root_has_to_be() {
    let (arch, _) = ARCHITECTURES[0];
    let mut users = std::collections::BTreeSet::new();
    for (name, policy) in policies(arch) {
        match name.as_str() {
            // init and the warden begin everything, and the pod init can do nothing.
            "init" | "warden" | "podinit" => assert_eq!((policy.uid, policy.gid), (0, 0), "{name}"),
            name if name.starts_with("container/") => {
                assert_eq!((policy.uid, policy.gid), (0, 0), "{name}");
            }
            _ => {
                assert!(
                    HELPER_USERS.contains(&policy.uid) && policy.gid == policy.uid,
                    "{name}: {}",
                    policy.uid
                );
                assert!(users.insert(policy.uid), "{name} is another's user");
            }
        }
    }
    assert_eq!(users.len(), 4, "netd, mountd, execd, streamd");
}
