//! mountd, confined, by hand, in namespaces of its own; its pod init is the real execd's.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use hyperinit::channel::Bulk;
use hyperinit::fault::Fault;
use hyperinit::ids::{ContainerId, Pid};
use hyperinit::paths;
use hyperinit::wire::Role;
use hyperinit::wire::mountd::{PodFiles, Request, Share};
use nix::errno::Errno;
use serde_json::json;
use support::guest::{Guest, guest, guest_with_cgroups};
use support::helper::Helper;
use support::image::{image, program};
use support::pod::{Pod, done, id, pod_files};

fn mountd() -> Helper {
    Helper::start(Role::Mountd, &[], None)
}

fn prepare_pod(mountd: &mut Helper, pod: PodFiles) -> Result<(), Fault> {
    done(mountd, &Request::PreparePod { pod: Bulk::Here(pod) })
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn mode(path: &str) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

/// The mount points below a directory, in mountinfo's text.
fn mounted_below(mounts: &str, directory: &str) -> BTreeSet<String> {
    let points = mounts.lines().map(|line| line.split(' ').nth(4).unwrap());
    points.filter(|point| Path::new(point).starts_with(directory)).map(str::to_owned).collect()
}

/// The mount on a path: (its options, the root of it, its filesystem). The topmost one.
fn mount_on<'a>(mounts: &'a str, path: &str) -> (&'a str, &'a str, &'a str) {
    let line = mounts.lines().rfind(|line| line.split(' ').nth(4) == Some(path));
    let line = line.unwrap_or_else(|| panic!("nothing is mounted on {path}:\n{mounts}"));
    let mut fields = line.split(' ').skip(3);
    let (root, options) = (fields.next().unwrap(), fields.nth(1).unwrap());
    (options, root, line.split(" - ").nth(1).unwrap().split(' ').next().unwrap())
}

#[test]
fn a_pod_has_its_files() {
    guest(|guest| {
        let mut mountd = mountd();
        let pod = PodFiles {
            dns: words(&["192.0.2.1", "2001:db8::1"]),
            dns_search: words(&["a.test", "b.test"]),
            dns_options: words(&["ndots:2"]),
            ..pod_files()
        };
        fs::write(Path::new(paths::LOCAL_SHARE).join("on-the-share"), "").unwrap();
        prepare_pod(&mut mountd, pod).unwrap();
        assert_eq!(
            fs::read_to_string(paths::POD_RESOLV_CONF).unwrap(),
            "nameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch a.test b.test\noptions ndots:2\n"
        );
        assert_eq!(fs::read_to_string(paths::POD_HOSTNAME).unwrap(), "thepod\n");
        assert_eq!((mode(paths::POD_RESOLV_CONF), mode(paths::POD_HOSTNAME)), (0o644, 0o644));
        assert_eq!(mode(paths::POD_SHM), 0o1777);
        let mounts = guest.mounts();
        let (options, _, kind) = mount_on(&mounts, paths::POD_SHM);
        assert!(kind == "tmpfs" && options.contains("nosuid,nodev,noexec"), "{options} {kind}");
        assert!(Path::new(paths::SHARE).join("on-the-share").exists());
        assert_eq!(mountd.log(), "");
    });
}

#[test]
fn a_pod_without_dns_has_no_resolv_conf() {
    guest(|_| {
        let mut mountd = mountd();
        prepare_pod(&mut mountd, PodFiles { share: None, ..pod_files() }).unwrap();
        assert!(!Path::new(paths::POD_RESOLV_CONF).exists());
        assert!(Path::new(paths::POD_HOSTNAME).exists());
    });
}

#[test]
fn no_word_writes_a_line_of_its_own() {
    guest(|guest| {
        let before = guest.mounts();
        let mut mountd = mountd();
        let evil = || words(&["192.0.2.1\nnameserver 192.0.2.66"]);
        for (key, pod) in [
            ("dns", PodFiles { dns: evil(), ..pod_files() }),
            ("dnsSearch", PodFiles { dns_search: evil(), ..pod_files() }),
            ("dnsOptions", PodFiles { dns_options: evil(), ..pod_files() }),
            ("hostname", PodFiles { hostname: "a\nb".to_owned(), ..pod_files() }),
        ] {
            let fault = prepare_pod(&mut mountd, pod).unwrap_err();
            assert_eq!(fault.to, key, "{fault}");
        }
        assert_eq!(guest.mounts(), before);
        assert!(!Path::new(paths::POD).exists());
    });
}

#[test]
fn a_pod_that_fails_leaves_nothing() {
    guest(|guest| {
        let before = guest.mounts();
        let mut mountd = mountd();
        // There is no virtio here, nor 9p.
        let pod = PodFiles { share: Some(Share::NineP { tag: "share_dir".to_owned() }), ..pod_files() };
        let fault = prepare_pod(&mut mountd, pod).unwrap_err();
        assert!(fault.to_string().starts_with("mountd: mounting the share share_dir: "), "{fault}");
        assert_eq!(guest.mounts(), before);
        assert!(!Path::new(paths::POD).exists());
        prepare_pod(&mut mountd, pod_files()).unwrap();
    });
}

