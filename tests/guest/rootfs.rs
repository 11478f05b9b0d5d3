//! A root filesystem for containers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command as Program;

use nix::sys::stat::{Mode, umask};

/// Makes a root filesystem of busybox with a few accounts.
pub fn make_rootfs(root: &Path) {
    const BUSYBOX: &str = "/bin/busybox";
    // Users other than root have to get in, whatever umask the test runs with.
    umask(Mode::from_bits_truncate(0o022));
    assert!(Path::new(BUSYBOX).exists(), "{BUSYBOX} is missing: apt-get install busybox-static");
    for directory in ["bin", "dev", "etc", "home/web", "proc", "root", "sys", "tmp", "usr/bin", "var"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
    let list = Program::new(BUSYBOX).arg("--list").output().unwrap();
    for applet in String::from_utf8(list.stdout).unwrap().lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/home/web:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).unwrap();
    fs::write(root.join("etc/group"), "root:x:0:\ntty:x:5:\nwww:x:34:\naudio:x:29:web\n").unwrap();
    let mode = |path: &str, mode| {
        fs::set_permissions(root.join(path), std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    };
    mode("tmp", 0o1777);
}
