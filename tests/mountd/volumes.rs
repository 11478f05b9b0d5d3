//! Volumes on disks, and parts of the share.

use nix::sys::stat::Mode;

use super::disk::Disk;
use super::*;

/// A volume on a disk; `more` is merged in.
fn volume(disk: &Disk, fstype: &str, mount: &str, more: serde_json::Value) -> serde_json::Value {
    let mut all = json!({"device": disk.name, "fstype": fstype, "mount": mount});
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

fn gone(pod: &mut Pod<'_>, container: &str) {
    pod.mountd(&Request::KillContainer { container: id(container) }).unwrap();
    pod.mountd(&Request::RemoveContainer { container: id(container) }).unwrap();
}

#[test]
fn a_volume_is_the_data_of_its_disk() {
    guest(|guest| {
        let root = image("web");
        image("other");
        let disk = Disk::ext4("volume", 16, None);
        let mut pod = Pod::start(guest);
        let before = guest.mounts();
        let volumes = |more| json!({"volumes": [volume(&disk, "ext4", "/made/for/it", more)]});
        pod.prepare("web", volumes(json!({}))).unwrap();
        assert!(root.join("made/for/it").is_dir());
        assert_eq!(pod.shell("web", "echo word >/made/for/it/file && ls -A /made/for/it"), "file");
        guest.inside("web", |mounts| {
            let (options, root, kind) = mount_on(mounts, "/made/for/it");
            assert_eq!((root, kind), ("/_data", "ext4"));
            assert!(options.starts_with("rw") && options.contains("nodev"), "{options}");
            assert_eq!(mode("/made/for/it"), 0o777, "any user's");
            // With CAP_MKNOD a device can be made there, but it is none.
            let node = nix::sys::stat::SFlag::S_IFCHR;
            let null = nix::sys::stat::makedev(1, 3);
            nix::sys::stat::mknod("/made/for/it/null", node, Mode::S_IRWXU, null).unwrap();
            assert_eq!(
                fs::File::open("/made/for/it/null").unwrap_err().raw_os_error(),
                Some(Errno::EACCES as i32)
            );
        });
        // One disk in two containers at once, for one of them to read.
        pod.prepare("other", volumes(json!({"readOnly": true}))).unwrap();
        assert_eq!(pod.shell("other", "cat /made/for/it/file"), "word");
        guest.inside("other", |_| {
            let refused = fs::write("/made/for/it/other", "").unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::EROFS as i32));
        });
        pod.shell("web", "echo another >/made/for/it/file");
        assert_eq!(pod.shell("other", "cat /made/for/it/file"), "another");
        gone(&mut pod, "web");
        gone(&mut pod, "other");
        assert_eq!(guest.mounts(), before);
        disk.look(|at| {
            assert_eq!(fs::read_to_string(at.join("_data/file")).unwrap(), "another\n");
            let names: BTreeSet<_> =
                fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, ["_data", "lost+found"].into_iter().map(Into::into).collect());
        });
        disk.detach();
        assert_eq!(pod.mountd.log(), "");
    });
}

#[test]
fn a_disk_that_cannot_be_written_to_can_be_read() {
    guest(|guest| {
        image("web");
        let source = Path::new(support::guest::SCRATCH).join("source");
        fs::create_dir_all(source.join("_data")).unwrap();
        fs::write(source.join("_data/file"), "content").unwrap();
        let disk = Disk::ext4("protected", 16, Some(&source));
        let protected = disk.write_protected();
        let mut pod = Pod::start(guest);
        let volumes = |more| json!({"volumes": [volume(&protected, "ext4", "/data", more)]});
        let fault = pod.prepare("web", volumes(json!({}))).unwrap_err();
        assert!(fault.doing.contains("mounting ext4"), "{fault}");
        pod.prepare("web", volumes(json!({"readOnly": true}))).unwrap();
        assert_eq!(pod.shell("web", "cat /data/file"), "content");
        gone(&mut pod, "web");
        protected.detach();
        disk.detach();
    });
}

