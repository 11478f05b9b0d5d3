//! A root filesystem on a block device; the disks of the other tests.

use super::*;
use hyperinit::wire::mountd::Reply;
use std::cell::Cell;
use std::process::Command;

/// A loop device with a filesystem. It detaches itself when nobody uses it any more.
pub struct Disk {
    /// Its name under /dev.
    pub name: String,
    file: String,
    attached: Cell<bool>,
}

fn run(command: &str, arguments: &[&str], package: &str) -> String {
    let output = Command::new(command)
        .args(arguments)
        .env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin")
        .output()
        .unwrap_or_else(|error| panic!("{command}: {error} (apt-get install {package})"));
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

impl Disk {
    /// An ext4 of so many megabytes, with what is in a directory.
    pub fn ext4(name: &str, megabytes: u32, source: Option<&Path>) -> Disk {
        let file = format!("{}/{name}.img", support::guest::SCRATCH);
        let size = format!("{megabytes}m");
        let source = source.map(|source| source.to_str().unwrap());
        let mut arguments = vec!["-q", "-m", "0"];
        arguments.extend(source.iter().flat_map(|source| ["-d", source]));
        run("mkfs.ext4", &[arguments, vec![&file, &size]].concat(), "e2fsprogs");
        Disk::attach(file, &[])
    }

    /// An xfs of the least size.
    pub fn xfs(name: &str) -> Disk {
        let file = format!("{}/{name}.img", support::guest::SCRATCH);
        fs::File::create(&file).unwrap().set_len(300 << 20).unwrap();
        run("mkfs.xfs", &["-q", &file], "xfsprogs");
        Disk::attach(file, &[])
    }

    /// A snapshot of it: the same to the last byte.
    pub fn snapshot(&self, name: &str) -> Disk {
        let file = format!("{}/{name}.img", support::guest::SCRATCH);
        run("cp", &["--sparse=always", &self.file, &file], "coreutils");
        Disk::attach(file, &[])
    }

    /// The same file on a device that cannot be written to.
    pub fn write_protected(&self) -> Disk {
        Disk::attach(self.file.clone(), &["--read-only"])
    }

    fn attach(file: String, options: &[&str]) -> Disk {
        if !Path::new("/dev/loop-control").exists() {
            support::guest::node("loop-control", nix::sys::stat::SFlag::S_IFCHR, 10, 237);
        }
        let numbers = fs::read_dir("/sys/block").unwrap().flatten();
        let loops =
            numbers.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("loop")?.parse::<u64>().ok());
        for number in loops.filter(|number| !Path::new(&format!("/dev/loop{number}")).exists()) {
            support::guest::node(&format!("loop{number}"), nix::sys::stat::SFlag::S_IFBLK, 7, number);
        }
        let device = run("losetup", &[&["--find", "--show"], options, &[file.as_str()]].concat(), "mount");
        Disk { name: device.strip_prefix("/dev/").unwrap().to_owned(), file, attached: Cell::new(true) }
    }

    /// Looks at it from outside of all containers.
    pub fn look<T>(&self, look: impl FnOnce(&Path) -> T) -> T {
        let at = format!("{}/look", support::guest::SCRATCH);
        fs::create_dir_all(&at).unwrap();
        run("mount", &[&format!("/dev/{}", self.name), &at], "mount");
        let result = look(Path::new(&at));
        run("umount", &[&at], "mount");
        result
    }

    /// Lets go of it: the kernel detaches it with its last mount. Once, for its number may be another test's
    /// then.
    pub fn detach(&self) {
        assert!(self.attached.replace(false));
        run("losetup", &["-d", &format!("/dev/{}", self.name)], "mount");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.attached.get() {
            let _ = Command::new("losetup").args(["-d", &format!("/dev/{}", self.name)]).output();
        }
    }
}

#[test]
fn a_root_can_be_on_a_disk() {
    guest(|guest| {
        let root = image("disk-source");
        program(&root, "marker", b"", 0o755);
        let disk = Disk::ext4("disk", 16, root.parent());
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
        // Another of the same disk may not write to it.
        pod.prepare("other", json!({"image": disk.name, "fstype": "ext4", "readOnly": true})).unwrap();
        guest.inside("other", |_| assert!(fs::write("/x", "").is_err()));
        for container in ["disk", "other"] {
            pod.mountd(&Request::KillContainer { container: id(container) }).unwrap();
            pod.mountd(&Request::RemoveContainer { container: id(container) }).unwrap();
        }
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

#[test]
fn a_disk_that_has_no_such_address_is_named_by_it() {
    guest(|guest| {
        // The machine's own controllers are not asked to look again.
        let mut pod = Pod::with(guest, pod_files(), &["--local"]);
        image("c");
        let disk = json!({"device": "sda", "addr": "77:0", "fstype": "ext4", "mount": "/data"});
        for more in [json!({"fstype": "ext4", "addr": "77:0"}), json!({"volumes": [disk]})] {
            let fault = pod.prepare("c", more).unwrap_err();
            assert_eq!(
                fault.to_string(),
                "mountd: waiting for the disk SCSI 77:0: No such file or directory"
            );
        }
    });
}

/// A controller that refuses is no reason to have none of the others look: whether the disk comes is what
/// counts.
#[test]
fn a_controller_that_refuses_to_look_keeps_none_from_looking() {
    guest(|guest| {
        const HOSTS: &str = "/sys/class/scsi_host";
        image("web");
        let mut pod = Pod::start(guest);
        let tmpfs = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), "/sys/class", Some("tmpfs"), tmpfs, None::<&str>).unwrap();
        // A directory is not to be written to. One is before the one that works, whatever the order.
        for (name, refuses) in [("host0", true), ("host1", false), ("host2", true)] {
            let scan = Path::new(HOSTS).join(name).join("scan");
            fs::create_dir_all(scan.parent().unwrap()).unwrap();
            if refuses { fs::create_dir(&scan) } else { fs::write(&scan, "") }.unwrap();
        }
        let container = json!({
            "id": "web", "image": "sda", "addr": "3:1", "fstype": "ext4", "rootfs": "rootfs",
            "process": {"args": ["/bin/true"]},
        });
        let container = serde_json::from_value(container).unwrap();
        match pod.mountd.ask(&Request::PrepareContainer { container }).unwrap() {
            Reply::NotYet { fault } => assert!(fault.to_string().contains("SCSI 3:1"), "{fault}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(fs::read_to_string(format!("{HOSTS}/host1/scan")).unwrap(), "0 3 1");
        let log = pod.mountd.log();
        assert!(log.contains("host0/scan") && log.contains("host2/scan"), "{log}");
    });
}
