//! The share: mounting it, and syncing it to the host.

use std::fs;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::paths;
use hyperinit::wire::mountd::{NinePTransport, Share, ShareCache, nine_p_options};
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount as mount_at};
use nix::sys::stat::Mode;
use nix::unistd::syncfs;

/// The kernel's directory of 9p devices, each a directory with a file `mount_tag`.
const NINE_P_DEVICES: &str = "/sys/bus/virtio/drivers/9pnet_virtio";

/// Mounts the share at `paths::SHARE`.
pub fn mount(share: &Share) -> Result<(), Fault> {
    match share {
        Share::NineP { tag, transport, cache } => from_device(tag, *transport, *cache),
        // The bind is recursive, to include the mounts below it (hyperctl run -v).
        Share::Local => mount_at(
            Some(paths::LOCAL_SHARE),
            paths::SHARE,
            None::<&str>,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            None::<&str>,
        )
        .fault("binding", paths::LOCAL_SHARE),
    }
}

/// Mounts the device with the tag `tag`: 9p if a virtio device reports the tag (or the transport is Xen),
/// else virtiofs, which reports its tag only since Linux 6.9.
fn from_device(tag: &str, transport: NinePTransport, cache: ShareCache) -> Result<(), Fault> {
    let mount = |kind: &str, options: Option<&str>| {
        mount_at(Some(tag), paths::SHARE, Some(kind), MsFlags::MS_NODEV, options)
    };
    if transport == NinePTransport::Xen || nine_p_tags().iter().any(|offered| offered == tag) {
        let options = nine_p_options(transport, cache);
        return mount("9p", Some(&options)).fault("mounting the share", tag);
    }
    mount("virtiofs", None).map_err(|errno| {
        let why = format!("no 9p device offers it, and as virtiofs: {}", errno.desc());
        Fault { errno: Some(errno as i32), ..Fault::new("mounting the share", tag, why) }
    })
}

/// The mount tags of the guest's 9p devices on virtio.
fn nine_p_tags() -> Vec<String> {
    let Ok(devices) = fs::read_dir(NINE_P_DEVICES) else { return Vec::new() };
    let tags =
        devices.flatten().filter_map(|device| fs::read_to_string(device.path().join("mount_tag")).ok());
    tags.map(|tag| tag.trim_end_matches(['\0', '\n']).to_owned()).collect()
}

/// Writes cached data of the share to the host, if it is a 9p. Writes to a virtiofs reach the host at once,
/// and syncing it would make the host sync its own disks.
pub fn sync() -> Result<(), Fault> {
    // The type is read from here, because statfs(2) of a 9p returns the type of the host's filesystem.
    const MOUNTS: &str = "/proc/self/mounts";
    if !is_nine_p(&fs::read_to_string(MOUNTS).fault("reading", MOUNTS)?) {
        return Ok(());
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let share = open(paths::SHARE, flags, Mode::empty()).fault("opening", "the share")?;
    syncfs(&share).fault("syncing", "the share")
}

/// Whether the share is a 9p, according to the text of proc_pid_mounts(5).
fn is_nine_p(mounts: &str) -> bool {
    let share = mounts.lines().rev().find(|line| line.split(' ').nth(1) == Some(paths::SHARE));
    share.is_some_and(|line| line.split(' ').nth(2) == Some("9p"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_mount_is_the_share() {
        let mounts = |kinds: &[&str]| {
            let lines: Vec<String> =
                kinds.iter().map(|kind| format!("9p {} {kind} rw 0 0\n", paths::SHARE)).collect();
            format!("9p / 9p rw 0 0\n{}9p /proc 9p rw 0 0\n", lines.concat())
        };
        assert!(is_nine_p(&mounts(&["9p"])) && is_nine_p(&mounts(&["virtiofs", "9p"])));
        assert!(!is_nine_p(&mounts(&[])) && !is_nine_p(&mounts(&["9p", "virtiofs"])));
    }
}
