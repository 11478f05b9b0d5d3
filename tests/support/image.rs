//! An image on the share: a static busybox, and the account files of a distribution.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use hyperinit::paths;

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 24] = [
    "cat", "chmod", "echo", "env", "false", "head", "id", "kill", "ln", "ls", "mkdir", "mknod", "mount",
    "printf", "ps", "readlink", "rm", "sh", "sleep", "stat", "stty", "test", "tty", "true",
];
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/sh\n";
const GROUP: &str = "root:x:0:\ntty:x:6:\nwww:x:34:\naudio:x:29:web\nvideo:x:44:web,root\n";

/// Makes `<share>/<name>/rootfs` and returns it.
pub fn image(name: &str) -> PathBuf {
    let root = Path::new(paths::LOCAL_SHARE).join(name).join("rootfs");
    for directory in ["bin", "dev", "etc", "proc", "root", "srv", "sys", "tmp"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::copy(BUSYBOX, root.join("bin/busybox"))
        .unwrap_or_else(|error| panic!("{BUSYBOX}: {error} (apt-get install busybox-static)"));
    for applet in APPLETS {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), PASSWD).unwrap();
    fs::write(root.join("etc/group"), GROUP).unwrap();
    root
}

/// Adds a program to an image.
pub fn program(root: &Path, name: &str, bytes: &[u8], mode: u32) {
    let path = root.join("bin").join(name);
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
}
