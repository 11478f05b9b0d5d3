//! What a host decides for a guest when it starts it: words of the kernel's command line, and settings of its
//! network.

use serde::{Deserialize, Serialize};

/// Settings of a network namespace of the guest's own, as Docker has them: every user may listen on any port,
/// and ping. A container's sysctls come later and count.
pub const USERS_NETWORK: [(&str, &str); 2] = [
    ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
];

/// Which container profile of policy/container the pod runs under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Docker's 14 capabilities, seccomp, masked paths.
    Default,
    /// Everything execd has to give (kernel cmdline `hyper_profile=privileged`).
    Privileged,
    /// For code that nobody trusts: no capabilities, a short list of calls (kernel cmdline
    /// `hyper_profile=restricted`).
    Restricted,
}

impl Profile {
    /// All of them.
    pub const ALL: [Profile; 3] = [Profile::Default, Profile::Privileged, Profile::Restricted];

    /// The profile of that name.
    pub fn named(name: &str) -> Result<Profile, String> {
        let found = Profile::ALL.into_iter().find(|profile| profile.name() == name);
        found.ok_or_else(|| {
            format!("no such profile: {name:?} ({})", Profile::ALL.map(Profile::name).join(", "))
        })
    }

    /// As on the kernel cmdline and in policy/container.
    pub fn name(self) -> &'static str {
        match self {
            Profile::Default => "default",
            Profile::Privileged => "privileged",
            Profile::Restricted => "restricted",
        }
    }
}

/// The most that virtio's 9p transport moves at once with pages of 4 kB (net/9p/trans_virtio.c), in bytes.
/// The kernel's default, 128 kB, makes four times as many round trips for a large file.
const NINE_P_MSIZE: u32 = 512_000;

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
    /// Nothing that is not in use: the host and the guest see at once what the other writes, as with the
    /// original.
    Coherent,
    /// Files and names, for as long as there is memory: much faster, for a host that changes nothing below
    /// the share.
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
    /// `mmap` is `none`, which reads and writes at the host and keeps no name, but has shared mappings:
    /// without, databases and linkers fail. And it reads ahead in what is mapped; `none` gets each page of a
    /// program in a round trip of its own. From Linux 6.4 on `mmap` also keeps what is read and written by
    /// calls, unless `directio` is there; kernels before do not know that word and pass over it.
    fn mode(self) -> &'static str {
        match self {
            ShareCache::Coherent => "mmap,directio",
            ShareCache::Loose => "loose",
        }
    }

    /// Whether a process that has exited may have written what is not at the host yet.
    ///
    /// In the coherent mode that can only be pages of a shared mapping. The kernel writes them when the
    /// mapping goes, which is before the process is reaped. `release` (uname's) 6.8 and later only begin to
    /// write them then.
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
/// `access=client`: what a user makes is his, for the host is told who he is, and each user has handles of
/// his own. The guest's kernel checks the modes of files in any case. `user` would do the same; `client` is
/// the kernel's default, and the only one that could have ACLs. With `any` everybody is root to the host, and
/// all that he makes root's. Handles of his own cost a user one round trip for each directory that another
/// user has just been in.
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
