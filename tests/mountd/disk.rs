//! A root filesystem on a block device.

use super::*;

/// A loop device with an ext4 that holds a rootfs. It detaches itself when nobody uses it any more.
struct Disk {
    name: String,
}

impl Disk {
    fn make() -> Disk {
        let root = image("disk-source");
        program(&root, "marker", b"", 0o755);
        let file = format!("{}/disk", support::guest::SCRATCH);
        let run = |command: &str, arguments: &[&str], package: &str| {
            let output = std::process::Command::new(command)
                .args(arguments)
                .output()
                .unwrap_or_else(|error| panic!("{command}: {error} (apt-get install {package})"));
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        let source = root.parent().unwrap().to_str().unwrap().to_owned();
        run("mkfs.ext4", &["-q", "-d", &source, &file, "16m"], "e2fsprogs");
        support::guest::node("loop-control", nix::sys::stat::SFlag::S_IFCHR, 10, 237);
        let numbers = fs::read_dir("/sys/block").unwrap().flatten();
        let loops =
            numbers.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("loop")?.parse::<u64>().ok());
        for number in loops {
            support::guest::node(&format!("loop{number}"), nix::sys::stat::SFlag::S_IFBLK, 7, number);
        }
        let device = run("losetup", &["--find", "--show", &file], "mount");
        Disk { name: device.strip_prefix("/dev/").unwrap().to_owned() }
    }

    /// Lets go of it: the kernel detaches it with its last mount.
    fn detach(&self) {
        let status =
            std::process::Command::new("losetup").args(["-d", &format!("/dev/{}", self.name)]).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &format!("/dev/{}", self.name)]).status();
    }
}

#[test]
fn a_root_can_be_on_a_disk() {
    guest(|guest| {
        let disk = Disk::make();
        let mut pod = Pod::start(guest);
        pod.prepare("disk", json!({"image": disk.name, "fstype": "ext4"})).unwrap();
        assert_eq!(
            pod.shell("disk", "ls /bin/marker && echo written >/new && cat /new"),
            "/bin/marker\nwritten"
        );
        guest.inside("disk", |mounts| {
            let (options, root, kind) = mount_on(mounts, "/");
            assert_eq!((root, kind), ("/rootfs", "ext4"));
            assert!(options.contains("nodev"), "{options}");
            assert!(!Path::new("/../lost+found").exists());
        });
        pod.mountd(&Request::KillContainer { container: id("disk") }).unwrap();
        pod.mountd(&Request::RemoveContainer { container: id("disk") }).unwrap();
        pod.prepare("disk", json!({"image": disk.name, "fstype": "ext4", "readOnly": true})).unwrap();
        guest.inside("disk", |mounts| {
            assert_eq!(fs::read_to_string("/new").unwrap(), "written\n");
            assert!(mounts.lines().next().unwrap().contains(" ext4 /dev/"), "{mounts}");
            assert!(fs::write("/x", "").is_err());
        });
        for (image, fstype, word) in
            [(disk.name.as_str(), "xfs", "mounting xfs"), ("no-such-disk", "ext4", "waiting for the disk")]
        {
            let fault = pod.prepare("c", json!({"image": image, "fstype": fstype})).unwrap_err();
            assert!(fault.to_string().contains(word), "{fault}");
        }
        disk.detach();
    });
}