#[test]
fn snapshots_of_one_xfs_go_together() {
    guest(|guest| {
        image("web");
        let disk = Disk::xfs("one");
        let snapshot = disk.snapshot("two");
        let mut pod = Pod::start(guest);
        let volumes = [volume(&disk, "xfs", "/one", json!({})), volume(&snapshot, "xfs", "/two", json!({}))];
        pod.prepare("web", json!({"volumes": volumes})).unwrap();
        let script = "echo 1 >/one/file && echo 2 >/two/file && cat /one/file /two/file";
        assert_eq!(pod.shell("web", script), "1\n2");
        gone(&mut pod, "web");
        disk.detach();
        snapshot.detach();
    });
}

#[test]
fn a_volume_can_be_a_file() {
    guest(|guest| {
        image("web");
        let source = Path::new(support::guest::SCRATCH).join("source");
        fs::create_dir_all(source.join("_data")).unwrap();
        let file = source.join("_data/.hyper_file_volume_data_do_not_create_on_your_own");
        fs::write(&file, "the file").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let disk = Disk::ext4("file", 16, Some(&source));
        let mut pod = Pod::start(guest);
        let more = json!({"dockerVolume": true});
        let all = json!({"initialize": true, "volumes": [volume(&disk, "ext4", "/srv/new/file", more)]});
        pod.prepare("web", all).unwrap();
        guest.inside("web", |mounts| {
            assert!(
                mount_on(mounts, "/srv/new/file")
                    .1
                    .ends_with("/_data/.hyper_file_volume_data_do_not_create_on_your_own")
            );
            assert_eq!(fs::read_to_string("/srv/new/file").unwrap(), "the file");
            assert_eq!(mode("/srv/new/file"), 0o777, "any user's");
        });
        gone(&mut pod, "web");
        // Beside another it is a file like any.
        disk.look(|at| fs::write(at.join("_data/other"), "").unwrap());
        pod.prepare("web", json!({"volumes": [volume(&disk, "ext4", "/data", json!({}))]})).unwrap();
        guest.inside("web", |_| assert_eq!(fs::read_dir("/data").unwrap().count(), 2));
        gone(&mut pod, "web");
        disk.detach();
    });
}

/// As the original has it, for which a device says nothing then.
#[test]
fn a_volume_can_be_in_memory() {
    guest(|guest| {
        let root = image("web");
        let mut pod = Pod::start(guest);
        let before = guest.mounts();
        let volumes = json!([
            {"fstype": "tmpfs", "mount": "/run/mine"},
            {"device": "tmpfs", "fstype": "tmpfs", "mount": "/read", "readOnly": true, "dockerVolume": true},
        ]);
        pod.prepare("web", json!({"volumes": volumes, "initialize": true})).unwrap();
        assert_eq!(
            pod.shell("web", "ls -A /run/mine; echo word >/run/mine/file; cat /run/mine/file"),
            "word"
        );
        guest.inside("web", |mounts| {
            for (at, access) in [("/run/mine", "rw"), ("/read", "ro")] {
                let (options, root, kind) = mount_on(mounts, at);
                assert_eq!((root, kind), ("/", "tmpfs"));
                for option in [access, "nosuid", "nodev", "noexec"] {
                    assert!(options.split(',').any(|word| word == option), "{options}");
                }
            }
            assert_eq!(mode("/run/mine"), 0o1777);
        });
        gone(&mut pod, "web");
        assert_eq!(guest.mounts(), before);
        assert_eq!(fs::read_dir(root.join("run/mine")).unwrap().count(), 0);
        assert_eq!(pod.mountd.log(), "");
    });
}

