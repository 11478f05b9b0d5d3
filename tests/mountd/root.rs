//! What a container sees.

use super::*;

/// Everything that is mounted in a container of the default profile.
const MOUNTS: [&str; 23] = [
    "/",
    "/dev",
    "/dev/full",
    "/dev/null",
    "/dev/pts",
    "/dev/random",
    "/dev/shm",
    "/dev/tty",
    "/dev/urandom",
    "/dev/zero",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/proc",
    "/proc/bus",
    "/proc/fs",
    "/proc/interrupts",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/sys",
    "/sys/firmware",
    "/sys/kernel/debug",
];

#[test]
fn a_container_sees_its_own_and_nothing_else() {
    guest(|guest| {
        image("other");
        let root = image("web");
        fs::write(root.join("mine"), "").unwrap();
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        let before = guest.mounts();
        pod.prepare("web", json!({})).unwrap();
        let added: Vec<String> = {
            let after = mounted_below(&guest.mounts(), "/");
            after.difference(&mounted_below(&before, "/")).cloned().collect()
        };
        assert_eq!(added, [format!("{}/web/mnt", paths::CONTAINERS)], "all that the guest sees of it");
        guest.inside("web", |mounts| {
            let mounted = mounted_below(mounts, "/");
            // What the kernel of the day has of the hidden files differs.
            let optional = |path: &String| ["/proc/", "/sys/"].iter().any(|below| path.starts_with(below));
            let expected = MOUNTS.iter().map(|&path| path.to_owned()).collect::<BTreeSet<_>>();
            let surely = |set: &BTreeSet<String>| {
                set.iter().filter(|path| !optional(path)).cloned().collect::<BTreeSet<_>>()
            };
            assert_eq!(surely(&mounted), surely(&expected));
            assert!(mounted.contains("/proc/sys") && mounted.contains("/proc/interrupts"), "{mounts}");
            assert!(Path::new("/mine").exists());
            assert!(!Path::new("/../other").exists() && !Path::new(paths::RUN).exists());
            let (options, root, _) = mount_on(mounts, "/");
            assert!(root.ends_with("/web/rootfs"), "{root}");
            assert!(options.starts_with("rw") && options.contains("nodev"), "{options}");
            for line in mounts.lines() {
                assert!(!line.contains("shared:") && !line.contains("master:"), "all are private: {line}");
            }
        });
        assert_eq!(pod.mountd.log(), "");
    });
}

#[test]
fn its_dev_has_the_profiles_nodes_and_no_device_can_be_added() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::start(guest);
        pod.prepare("web", json!({})).unwrap();
        guest.inside("web", |mounts| {
            let names: BTreeSet<String> = fs::read_dir("/dev")
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            let expected = [
                "console", "fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout",
                "tty", "urandom", "zero",
            ];
            assert_eq!(names.iter().map(String::as_str).collect::<Vec<_>>(), expected);
            for (name, number) in [("null", (1, 3)), ("zero", (1, 5)), ("tty", (5, 0))] {
                let node = fs::metadata(format!("/dev/{name}")).unwrap();
                let rdev = node.rdev();
                assert!(node.file_type().is_char_device());
                assert_eq!((nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev)), number);
                assert_eq!(node.permissions().mode() & 0o777, 0o666, "everybody's, whatever the umask was");
            }
            fs::write("/dev/null", "gone").unwrap();
            for (name, to) in [("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdout", "/proc/self/fd/1")] {
                assert_eq!(fs::read_link(format!("/dev/{name}")).unwrap(), Path::new(to));
            }
            let (options, _, kind) = mount_on(mounts, "/dev");
            assert!(kind == "tmpfs" && options.contains("nodev"), "{options}");
            assert!(!mount_on(mounts, "/dev/null").0.contains("nodev"));
            assert_eq!(mount_on(mounts, "/dev/pts").2, "devpts");
            assert_eq!(mode("/dev/pts/ptmx"), 0o666);
            // With CAP_MKNOD one can be made, but it is none.
            support::guest::node("mem", nix::sys::stat::SFlag::S_IFCHR, 1, 1);
            assert_eq!(fs::File::open("/dev/mem").unwrap_err().raw_os_error(), Some(Errno::EACCES as i32));
            assert_eq!(fs::remove_file("/dev/null").unwrap_err().raw_os_error(), Some(Errno::EBUSY as i32));
        });
        assert!(!Path::new("/dev/mem").exists(), "the guest's /dev is another");
    });
}

