//! READFILE and WRITEFILE.

use hyperinit::wire::Bytes;
use hyperinit::wire::mountd::{FILE_MAX, PART_MAX, Reply};

use super::*;

fn read(pod: &mut Pod<'_>, file: &str) -> Result<Vec<u8>, Fault> {
    let mut all = Vec::new();
    let mut request = Request::ReadFile { container: id("web"), file: file.to_owned() };
    loop {
        match pod.mountd.ask(&request)? {
            Reply::Part { bytes, last } => {
                assert!(bytes.0.len() <= PART_MAX);
                all.extend(bytes.0);
                if last {
                    return Ok(all);
                }
            }
            other => panic!("{other:?}"),
        }
        request = Request::ReadOn { container: id("web") };
    }
}

fn write(pod: &mut Pod<'_>, file: &str, data: &[u8]) -> Result<(), Fault> {
    let data = Bytes(data.to_vec());
    pod.mountd(&Request::WriteFile { container: id("web"), file: file.to_owned(), data })
}

/// A pod with a container `web`.
fn web<'a>(guest: &'a Guest, more: serde_json::Value) -> Pod<'a> {
    let mut pod = Pod::start(guest);
    pod.prepare("web", more).unwrap();
    pod
}

#[test]
fn a_file_is_what_was_written() {
    guest(|guest| {
        let root = image("web");
        let mut pod = web(guest, json!({}));
        write(&mut pod, "/etc/new", b"one two three").unwrap();
        assert_eq!(fs::read(root.join("etc/new")).unwrap(), b"one two three");
        let new = fs::metadata(root.join("etc/new")).unwrap();
        assert_eq!((new.permissions().mode() & 0o7777, new.uid(), new.gid()), (0o644, 0, 0));
        fs::set_permissions(root.join("etc/new"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::hard_link(root.join("etc/new"), root.join("etc/again")).unwrap();
        write(&mut pod, "etc/new", b"one").unwrap();
        assert_eq!(read(&mut pod, "/etc/again").unwrap(), b"one", "the same file, what was in it is gone");
        write(&mut pod, "/etc/new", b"").unwrap();
        assert_eq!(read(&mut pod, "/etc/new").unwrap(), b"");
        let large: Vec<u8> = (0..2 * PART_MAX + 1).map(|at| (at % 251) as u8).collect();
        write(&mut pod, "/tmp/large", &large).unwrap();
        assert!(read(&mut pod, "/tmp/large").unwrap() == large);
        let exactly = &large[..PART_MAX];
        write(&mut pod, "/tmp/exactly", exactly).unwrap();
        assert!(read(&mut pod, "/tmp/exactly").unwrap() == exactly);
        let fault = pod.mountd.ask::<_, Reply>(&Request::ReadOn { container: id("web") }).unwrap_err();
        assert!(fault.to_string().contains("none is being read"), "{fault}");
        // What is mounted in the container is the container's.
        assert_eq!(read(&mut pod, "/etc/hostname").unwrap(), b"thepod\n");
        write(&mut pod, "/etc/hostname", b"x").unwrap();
        assert_eq!(read(&mut pod, "/etc/hostname").unwrap(), b"x");
        assert_eq!(fs::read(paths::POD_HOSTNAME).unwrap(), b"thepod\n");
        write(&mut pod, "/dev/shm/shared", b"all").unwrap();
        assert_eq!(fs::read(Path::new(paths::POD_SHM).join("shared")).unwrap(), b"all");
    });
}

#[test]
fn a_container_that_is_gone_has_no_file_open() {
    guest(|guest| {
        image("web");
        let disk = super::disk::Disk::ext4("volume", 16, None);
        let volume = json!({"device": disk.name, "fstype": "ext4", "mount": "/data"});
        let mut pod = web(guest, json!({"volumes": [volume]}));
        write(&mut pod, "/data/large", &vec![7; 2 * PART_MAX]).unwrap();
        let request = Request::ReadFile { container: id("web"), file: "/data/large".to_owned() };
        assert!(matches!(pod.mountd.ask(&request), Ok(Reply::Part { last: false, .. })));
        pod.mountd(&Request::RemoveContainer { container: id("other") }).unwrap();
        assert!(matches!(
            pod.mountd.ask(&Request::ReadOn { container: id("web") }),
            Ok(Reply::Part { last: false, .. })
        ));
        let fault = pod.mountd.ask::<_, Reply>(&Request::ReadOn { container: id("other") }).unwrap_err();
        assert_eq!(fault.why, "none is being read", "another container's request");
        pod.mountd(&Request::RemoveContainer { container: id("web") }).unwrap();
        let open = fs::read_dir(format!("/proc/{}/fd", pod.mountd.pid())).unwrap().flatten();
        let files: Vec<_> = open.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
        assert!(!files.iter().any(|file| file.ends_with("large")), "{files:?}");
        let fault = pod.mountd.ask::<_, Reply>(&Request::ReadOn { container: id("web") }).unwrap_err();
        assert_eq!(fault.why, "none is being read");
        disk.detach();
    });
}

#[test]
fn procfs_is_read_to_its_end_and_never_waited_for() {
    guest(|guest| {
        image("web");
        let mut pod = web(guest, json!({}));
        let cpuinfo = read(&mut pod, "/proc/cpuinfo").unwrap();
        assert!(cpuinfo.ends_with(b"\n\n"), "{}", String::from_utf8_lossy(&cpuinfo));
        assert!(read(&mut pod, "/proc/1/comm").unwrap().starts_with(b"podinit"));
        assert_eq!(read(&mut pod, "/sys/kernel/mm/transparent_hugepage/enabled").map(|_| ()).err(), None);
    });
}

#[test]
fn only_regular_files_and_nothing_is_waited_for() {
    guest(|guest| {
        let root = image("web");
        nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
        drop(std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap());
        symlink("fifo", root.join("link")).unwrap();
        let mut pod = web(guest, json!({}));
        for (path, what) in [
            ("/fifo", "it is a FIFO"),
            ("/link", "it is a FIFO"),
            ("/socket", "it is a socket"),
            ("/etc", "it is a directory"),
            ("/", "it is a directory"),
            ("/dev/null", "it is a device"),
            ("/dev/tty", "it is a device"),
            ("/proc/interrupts", "it is a device"),
        ] {
            for result in [read(&mut pod, path).map(drop), write(&mut pod, path, b"x")] {
                let fault = result.unwrap_err();
                assert!(fault.to_string().contains(what) && fault.to == path, "{path}: {fault}");
            }
        }
        for (path, errno) in [("/no", Errno::ENOENT), ("", Errno::ENOENT), ("/a\0b", Errno::EINVAL)] {
            assert!(read(&mut pod, path).unwrap_err().is(errno), "{path:?}");
        }
        for (path, errno) in [
            ("/no/file", Errno::ENOENT),
            ("/etc/passwd/file", Errno::ENOTDIR),
            ("", Errno::ENOENT),
            ("/a\0b", Errno::EINVAL),
            ("/tmp/", Errno::EISDIR),
            ("/new/", Errno::EISDIR),
        ] {
            let fault = write(&mut pod, path, b"x").unwrap_err();
            assert!(fault.is(errno) || path == "/tmp/", "{path:?}: {fault}");
        }
        assert!(!root.join("no").exists());
        let fault = done(
            &mut pod.mountd,
            &Request::WriteFile { container: id("nobody"), file: "/f".to_owned(), data: Bytes(vec![]) },
        );
        assert!(fault.unwrap_err().is(Errno::ENOENT));
    });
}

#[test]
fn links_lead_where_they_do_inside() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir("/run/outside").unwrap();
        fs::write("/run/outside/file", "untouched").unwrap();
        for (name, to) in [
            ("absolute", "/run/outside/file"),
            ("up", "../../../../../../run/outside/file"),
            ("loop", "loop"),
            ("magic", "/proc/1/root/run/outside/file"),
            ("fd", "/proc/self/fd/0"),
            ("dangling", "/srv/made"),
            ("passwd", "/../../etc/passwd"),
        ] {
            symlink(to, root.join(name)).unwrap();
        }
        let mut pod = web(guest, json!({}));
        assert!(read(&mut pod, "/passwd").unwrap().starts_with(b"root:"));
        for name in ["absolute", "up", "loop", "magic", "fd"] {
            read(&mut pod, name).unwrap_err();
            write(&mut pod, name, b"changed").unwrap_err();
        }
        for path in ["/../../../run/outside/file", "/proc/1/root/run/outside/file", "/proc/1/cwd/etc/passwd"]
        {
            read(&mut pod, path).unwrap_err();
            write(&mut pod, path, b"changed").unwrap_err();
        }
        assert_eq!(fs::read_to_string("/run/outside/file").unwrap(), "untouched");
        write(&mut pod, "/dangling", b"made").unwrap();
        assert_eq!(fs::read_to_string(root.join("srv/made")).unwrap(), "made");
    });
}

