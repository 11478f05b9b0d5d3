//! init ⇄ mountd.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::frame::{CONTROL_HEADER, CONTROL_MAX};
use crate::ids::ContainerId;
use crate::spec::Container;
pub use hyperinit_protocol::boot::{NinePTransport, ShareCache, nine_p_options};

use super::{Bytes, MOUNT, MOUNTDS, Terms};

/// The largest file that READFILE answers with, in bytes: it has to fit a frame.
pub const FILE_MAX: usize = CONTROL_MAX - CONTROL_HEADER;
/// How much of a file one reply carries at most, in bytes: it fits the socket's buffer (208 kB by default),
/// so that mountd has answered and is free for others.
pub const PART_MAX: usize = 64 << 10;

/// What init asks of mountd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Look for devices that were plugged: the PCI bus.
    Rescan,
    /// Set the clock from the RTC, and renew the random pool: the guest may have slept, or be a copy.
    WakeUp,
    /// Take processors and memory into use that were plugged. Nothing to do is no error.
    Online,
    /// Unplug a NIC: its PCI device goes, and the link, its addresses and its routes with it.
    Unplug {
        /// The link's name.
        device: String,
    },
    /// Mount the share, write hosts, hostname and resolv.conf, make the pod's shm. Undoes itself when it
    /// fails.
    PreparePod {
        /// The pod's files.
        pod: PodFiles,
    },
    /// Build a container's mount namespace and keep it as `paths::container_mount_ns`. Undoes itself when it
    /// fails. It waits for a disk and fills a new volume only for a moment, and has to be asked again then:
    /// the host may have given it up.
    PrepareContainer {
        /// What the host said of it.
        container: Box<Container>,
    },
    /// Read a regular file of a container. The answer is its beginning; `ReadOn` reads on. A new ReadFile
    /// forgets the last.
    ReadFile {
        /// Whose.
        container: ContainerId,
        /// Its path there.
        file: String,
    },
    /// The next part of the file that is being read.
    ReadOn {
        /// Whose file it is.
        container: ContainerId,
    },
    /// Write a regular file of a container: what was in it is gone, one that is not there is made (0644).
    WriteFile {
        /// Whose.
        container: ContainerId,
        /// Its path there.
        file: String,
        /// All that it shall contain.
        data: Bytes,
    },
    /// Kill everything that is left in the container, and answer when nothing of it runs (zombies are
    /// init's).
    KillContainer {
        /// Which.
        container: ContainerId,
    },
    /// Unmount and forget the container. One that is not there is no error: this is also the undo.
    RemoveContainer {
        /// Which.
        container: ContainerId,
    },
    /// Have everything that was written to the share at its host. Without a share there is nothing to do.
    SyncShare,
    /// Have everything that was written to any filesystem on its disk or at its server.
    Sync,
    /// Undo everything since PreparePod, then sync.
    DestroyPod,
}

/// Requests to mountd that keep their order, and that one mountd does at a time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Those about one container.
    Container(ContainerId),
    /// Those about the pod. The clock is set before the pod's files are made.
    Pod,
    /// Those about devices.
    Devices,
    /// The share.
    Share,
    /// Every filesystem.
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
            // mountd keeps the file open for it.
            Request::ReadOn { .. } => Terms { may_fail: false, ..Terms::once(MOUNT) },
        }
    }

    /// What it keeps its order with.
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

    /// How many of the mountds it may be sent to, counted from the first. The last is for kills, and the one
    /// before for requests that end something else, however many of the others are held up. A request that
    /// may be sent to more of them comes first.
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

/// What the pod's containers share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFiles {
    /// The content of `hostname`, and a name in `hosts` unless it is empty.
    pub hostname: String,
    /// The address of that name; with none it is 127.0.1.1.
    pub address: Option<IpAddr>,
    /// `nameserver` lines; with none (and no search, no options) there is no resolv.conf.
    pub dns: Vec<String>,
    /// The `search` line.
    pub dns_search: Vec<String>,
    /// The `options` line.
    pub dns_options: Vec<String>,
    /// The share, if the pod has one.
    pub share: Option<Share>,
}

/// Where the share comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Share {
    /// A 9p export with this mount tag; on virtio, a virtiofs if no 9p device offers it.
    NineP {
        /// The mount tag.
        tag: String,
        /// What it travels over.
        transport: NinePTransport,
        /// What the guest keeps of it.
        cache: ShareCache,
    },
    /// The directory bound at `paths::LOCAL_SHARE` (`--local`).
    Local,
}

/// What mountd answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// PrepareContainer: its disk has not been plugged yet. Ask again, or tell the host why not.
    NotYet {
        /// What is missing.
        fault: Fault,
    },
    /// PrepareContainer: a new volume is being filled from the image. Ask again: it goes on then.
    Populating,
    /// ReadFile, ReadOn: a part of the file.
    Part {
        /// At most `PART_MAX` of them; none only at the end.
        bytes: Bytes,
        /// Whether the file ends with it.
        last: bool,
    },
}
