//! What a host decides for a guest when it starts it: words of the kernel's command line, and settings of the
//! guest's network.

use serde::{Deserialize, Serialize};

/// Settings of the guest's own network namespace, as in Docker: every user may listen on any port, and ping.
/// A container's sysctls are set later and override them.
pub const USERS_NETWORK: [(&str, &str); 2] = [
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
];

/// The container profile of policy/container under which the pod runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Docker's 14 capabilities, seccomp, masked paths.
    Default,
    /// Everything that execd itself may grant (kernel cmdline `hyper_profile=privileged`).
    Privileged,
    /// For untrusted code: no capabilities and a short list of system calls (kernel cmdline
    /// `hyper_profile=restricted`).
    Restricted,
}

impl Profile {
    /// Every profile.
    pub const ALL: [Profile; 3] = [Profile::Default, Profile::Privileged, Profile::Restricted];

    /// The profile with that name; the error lists the names.
    pub fn named(name: &str) -> Result<Profile, String> {
        let found = Profile::ALL.into_iter().find(|profile| profile.name() == name);
        found.ok_or_else(|| {
            format!("no such profile: {name:?} ({})", Profile::ALL.map(Profile::name).join(", "))
        })
    }

    /// The name on the kernel cmdline and in policy/container.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Default => "default",
            Profile::Privileged => "privileged",
            Profile::Restricted => "restricted",
        }
    }
}

/// The most that virtio's 9p transport moves at once with pages of 4 kB (net/9p/trans_virtio.c), in bytes.
/// With the kernel's default of 128 kB a large file takes four times as many round trips.
const NINE_P_MSIZE: u32 = 512_000;

/// The transport of the 9p protocol.
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

/// What the guest caches of a 9p share (`hyper_share_cache=`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShareCache {
    /// Nothing that is not in use: the host and the guest see each other's writes at once, as with the
    /// original.
    Coherent,
    /// Files and names, as long as there is memory. Much faster, for a host that changes nothing below the
    /// share.
    Loose,
}

impl ShareCache {
    /// Both modes.
    pub const ALL: [ShareCache; 2] = [ShareCache::Coherent, ShareCache::Loose];

    /// The value of `hyper_share_cache=`.
    pub fn name(self) -> &'static str {
        match self {
            ShareCache::Coherent => "coherent",
            ShareCache::Loose => "loose",
        }
    }

    /// The kernel's cache mode (Documentation/filesystems/9p.rst).
    ///
    /// `mmap` works like `none`, which reads and writes at the host and caches no name, but it also supports
    /// shared mappings, without which databases and linkers fail. It also reads ahead in mapped files, while
    /// `none` fetches each page of a program in a round trip of its own. From Linux 6.4 on `mmap` also caches
    /// what calls read and write, unless `directio` is given; earlier kernels ignore that word.
    fn mode(self) -> &'static str {
        match self {
            ShareCache::Coherent => "mmap,directio",
            ShareCache::Loose => "loose",
        }
    }

    /// Whether the writes of a process that has exited may not have reached the host yet.
    ///
    /// In the coherent mode this concerns only pages of a shared mapping. The kernel writes them when the
    /// mapping goes, which is before the process is reaped. Kernels whose `release` (of uname) is 6.8 or
    /// later only begin to write them at that time.
    pub fn is_late(self, release: &str) -> bool {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|word| word.parse().unwrap_or(0));
        let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
        match self {
            ShareCache::Coherent => version >= (6, 8),
            ShareCache::Loose => true,
        }
    }
}

/// The mount options of a 9p share.
///
/// `access=client`: files belong to the user who makes them, because the host is told which user that is, and
/// each user has file handles of its own. The guest's kernel checks file modes in any case. `user` would do
/// the same; `client` is the kernel's default, and the only mode that could have ACLs. With `any` every user
/// is root to the host, and all files that users make are root's. Handles of its own cost a user one round
/// trip for each directory that another user has just been in.
pub fn nine_p_options(transport: NinePTransport, cache: ShareCache) -> String {
    let (trans, mode) = (transport.name(), cache.mode());
    format!("trans={trans},version=9p2000.L,msize={NINE_P_MSIZE},access=client,cache={mode}")
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