#[test]
fn what_cannot_be_written_says_why() {
    guest(|guest| {
        let root = image("web");
        let mut pod = web(guest, json!({"readOnly": true}));
        for path in ["/new", "/etc/passwd"] {
            assert!(write(&mut pod, path, b"x").unwrap_err().is(Errno::EROFS), "{path}");
        }
        // /dev has a megabyte.
        let fault = write(&mut pod, "/dev/large", &vec![1; (1 << 20) + 4096]).unwrap_err();
        assert!(
            fault.is(Errno::ENOSPC) && fault.to_string().starts_with("mountd: writing /dev/large"),
            "{fault}"
        );
        fs::File::create(root.join("huge")).unwrap().set_len(FILE_MAX as u64 + 1).unwrap();
        let fault = read(&mut pod, "/huge").unwrap_err();
        assert!(fault.to_string().contains("larger than 16777208 bytes"), "{fault}");
    });
}

/// The path is a file, a FIFO, a link that leads out and a directory, in turn, as fast as it goes.
#[test]
fn what_changes_under_the_eye_is_refused_or_read_and_never_waited_for() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir("/run/outside").unwrap();
        fs::write("/run/outside/file", "secret").unwrap();
        let turn = root.join("turn");
        fs::create_dir(&turn).unwrap();
        fs::write(turn.join("file"), "content").unwrap();
        nix::unistd::mkfifo(&turn.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o666)).unwrap();
        symlink("/run/outside/file", turn.join("link")).unwrap();
        fs::create_dir(turn.join("directory")).unwrap();
        let mut pod = web(guest, json!({}));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // What was there before, by mountd's hand too, is in the way of one or the other.
                while !stop.load(Ordering::Relaxed) {
                    for name in ["file", "fifo", "link", "directory"] {
                        let _ = fs::rename(turn.join(name), root.join("path"));
                        let _ = fs::rename(root.join("path"), turn.join(name));
                    }
                    let _ = fs::remove_file(root.join("path"));
                    if !turn.join("file").exists() {
                        fs::write(turn.join("file"), "content").unwrap();
                    }
                }
            });
            let _stop = Stop(&stop);
            for _ in 0..300 {
                if let Ok(bytes) = read(&mut pod, "/path") {
                    assert!(bytes == b"content" || bytes.is_empty(), "{bytes:?}");
                }
                let _ = write(&mut pod, "/path", b"content");
            }
        });
        assert_eq!(fs::read_to_string("/run/outside/file").unwrap(), "secret");
    });
}

