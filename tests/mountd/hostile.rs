//! Images and words of the host that lead out of a container's root.

use super::*;

#[test]
fn an_image_is_below_the_share_whatever_the_host_or_a_link_says() {
    guest(|guest| {
        image("web");
        // In the guest these exist; on the share they do not.
        fs::create_dir_all("/run/outside/rootfs/proc").unwrap();
        symlink("/run/outside", Path::new(paths::LOCAL_SHARE).join("link")).unwrap();
        symlink("../../../run/outside", Path::new(paths::LOCAL_SHARE).join("dots")).unwrap();
        let mut pod = Pod::start(guest);
        for image in ["link", "dots", "../../run/outside", "nothing", "web/rootfs/etc/passwd"] {
            let fault = pod.prepare("c", json!({"image": image})).unwrap_err();
            assert!(fault.doing.contains("root filesystem"), "{image}: {fault}");
        }
        let fault = pod.prepare("c", json!({"image": "web", "rootfs": "../../outside/rootfs"})).unwrap_err();
        assert!(fault.is(Errno::ENOENT), "{fault}");
        assert_eq!(fs::read_dir("/run/outside/rootfs").unwrap().count(), 1);
        assert!(!Path::new(paths::CONTAINERS).join("c").exists());
        pod.prepare("web", json!({})).unwrap();
    });
}

/// What a hostile image does before its container is prepared, and what has to come of it: none, or a word of
/// the fault.
type Trap = (&'static str, fn(&Path), Option<&'static str>);

fn replace(root: &Path, path: &str, to: &str) {
    let path = root.join(path);
    let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
    symlink(to, path).unwrap();
}

const TRAPS: [Trap; 16] = [
    ("proc leads out", |root| replace(root, "proc", "/run/outside"), Some("/proc")),
    ("proc leads to dev", |root| replace(root, "proc", "dev"), Some("/proc")),
    (
        "proc is a file",
        |root| {
            fs::remove_dir(root.join("proc")).unwrap();
            fs::write(root.join("proc"), "").unwrap();
        },
        Some("/proc"),
    ),
    ("sys dangles", |root| replace(root, "sys", "/nowhere"), Some("/sys")),
    ("dev leads out", |root| replace(root, "dev", "/run/outside"), Some("/dev")),
    ("dev is a loop", |root| replace(root, "dev", "dev"), Some("/dev")),
    ("there is no proc", |root| fs::remove_dir(root.join("proc")).unwrap(), None),
    ("etc leads out", |root| replace(root, "etc", "/run/outside"), Some("/etc")),
    ("etc leads up", |root| replace(root, "etc", "../../../../run/outside"), Some("/etc")),
    ("etc leads inside", |root| replace(root, "etc", "/srv"), None),
    (
        "etc is a file",
        |root| {
            fs::remove_dir_all(root.join("etc")).unwrap();
            fs::write(root.join("etc"), "").unwrap();
        },
        Some("/etc"),
    ),
    ("resolv.conf leads out", |root| replace(root, "etc/resolv.conf", "/run/outside/file"), None),
    (
        "resolv.conf leads up",
        |root| replace(root, "etc/resolv.conf", "../../../../../../run/outside/file"),
        None,
    ),
    ("resolv.conf is a loop", |root| replace(root, "etc/resolv.conf", "resolv.conf"), None),
    ("resolv.conf is magic", |root| replace(root, "etc/resolv.conf", "/proc/1/root/run/outside/file"), None),
    (
        "hosts and mtab lead out",
        |root| {
            replace(root, "etc/hosts", "/run/outside/file");
            replace(root, "etc/mtab", "/run/outside/file");
        },
        None,
    ),
];

#[test]
fn a_hostile_image_stays_inside() {
    guest(|guest| {
        fs::create_dir("/run/outside").unwrap();
        fs::write("/run/outside/file", "untouched").unwrap();
        fs::set_permissions("/run/outside", fs::Permissions::from_mode(0o700)).unwrap();
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        for (number, (what, set, expected)) in TRAPS.into_iter().enumerate() {
            let name = format!("trap{number}");
            set(&image(&name));
            let before = mounted_below(&guest.mounts(), "/");
            let prepared = pod.prepare(&name, json!({"initialize": true}));
            match (expected, prepared) {
                (None, prepared) => prepared.unwrap_or_else(|fault| panic!("{what}: {fault}")),
                (Some(word), Err(fault)) => {
                    assert!(fault.to_string().contains(word), "{what}: {fault}");
                    assert_eq!(mounted_below(&guest.mounts(), "/"), before, "{what}");
                    assert!(!Path::new(paths::CONTAINERS).join(&name).exists(), "{what}");
                }
                (Some(_), Ok(())) => panic!("{what}: it was prepared"),
            }
            assert_eq!(fs::read_to_string("/run/outside/file").unwrap(), "untouched", "{what}");
            assert_eq!(fs::read_dir("/run/outside").unwrap().count(), 1, "{what}");
            let outside = mounted_below(&guest.mounts(), "/run/outside");
            assert_eq!(outside, BTreeSet::new(), "{what}");
        }
    });
}

#[test]
fn a_hostile_workdir_stays_inside() {
    guest(|guest| {
        let root = image("web");
        fs::create_dir("/run/outside").unwrap();
        symlink("/run/outside", root.join("out")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        symlink("../../../../..", root.join("up")).unwrap();
        fs::create_dir(root.join("run")).unwrap();
        fs::create_dir(root.join("run/outside")).unwrap();
        let mut pod = Pod::start(guest);
        let workdir = |path: &str| json!({"initialize": true, "process": {"args": ["x"], "workdir": path}});
        pod.prepare("web", workdir("/../../../a/b")).unwrap();
        assert!(root.join("a/b").is_dir());
        pod.prepare("web", workdir("/out/c")).unwrap();
        assert!(root.join("run/outside/c").is_dir(), "an absolute link leads to where it does inside");
        pod.prepare("web", workdir("/up/up/d")).unwrap();
        assert!(root.join("d").is_dir());
        for (bad, errno) in
            [("/loop/e", Errno::ELOOP), ("/etc/passwd/e", Errno::ENOTDIR), ("/proc/1/cwd/e", Errno::EACCES)]
        {
            let fault = pod.prepare("web", workdir(bad)).unwrap_err();
            assert!(fault.doing == "making the workdir" && fault.is(errno), "{bad}: {fault}");
        }
        assert_eq!(fs::read_dir("/run/outside").unwrap().count(), 0);
    });
}

#[test]
fn an_id_is_never_a_path() {
    guest(|_| {
        let mut mountd = mountd();
        for bad in ["..", "a/b", ""] {
            assert!(ContainerId::try_from(bad.to_owned()).is_err());
            let reply = mountd.line(&json!({"RemoveContainer": {"container": bad}}).to_string());
            assert!(reply.contains("Err") && reply.contains("the request"), "{reply}");
        }
    });
}
