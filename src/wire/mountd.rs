//! init ⇄ mountd.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::channel::{Bulk, Bytes, Payload};
use crate::fault::Fault;
use crate::frame::{CONTROL_HEADER, CONTROL_MAX};
use crate::ids::ContainerId;
use crate::spec::Container;

/// The most that virtio's 9p transport moves at once with pages of 4 kB (net/9p/trans_virtio.c), in bytes. The kernel's default,
/// 128 kB, makes four times as many round trips for a large file.
const NINE_P_MSIZE: u32 = 512_000;

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

/// What 9p travels over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NinePTransport {
    /// A virtio device.
    Virtio,
    /// Xen's rings.
    Xen,
}

impl NinePTransport {
    /// The value of the mount option `trans`.
    pub fn name(self) -> &'static str {
        match self {
            NinePTransport::Virtio => "virtio",
            NinePTransport::Xen => "xen",
        }
    }
}

/// What the guest keeps of a share by 9p (`hyper_share_cache=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShareCache {
    /// Nothing that is not in use: the host and the guest see at once what the other writes, as with the original.
    Coherent,
    /// Files and names, for as long as there is memory: much faster, for a host that changes nothing below the share.
    Loose,
}

impl ShareCache {
    /// Both.
    pub const ALL: [ShareCache; 2] = [ShareCache::Coherent, ShareCache::Loose];

    /// The value of `hyper_share_cache=`.
    pub fn name(self) -> &'static str {
        match self {
            ShareCache::Coherent => "coherent",
            ShareCache::Loose => "loose",
        }
    }

    /// The mode of the kernel (Documentation/filesystems/9p.rst).
    ///
    /// `mmap` is `none`, which reads and writes at the host and keeps no name, but has shared mappings: without, databases and
    /// linkers fail. And it reads ahead in what is mapped; `none` gets each page of a program in a round trip of its own. From Linux 6.4
    /// on `mmap` also keeps what is read and written by calls, unless `directio` is there; kernels before do not know that word and
    /// pass over it.
    fn mode(self) -> &'static str {
        match self {
            ShareCache::Coherent => "mmap,directio",
            ShareCache::Loose => "loose",
        }
    }

    /// Whether a process that has exited may have written what is not at the host yet.
    ///
    /// In the coherent mode that can only be pages of a shared mapping. The kernel writes them when the mapping goes, which is
    /// before the process is reaped. `release` (uname's) 6.8 and later only begin to write them then.
    pub fn is_late(self, release: &str) -> bool {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|word| word.parse().unwrap_or(0));
        let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        match self {
            ShareCache::Coherent => version >= (6, 8),
            ShareCache::Loose => true,
        }
    }
}

/// The mount options of a share by 9p.
///
/// `access=client`: what a user makes is his, for the host is told who he is, and each user has handles of his own. The guest's
/// kernel checks the modes of files in any case. `user` would do the same; `client` is the kernel's default, and the only one that
/// could have ACLs. With `any` everybody is root to the host, and all that he makes root's. Handles of his own cost a user one
/// round trip for each directory that another user has just been in.
pub fn nine_p_options(transport: NinePTransport, cache: ShareCache) -> String {
    let (trans, mode) = (transport.name(), cache.mode());
    format!("trans={trans},version=9p2000.L,msize={NINE_P_MSIZE},access=client,cache={mode}")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_mounted_as_the_host_has_asked() {
        assert_eq!(
            nine_p_options(NinePTransport::Virtio, ShareCache::Coherent),
            "trans=virtio,version=9p2000.L,msize=512000,access=client,cache=mmap,directio"
        );
        assert_eq!(
            nine_p_options(NinePTransport::Xen, ShareCache::Loose),
            "trans=xen,version=9p2000.L,msize=512000,access=client,cache=loose"
        );
    }

    #[test]
    fn what_a_kernel_writes_late() {
        for (release, late) in [("5.12.0", false), ("6.1.0-35-amd64", false), ("6.7.9", false)]
            .into_iter()
            .chain([("6.8.0", true), ("6.18", true), ("7.0.0-rc1", true)])
        {
            assert_eq!(ShareCache::Coherent.is_late(release), late, "{release}");
            assert!(ShareCache::Loose.is_late(release));
        }
    }
}
