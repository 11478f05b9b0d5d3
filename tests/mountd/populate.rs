//! New volumes, and what they get from the image.

use std::ffi::CString;
use std::os::unix::fs::chown;

use hyperinit::sys::xattr;
use hyperinit::wire::mountd::Reply;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;

use super::disk::Disk;
use super::*;

fn first_start(disk: &Disk) -> serde_json::Value {
    let volume = json!({"device": disk.name, "fstype": "ext4", "mount": "/data", "dockerVolume": true});
    json!({"initialize": true, "volumes": [volume]})
}

fn gone(pod: &mut Pod<'_>, container: &str) {
    pod.mountd(&Request::KillContainer { container: id(container) }).unwrap();
    pod.mountd(&Request::RemoveContainer { container: id(container) }).unwrap();
}

/// Another time than now, for each name its own.
fn date(path: &Path, seconds: i64) {
    let time = TimeSpec::new(seconds, 5);
    let nofollow = UtimensatFlags::NoFollowSymlink;
    utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, nofollow).unwrap();
}

/// The names in a directory.
fn names(path: impl AsRef<Path>) -> BTreeSet<String> {
    let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

/// An image with one of each kind at /data.
fn one_of_each(root: &Path) {
    let data = root.join("data");
    fs::create_dir_all(data.join("sub/deeper")).unwrap();
    fs::write(data.join("file"), "content").unwrap();
    fs::hard_link(data.join("file"), data.join("sub/same")).unwrap();
    symlink("/etc/passwd", data.join("link")).unwrap();
    symlink("nowhere", data.join("sub/dangling")).unwrap();
    let private = Mode::from_bits_truncate(0o620);
    nix::unistd::mkfifo(&data.join("fifo"), private).unwrap();
    drop(std::os::unix::net::UnixListener::bind(data.join("socket")).unwrap());
    mknod(&data.join("null"), SFlag::S_IFCHR, private, makedev(1, 3)).unwrap();
    let program = data.join("program");
    fs::write(&program, "#!/bin/sh\n").unwrap();
    chown(&program, Some(33), Some(34)).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o6755)).unwrap();
    let sparse = fs::File::create(data.join("sub/sparse")).unwrap();
    std::os::unix::fs::FileExt::write_at(&sparse, b"middle", 40 << 20).unwrap();
    sparse.set_len(200 << 20).unwrap();
    let file = fs::File::open(data.join("file")).unwrap();
    xattr::set(&file, c"user.word", b"value").unwrap();
    // CAP_NET_RAW, permitted and effective (linux/capability.h: VFS_CAP_REVISION_2).
    let capability: Vec<u8> =
        [0x0200_0001_u32, 1 << 13, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    xattr::set(fs::File::open(data.join("program")).unwrap(), c"security.capability", &capability).unwrap();
    xattr::set(fs::File::open(data.join("sub")).unwrap(), c"user.of", b"a directory").unwrap();
    chown(data.join("sub"), Some(1), Some(2)).unwrap();
    fs::set_permissions(data.join("sub"), fs::Permissions::from_mode(0o2750)).unwrap();
    chown(&data, Some(33), Some(34)).unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o1711)).unwrap();
    for (number, name) in
        ["file", "link", "fifo", "program", "sub/sparse", "sub/deeper", "sub", ""].iter().enumerate()
    {
        date(&data.join(name), 1_000_000 + number as i64);
    }
}