#[test]
fn the_pods_namespaces_are_kept() {
    guest(|guest| {
        let pod = Pod::start(guest);
        for name in ["ipc", "mnt", "pid", "uts"] {
            let kept = fs::metadata(format!("{}/{name}", paths::POD_NS)).unwrap().ino();
            assert_eq!(kept, fs::metadata(format!("/proc/{}/ns/{name}", pod.init)).unwrap().ino(), "{name}");
            assert_ne!(kept, fs::metadata(format!("/proc/thread-self/ns/{name}")).unwrap().ino(), "{name}");
        }
    });
}

#[test]
fn a_pid_that_is_nobody_is_a_fault() {
    guest(|_| {
        let mut mountd = mountd();
        prepare_pod(&mut mountd, pod_files()).unwrap();
        let fault = done(&mut mountd, &Request::PinPod { pid: Pid(i32::MAX) }).unwrap_err();
        assert!(fault.is(Errno::ENOENT), "{fault}");
    });
}

/// Everything that is mounted in a container of the default profile.
const MOUNTS: [&str; 22] = [
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
        fs::write(root.join("etc/hostname"), "the image's\n").unwrap();
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        let more =
            json!({"readOnly": true, "initialize": true, "process": {"args": ["x"], "workdir": "/data"}});
        pod.prepare("web", more).unwrap();
        guest.inside("web", |mounts| {
            assert!(mount_on(mounts, "/").0.starts_with("ro"));
            assert_eq!(fs::write("/x", "").unwrap_err().raw_os_error(), Some(Errno::EROFS as i32));
            assert_eq!(fs::read_to_string("/etc/hostname").unwrap(), "thepod\n", "its file is bound over");
            assert!(!Path::new("/etc/resolv.conf").exists(), "it has none to bind over");
            fs::write("/dev/shm/x", "").unwrap();
        });
        assert!(!root.join("etc/mtab").exists() && !root.join("etc/hosts").exists());
        assert!(pod.mountd.log().contains("/etc/resolv.conf"), "{}", pod.mountd.log());
    });
}

#[test]
fn a_workdir_that_is_missing_in_a_read_only_root_is_a_fault() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::start(guest);
        let more =
            json!({"readOnly": true, "initialize": true, "process": {"args": ["x"], "workdir": "/a/b"}});
        let fault = pod.prepare("web", more).unwrap_err();
        assert_eq!(fault.to_string(), "mountd: making the workdir /a/b: No such file or directory");
    });
}

#[test]
fn a_first_start_makes_the_init_layer_and_the_workdir() {
    guest(|guest| {
        let root = image("web");
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        let more = json!({"initialize": true, "process": {"args": ["x"], "workdir": "/var/lib/../www/./a"}});
        pod.prepare("web", more).unwrap();
        assert!(fs::read_to_string(root.join("etc/hosts")).unwrap().contains("localhost"));
        assert_eq!(fs::read_link(root.join("etc/mtab")).unwrap(), Path::new("/proc/mounts"));
        assert_eq!(fs::read_to_string(root.join("etc/resolv.conf")).unwrap(), "", "made to be mounted over");
        assert!(root.join("var/www/a").is_dir() && root.join("var/lib").is_dir());
        assert_eq!(fs::metadata(root.join("var")).unwrap().permissions().mode() & 0o777, 0o755);
        guest.inside("web", |mounts| {
            assert_eq!(fs::read_to_string("/etc/resolv.conf").unwrap(), "nameserver 192.0.2.1\n");
            assert_eq!(fs::read_to_string("/etc/hostname").unwrap(), "thepod\n");
            assert!(mount_on(mounts, "/etc/hostname").0.starts_with("ro"), "it is the whole pod's");
        });
        assert_eq!(fs::read_to_string(paths::POD_HOSTNAME).unwrap(), "thepod\n");
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
        assert_eq!(fs::read_to_string(root.join("etc/hosts")).unwrap(), "mine\n");
        pod.mountd(&Request::RemoveContainer { container: id("web") }).unwrap();
        pod.prepare("web", json!({"initialize": true})).unwrap();
        assert_eq!(fs::read_to_string(root.join("etc/hosts")).unwrap(), "mine\n", "what is there stays");
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

/// What a hostile image does before its container is prepared, and what has to come of it: none, or a word of the fault.
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
            [("/loop/e", Errno::ELOOP), ("/etc/passwd/e", Errno::ENOTDIR), ("/proc/1/cwd/e", Errno::ELOOP)]
        {
            let fault = pod.prepare("web", workdir(bad)).unwrap_err();
            assert!(fault.doing == "making the workdir" && fault.is(errno), "{bad}: {fault}");
        }
        assert_eq!(fs::read_dir("/run/outside").unwrap().count(), 0);
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
    });
}