#[test]
fn what_is_hidden_is_hidden_and_the_guests_null_is_nobodys() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::start(guest);
        pod.prepare("web", json!({})).unwrap();
        guest.inside("web", |mounts| {
            assert_eq!(fs::read("/proc/interrupts").unwrap(), b"");
            assert_eq!(fs::read_dir("/sys/firmware").unwrap().count(), 0);
            let busy = [Some(Errno::EROFS as i32), Some(Errno::EACCES as i32)];
            let change = fs::set_permissions("/proc/interrupts", fs::Permissions::from_mode(0o600));
            assert!(busy.contains(&change.unwrap_err().raw_os_error()), "it would be the guest's /dev/null");
            assert!(busy.contains(&fs::create_dir("/sys/firmware/x").unwrap_err().raw_os_error()));
            let write = fs::OpenOptions::new().write(true).open("/proc/sys/kernel/hostname");
            assert_eq!(write.unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
            assert!(mount_on(mounts, "/sys").0.starts_with("ro,nosuid,nodev,noexec"));
            assert!(mount_on(mounts, "/proc").0.starts_with("rw,nosuid,nodev,noexec"));
        });
        assert_eq!(mode("/dev/null"), 0o666);
    });
}

#[test]
fn a_read_only_root_is_left_as_it_is() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir(root.join("data")).unwrap();
        for name in ["hosts", "hostname", "resolv.conf"] {
            fs::write(root.join("etc").join(name), "the image's\n").unwrap();
        }
        let before = names_below(&root);
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        let more =
            json!({"readOnly": true, "initialize": true, "process": {"args": ["x"], "workdir": "/data"}});
        pod.prepare("web", more).unwrap();
        guest.inside("web", |mounts| {
            let (options, _, kind) = mount_on(mounts, "/");
            assert!(options.starts_with("ro") && kind != "overlay", "{options} {kind}");
            assert_eq!(fs::write("/x", "").unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
            assert_eq!(fs::read_to_string("/etc/hostname").unwrap(), "thepod\n", "its file is bound over");
            for name in ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"] {
                assert_eq!(fs::write(name, "").unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
            }
            fs::write("/dev/shm/x", "").unwrap();
        });
        assert_eq!(names_below(&root), before);
        assert_eq!(fs::read_to_string(root.join("etc/hosts")).unwrap(), "the image's\n");
        assert_eq!(pod.mountd.log(), "");
    });
}

/// The names in a directory and in those below it.
fn names_below(directory: &Path) -> BTreeSet<std::path::PathBuf> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            names.extend(names_below(&entry.path()));
        }
        names.insert(entry.path());
    }
    names
}

/// Docker makes them in the container's layer: an image may be one static program.
#[test]
fn a_read_only_image_needs_no_mount_points() {
    guest(|guest| {
        let root = Path::new(paths::LOCAL_SHARE).join("bare/rootfs");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::copy("/bin/busybox", root.join("bin/sh")).unwrap();
        std::os::unix::fs::chown(&root, Some(7), Some(8)).unwrap();
        fs::set_permissions(&root, fs::Permissions::from_mode(0o750)).unwrap();
        // What would lead a reader of layers astray.
        symlink("/dev/null", root.join("conf")).unwrap();
        fs::create_dir_all(Path::new(paths::LOCAL_SHARE).join("volume")).unwrap();
        fs::write(Path::new(paths::LOCAL_SHARE).join("volume/file"), "the volume's").unwrap();
        let before = names_below(&root);
        let guests = guest.mounts();
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        let with_pod = guest.mounts();
        let more = json!({
            "readOnly": true, "initialize": true, "process": {"args": ["x"], "workdir": "/made/for/it"},
            "fsmap": [{"source": "volume", "path": "/srv/deep/data"}, {"source": "volume/file", "path": "/conf"}],
        });
        pod.prepare("bare", more).unwrap();
        guest.inside("bare", |mounts| {
            assert_eq!(mount_on(mounts, "/").2, "overlay");
            let options = mount_on(mounts, "/").0;
            assert!(options.starts_with("ro") && options.contains("nodev"), "{options}");
            let top = fs::metadata("/").unwrap();
            assert_eq!((top.uid(), top.gid(), top.permissions().mode() & 0o7777), (7, 8, 0o750));
            for name in ["/x", "/etc/x", "/made/for/it/x", "/etc/hosts"] {
                let errno = fs::write(name, "").unwrap_err().raw_os_error();
                assert_eq!(errno, Some(Errno::EROFS as i32), "{name}");
            }
            assert_eq!(fs::read_to_string("/etc/resolv.conf").unwrap(), "nameserver 192.0.2.1\n");
            assert_eq!(fs::read_to_string("/srv/deep/data/file").unwrap(), "the volume's");
            assert_eq!(fs::read_to_string("/conf").unwrap(), "the volume's");
            fs::write("/srv/deep/data/new", "").unwrap();
            assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
            assert!(!Path::new(paths::RUN).exists());
            for line in mounts.lines() {
                assert!(!line.contains("shared:") && !line.contains("master:"), "all are private: {line}");
            }
        });
        assert_eq!(pod.shell("bare", "echo it runs"), "it runs");
        assert_eq!(names_below(&root), before, "the image is as it was");
        assert_eq!(pod.mountd.log(), "");
        pod.mountd(&Request::KillContainer { container: id("bare") }).unwrap();
        pod.mountd(&Request::RemoveContainer { container: id("bare") }).unwrap();
        assert_eq!(guest.mounts(), with_pod);
        assert!(!guests.is_empty());
    });
}