#[test]
fn a_new_volume_gets_what_the_image_has() {
    guest(|guest| {
        let root = image("web");
        one_of_each(&root);
        let disk = Disk::ext4("volume", 32, None);
        let mut pod = Pod::start(guest);
        pod.prepare("web", first_start(&disk)).unwrap();
        guest.inside("web", |_| {
            let same = |path: &str| {
                let (of, at) = (root.join("data").join(path), Path::new("/data").join(path));
                let at = fs::symlink_metadata(&at).unwrap_or_else(|error| panic!("{path}: {error}"));
                (of, at)
            };
            assert_eq!(
                names("/data"),
                ["fifo", "file", "link", "program", "socket", "sub"].map(String::from).into()
            );
            assert_eq!(names("/data/sub"), ["dangling", "deeper", "same", "sparse"].map(String::from).into());
            assert_eq!(fs::read_to_string("/data/file").unwrap(), "content");
            assert_eq!(fs::read_link("/data/link").unwrap(), Path::new("/etc/passwd"));
            let (file, again) = (same("file").1, same("sub/same").1);
            assert_eq!((file.ino(), file.nlink()), (again.ino(), 2), "one file by two names");
            let sparse = same("sub/sparse").1;
            assert_eq!(sparse.len(), 200 << 20);
            assert!(sparse.blocks() * 512 < 1 << 20, "its holes are holes: {}", sparse.blocks());
            let mut middle = [0; 6];
            let file = fs::File::open("/data/sub/sparse").unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut middle, 40 << 20).unwrap();
            assert_eq!(&middle, b"middle");
            let get = |path: &str, name: &str| {
                xattr::get(fs::File::open(path).unwrap(), &CString::new(name).unwrap()).unwrap()
            };
            assert_eq!(get("/data/file", "user.word"), b"value");
            assert_eq!(get("/data/sub", "user.of"), b"a directory");
            assert_eq!(get("/data/program", "security.capability").len(), 20);
        });
        // The metadata, from outside, where both can be seen.
        gone(&mut pod, "web");
        disk.look(|at| {
            for path in ["", "file", "link", "fifo", "socket", "program", "sub", "sub/deeper", "sub/sparse"] {
                let (of, is) = (root.join("data").join(path), at.join("_data").join(path));
                let told = |path: &Path| {
                    let data = fs::symlink_metadata(path).unwrap();
                    (data.mode(), data.uid(), data.gid(), data.mtime(), data.mtime_nsec())
                };
                assert_eq!(told(&is), told(&of), "{path}");
            }
            assert_eq!(names(at), ["_data", "lost+found"].map(String::from).into());
        });
        disk.detach();
        assert_eq!(pod.mountd.log(), "");
    });
}

#[test]
fn a_volume_is_populated_once_and_only_when_it_is_asked_for() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir(root.join("data")).unwrap();
        fs::write(root.join("data/file"), "the image's").unwrap();
        let disk = Disk::ext4("volume", 16, None);
        let mut pod = Pod::start(guest);
        let mut not_docker = first_start(&disk);
        not_docker["volumes"][0]["dockerVolume"] = json!(false);
        let mut not_first = first_start(&disk);
        not_first["initialize"] = json!(false);
        for all in [not_docker, not_first] {
            pod.prepare("web", all).unwrap();
            guest.inside("web", |_| assert_eq!(names("/data"), [].into()));
            gone(&mut pod, "web");
        }
        // A filesystem's own directory does not make it an old one.
        disk.look(|at| fs::create_dir(at.join("_data/lost+found")).unwrap());
        let mut read_only = first_start(&disk);
        read_only["volumes"][0]["readOnly"] = json!(true);
        pod.prepare("web", read_only).unwrap();
        guest.inside("web", |_| {
            assert_eq!(fs::read_to_string("/data/file").unwrap(), "the image's");
            assert!(fs::write("/data/file", "").is_err());
        });
        gone(&mut pod, "web");
        disk.look(|at| fs::write(at.join("_data/file"), "the volume's").unwrap());
        pod.prepare("web", first_start(&disk)).unwrap();
        guest.inside("web", |_| assert_eq!(fs::read_to_string("/data/file").unwrap(), "the volume's"));
        gone(&mut pod, "web");
        disk.look(|at| {
            fs::remove_file(at.join("_data/file")).unwrap();
            fs::write(at.join("_data/lost+found/found"), "").unwrap();
        });
        pod.prepare("web", first_start(&disk)).unwrap();
        guest.inside("web", |_| assert_eq!(names("/data"), ["lost+found".to_owned()].into(), "it was used"));
        gone(&mut pod, "web");
        disk.detach();
    });
}

#[test]
fn a_part_of_the_share_is_populated_too() {
    guest(|guest| {
        let root = image("web");
        one_of_each(&root);
        let share = Path::new(paths::LOCAL_SHARE);
        fs::create_dir(share.join("volume")).unwrap();
        // What a mountd that died has left.
        fs::create_dir_all(share.join("volume/.hyperinit-new/half/of/it")).unwrap();
        fs::write(share.join("volume/.hyperinit-new/half/file"), "").unwrap();
        let mut pod = Pod::start(guest);
        let map = json!({"source": "volume", "path": "/data", "dockerVolume": true});
        pod.prepare("web", json!({"initialize": true, "fsmap": [map]})).unwrap();
        assert_eq!(pod.shell("web", "cat /data/file; ls /data/sub"), "contentdangling\ndeeper\nsame\nsparse");
        assert_eq!(names(share.join("volume")), ["_data".to_owned()].into());
        assert_eq!(fs::metadata(share.join("volume/_data/program")).unwrap().uid(), 33);
    });
}

