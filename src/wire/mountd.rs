//! init ⇄ mountd.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::channel::{Bulk, Bytes, Payload};
use crate::fault::Fault;
use crate::frame::{CONTROL_HEADER, CONTROL_MAX};
use crate::ids::ContainerId;
use crate::spec::Container;
pub use hyperinit_protocol::boot::{NinePTransport, ShareCache, nine_p_options};

/// The largest file that READFILE answers with, in bytes: it has to fit a frame.
pub const FILE_MAX: usize = CONTROL_MAX - CONTROL_HEADER;
/// How much of a file one reply carries at most, in bytes: it fits the socket's buffer (208 kB by default), so that mountd
/// has answered and is free for others.
pub const PART_MAX: usize = 64 << 10;

/// What init asks of mountd.
#[derive(Debug, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant, reason = "one is under way at a time")]
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
    /// Mount the share, write hosts, hostname and resolv.conf, make the pod's shm. Undoes itself when it fails.
    PreparePod {
        /// The pod's files.
        pod: Bulk<PodFiles>,
    },
    /// Build a container's mount namespace and keep it as `paths::container_mount_ns`. Undoes itself when it fails. It waits
    /// for a disk and fills a new volume only for a moment, and has to be asked again then: the host may have given it
    /// up.
    PrepareContainer {
        /// What the host said of it.
        container: Bulk<Container>,
    },
    /// Read a regular file of a container. The answer is its beginning; `ReadOn` reads on. A new ReadFile forgets the last.
    ReadFile {
        /// Whose.
        container: ContainerId,
        /// Its path there.
        file: String,
    },
    /// The next part of the file that is being read.
    ReadOn,
    /// Write a regular file of a container: what was in it is gone, one that is not there is made (0644).
    WriteFile {
        /// Whose.
        container: ContainerId,
        /// Its path there.
        file: String,
        /// All that it shall contain.
        data: Payload,
    },
    /// Kill everything that is left in the container, and answer when nothing of it runs (zombies are init's).
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
