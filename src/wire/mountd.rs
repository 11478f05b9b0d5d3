//! The edge between init and mountd.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::frame::{CONTROL_HEADER, CONTROL_MAX};
use crate::ids::ContainerId;
use crate::spec::Container;
pub use hyperinit_protocol::boot::{NinePTransport, ShareCache, nine_p_options};

use super::{Bytes, MOUNT, MOUNTDS, Terms};

/// The largest file that READFILE returns, in bytes: it has to fit one frame.
pub const FILE_MAX: usize = CONTROL_MAX - CONTROL_HEADER;
/// The largest part of a file that one reply carries, in bytes. It fits the socket's buffer (208 kB by
/// default), so mountd never blocks on the reply and is free for other requests.
pub const PART_MAX: usize = 64 << 10;

/// What init asks of mountd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Rescan the PCI bus for devices that were plugged.
    Rescan,
    /// Set the clock from the RTC and reseed the random pool: the guest may have slept, or may be a copy.
    WakeUp,
    /// Bring plugged processors and memory online. If there are none, that is no error.
    Online,
    /// Unplug a NIC: its PCI device is removed, and with it the link, its addresses and its routes.
    Unplug {
        /// The link's name.
        device: String,
    },
    /// Mount the share, write hosts, hostname and resolv.conf, and make the pod's shm. Undoes itself if it
    /// fails.
    PreparePod {
        /// What the pod's files contain.
        pod: PodFiles,
    },
    /// Build a container's mount namespace and keep it as `paths::container_mount_ns`. Undoes itself if it
    /// fails. One request waits for a disk or fills a new volume only for a moment; then init has to ask
    /// again, because the host may have given the container up.
    PrepareContainer {
        /// The container as the host specified it.
        container: Box<Container>,
    },
    /// Read a regular file of a container. The answer is the first part; `ReadOn` reads the next. A new
    /// ReadFile drops the file that was being read.
    ReadFile {
        /// The container.
        container: ContainerId,
        /// The file's path in the container.
        file: String,
    },
    /// Read the next part of the file that is being read.
    ReadOn {
        /// The container of that file.
        container: ContainerId,
    },
    /// Write a regular file of a container. An existing file is overwritten; a missing one is created (mode
    /// 0644).
    WriteFile {
        /// The container.
        container: ContainerId,
        /// The file's path in the container.
        file: String,
        /// The whole content of the file.
        data: Bytes,
    },
    /// Kill everything that is left in the container, and answer when nothing of it runs (init reaps the
    /// zombies).
    KillContainer {
        /// The container.
        container: ContainerId,
    },
    /// Unmount and forget the container. An unknown container is no error, because this is also the undo.
    RemoveContainer {
        /// The container.
        container: ContainerId,
    },
    /// Flush everything that was written to the share to its host. Without a share there is nothing to do.
    SyncShare,
    /// Flush everything that was written to any filesystem to its disk or server.
    Sync,
    /// Undo everything since PreparePod, then sync.
    DestroyPod,
}

/// A lane: requests to mountd that keep their order and of which one mountd does one at a time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Requests about one container.
    Container(ContainerId),
    /// Requests about the pod. The clock is set before the pod's files are made.
    Pod,
    /// Requests about devices.
    Devices,
    /// Requests about the share.
    Share,
    /// Requests about every filesystem.
    Everything,
}

impl Request {
    /// See [`Terms`].
    pub fn terms(&self) -> Terms {
        match self {
            Request::WakeUp
            | Request::Online
            | Request::KillContainer { .. }
            | Request::RemoveContainer { .. }
            | Request::SyncShare
            | Request::Sync
            | Request::DestroyPod => Terms::repeated(MOUNT),
            Request::Rescan
            | Request::Unplug { .. }
            | Request::PreparePod { .. }
            | Request::PrepareContainer { .. }
            | Request::ReadFile { .. }
            | Request::WriteFile { .. } => Terms::once(MOUNT),
            // mountd keeps the file open between the parts, so a successor could not read on.
            Request::ReadOn { .. } => Terms { may_fail: false, ..Terms::once(MOUNT) },
        }
    }

    /// The lane in which the request keeps its order.
    pub fn lane(&self) -> Lane {
        match self {
            Request::PrepareContainer { container } => Lane::Container(container.id.clone()),
            Request::ReadFile { container, .. }
            | Request::ReadOn { container }
            | Request::WriteFile { container, .. }
            | Request::KillContainer { container }
            | Request::RemoveContainer { container } => Lane::Container(container.clone()),
            Request::WakeUp | Request::PreparePod { .. } | Request::DestroyPod => Lane::Pod,
            Request::Rescan | Request::Online | Request::Unplug { .. } => Lane::Devices,
            Request::SyncShare => Lane::Share,
            Request::Sync => Lane::Everything,
        }
    }

    /// How many of the mountds the request may be sent to, counted from the first. The last mountd takes only
    /// kills, and the one before it only kills and requests that end something; so these find a free mountd
    /// however many of the others are blocked. A request that may be sent to more mountds comes first.
    pub fn mountds(&self) -> u8 {
        match self {
            Request::KillContainer { .. } => MOUNTDS,
            Request::RemoveContainer { .. } | Request::DestroyPod | Request::Sync => MOUNTDS - 1,
            Request::Rescan
            | Request::WakeUp
            | Request::Online
            | Request::Unplug { .. }
            | Request::PreparePod { .. }
            | Request::PrepareContainer { .. }
            | Request::ReadFile { .. }
            | Request::ReadOn { .. }
            | Request::WriteFile { .. }
            | Request::SyncShare => MOUNTDS - 2,
        }
    }
}

/// The files that all containers of the pod share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFiles {
    /// The content of `hostname`. Unless it is empty, it is also a name in `hosts`.
    pub hostname: String,
    /// The address of that name in `hosts`; 127.0.1.1 if there is none.
    pub address: Option<IpAddr>,
    /// The `nameserver` lines. If these, the search line and the options are all empty, no resolv.conf is
    /// written.
    pub dns: Vec<String>,
    /// The `search` line.
    pub dns_search: Vec<String>,
    /// The `options` line.
    pub dns_options: Vec<String>,
    /// The share, if the pod has one.
    pub share: Option<Share>,
}

/// The source of the share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Share {
    /// A 9p export with this mount tag. On virtio, the tag may also be that of a virtiofs device, if no 9p
    /// device offers it.
    NineP {
        /// The mount tag.
        tag: String,
        /// The transport of the 9p protocol.
        transport: NinePTransport,
        /// What the guest caches of the share.
        cache: ShareCache,
    },
    /// The directory that is bound at `paths::LOCAL_SHARE` (`--local`).
    Local,
}

/// What mountd answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The request is done.
    Done,
    /// To PrepareContainer: the container's disk has not been plugged yet. init asks again, or tells the host
    /// this fault.
    NotYet {
        /// What is missing.
        fault: Fault,
    },
    /// To PrepareContainer: a new volume is being filled from the image. mountd goes on when init asks again.
    Populating,
    /// To ReadFile and ReadOn: a part of the file.
    Part {
        /// At most `PART_MAX` bytes; empty only at the end of the file.
        bytes: Bytes,
        /// Whether this is the last part.
        last: bool,
    },
}