#[test]
fn a_mountd_that_died_while_it_moved_leaves_a_volume_that_becomes_whole() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir_all(root.join("data/sub")).unwrap();
        for name in ["moved", "left", "sub/file"] {
            fs::write(root.join("data").join(name), "the image's").unwrap();
        }
        chown(root.join("data"), Some(33), Some(34)).unwrap();
        let share = Path::new(paths::LOCAL_SHARE);
        let volume = share.join("volume");
        fs::create_dir_all(volume.join("_data")).unwrap();
        fs::create_dir_all(volume.join(".hyperinit-whole/sub")).unwrap();
        fs::write(volume.join("_data/moved"), "the image's").unwrap();
        for name in ["left", "sub/file"] {
            fs::write(volume.join(".hyperinit-whole").join(name), "the image's").unwrap();
        }
        let mut pod = Pod::start(guest);
        let map = json!({"source": "volume", "path": "/data", "dockerVolume": true});
        pod.prepare("web", json!({"initialize": true, "fsmap": [map]})).unwrap();
        assert_eq!(names(&volume), ["_data".to_owned()].into());
        assert_eq!(names(volume.join("_data")), ["left", "moved", "sub"].map(String::from).into());
        assert_eq!(fs::read_to_string(volume.join("_data/sub/file")).unwrap(), "the image's");
        assert_eq!(fs::metadata(volume.join("_data")).unwrap().uid(), 33);
    });
}

#[test]
fn what_a_mountd_that_died_has_left_is_removed_in_slices() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir(root.join("data")).unwrap();
        fs::write(root.join("data/file"), "the image's").unwrap();
        let volume = Path::new(paths::LOCAL_SHARE).join("volume");
        // No machine removes so many in a tenth of a second.
        for number in 0..200 {
            let directory = volume.join(format!(".hyperinit-new/{number}"));
            fs::create_dir_all(&directory).unwrap();
            for number in 0..200 {
                fs::write(directory.join(number.to_string()), "").unwrap();
            }
        }
        let mut pod = Pod::start(guest);
        assert_eq!(ask(&mut pod, "web", "volume"), Reply::Populating);
        let mut before = names(volume.join(".hyperinit-new")).len();
        while ask(&mut pod, "web", "volume") == Reply::Populating {
            let after = names(volume.join(".hyperinit-new")).len();
            assert!(after <= before);
            before = after;
        }
        assert_eq!(names(&volume), ["_data".to_owned()].into());
        assert_eq!(names(volume.join("_data")), ["file".to_owned()].into());
    });
}

#[test]
fn an_image_that_has_no_directory_there_populates_nothing() {
    guest(|guest| {
        fs::create_dir("/run/outside").unwrap();
        fs::write("/run/outside/file", "secret").unwrap();
        let mut pod = Pod::start(guest);
        let share = Path::new(paths::LOCAL_SHARE);
        let traps: [fn(&Path); 4] = [
            |_| {},
            |root| symlink("/run/outside", root.join("data")).unwrap(),
            |root| symlink("../../../../run/outside", root.join("data")).unwrap(),
            // The container has something there, the image has not.
            |root| symlink("/proc/1", root.join("data")).unwrap(),
        ];
        for (number, trap) in traps.into_iter().enumerate() {
            let name = format!("trap{number}");
            trap(&image(&name));
            fs::create_dir(share.join(format!("volume{number}"))).unwrap();
            let map = json!({"source": format!("volume{number}"), "path": "/data", "dockerVolume": true});
            let _ = pod.prepare(&name, json!({"initialize": true, "fsmap": [map]}));
            assert_eq!(names(share.join(format!("volume{number}/_data"))), [].into(), "{number}");
        }
    });
}

#[test]
fn a_volume_that_is_full_is_as_it_was() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir_all(root.join("data/sub")).unwrap();
        fs::write(root.join("data/small"), "small").unwrap();
        fs::write(root.join("data/sub/large"), vec![7; 20 << 20]).unwrap();
        let disk = Disk::ext4("volume", 16, None);
        let mut pod = Pod::start(guest);
        let before = guest.mounts();
        let fault = pod.prepare("web", first_start(&disk)).unwrap_err();
        assert_eq!(
            fault.to_string(),
            "mountd: populating the volume for /data with sub/large: No space left on device"
        );
        assert_eq!(guest.mounts(), before);
        assert!(!Path::new(paths::CONTAINERS).join("web").exists());
        disk.look(|at| {
            assert_eq!(names(at), ["_data", "lost+found"].map(String::from).into());
            assert_eq!(names(at.join("_data")), [].into());
        });
        fs::write(root.join("data/sub/large"), "small after all").unwrap();
        pod.prepare("web", first_start(&disk)).unwrap();
        assert_eq!(pod.shell("web", "cat /data/sub/large"), "small after all");
        gone(&mut pod, "web");
        disk.detach();
    });
}

