//! Disk images: files with a filesystem in them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Runs a program of a package; it must succeed.
pub fn run(program: &str, arguments: &[&str], package: &str) {
    let output = Command::new(program).args(arguments).env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin").output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error} (apt-get install {package})"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An ext4 of so many megabytes, with what is in a directory.
pub fn ext4(image: &Path, megabytes: u64, source: Option<&Path>) -> PathBuf {
    File::create(image).unwrap().set_len(megabytes << 20).unwrap();
    let mut arguments = vec!["-q", "-t", "ext4", "-m", "0"];
    if let Some(source) = source {
        arguments.extend(["-d", source.to_str().unwrap()]);
    }
    arguments.push(image.to_str().unwrap());
    run("mke2fs", &arguments, "e2fsprogs");
    image.to_owned()
}

/// An empty xfs.
pub fn xfs(image: &Path) -> PathBuf {
    File::create(image).unwrap().set_len(300 << 20).unwrap();
    run("mkfs.xfs", &["-q", image.to_str().unwrap()], "xfsprogs");
    image.to_owned()
}

/// Another one that is the same to the last byte.
pub fn snapshot(image: &Path) -> PathBuf {
    let copy = image.with_extension("snapshot");
    run("cp", &["--sparse=always", image.to_str().unwrap(), copy.to_str().unwrap()], "coreutils");
    copy
}

/// An image with a directory /data that has one of each, for volumes that are populated. Returns the script
/// by which a container tells of them, and what it says.
pub fn one_of_each(root: &Path) -> (&'static str, &'static str) {
    let data = root.join("data");
    fs::create_dir_all(data.join("sub")).unwrap();
    fs::write(data.join("sub/file"), "the image's\n").unwrap();
    fs::hard_link(data.join("sub/file"), data.join("same")).unwrap();
    std::os::unix::fs::symlink("sub/file", data.join("link")).unwrap();
    let mode = |path: &str, mode| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        fs::set_permissions(data.join(path), mode).unwrap();
    };
    std::os::unix::fs::chown(data.join("sub"), Some(33), Some(34)).unwrap();
    mode("sub", 0o2750);
    mode("same", 0o640);
    File::open(data.join("same")).unwrap().set_modified(at(1_000_000_000)).unwrap();
    File::open(data.join("sub")).unwrap().set_modified(at(1_100_000_000)).unwrap();
    let script = "cd /data; ls -A | tr '\\n' ' '; cat link; readlink link; stat -c '%u:%g %a %Y' sub; stat -c '%h %a %Y' same";
    (script, "link same sub the image's\nsub/file\n33:34 2750 1100000000\n2 640 1000000000\n")
}

fn at(seconds: u64) -> std::time::SystemTime {
    std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds)
}
