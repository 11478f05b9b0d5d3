//! The paths of the guest, in one place, because several processes and a person who debugs use them.

use std::path::PathBuf;

use crate::ids::ContainerId;

/// The directory of everything that belongs to hyperinit: a tmpfs of its own, mode 0711.
pub const RUN: &str = "/run/hyperinit";
/// Where the one-shot servers of the ipc-channel bootstrap live; empty once the helpers are up.
pub const IPC: &str = "/run/hyperinit/ipc";
/// The pod's files and kept namespaces.
pub const POD: &str = "/run/hyperinit/pod";
/// The pod's namespaces, one nsfs bind mount each.
pub const POD_NS: &str = "/run/hyperinit/pod/ns";
/// The names of those namespaces; `mnt` is the template of every container's.
pub const POD_NAMESPACES: [&str; 4] = ["ipc", "mnt", "pid", "uts"];
/// The pod's `/dev/shm`, one tmpfs shared by all its containers.
pub const POD_SHM: &str = "/run/hyperinit/pod/shm";
/// The pod's hosts file. Each container has a copy of its own of this and the next two.
pub const POD_HOSTS: &str = "/run/hyperinit/pod/hosts";
/// The pod's resolv.conf.
pub const POD_RESOLV_CONF: &str = "/run/hyperinit/pod/resolv.conf";
/// The pod's hostname file.
pub const POD_HOSTNAME: &str = "/run/hyperinit/pod/hostname";
/// A process that fills a volume locks one byte of this file for the volume.
pub const FILLING: &str = "/run/hyperinit/pod/filling";
/// Where a container's root is put together, in a mount namespace that later becomes the container's alone.
pub const STAGE: &str = "/run/hyperinit/stage";
/// Where a container's scratch is mounted, in the same namespace. A volume is mounted on it while a part of
/// the volume is bound into the container.
pub const VOLUME: &str = "/run/hyperinit/volume";
/// Where the pod's share is mounted at STARTPOD.
pub const SHARE: &str = "/run/hyperinit/share";
/// With `--local`: the directory that stands in for the 9p export, bound here at boot.
pub const LOCAL_SHARE: &str = "/run/hyperinit/local-share";
/// The kernel's modules, in a guest that kept them (`hyper_modules`): one directory, named by the release.
pub const MODULES: &str = "/lib/modules";
/// Programs of the initramfs for the debugging door (`hyperctl initrd --tool`).
pub const TOOLS: &str = "/bin";
/// One directory for each container.
pub const CONTAINERS: &str = "/run/hyperinit/containers";
/// The guest's cgroup v2 root, if the kernel has one.
pub const CGROUP: &str = "/sys/fs/cgroup";
/// How much of a VM's memory does not belong to the pod, in bytes: what the kernel took at boot and what the
/// guest's processes need.
pub const NOT_THE_PODS: &str = "/run/hyperinit/not-the-pods";
/// The pod's cgroup: a child for each container, named by its id.
pub const POD_CGROUP: &str = "/sys/fs/cgroup/pod";

/// The directory of one container: `mnt` is its kept mount namespace.
pub fn container(id: &ContainerId) -> PathBuf {
    PathBuf::from(CONTAINERS).join(id.as_str())
}

/// The kept mount namespace of one container (an nsfs bind mount): `nsenter --mount=FILE` enters it.
pub fn container_mount_ns(id: &ContainerId) -> PathBuf {
    container(id).join("mnt")
}

/// The cgroup v2 of one container.
pub fn container_cgroup(id: &ContainerId) -> PathBuf {
    PathBuf::from(POD_CGROUP).join(id.as_str())
}