#[test]
fn a_volume_that_cannot_be_had_leaves_nothing() {
    guest(|guest| {
        let root = image("web");
        symlink("/", root.join("top")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let source = Path::new(support::guest::SCRATCH).join("source");
        fs::create_dir_all(&source).unwrap();
        symlink("/run", source.join("_data")).unwrap();
        let (disk, evil) = (Disk::ext4("volume", 16, None), Disk::ext4("evil", 16, Some(&source)));
        let mut pod = Pod::start(guest);
        let before = guest.mounts();
        for (bad, words) in [
            (volume(&disk, "xfs", "/data", json!({})), "mounting xfs from /dev/loop"),
            (volume(&disk, "nofs", "/data", json!({})), "mounting nofs from /dev/loop"),
            (volume(&disk, "devtmpfs", "/data", json!({})), "it is the kernel's own and has no disk"),
            (volume(&disk, "proc", "/data", json!({})), "it is the kernel's own and has no disk"),
            (
                volume(&disk, "ext4", "/data", json!({"device": "nothing"})),
                "waiting for the disk /dev/nothing",
            ),
            (volume(&disk, "ext4", "/etc/passwd", json!({})), "making in the image /etc/passwd"),
            (volume(&disk, "ext4", "/loop/data", json!({})), "making in the image /loop/data"),
            (volume(&disk, "ext4", "/proc/new", json!({})), "making in the image /proc/new"),
            (volume(&disk, "ext4", "/top/..", json!({})), "it is the root"),
            (volume(&evil, "ext4", "/data", json!({})), "opening _data of the volume for /data"),
            (
                json!({"device": "192.0.2.7:/srv", "fstype": "nfs", "mount": "/data"}),
                "mounting NFS from 192.0.2.7:/srv",
            ),
        ] {
            let good = volume(&disk, "ext4", "/srv/good", json!({}));
            let fault = pod.prepare("web", json!({"volumes": [good, bad]})).unwrap_err();
            assert!(fault.to_string().contains(words), "{words}: {fault}");
            assert_eq!(guest.mounts(), before, "{words}");
            assert!(!Path::new(paths::CONTAINERS).join("web").exists(), "{words}");
        }
        pod.prepare("web", json!({"volumes": [volume(&disk, "ext4", "/data", json!({}))]})).unwrap();
        gone(&mut pod, "web");
        disk.detach();
        evil.detach();
    });
}

#[test]
fn an_image_cannot_place_a_volume_over_what_protects_the_guest() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir("/run/outside").unwrap();
        symlink("/proc/sys", root.join("data")).unwrap();
        symlink("/run/outside", root.join("out")).unwrap();
        fs::create_dir_all(root.join("run/outside")).unwrap();
        let share = Path::new(paths::LOCAL_SHARE);
        fs::create_dir(share.join("dir")).unwrap();
        fs::write(share.join("dir/file"), "").unwrap();
        let mut pod = Pod::start(guest);
        let fsmap = [json!({"source": "dir", "path": "/data"}), json!({"source": "dir", "path": "/out"})];
        pod.prepare("web", json!({"fsmap": fsmap, "sysctl": {"kernel.shmmax": "123456"}})).unwrap();
        pod.init_sets("web").unwrap();
        guest.inside("web", |mounts| {
            assert!(Path::new("/data/file").exists() && !Path::new("/proc/sys/file").exists());
            assert!(fs::symlink_metadata("/data").unwrap().is_dir(), "a link to what the guest made is dead");
            assert!(Path::new("/run/outside/file").exists(), "inside");
            assert!(
                mounts.lines().any(|line| line.contains(" /sys /proc/sys ro,")),
                "below it is as it was: {mounts}"
            );
            assert_eq!(fs::read("/proc/interrupts").unwrap(), b"");
        });
        assert_eq!(fs::read_dir("/run/outside").unwrap().count(), 0);
        // Set in the kernel and not in a file of that name.
        image("plain");
        pod.prepare("plain", json!({})).unwrap();
        assert_eq!(pod.shell("plain", "cat /proc/sys/kernel/shmmax"), "123456");
    });
}

#[test]
fn the_hosts_null_device_is_the_guests_own_and_no_other_device_is_one() {
    guest(|guest| {
        image("web");
        let share = Path::new(paths::LOCAL_SHARE);
        for (name, minor) in [("null", 3), ("zero", 5)] {
            let device = nix::sys::stat::makedev(1, minor);
            let mode = Mode::from_bits_truncate(0o600);
            nix::sys::stat::mknod(&share.join(name), nix::sys::stat::SFlag::S_IFCHR, mode, device).unwrap();
        }
        let mut pod = Pod::start(guest);
        let map = |name: &str| json!({"source": name, "path": format!("/etc/{name}")});
        pod.prepare("web", json!({"fsmap": [map("null"), map("zero")]})).unwrap();
        guest.inside("web", |_| {
            assert_eq!(fs::read("/etc/null").unwrap(), b"");
            fs::write("/etc/null", "gone").unwrap();
            let refused = fs::set_permissions("/etc/null", fs::Permissions::from_mode(0o600)).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::EROFS as i32));
            assert_eq!((mode("/etc/null"), mode("/dev/null")), (0o666, 0o666));
            let refused = fs::read("/etc/zero").unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::EACCES as i32));
        });
        pod.mountd(&Request::SyncShare).unwrap();
        assert_eq!(pod.mountd.log(), "");
    });
}

