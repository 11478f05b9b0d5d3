//! The Debian roots. What a scenario changes in one is discarded with it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hyperinit::sys::mount::enter_new_namespace;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::guest::scratch;

/// The contents of a root, as `scripts/world` defines it. The later one includes the earlier.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Set {
    /// The root of `make test`.
    Core,
    /// The root of `make world`.
    All,
}

/// Whether all scenarios are to run (`WORLD=all`).
pub fn all() -> bool {
    std::env::var("WORLD").is_ok_and(|which| which == "all")
}

/// The largest root of this run.
pub fn largest() -> Set {
    if all() { Set::All } else { Set::Core }
}

/// A writable root: an overlay over the stored root, in a mount namespace of the test's thread.
pub struct Root {
    pub set: Set,
    directory: PathBuf,
}

/// Runs `test` with a root, on a separate thread.
pub fn with(set: Set, test: impl FnOnce(&Root) + Send) {
    assert!(set <= largest(), "this scenario needs the large root: make world");
    std::thread::scope(|scope| {
        if let Err(panic) = scope.spawn(|| test(&Root::new(largest()))).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

impl Root {
    fn new(set: Set) -> Root {
        let name = match set {
            Set::Core => "core",
            Set::All => "all",
        };
        let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/world").join(name);
        assert!(kept.with_extension("made").exists(), "no .cache/world/{name}: scripts/world {name}");
        enter_new_namespace().unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let directory = scratch();
        mount(Some("tmpfs"), &directory, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
        let root = Root { set, directory };
        for part in ["upper", "work", "share/image/rootfs"] {
            std::fs::create_dir_all(root.directory.join(part)).unwrap();
        }
        let at = root.directory.display();
        // Without `xino=on`, a file's inode number would change when it is first written to, and virtiofsd
        // identifies files by their numbers (docs/limits.md).
        let options = format!("lowerdir={},upperdir={at}/upper,workdir={at}/work,xino=on", kept.display());
        mount(Some("overlay"), &root.path(), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .expect("mounting an overlay (CONFIG_OVERLAY_FS)");
        root
    }

    /// The share for a guest: the root is its image `image`.
    pub fn share(&self) -> PathBuf {
        self.directory.join("share")
    }

    fn path(&self) -> PathBuf {
        self.share().join("image/rootfs")
    }

    /// Runs a program in a chroot, in namespaces like those of a container, without the rest of a guest.
    /// Returns its exit status, stdout and stderr.
    pub fn chroot(
        &self,
        user: &str,
        words: &[String],
        environment: &[(&str, String)],
    ) -> (i32, String, String) {
        // Docker provides these files and settings for a container.
        let prepare = "set -eu; cd \"$1\"; shift
            mount --rbind /dev dev; mount -t tmpfs -o mode=1777 shm dev/shm; mount -t proc proc proc; mount -t sysfs sysfs sys
            ip link set lo up; hostname pod-1; echo pod-1 >etc/hostname
            printf '127.0.0.1 localhost\\n::1 localhost\\n127.0.1.1 pod-1\\n' >etc/hosts
            echo 0 >/proc/sys/net/ipv4/ip_unprivileged_port_start; echo '0 2147483647' >/proc/sys/net/ipv4/ping_group_range
            user=$1; shift
            exec chroot --userspec=\"$user\" . /usr/bin/env -i \"$@\"";
        let output = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--net",
                "--uts",
                "--ipc",
                "sh",
                "-c",
                prepare,
                "sh",
            ])
            .arg(self.path())
            .arg(user)
            .args(environment.iter().map(|(name, value)| format!("{name}={value}")))
            .args(words)
            .env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin")
            .stdin(Stdio::null())
            .output()
            .expect("unshare is missing: apt-get install util-linux");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        for path in [self.path(), self.directory.clone()] {
            let _ = umount2(&path, MntFlags::MNT_DETACH);
        }
        let _ = std::fs::remove_dir(&self.directory);
    }
}