/// Somebody makes the file at the moment at which mountd does.
#[test]
fn what_is_made_meanwhile_is_written_over_and_not_into() {
    guest(|guest| {
        let root = image("web");
        let (path, aside, kept) = (root.join("path"), root.join("aside"), root.join("kept"));
        fs::create_dir(&kept).unwrap();
        let mut pod = web(guest, json!({}));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0.. {
                    // Each a file of its own: only mountd writes to what has been there.
                    fs::write(&aside, [b'o'; 100]).unwrap();
                    fs::rename(&aside, &path).unwrap();
                    fs::rename(&path, kept.join(number.to_string())).unwrap();
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let _stop = Stop(&stop);
            let until = std::time::Instant::now() + std::time::Duration::from_secs(2);
            while std::time::Instant::now() < until {
                write(&mut pod, "/path", b"content").unwrap();
            }
        });
        for file in fs::read_dir(&kept).unwrap() {
            let text = fs::read_to_string(file.unwrap().path()).unwrap();
            assert!(text == "content" || !text.starts_with("content"), "what was there is left: {text:?}");
        }
    });
}

/// What mountd may read is more than what the container may.
#[test]
fn a_link_does_not_lead_a_read_to_the_kernel() {
    guest(|guest| {
        let root = image("web");
        for (name, to) in [
            ("maps", "/proc/1/maps"),
            ("self", "/proc/self/environ"),
            ("up", "../../../proc/1/maps"),
            ("setting", "/proc/sys/kernel/shmmni"),
            ("kernel", "/sys/kernel/mm/transparent_hugepage/enabled"),
            ("way", "/proc"),
            ("again", "way/1"),
            ("group", "/sys/fs/cgroup/cgroup.controllers"),
            ("shared", "/dev/shm/file"),
        ] {
            symlink(to, root.join(name)).unwrap();
        }
        let mut pod = web(guest, json!({}));
        for path in
            ["/maps", "self", "/up", "/setting", "/kernel", "/way/1/maps", "/again/maps", "/etc/../maps"]
        {
            let fault = read(&mut pod, path).unwrap_err();
            assert!(fault.is(Errno::EXDEV) || path == "self", "{path}: {fault}");
        }
        read(&mut pod, "/group").unwrap_err();
        // Links of the kernel's lead into it too.
        read(&mut pod, "/proc/mounts").unwrap_err();
        read(&mut pod, "/proc/self/environ").unwrap_err();
        write(&mut pod, "/dev/shm/file", b"own").unwrap();
        assert_eq!(read(&mut pod, "/shared").unwrap(), b"own", "the containers' own");
    });
}

