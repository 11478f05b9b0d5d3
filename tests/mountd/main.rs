//! mountd, confined, by hand, in namespaces of its own; its pod init is the real execd's.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod disk;
mod files;
mod hostile;
mod populate;
mod root;
#[path = "../support/mod.rs"]
mod support;
mod volumes;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use hyperinit::fault::Fault;
use hyperinit::ids::ContainerId;
use hyperinit::paths;
use hyperinit::wire::Role;
use hyperinit::wire::mountd::{NinePTransport, PodFiles, Request, Share, ShareCache};
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
    done(mountd, &Request::PreparePod { pod })
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
        let (tag, transport) = ("share_dir".to_owned(), NinePTransport::Virtio);
        let share = Share::NineP { tag, transport, cache: ShareCache::Coherent };
        let pod = PodFiles { share: Some(share), ..pod_files() };
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
            let own = || fs::metadata(format!("/proc/{}/ns/{name}", pod.init)).unwrap().ino();
            match name {
                // It leaves the one that is kept for the containers.
                "mnt" => until(|| own() != kept),
                _ => assert_eq!(kept, own(), "{name}"),
            }
            assert_ne!(kept, fs::metadata(format!("/proc/thread-self/ns/{name}")).unwrap().ino(), "{name}");
        }
    });
}

fn until(done: impl Fn() -> bool) {
    let deadline = std::time::Instant::now() + support::DEADLINE;
    while !done() {
        assert!(std::time::Instant::now() < deadline, "the pod init stays where it was");
        std::thread::yield_now();
    }
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

/// Who spins while many die takes the processor that they need for it.
#[test]
fn the_end_of_many_is_waited_for_asleep() {
    guest_with_cgroups(|guest| {
        image("web");
        let mut pod = Pod::start(guest);
        pod.prepare("web", json!({})).unwrap();
        let many = "i=0; while [ $i -lt 300 ]; do sleep 1000 & i=$((i+1)); done; echo up; wait";
        let running = pod.exec("web", json!({"args": ["/bin/sh", "-c", many]})).unwrap();
        support::read_to(&running.out, "up\n");
        let mountd = pod.mountd.pid();
        let reads = || {
            let io = fs::read_to_string(format!("/proc/{mountd}/io")).unwrap();
            let line = io.lines().find_map(|line| line.strip_prefix("syscr: ")).unwrap();
            line.parse::<u32>().unwrap()
        };
        let before = reads();
        pod.mountd(&Request::KillContainer { container: id("web") }).unwrap();
        let reads = reads() - before;
        assert!(reads < 20, "{reads} reads, for one request and one change of cgroup.events");
        assert_eq!(guest.wait(running.pid), 128 + 9);
    });
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

/// Nobody undid what a mountd that died in the middle had made.
#[test]
fn what_is_left_of_a_pod_is_none_of_the_next() {
    guest(|guest| {
        let before = guest.mounts();
        image("web");
        let mut pod = Pod::with(guest, PodFiles { dns: words(&["192.0.2.1"]), ..pod_files() }, &[]);
        pod.prepare("web", json!({})).unwrap();
        fs::write(Path::new(paths::POD_SHM).join("old"), "").unwrap();
        pod.mountd.kill();
        pod.mountd = mountd();
        prepare_pod(&mut pod.mountd, pod_files()).unwrap();
        assert!(!Path::new(paths::POD_RESOLV_CONF).exists(), "it has no DNS");
        assert!(!Path::new(paths::POD_SHM).join("old").exists());
        assert!(!paths::container(&id("web")).exists());
        let shm = guest.mounts().lines().filter(|line| line.contains(paths::POD_SHM)).count();
        assert_eq!(shm, 1, "mounted once");
        pod.mountd(&Request::DestroyPod).unwrap();
        assert_eq!(guest.mounts(), before);
        assert!(pod.mountd.log().contains("of an earlier pod"), "{}", pod.mountd.log());
    });
}

/// Ends a thread that looks at it, also when a test unwinds.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