#[test]
fn a_container_goes_with_all_that_runs_in_it() {
    guest_with_cgroups(|guest| kill_and_remove(guest, true));
}

#[test]
fn a_container_goes_where_the_kernel_has_no_cgroups() {
    guest(|guest| kill_and_remove(guest, false));
}

fn kill_and_remove(guest: &Guest, cgroups: bool) {
    image("web");
    image("other");
    let mut pod = Pod::start(guest);
    pod.prepare("web", json!({})).unwrap();
    pod.prepare("other", json!({})).unwrap();
    let cgroup = paths::container_cgroup(&id("web"));
    assert_eq!(cgroup.exists(), cgroups);
    let sleep = json!({"args": ["/bin/sh", "-c", "sleep 1000 & echo $!; sleep 1001"]});
    let running = pod.exec("web", sleep.clone()).unwrap();
    let other = pod.exec("other", sleep).unwrap();
    // Its words: both have been started.
    support::read_to(&running.out, "\n");
    if cgroups {
        assert!(fs::read_to_string(cgroup.join("cgroup.procs")).unwrap().lines().count() >= 2);
        let fault = pod.mountd(&Request::RemoveContainer { container: id("web") }).unwrap_err();
        assert!(fault.is(Errno::EBUSY), "{fault}");
        let fault = pod.prepare("web", json!({})).unwrap_err();
        assert!(fault.is(Errno::EBUSY), "{fault}");
        guest.inside("web", |_| assert!(Path::new("/bin/sh").exists(), "it was left as it is"));
    }
    pod.mountd(&Request::KillContainer { container: id("web") }).unwrap();
    assert_eq!(guest.wait(running.pid), 128 + 9);
    // Only the shell's child could still hold it open.
    support::read_all(&running.out);
    assert!(Path::new(&format!("/proc/{}/exe", other.pid)).read_link().is_ok(), "another container lives");
    pod.mountd(&Request::KillContainer { container: id("web") }).unwrap();
    for _ in 0..2 {
        pod.mountd(&Request::RemoveContainer { container: id("web") }).unwrap();
        assert!(!cgroup.exists() && !paths::container(&id("web")).exists());
        assert_eq!(mounted_below(&guest.mounts(), "/run/hyperinit/containers/web"), BTreeSet::new());
    }
    pod.mountd(&Request::KillContainer { container: id("web") }).unwrap();
    pod.prepare("web", json!({})).unwrap();
    assert_eq!(pod.shell("web", "echo again"), "again");
}

#[test]
fn a_pod_that_is_destroyed_leaves_nothing() {
    guest_with_cgroups(|guest| {
        let before = guest.mounts();
        image("a");
        image("b");
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        pod.prepare("a", json!({})).unwrap();
        pod.prepare("b", json!({"initialize": true})).unwrap();
        guest.kill(pod.init, nix::sys::signal::Signal::SIGKILL);
        guest.wait(pod.init);
        pod.mountd(&Request::DestroyPod).unwrap();
        assert_eq!(guest.mounts(), before);
        assert!(!Path::new(paths::POD).exists());
        assert_eq!(fs::read_dir(paths::CONTAINERS).unwrap().count(), 0);
        assert!(!paths::container_cgroup(&id("a")).exists());
        pod.mountd(&Request::DestroyPod).unwrap();
        prepare_pod(&mut pod.mountd, pod_files()).unwrap();
        pod.mountd(&Request::DestroyPod).unwrap();
        assert_eq!(guest.mounts(), before);
        assert_eq!(pod.mountd.log(), "");
    });
}

#[test]
fn a_mountd_that_comes_later_goes_on() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::start(guest);
        pod.prepare("web", json!({})).unwrap();
        pod.mountd.kill();
        pod.mountd = mountd();
        assert_eq!(pod.shell("web", "echo still"), "still");
        // A start that died with it left its directory; and its namespace, if it came so far.
        pod.prepare("web", json!({})).unwrap();
        assert_eq!(pod.shell("web", "echo anew"), "anew");
        let before = mounted_below(&guest.mounts(), paths::POD);
        prepare_pod(&mut pod.mountd, pod_files()).unwrap();
        pod.mountd(&Request::DestroyPod).unwrap();
        assert!(!before.is_empty());
        assert_eq!(mounted_below(&guest.mounts(), paths::POD), BTreeSet::new(), "twice mounted, all gone");
    });
}

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
        let fault = pod.prepare("c", json!({"image": "sda", "fstype": "ext4", "addr": "0:0"})).unwrap_err();
        assert!(fault.to_string().contains("not implemented"), "{fault}");
        disk.detach();
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