#[test]
fn a_first_start_makes_the_init_layer_and_the_workdir() {
    guest(|guest| {
        let root = image("web");
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        let more = json!({"initialize": true, "process": {"args": ["x"], "workdir": "/var/lib/../www/./a"}});
        pod.prepare("web", more).unwrap();
        assert_eq!(fs::read_link(root.join("etc/mtab")).unwrap(), Path::new("/proc/mounts"));
        for name in ["hosts", "hostname", "resolv.conf"] {
            let made = fs::read_to_string(root.join("etc").join(name)).unwrap();
            assert_eq!(made, "", "made to be mounted over");
        }
        assert!(root.join("var/www/a").is_dir() && root.join("var/lib").is_dir());
        assert_eq!(fs::metadata(root.join("var")).unwrap().permissions().mode() & 0o777, 0o755);
        guest.inside("web", |mounts| {
            assert_eq!(fs::read_to_string("/etc/resolv.conf").unwrap(), "nameserver 192.0.2.1\n");
            assert_eq!(fs::read_to_string("/etc/hostname").unwrap(), "thepod\n");
            let (options, _, kind) = mount_on(mounts, "/etc/hostname");
            assert!(options.starts_with("rw,nosuid,nodev,noexec") && kind == "tmpfs", "{options} {kind}");
        });
    });
}

/// As under Docker they are the container's to change, and what it does to them is nobody else's.
#[test]
fn the_pods_files_are_each_containers_own() {
    guest(|guest| {
        let root = image("web");
        image("other");
        let address = Some("192.0.2.7".parse().unwrap());
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), address, ..pod_files() }, &[]);
        pod.prepare("web", json!({})).unwrap();
        pod.prepare("other", json!({})).unwrap();
        let own = [
            ("/etc/hosts", paths::POD_HOSTS),
            ("/etc/hostname", paths::POD_HOSTNAME),
            ("/etc/resolv.conf", paths::POD_RESOLV_CONF),
        ];
        let texts = own.map(|(_, from)| fs::read_to_string(from).unwrap());
        assert!(texts[0].starts_with("127.0.0.1\tlocalhost\n::1\tlocalhost"), "{}", texts[0]);
        assert!(texts[0].ends_with("\n192.0.2.7\tthepod\n"), "{}", texts[0]);
        guest.inside("web", |_| {
            for ((path, _), text) in own.iter().zip(&texts) {
                assert_eq!(&fs::read_to_string(path).unwrap(), text);
                assert_eq!(mode(path), 0o644);
                fs::write(path, "changed").unwrap();
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
                std::os::unix::fs::chown(path, Some(33), Some(34)).unwrap();
            }
            // So much memory and no more.
            let much = vec![b'x'; 8 << 20];
            let full = fs::write("/etc/hosts", &much).unwrap_err();
            assert_eq!(full.raw_os_error(), Some(Errno::ENOSPC as i32));
            assert!(fs::metadata("/etc/hosts").unwrap().len() <= 1 << 20);
        });
        for ((path, from), text) in own.iter().zip(&texts) {
            assert_eq!(&fs::read_to_string(from).unwrap(), text, "the pod's own");
            assert_eq!(mode(from), 0o644);
            guest.inside("other", |_| assert_eq!(&fs::read_to_string(path).unwrap(), text));
            assert_eq!(fs::read(root.join(&path[1..])).unwrap(), b"");
        }
        // Another start has them anew.
        pod.mountd(&Request::RemoveContainer { container: id("web") }).unwrap();
        pod.prepare("web", json!({})).unwrap();
        guest.inside("web", |_| assert_eq!(fs::read_to_string("/etc/hostname").unwrap(), "thepod\n"));
    });
}