#[test]
fn a_deep_image_is_refused() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir_all(root.join("data").join("d/".repeat(200))).unwrap();
        let share = Path::new(paths::LOCAL_SHARE);
        fs::create_dir(share.join("volume")).unwrap();
        let mut pod = Pod::start(guest);
        let map = json!({"source": "volume", "path": "/data", "dockerVolume": true});
        let fault = pod.prepare("web", json!({"initialize": true, "fsmap": [map]})).unwrap_err();
        assert!(fault.is(Errno::ENAMETOOLONG), "{fault}");
        // On a slow machine undoing takes longer than it may at once, and goes on with the next request for
        // the volume.
        let mut left = names(share.join("volume"));
        left.remove(".hyperinit-new");
        assert_eq!(left, ["_data".to_owned()].into());
        assert_eq!(names(share.join("volume/_data")), [].into());
    });
}

/// Asks once, as init does each time.
fn ask(pod: &mut Pod<'_>, container: &str, source: &str) -> Reply {
    ask_of(&mut pod.mountd, container, source)
}

/// The same of another mountd than the pod's.
fn ask_of(mountd: &mut Helper, container: &str, source: &str) -> Reply {
    let map = json!({"source": source, "path": "/data", "dockerVolume": true});
    let container = json!({
        "id": container, "image": "web", "rootfs": "rootfs", "process": {"args": ["/bin/true"]},
        "initialize": true, "fsmap": [map],
    });
    let container = serde_json::from_value(container).unwrap();
    mountd.ask(&Request::PrepareContainer { container }).unwrap()
}

/// Two containers that share a volume may be two mountds' work.
#[test]
fn one_mountd_at_a_time_fills_a_volume() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir(root.join("data")).unwrap();
        const FILES: usize = 20_000;
        (0..FILES).for_each(|number| fs::write(root.join(format!("data/{number}")), "").unwrap());
        let share = Path::new(paths::LOCAL_SHARE);
        let count = |volume: &str| names(share.join(volume).join("_data")).len();
        let mut pod = Pod::start(guest);
        for volume in ["first", "second"] {
            fs::create_dir(share.join(volume)).unwrap();
            let mut other = Helper::start(Role::Mountd, &[], None);
            assert_eq!(ask_of(&mut other, "one", volume), Reply::Populating);
            assert_eq!(ask(&mut pod, "two", volume), Reply::Populating);
            if volume == "first" {
                // Whoever waits has not touched what the other puts together.
                while ask_of(&mut other, "one", volume) == Reply::Populating {
                    assert_eq!(ask(&mut pod, "two", volume), Reply::Populating);
                }
                assert_eq!(count(volume), FILES);
                pod.mountd(&Request::RemoveContainer { container: id("one") }).unwrap();
            }
            // Or it dies, and holds nothing any more.
            drop(other);
            while ask(&mut pod, "two", volume) == Reply::Populating {}
            assert_eq!(count(volume), FILES);
            assert_eq!(pod.mountd.log(), "");
        }
    });
}

#[test]
fn a_large_volume_takes_many_slices_and_can_be_given_up() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir(root.join("data")).unwrap();
        // No machine makes so many in a tenth of a second.
        const FILES: usize = 20_000;
        for number in 0..FILES {
            fs::write(root.join(format!("data/{number}")), "").unwrap();
        }
        let share = Path::new(paths::LOCAL_SHARE);
        fs::create_dir(share.join("volume")).unwrap();
        let mut pod = Pod::start(guest);
        assert_eq!(ask(&mut pod, "one", "volume"), Reply::Populating);
        assert_eq!(names(share.join("volume")), [".hyperinit-new", "_data"].map(String::from).into());
        assert_eq!(names(share.join("volume/_data")), [].into(), "all or nothing");
        // Another container with the same volume waits for the first.
        assert_eq!(ask(&mut pod, "two", "volume"), Reply::Populating);
        assert_eq!(ask(&mut pod, "one", "volume"), Reply::Populating);
        // In between others have their turn.
        pod.mountd(&Request::Rescan).unwrap();
        pod.mountd(&Request::RemoveContainer { container: id("one") }).unwrap();
        assert_eq!(names(share.join("volume")), ["_data".to_owned()].into(), "undone");
        let mut slices = 0;
        while ask(&mut pod, "two", "volume") == Reply::Populating {
            slices += 1;
        }
        assert!(slices > 0);
        assert_eq!(names(share.join("volume/_data")).len(), FILES);
        assert_eq!(ask(&mut pod, "one", "volume"), Reply::Done, "it is not new any more");
        assert_eq!(pod.shell("one", "ls /data | wc -l"), FILES.to_string());
        assert_eq!(pod.mountd.log(), "");
    });
}

