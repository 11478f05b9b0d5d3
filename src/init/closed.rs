//! The parts of the kernel that a VM closes at boot, each setting with its reason. The defaults of
//! distributions' kernels differ, so the guest sets all of them.
//!
//! A setting that the kernel does not have is skipped.

use std::io::ErrorKind;
use std::path::PathBuf;

use super::settings::Settings;
use crate::fault::Fault;
use crate::wire::Profile;

/// A setting of the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Closed {
    /// Its name, as sysctl(8) has it.
    pub name: &'static str,
    /// What it is set to.
    pub value: &'static str,
    /// Why.
    pub why: &'static str,
}

impl Closed {
    /// Its file in /proc/sys.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/sys/{}", self.name.replace('.', "/")))
    }
}

const fn closed(name: &'static str, value: &'static str, why: &'static str) -> Closed {
    Closed { name, value, why }
}

/// The settings of every VM. Names and values are those of the kernel's Documentation/admin-guide/sysctl.
const ALWAYS: &[Closed] = &[
    closed(
        "dev.tty.ldisc_autoload",
        "0",
        "opening a terminal loads no line discipline, which has often had holes",
    ),
    closed(
        "fs.protected_fifos",
        "1",
        "root writes to no FIFO that another user left in a directory like /tmp",
    ),
    closed("fs.protected_hardlinks", "1", "no user makes a hard link to a file that he may not write to"),
    closed(
        "fs.protected_regular",
        "1",
        "root writes to no file that another user left in a directory like /tmp",
    ),
    closed(
        "fs.protected_symlinks",
        "1",
        "nobody follows a link that another user left in a directory like /tmp",
    ),
    closed(
        "fs.suid_dumpable",
        "0",
        "a process that has changed its user is no core file and is traced by nobody",
    ),
    closed(
        "kernel.core_pattern",
        "core",
        "a core file is a file in the directory of the process that dies, as a container's user expects who raises \
         RLIMIT_CORE; the kernel starts no program for it and follows no path of the guest's",
    ),
    closed("kernel.dmesg_restrict", "1", "the kernel's log has addresses, and what the guest logs"),
    closed("kernel.hotplug", "", "the kernel starts no program when a device comes"),
    closed("kernel.io_uring_disabled", "2", "nobody has a use for it: the ceiling denies its calls"),
    closed("kernel.kexec_load_disabled", "1", "no other kernel is started; it cannot be set back"),
    closed("kernel.kptr_restrict", "2", "nobody reads the kernel's addresses in /proc"),
    closed("kernel.modprobe", "", "the kernel starts no program for a module: all are loaded at boot"),
    closed(
        "kernel.panic_on_oops",
        "1",
        "a kernel that has failed goes no further; what follows is panic= of its command line",
    ),
    closed("kernel.poweroff_cmd", "", "the kernel starts no program when it turns the VM off"),
    closed("kernel.sysrq", "0", "no key and no break on a serial line commands the kernel"),
    closed(
        "kernel.unprivileged_bpf_disabled",
        "1",
        "no user gives the kernel a program; it cannot be set back",
    ),
    closed(
        "kernel.usermodehelper.bset",
        "0 0",
        "whatever program the kernel starts has no capability; it cannot be set back",
    ),
    closed("kernel.usermodehelper.inheritable", "0 0", "as bset"),
    closed(
        "kernel.yama.ptrace_scope",
        "0",
        "a debugger attaches to a process of its own user in the pod, as under Docker on a host without Yama; the guest's \
         processes are closed to it by being not dumpable",
    ),
    closed(
        "net.core.bpf_jit_harden",
        "1",
        "the constants of a container's socket filters and seccomp filters are no code; the guest's own filters are \
         loaded with CAP_SYS_ADMIN and take no longer",
    ),
    closed("vm.panic_on_oom", "0", "a container's process dies of want of memory, not the VM"),
];

/// The settings of profiles whose containers make no user namespaces. A user namespace has every capability
/// of its own, and so exposes more of the kernel. The privileged profile runs containers in containers, which
/// may need user namespaces.
const WITHOUT_USER_NAMESPACES: Closed = closed(
    "user.max_user_namespaces",
    "0",
    "nobody makes one: the profiles default and restricted deny it to containers, the guest needs none",
);

/// The settings of a profile.
pub fn settings(profile: Profile) -> impl Iterator<Item = Closed> {
    let more = match profile {
        Profile::Default | Profile::Restricted => Some(WITHOUT_USER_NAMESPACES),
        Profile::Privileged => None,
    };
    ALWAYS.iter().copied().chain(more)
}

/// Sets them in a VM. In namespaces they belong to the machine.
pub fn close(guest: &Settings) {
    if guest.local.is_some() {
        return;
    }
    for setting in settings(guest.profile) {
        let path = setting.path();
        // The newline is needed: an empty write is no write.
        match std::fs::write(&path, format!("{}\n", setting.value)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                log::warn!("{}", Fault::io(format!("setting to {:?}", setting.value), setting.name, &error));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_there_once_and_explained() {
        for profile in Profile::ALL {
            let all: Vec<_> = settings(profile).collect();
            let names: std::collections::BTreeSet<_> = all.iter().map(|setting| setting.name).collect();
            assert_eq!(names.len(), all.len());
            assert!(all.iter().all(|setting| !setting.why.is_empty()));
        }
    }
}