/// A device as a file, a setting of the kernel's: an image has no say in what they are.
#[test]
fn a_link_out_of_the_image_is_replaced() {
    guest(|guest| {
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        let share = Path::new(paths::LOCAL_SHARE);
        fs::create_dir_all(share.join("volume")).unwrap();
        fs::write(share.join("volume/file"), "the volume's").unwrap();
        let hostname = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let links = [
            "/dev/null",
            "../dev/null",
            "/dev/pts/ptmx",
            "/dev/shm/file",
            "/proc/sys/kernel/hostname",
            "/proc/interrupts",
            "/sys/kernel/uevent_helper",
            "/data/file",
        ];
        for (number, link) in links.into_iter().enumerate() {
            let name = format!("web{number}");
            let root = image(&name);
            for file in ["hosts", "hostname", "resolv.conf", "app.conf", "app.d"] {
                symlink(link, root.join("etc").join(file)).unwrap();
            }
            let mut fsmap = vec![json!({"source": "volume", "path": "/data"})];
            // What the host names may lead to a volume, or the shared memory; these links do not.
            if !["/data/file", "/dev/shm/file"].contains(&link) {
                fsmap.push(json!({"source": "volume/file", "path": "/etc/app.conf"}));
                fsmap.push(json!({"source": "volume", "path": "/etc/app.d"}));
            }
            let many = fsmap.len() > 1;
            pod.prepare(&name, json!({"initialize": true, "fsmap": fsmap})).unwrap();
            guest.inside(&name, |mounts| {
                let read =
                    |path: &str| fs::read_to_string(path).unwrap_or_else(|error| panic!("{link}: {error}"));
                assert_eq!(read("/etc/resolv.conf"), "nameserver 192.0.2.1\n", "{link}");
                assert_eq!(read("/etc/hostname"), "thepod\n", "{link}");
                assert!(read("/etc/hosts").contains("localhost"), "{link}");
                assert_eq!(read("/data/file"), "the volume's", "{link}");
                if many {
                    assert_eq!(read("/etc/app.conf"), "the volume's", "{link}");
                    assert_eq!(read("/etc/app.d/file"), "the volume's", "{link}");
                }
                let null = fs::metadata("/dev/null").unwrap();
                assert!(null.file_type().is_char_device() && null.rdev() == nix::sys::stat::makedev(1, 3));
                assert!(fs::metadata("/dev/pts/ptmx").unwrap().file_type().is_char_device(), "{link}");
                assert!(!Path::new("/dev/shm/file").exists(), "{link}");
                assert_eq!(read("/proc/sys/kernel/hostname"), hostname, "{link}");
                let on_null = mounts.lines().filter(|line| line.contains(" /dev/null ")).count();
                assert_eq!(on_null, 1, "{link}: {mounts}");
            });
        }
        assert_eq!(fs::read_to_string(share.join("volume/file")).unwrap(), "the volume's");
        assert_eq!(fs::read_dir(share.join("volume")).unwrap().count(), 1);
        assert_eq!(pod.mountd.log(), "");
    });
}

/// systemd's images have such links, to what a service would make.
#[test]
fn a_link_that_leads_nowhere_is_replaced_by_the_pods_file() {
    guest(|guest| {
        fs::create_dir("/run/outside").unwrap();
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        let links = [
            "../run/systemd/resolve/stub-resolv.conf",
            "/run/outside/file",
            "../../../../../../run/outside/file",
            "/proc/1/root/etc/passwd",
            "/etc/passwd/file",
            "a loop",
        ];
        for (number, link) in links.into_iter().enumerate() {
            let name = format!("web{number}");
            let root = image(&name);
            for file in ["hosts", "hostname", "resolv.conf"] {
                let to = if link == "a loop" { file } else { link };
                symlink(to, root.join("etc").join(file)).unwrap();
            }
            pod.prepare(&name, json!({"initialize": true})).unwrap();
            guest.inside(&name, |_| {
                let read =
                    |path: &str| fs::read_to_string(path).unwrap_or_else(|error| panic!("{link}: {error}"));
                assert_eq!(read("/etc/resolv.conf"), "nameserver 192.0.2.1\n", "{link}");
                assert_eq!(read("/etc/hostname"), "thepod\n", "{link}");
                assert!(read("/etc/hosts").contains("localhost"), "{link}");
            });
            let made = fs::symlink_metadata(root.join("etc/resolv.conf")).unwrap();
            assert!(made.is_file() && made.len() == 0, "{link}");
        }
        assert_eq!(fs::read_dir("/run/outside").unwrap().count(), 0);
        assert_eq!(fs::read_to_string(paths::POD_RESOLV_CONF).unwrap(), "nameserver 192.0.2.1\n");
        assert_eq!(pod.mountd.log(), "");
    });
}