/// A hole is jumped over: reading one of this size takes hours.
#[test]
fn a_file_of_holes_takes_as_long_as_what_is_in_it() {
    use std::os::unix::fs::FileExt;
    const SIZE: u64 = 1 << 40;
    const WORDS: [(u64, &[u8]); 3] = [(0, b"start"), (SIZE / 2 + 123_456, b"middle"), (SIZE - 3, b"end")];
    guest(|guest| {
        let data = image("web").join("data");
        fs::create_dir(&data).unwrap();
        let make = |name: &str, words: &[(u64, &[u8])]| {
            let file = fs::File::create(data.join(name)).unwrap();
            file.set_len(SIZE).unwrap();
            words.iter().for_each(|(at, word)| file.write_all_at(word, *at).unwrap());
        };
        make("sparse", &WORDS);
        make("empty", &[]);
        make("open", &WORDS[..2]);
        fs::create_dir(Path::new(paths::LOCAL_SHARE).join("volume")).unwrap();
        let mut pod = Pod::start(guest);
        let deadline = std::time::Instant::now() + support::DEADLINE / 4;
        while ask(&mut pod, "web", "volume") == Reply::Populating {
            assert!(std::time::Instant::now() < deadline, "the holes are read");
        }
        guest.inside("web", |_| {
            for (name, words) in [("sparse", &WORDS[..]), ("empty", &[]), ("open", &WORDS[..2])] {
                let file = fs::File::open(Path::new("/data").join(name)).unwrap();
                let told = file.metadata().unwrap();
                assert_eq!(told.len(), SIZE, "{name}");
                assert!(told.blocks() * 512 < 1 << 20, "{name}: its holes are holes: {}", told.blocks());
                for (at, word) in words {
                    let mut found = vec![0; word.len()];
                    file.read_exact_at(&mut found, *at).unwrap();
                    assert_eq!(&found, word, "{name}");
                }
            }
        });
        assert_eq!(pod.mountd.log(), "");
    });
}

#[test]
fn what_takes_the_place_of_a_copy_is_not_taken_for_it() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir(root.join("data")).unwrap();
        for number in 0..20_000 {
            fs::write(root.join(format!("data/{number}")), "").unwrap();
        }
        let volume = Path::new(paths::LOCAL_SHARE).join("volume");
        fs::create_dir(&volume).unwrap();
        let mut pod = Pod::start(guest);
        assert_eq!(ask(&mut pod, "web", "volume"), Reply::Populating);
        fs::rename(volume.join(".hyperinit-new"), volume.join("aside")).unwrap();
        fs::create_dir(volume.join(".hyperinit-new")).unwrap();
        fs::write(volume.join(".hyperinit-new/another's"), "").unwrap();
        let map = json!({"source": "volume", "path": "/data", "dockerVolume": true});
        let fault = pod.prepare("web", json!({"initialize": true, "fsmap": [map]})).unwrap_err();
        assert!(fault.is(Errno::EBUSY), "{fault}");
        assert_eq!(names(volume.join("_data")), [].into());
        assert_eq!(names(volume.join(".hyperinit-new")), ["another's".to_owned()].into());
    });
}

