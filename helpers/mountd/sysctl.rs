//! Sysctls of a container: those that belong to the pod's namespaces.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::paths;
use hyperinit::sandbox::ContainerProfile;
use hyperinit::sys::mount::{Resolve, openat2};
use nix::fcntl::OFlag;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;
use nix::unistd::write;

use super::tree::{Home, libc_flags};

/// Names that a namespace has of its own, or that runV sets with every container.
const NAMESPACED: [&str; 5] = ["fs.mqueue.", "kernel.msg", "kernel.sem", "kernel.shm", "net."];
const ALWAYS: [&str; 1] = ["vm.overcommit_memory"];

/// Refuses what the profile does not open, before anything is done.
pub fn check(sysctls: &BTreeMap<String, String>, profile: &ContainerProfile) -> Result<(), Fault> {
    for name in sysctls.keys() {
        let fault = |why: &str| Err(Fault::new("reading the sysctl", name, why));
        if name.split('.').any(|part| part.is_empty() || part.contains('/')) {
            return fault("it is not a dotted name");
        }
        let open = ALWAYS.contains(&name.as_str()) || is_namespaced(name);
        // Only the privileged profile leaves /sys writable; it may also set what is the whole guest's.
        if !open && profile.readonly_sys() {
            return fault("it is the whole guest's: only the privileged profile may set it");
        }
    }
    Ok(())
}

fn is_namespaced(name: &str) -> bool {
    NAMESPACED.iter().any(|prefix| name.starts_with(prefix))
}

/// What is left to set of them. In namespaces of a machine what is not theirs is the machine's, and stays as it is.
fn ours(sysctls: &BTreeMap<String, String>, local: bool) -> Vec<(&String, &String)> {
    let (ours, machines): (Vec<_>, Vec<_>) =
        sysctls.iter().partition(|(name, _)| !local || is_namespaced(name));
    for (name, _) in machines {
        log::warn!("{name} is left as it is: it is the machine's");
    }
    ours
}

/// Sets them, in the pod's IPC namespace: the kernel takes the writer's.
pub fn apply(
    home: &Home,
    proc: &OwnedFd,
    sysctls: &BTreeMap<String, String>,
    local: bool,
) -> Result<(), Fault> {
    let sysctls = ours(sysctls, local);
    if sysctls.is_empty() {
        return Ok(());
    }
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let own = nix::fcntl::openat(&home.proc, "self/ns/ipc", flags, Mode::empty())
        .fault("opening", "mountd's own IPC namespace")?;
    let pods = format!("{}/ipc", paths::POD_NS);
    let pods_fd =
        nix::fcntl::openat(&home.run, "pod/ns/ipc", flags, Mode::empty()).fault("opening", &pods)?;
    setns(&pods_fd, CloneFlags::CLONE_NEWIPC).fault("entering", &pods)?;
    let set = sysctls.iter().try_for_each(|(name, value)| set(proc, name, value));
    setns(&own, CloneFlags::CLONE_NEWIPC).fault("returning to", "mountd's own IPC namespace")?;
    set
}

fn set(proc: &OwnedFd, name: &str, value: &str) -> Result<(), Fault> {
    let path = format!("sys/{}", name.replace('.', "/"));
    let file = openat2(proc, Path::new(&path), libc_flags(OFlag::O_WRONLY), 0, Resolve::NoLinks)
        .fault("opening the sysctl", name)?;
    write(&file, value.as_bytes()).map(drop).fault("setting the sysctl", name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperinit::wire::Profile;

    #[test]
    fn a_machine_keeps_its_settings() {
        let both = ["kernel.shmmax", "vm.overcommit_memory"].map(|name| (name.to_owned(), "1".to_owned()));
        let both = BTreeMap::from(both);
        assert_eq!(ours(&both, false).len(), 2);
        assert_eq!(ours(&both, true), [(&"kernel.shmmax".to_owned(), &"1".to_owned())]);
    }

    #[test]
    fn only_what_belongs_to_the_pod() {
        let default = ContainerProfile::of(Profile::Default).unwrap();
        let privileged = ContainerProfile::of(Profile::Privileged).unwrap();
        let one = |name: &str| BTreeMap::from([(name.to_owned(), "1".to_owned())]);
        for name in ["kernel.shmmax", "net.ipv4.ip_forward", "vm.overcommit_memory", "fs.mqueue.msg_max"] {
            assert!(check(&one(name), &default).is_ok(), "{name}");
        }
        let fault = check(&one("kernel.core_pattern"), &default).unwrap_err();
        assert!(fault.to_string().contains("privileged"), "{fault}");
        assert!(check(&one("kernel.core_pattern"), &privileged).is_ok());
        for name in ["", "net..ipv4", "net.../../x", "net.ipv4/../../kernel"] {
            assert!(check(&one(name), &privileged).is_err(), "{name}");
        }
    }
}