#[test]
fn a_link_that_leads_to_a_file_inside_stays() {
    guest(|guest| {
        let root = image("web");
        fs::write(root.join("srv/resolv.conf"), "the image's\n").unwrap();
        symlink("/srv/resolv.conf", root.join("etc/resolv.conf")).unwrap();
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        pod.prepare("web", json!({"initialize": true})).unwrap();
        guest.inside("web", |_| {
            assert_eq!(fs::read_link("/etc/resolv.conf").unwrap(), Path::new("/srv/resolv.conf"));
            assert_eq!(fs::read_to_string("/etc/resolv.conf").unwrap(), "nameserver 192.0.2.1\n");
        });
        assert_eq!(fs::read_to_string(root.join("srv/resolv.conf")).unwrap(), "the image's\n");
    });
}

#[test]
fn a_later_start_leaves_the_images_own_files() {
    guest(|guest| {
        let root = image("web");
        fs::write(root.join("etc/hosts"), "mine\n").unwrap();
        let mut pod = Pod::start(guest);
        let more = json!({"process": {"args": ["x"], "workdir": "/a"}});
        pod.prepare("web", more).unwrap();
        assert!(!root.join("etc/mtab").exists() && !root.join("a").exists());
        guest.inside("web", |_| assert!(fs::read_to_string("/etc/hosts").unwrap().contains("thepod")));
        pod.mountd(&Request::RemoveContainer { container: id("web") }).unwrap();
        pod.prepare("web", json!({"initialize": true})).unwrap();
        assert_eq!(fs::read_to_string(root.join("etc/hosts")).unwrap(), "mine\n", "it is not written to");
    });
}

#[test]
fn containers_share_the_memory_and_nothing_else() {
    guest(|guest| {
        image("a");
        image("b");
        let mut pod = Pod::start(guest);
        pod.prepare("a", json!({})).unwrap();
        pod.prepare("b", json!({})).unwrap();
        guest.inside("a", |_| {
            fs::write("/dev/shm/x", "hello").unwrap();
            fs::write("/tmp/x", "a's").unwrap();
            fs::write("/dev/x", "a's").unwrap();
        });
        guest.inside("b", |_| {
            assert_eq!(fs::read_to_string("/dev/shm/x").unwrap(), "hello");
            assert!(!Path::new("/tmp/x").exists() && !Path::new("/dev/x").exists());
        });
        assert!(Path::new(paths::POD_SHM).join("x").exists());
    });
}

#[test]
fn sysctls_are_the_pods() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::start(guest);
        let read = |name: &str| fs::read_to_string(format!("/proc/sys/{name}")).unwrap();
        let (before, forward) = (read("kernel/msgmax"), read("net/ipv4/ip_forward"));
        assert_eq!(forward, "0\n");
        let sysctl = json!({"kernel.msgmax": "12345", "net.ipv4.ip_forward": "1"});
        pod.prepare("web", json!({"sysctl": sysctl})).unwrap();
        pod.init_sets("web").unwrap();
        assert_eq!(read("kernel/msgmax"), before, "another IPC namespace's");
        assert_eq!(pod.shell("web", "cat /proc/sys/kernel/msgmax"), "12345");
        assert_eq!(read("net/ipv4/ip_forward"), "1\n", "the pod has the guest's network");
        let mut refused =
            |name: &str, value: &str| pod.prepare("web", json!({"sysctl": {name: value}})).unwrap_err();
        let fault = refused("kernel.core_pattern", "|/evil");
        assert!(fault.to_string().contains("only the privileged profile"), "{fault}");
        assert!(refused("net/../kernel/core_pattern", "x").to_string().contains("not a dotted name"));
        assert!(refused("net.ipv4.no_such_thing", "1").is(Errno::ENOENT));
        assert!(refused("net.ipv4.ip_forward", "many").is(Errno::EINVAL));
        // The container's init sets these, and execd checks them again.
        for (name, value, errno) in
            [("kernel.shm_no_such", "1", Errno::ENOENT), ("kernel.msgmax", "many", Errno::EINVAL)]
        {
            pod.prepare("web", json!({"sysctl": {name: value}})).unwrap();
            let fault = pod.init_sets("web").unwrap_err();
            assert!(fault.is(errno) && fault.to == name, "{fault}");
        }
        pod.prepare("web", json!({})).unwrap();
        pod.wants("web", "kernel.core_pattern", "|/evil");
        let fault = pod.init_sets("web").unwrap_err();
        assert!(fault.to_string().contains("only the privileged profile"), "{fault}");
    });
}