/// A host can ask for as many at once as it likes.
#[test]
fn so_many_volumes_are_filled_at_once_and_the_others_wait() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir(root.join("data")).unwrap();
        // No machine makes so many in a tenth of a second.
        (0..20_000).for_each(|number| fs::write(root.join(format!("data/{number}")), "").unwrap());
        const AT_ONCE: usize = 8;
        let share = Path::new(paths::LOCAL_SHARE);
        let volume = |number: usize| format!("volume{number}");
        let mut pod = Pod::start(guest);
        for number in 0..=AT_ONCE {
            fs::create_dir(share.join(volume(number))).unwrap();
            assert_eq!(ask(&mut pod, &format!("c{number}"), &volume(number)), Reply::Populating);
        }
        let begun = |number: usize| names(share.join(volume(number))).contains(".hyperinit-new");
        assert!((0..AT_ONCE).all(begun) && !begun(AT_ONCE));
        pod.mountd(&Request::RemoveContainer { container: id("c3") }).unwrap();
        let last = format!("c{AT_ONCE}");
        assert_eq!(ask(&mut pod, &last, &volume(AT_ONCE)), Reply::Populating);
        assert!(begun(AT_ONCE) && !begun(3));
        assert_eq!(pod.mountd.log(), "");
    });
}

/// What is remembered of links is bounded by the bytes of their paths: the files behind it come as often as
/// they have names.
#[test]
fn so_many_links_are_links_and_further_ones_are_files() {
    /// `populate::LINKS`, in bytes.
    const LINKS: usize = 2 << 20;
    const FILES: usize = 700;
    let deep = vec!["d".repeat(250); 14].join("/");
    let name = |which: char, number: usize| format!("{which}{number:0199}");
    let length = deep.len() + 1 + name('a', 0).len();
    guest(move |guest| {
        let root = image("web").join("data").join(&deep);
        fs::create_dir_all(&root).unwrap();
        for number in 0..FILES {
            fs::write(root.join(name('a', number)), number.to_string()).unwrap();
            fs::hard_link(root.join(name('a', number)), root.join(name('b', number))).unwrap();
        }
        fs::create_dir(Path::new(paths::LOCAL_SHARE).join("volume")).unwrap();
        let mut pod = Pod::start(guest);
        let map = json!({"source": "volume", "path": "/data", "dockerVolume": true});
        pod.prepare("web", json!({"initialize": true, "fsmap": [map]})).unwrap();
        guest.inside("web", |_| {
            let at = Path::new("/data").join(&deep);
            let mut linked = 0;
            for number in 0..FILES {
                let [a, b] = ['a', 'b'].map(|which| at.join(name(which, number)));
                for path in [&a, &b] {
                    assert_eq!(fs::read_to_string(path).unwrap(), number.to_string());
                }
                let [a, b] = [a, b].map(|path| fs::metadata(path).unwrap());
                assert_eq!((a.ino() == b.ino(), a.nlink()), (a.nlink() == 2, b.nlink()));
                linked += usize::from(a.ino() == b.ino());
            }
            assert_eq!(linked, LINKS / length, "{FILES} files with paths of {length} bytes");
        });
    });
}

/// Somebody in another container plays with the image while it is copied.
#[test]
fn an_image_that_changes_leads_nobody_out() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir("/run/outside").unwrap();
        fs::write("/run/outside/file", "secret").unwrap();
        let (data, turn) = (root.join("data"), root.join("turn"));
        for directory in ["kept", "path", "deep/er"] {
            fs::create_dir_all(data.join(directory)).unwrap();
        }
        for number in 0..200 {
            fs::write(data.join(format!("kept/{number}")), "kept").unwrap();
        }
        fs::create_dir(&turn).unwrap();
        symlink("/run/outside", turn.join("link")).unwrap();
        nix::unistd::mkfifo(&turn.join("fifo"), Mode::S_IRWXU).unwrap();
        let share = Path::new(paths::LOCAL_SHARE);
        let mut pod = Pod::start(guest);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for name in ["link", "fifo"] {
                        let (path, aside) = (data.join("path"), turn.join("aside"));
                        fs::rename(&path, &aside).unwrap();
                        fs::rename(turn.join(name), &path).unwrap();
                        fs::rename(&path, turn.join(name)).unwrap();
                        fs::rename(&aside, &path).unwrap();
                    }
                    fs::rename(data.join("deep/er"), turn.join("er")).unwrap();
                    fs::rename(turn.join("er"), data.join("deep/er")).unwrap();
                }
            });
            // A panic here has to end the other thread too.
            let _stop = Stop(&stop);
            for number in 0..60 {
                let volume = format!("volume{number}");
                fs::create_dir(share.join(&volume)).unwrap();
                while ask(&mut pod, "web", &volume) == Reply::Populating {}
                let at = share.join(&volume).join("_data");
                assert_eq!(names(at.join("kept")).len(), 200);
                assert!(!at.join("path/file").exists() || fs::read_link(at.join("path")).is_ok());
                gone(&mut pod, "web");
            }
        });
    });
}
