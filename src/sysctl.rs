//! The sysctls of a container: those that belong to the pod's namespaces, and which process sets which.
//!
//! The kernel guards files of /proc/sys by the user alone: root may write to them with any capabilities.
//! Another user may write only to the settings of a network, and only with CAP_NET_ADMIN. So mountd, which
//! has CAP_NET_ADMIN and is not root, sets `net.`. The process that becomes a container's init sets the rest,
//! while it is root in the pod's namespaces and has not yet entered the container's.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::unistd::write;

use crate::fault::{Fault, OrFault};
use crate::sandbox::ContainerProfile;
use crate::sys::mount::{Resolve, openat2};

/// Names and values, as the host sent them.
pub type Sysctls = BTreeMap<String, String>;

/// Names of settings that each namespace has, or that runV sets with every container.
const NAMESPACED: [&str; 5] = ["fs.mqueue.", "kernel.msg", "kernel.sem", "kernel.shm", NETWORK];
const ALWAYS: [&str; 1] = ["vm.overcommit_memory"];
/// Names of the network's settings.
const NETWORK: &str = "net.";

/// Refuses sysctls that the profile does not allow, before anything is changed.
pub fn check(sysctls: &Sysctls, profile: &ContainerProfile) -> Result<(), Fault> {
    for name in sysctls.keys() {
        let fault = |why: &str| Err(Fault::new("reading the sysctl", name, why));
        if name.split('.').any(|part| part.is_empty() || part.contains('/')) {
            return fault("it is not a dotted name");
        }
        let open = ALWAYS.contains(&name.as_str()) || is_namespaced(name);
        // Only the privileged profile has a writable /sys, and it may also set what belongs to the whole
        // guest.
        if !open && profile.readonly_sys() {
            return fault("it is the whole guest's: only the privileged profile may set it");
        }
    }
    Ok(())
}

fn is_namespaced(name: &str) -> bool {
    NAMESPACED.iter().any(|prefix| name.starts_with(prefix))
}

/// mountd's part: sets the sysctls of the network, through a /proc.
pub fn set_network(proc: &OwnedFd, sysctls: &Sysctls) -> Result<(), Fault> {
    let network = sysctls.iter().filter(|(name, _)| name.starts_with(NETWORK));
    network.into_iter().try_for_each(|(name, value)| set(proc, name, value))
}

/// Sets all of `sysctls`, for a process that is root in the pod's namespaces. For a setting that each
/// namespace has, the kernel takes the writer's namespace.
pub fn set_all(proc: &OwnedFd, sysctls: &[(&String, &String)]) -> Result<(), Fault> {
    sysctls.iter().try_for_each(|(name, value)| set(proc, name, value))
}

/// The sysctls that are not the network's. In namespaces of a machine (`local`) a setting of no namespace
/// belongs to the machine: it stays as it is, and the log says so.
pub fn others(sysctls: &Sysctls, local: bool) -> Vec<(&String, &String)> {
    let others = sysctls.iter().filter(|(name, _)| !name.starts_with(NETWORK));
    let (ours, machines): (Vec<_>, Vec<_>) = others.partition(|(name, _)| !local || is_namespaced(name));
    for (name, _) in machines {
        log::warn!("{name} is left as it is: it is the machine's");
    }
    ours
}

fn set(proc: &OwnedFd, name: &str, value: &str) -> Result<(), Fault> {
    let path = format!("sys/{}", name.replace('.', "/"));
    let flags = (OFlag::O_WRONLY | OFlag::O_CLOEXEC).bits();
    let file =
        openat2(proc, Path::new(&path), flags, 0, Resolve::NoLinks).fault("opening the sysctl", name)?;
    write(&file, value.as_bytes()).map(drop).fault("setting the sysctl", name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Profile;

    #[test]
    fn a_machine_keeps_its_settings() {
        let all = ["kernel.shmmax", "net.ipv4.ip_forward", "vm.overcommit_memory"];
        let all = Sysctls::from(all.map(|name| (name.to_owned(), "1".to_owned())));
        assert_eq!(others(&all, false).len(), 2, "the network is mountd's");
        assert_eq!(others(&all, true), [(&"kernel.shmmax".to_owned(), &"1".to_owned())]);
    }

    #[test]
    fn only_what_belongs_to_the_pod() {
        let default = ContainerProfile::of(Profile::Default).unwrap();
        let privileged = ContainerProfile::of(Profile::Privileged).unwrap();
        let one = |name: &str| Sysctls::from([(name.to_owned(), "1".to_owned())]);
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