#[test]
fn parts_of_the_share_are_bound() {
    guest(|guest| {
        let root = image("web");
        let share = Path::new(paths::LOCAL_SHARE);
        fs::create_dir_all(share.join("maps/dir")).unwrap();
        fs::create_dir_all(share.join("maps/docker")).unwrap();
        fs::write(share.join("maps/dir/file"), "in it").unwrap();
        fs::write(share.join("maps/file"), "a file").unwrap();
        let mut pod = Pod::start(guest);
        let before = guest.mounts();
        let fsmap = json!([
            {"source": "maps/dir", "path": "/mnt/dir"},
            {"source": "/maps/dir", "path": "/mnt/ro", "readOnly": true},
            {"source": "maps/file", "path": "/mnt/new/file"},
            {"source": "maps/file", "path": "/etc/passwd", "readOnly": true, "dockerVolume": true},
            {"source": "maps/docker", "path": "/mnt/docker", "dockerVolume": true},
        ]);
        pod.prepare("web", json!({"fsmap": fsmap})).unwrap();
        guest.inside("web", |mounts| {
            fs::write("/mnt/dir/new", "new").unwrap();
            assert_eq!(fs::read_to_string("/mnt/ro/new").unwrap(), "new");
            assert_eq!(fs::write("/mnt/ro/x", "").unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
            fs::write("/mnt/new/file", "changed").unwrap();
            assert_eq!(fs::read_to_string("/etc/passwd").unwrap(), "changed");
            assert_eq!(fs::write("/etc/passwd", "").unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
            fs::write("/mnt/docker/data", "").unwrap();
            assert!(mount_on(mounts, "/mnt/docker").1.ends_with("/maps/docker/_data"));
            assert!(mount_on(mounts, "/mnt/dir").0.contains("nodev"));
        });
        assert!(share.join("maps/docker/_data/data").exists() && share.join("maps/dir/new").exists());
        assert!(root.join("mnt/new/file").exists());
        assert!(fs::read_to_string(root.join("etc/passwd")).unwrap().starts_with("root:"));
        gone(&mut pod, "web");
        assert_eq!(guest.mounts(), before);
    });
}

#[test]
fn a_part_of_the_share_is_one_whatever_a_link_says() {
    guest(|guest| {
        image("web");
        let share = Path::new(paths::LOCAL_SHARE);
        fs::create_dir_all("/run/outside").unwrap();
        fs::create_dir_all(share.join("mine")).unwrap();
        symlink("/web/rootfs", share.join("mine/link")).unwrap();
        symlink("../web", share.join("mine/_data")).unwrap();
        symlink("/run/outside", share.join("out")).unwrap();
        let mut pod = Pod::start(guest);
        for (source, docker, errno) in [
            ("out", false, Errno::ELOOP),
            ("mine/link/etc", false, Errno::ELOOP),
            ("mine", true, Errno::ELOOP),
            ("../../outside", false, Errno::EXDEV),
            ("nothing", false, Errno::ENOENT),
        ] {
            let map = json!({"source": source, "path": "/data", "dockerVolume": docker});
            let fault = pod.prepare("web", json!({"fsmap": [map]})).unwrap_err();
            let refused = fault.is(errno) || (docker && fault.is(Errno::ENOTDIR));
            assert!(refused, "{source}: {fault}");
        }
    });
}

#[test]
fn what_is_further_up_is_bound_before_what_is_below_it() {
    guest(|guest| {
        image("web");
        let share = Path::new(paths::LOCAL_SHARE);
        for name in ["outer", "inner", "etc"] {
            fs::create_dir(share.join(name)).unwrap();
            fs::write(share.join(name).join(name), "").unwrap();
        }
        let mut pod = Pod::start(guest);
        let fsmap = json!([
            {"source": "inner", "path": "/data/in"}, {"source": "outer", "path": "/data"}, {"source": "etc", "path": "/etc"}
        ]);
        let process = json!({"args": ["x"], "workdir": "/data/in/work"});
        pod.prepare("web", json!({"fsmap": fsmap, "initialize": true, "process": process})).unwrap();
        assert_eq!(
            pod.shell("web", "ls /data /data/in /etc"),
            "/data:\nin\nouter\n\n/data/in:\ninner\nwork\n\n/etc:\netc"
        );
        assert!(share.join("inner/work").is_dir(), "the workdir is where the process will be");
    });
}

#[test]
fn who_names_the_place_of_a_pods_file_has_his_own_there() {
    guest(|guest| {
        let root = image("web");
        let share = Path::new(paths::LOCAL_SHARE);
        fs::create_dir(share.join("etc")).unwrap();
        for (name, text) in [("hosts", "my hosts"), ("hostname", "my name"), ("resolv.conf", "my servers")] {
            fs::write(share.join(name), text).unwrap();
        }
        // By another name of the directory, too.
        symlink("etc", root.join("settings")).unwrap();
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        let fsmap = json!([
            {"source": "hosts", "path": "/etc/hosts"},
            {"source": "hostname", "path": "settings/hostname", "readOnly": true},
            {"source": "resolv.conf", "path": "/etc/resolv.conf"},
        ]);
        pod.prepare("web", json!({"fsmap": fsmap})).unwrap();
        let said = pod.shell("web", "cd /etc; cat hosts hostname resolv.conf; echo more >>hosts");
        assert_eq!(said, "my hostsmy namemy servers");
        assert_eq!(fs::read_to_string(share.join("hosts")).unwrap(), "my hostsmore\n");
        gone(&mut pod, "web");
        let fsmap = json!([{"source": "etc", "path": "/etc"}]);
        pod.prepare("web", json!({"fsmap": fsmap, "initialize": true})).unwrap();
        assert_eq!(pod.shell("web", "ls -A /etc"), "");
        assert_eq!(fs::read_dir(share.join("etc")).unwrap().count(), 0, "nothing is made in it");
        assert_eq!(pod.mountd.log(), "");
    });
}

/// `/var/run -> /run`, and a volume at each: both are the host's words.
#[test]
fn a_link_may_lead_a_volume_into_another() {
    guest(|guest| {
        let root = image("web");
        let share = Path::new(paths::LOCAL_SHARE);
        for name in ["run", "app"] {
            fs::create_dir(share.join(name)).unwrap();
        }
        fs::write(share.join("socket"), "a socket").unwrap();
        for (to, name) in [("/run", "var"), ("/dev", "devices"), ("/dev/shm", "shared")] {
            symlink(to, root.join(name)).unwrap();
        }
        let mut pod = Pod::start(guest);
        let fsmap = json!([
            {"source": "socket", "path": "/var/app.sock"},
            {"source": "app", "path": "/var/app"},
            {"source": "app", "path": "/shared/app"},
            {"source": "run", "path": "/run"},
        ]);
        pod.prepare("web", json!({"fsmap": fsmap})).unwrap();
        assert_eq!(
            pod.shell("web", "cat /run/app.sock; ls /run /dev/shm"),
            "a socket/dev/shm:\napp\n\n/run:\napp\napp.sock"
        );
        gone(&mut pod, "web");
        // On the way there it is no link that could give way.
        let fsmap = json!([{"source": "app", "path": "/devices/app"}]);
        let fault = pod.prepare("web", json!({"fsmap": fsmap})).unwrap_err();
        assert!(
            fault.to_string().contains("/devices/app: a link leads to what is the guest's own"),
            "{fault}"
        );
        // What the host names itself is another matter.
        let fsmap = json!([{"source": "app", "path": "/dev/app"}]);
        pod.prepare("web", json!({"fsmap": fsmap})).unwrap();
        assert_eq!(pod.shell("web", "ls -d /dev/app"), "/dev/app");
    });
}