/// Whatever the path: a privileged container may mount them where it likes.
#[test]
fn no_file_of_the_kernels_is_written_and_none_is_read_where_the_host_did_not_name_it() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir(root.join("elsewhere")).unwrap();
        symlink("/elsewhere/1/maps", root.join("link")).unwrap();
        let mut pod = Pod::with(guest, pod_files(), &["--profile", "privileged"]);
        pod.prepare("web", json!({})).unwrap();
        for path in ["/proc/sys/kernel/shmmni", "/proc/1/oom_score_adj", "/sys/kernel/mm/ksm/run"] {
            let fault = write(&mut pod, path, b"7").unwrap_err();
            assert!(fault.to_string().contains("it is the kernel's"), "{path}: {fault}");
        }
        assert_eq!(pod.shell("web", "mount -o bind /proc /elsewhere; cat /elsewhere/1/comm"), "podinit");
        for path in ["/elsewhere/1/maps", "/link", "/elsewhere/cpuinfo"] {
            let fault = read(&mut pod, path).unwrap_err();
            assert!(fault.to_string().contains("it is the kernel's"), "{path}: {fault}");
            write(&mut pod, path, b"7").unwrap_err();
        }
    });
}

/// Where a link leads is the container's idea and not the host's.
#[test]
fn a_link_does_not_lead_a_write_to_the_kernel() {
    guest(|guest| {
        let root = image("web");
        for (name, to) in [
            ("setting", "/proc/sys/kernel/shmmni"),
            ("score", "/proc/1/oom_score_adj"),
            ("sys", "/sys/kernel/mm/ksm/run"),
            ("way", "/proc"),
            ("shared", "/dev/shm/file"),
        ] {
            symlink(to, root.join("etc").join(name)).unwrap();
        }
        let mut pod = web(guest, json!({}));
        let before = read(&mut pod, "/proc/sys/kernel/shmmni").unwrap();
        write(&mut pod, "/dev/shm/file", b"first").unwrap();
        for path in ["/etc/setting", "/etc/score", "/etc/sys", "/etc/way/1/oom_score_adj"] {
            let fault = write(&mut pod, path, b"7").unwrap_err();
            assert!(fault.is(Errno::EXDEV) || path == "/etc/sys", "{path}: {fault}");
        }
        assert_eq!(read(&mut pod, "/proc/sys/kernel/shmmni").unwrap(), before);
        write(&mut pod, "/etc/shared", b"second").unwrap();
        assert_eq!(read(&mut pod, "/dev/shm/file").unwrap(), b"second", "the containers' own");
    });
}
