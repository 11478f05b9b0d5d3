//! execd, confined, by hand, in namespaces of its own: the test is init, which reaps, and streamd, which
//! takes the pipes.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod held;
mod profile;
mod program;
mod streams;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use hyperinit::fault::Fault;
use hyperinit::ids::Pid;
use hyperinit::paths;
use hyperinit::wire::{Role, execd};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::guest::{Guest, guest, guest_with_cgroups};
use support::helper::Helper;
use support::image::{image, program};
use support::pod::{Execd, HOSTNAME, Pod, id, join, pod_files, release, socket_pair};
use support::{probe, read_all, read_to, read_until};

const NONE: &str = "0000000000000000";

/// A pod with one container, of the image of that name.
fn pod(guest: &Guest) -> Pod<'_> {
    image("web");
    let mut pod = Pod::start(guest);
    pod.prepare("web", json!({})).unwrap();
    pod
}

/// Leaves nothing kept of an earlier pod, as mountd does when it prepares one.
fn forget_namespaces() {
    fs::create_dir_all(paths::POD_NS).unwrap();
    for name in paths::POD_NAMESPACES {
        let _ = umount2(Path::new(paths::POD_NS).join(name).as_path(), MntFlags::MNT_DETACH);
    }
}

/// What /proc says of a process, by key.
fn status_of(text: &str, key: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(&format!("{key}:")));
    line.unwrap_or_else(|| panic!("no {key} in {text}"))
        .split_whitespace()
        .skip(1)
        .collect::<Vec<_>>()
        .join(" ")
}

fn status(pid: Pid, key: &str) -> String {
    status_of(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap(), key)
}

#[test]
fn a_pod_init_is_one_in_namespaces_of_its_own_and_has_nothing() {
    guest(|guest| {
        let mut execd = Execd::start(&[]);
        forget_namespaces();
        let request = execd::Request::StartPod { hostname: HOSTNAME.to_owned() };
        let init = execd.started(&request).unwrap();
        guest.adopt_init(init);
        // What mountd keeps, and what every container's namespace is a copy of.
        let mounts = || fs::read_to_string(format!("/proc/{init}/mountinfo")).unwrap();
        let kept = mounts();
        assert_eq!(
            kept.lines().filter(|line| line.split(' ').nth(4) == Some("/proc")).count(),
            2,
            "its own /proc"
        );
        assert!(!kept.contains("shared:") && !kept.contains("master:"));
        for name in paths::POD_NAMESPACES {
            let inode = |path: &str| fs::metadata(path).unwrap().ino();
            let (file, own) = (format!("{}/{name}", paths::POD_NS), format!("/proc/{init}/ns/{name}"));
            assert_eq!(inode(&file), inode(&own), "{name} is kept before anybody hears of it");
        }
        release(init);
        // Its last step is its filter; until then it works on.
        let confined = || status(init, "Seccomp") == "2" && status(init, "CapEff") == NONE;
        let until = std::time::Instant::now() + support::DEADLINE;
        while !confined() {
            assert!(std::time::Instant::now() < until, "it is not confined");
            std::thread::yield_now();
        }
        for key in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(init, key), NONE, "{key}");
        }
        assert_eq!(status(init, "NoNewPrivs"), "1");
        assert_eq!(status(init, "NSpid").split(' ').nth(1), Some("1"));
        assert_eq!(status(init, "PPid"), std::process::id().to_string(), "init's child");
        for name in ["pid", "mnt", "uts", "ipc"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
            assert_ne!(of(&init.to_string()), of("thread-self"), "{name}");
        }
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_eq!(of(&init.to_string()), of("thread-self"), "the network is the guest's");
        let left = mounts();
        let mut left = left.lines().map(|line| line.split(' ').nth(4).unwrap());
        assert_eq!((left.next(), left.next()), (Some("/"), None), "it has left the guest's root");
        assert_eq!(fs::read_dir(format!("/proc/{init}/root/")).unwrap().count(), 0);
        let open: Vec<_> =
            fs::read_dir(format!("/proc/{init}/fd")).unwrap().map(|fd| fd.unwrap().file_name()).collect();
        assert_eq!(open, ["2"], "the log and nothing else");
        // TERM, INT and HUP mean nothing to it.
        guest.kill(init, Signal::SIGTERM);
        guest.kill(init, Signal::SIGINT);
        assert!(execd.done(&execd::Request::Resend).is_ok());
        assert_eq!(status(init, "State").chars().next(), Some('S'));
    });
}

#[test]
fn a_second_pod_is_not_inside_the_first() {
    guest(|guest| {
        let mut execd = Execd::start(&[]);
        for hostname in ["one", "two"] {
            forget_namespaces();
            let init = execd.started(&execd::Request::StartPod { hostname: hostname.to_owned() }).unwrap();
            guest.adopt_init(init);
            release(init);
            assert_eq!(status(init, "NSpid").split(' ').count(), 2);
        }
        for bad in ["x".repeat(65), "a\0b".to_owned()] {
            let fault = execd.started(&execd::Request::StartPod { hostname: bad }).unwrap_err();
            assert!(fault.to_string().contains("hostname"), "{fault}");
        }
    });
}

#[test]
fn nothing_starts_outside_a_pod() {
    guest(|guest| {
        let mut pod = pod(guest);
        let (mut fresh, request) = (Execd::start(&[]), pod.request("web", false, json!({})));
        let fault = fresh.started(&request).unwrap_err();
        assert!(fault.to_string().contains("has not joined the pod"), "{fault}");
        fresh.done(&join(&[])).unwrap();
        let pid = fresh.started(&request).unwrap();
        release(pid);
        assert_eq!(guest.wait(pid), 0, "an execd that was restarted");
    });
}

#[test]
fn an_orphan_is_reaped_by_the_pod() {
    guest(|guest| {
        let mut pod = pod(guest);
        let orphan: Pid = {
            // The subshell that was its parent has ended when the number is told.
            let words = "pid=$(sleep 1000 >/dev/null & echo $!); echo $pid; read line";
            let running = pod.exec("web", json!({"args": ["/bin/sh", "-c", words]})).unwrap();
            let inside = read_to(&running.out, "\n");
            let parent = pod.shell("web", &format!("cat /proc/{}/stat", inside.trim()));
            assert_eq!(parent.split(' ').nth(3), Some("1"), "the pod init is its parent now: {parent}");
            drop(running.stdin);
            guest.wait(running.pid);
            Pid(inside.trim().parse().unwrap())
        };
        pod.shell("web", &format!("kill -9 {orphan}"));
        let until = std::time::Instant::now() + support::DEADLINE;
        while pod.shell("web", "ls /proc").lines().any(|name| name == orphan.to_string()) {
            assert!(std::time::Instant::now() < until, "it stays a zombie");
        }
    });
}

#[test]
fn a_process_is_in_the_pod_and_in_its_container() {
    guest_with_cgroups(|guest| {
        let mut pod = pod(guest);
        let mut running = pod.exec_init("web", json!({"args": ["/bin/cat"]})).unwrap();
        running.stdin.as_mut().unwrap().write_all(b"executed").unwrap();
        read_to(&running.out, "executed");
        let link = |pid: Pid, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        for name in ["pid", "uts", "ipc", "net"] {
            assert_eq!(link(running.pid, name), link(pod.init, name), "{name}");
        }
        let kept = fs::metadata(paths::container_mount_ns(&id("web"))).unwrap().ino();
        assert_eq!(fs::metadata(format!("/proc/{}/ns/mnt", running.pid)).unwrap().ino(), kept);
        let procs = fs::read_to_string(paths::container_cgroup(&id("web")).join("cgroup.procs")).unwrap();
        assert_eq!(procs, format!("{}\n", running.pid));
        assert_eq!(status(running.pid, "PPid"), std::process::id().to_string(), "init's child");
        assert_eq!(pod.shell("web", "cat /proc/sys/kernel/hostname"), HOSTNAME);
        assert!(pod.shell("web", "ps").contains("/bin/cat"), "the pod's processes see each other");
        let stat = fs::read_to_string(format!("/proc/{}/stat", running.pid)).unwrap();
        let fields: Vec<&str> = stat.split(' ').collect();
        assert_eq!((fields[4], fields[5]), (fields[0], fields[0]), "leader of its group and session");
    });
}

/// Whoever is not released, for init does not know of it, runs nothing.
#[test]
fn a_start_that_is_not_released_runs_nothing() {
    guest(|guest| {
        let mut pod = pod(guest);
        let root = Path::new(paths::LOCAL_SHARE).join("web/rootfs");
        program(&root, "ran", b"#!/bin/sh\n: >/ran\n", 0o755);
        let request = pod.request("web", false, json!({"args": ["/bin/ran"]}));
        let pid = pod.execd.started(&request).unwrap();
        guest.adopt(pid);
        let (_, fds) = pod.execd.packet().unwrap();
        let mut files = fds.into_iter().map(fs::File::from).skip(1);
        assert_eq!(read_all(files.next().unwrap()), "");
        assert_eq!(read_all(files.next().unwrap()), "", "nobody knows of its streams");
        assert_eq!(guest.wait(pid), 125);
        assert!(!root.join("ran").exists());
    });
}

/// A process that init knows of runs, though execd is no more.
#[test]
fn a_start_that_is_known_survives_execd() {
    guest(|guest| {
        let mut pod = pod(guest);
        let request = pod.request("web", false, json!({"args": ["/bin/echo", "runs"]}));
        let pid = pod.execd.started(&request).unwrap();
        guest.adopt(pid);
        let (_, fds) = pod.execd.packet().unwrap();
        pod.execd.helper.kill();
        release(pid);
        assert_eq!(read_all(fs::File::from(fds.into_iter().nth(1).unwrap())), "runs\n");
        assert_eq!(guest.wait(pid), 0);
    });
}

#[test]
fn an_execd_that_dies_takes_nobody_along() {
    guest(|guest| {
        let mut pod = pod(guest);
        let mut running = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        let mut stdin = running.stdin.take().unwrap();
        stdin.write_all(b"released").unwrap();
        read_to(&running.out, "released");
        pod.execd.helper.kill();
        stdin.write_all(b"alive").unwrap();
        drop(stdin);
        assert_eq!(read_all(running.out), "alive");
        assert_eq!(guest.wait(running.pid), 0);
        pod.execd = Execd::start(&[]);
        pod.execd.done(&join(&[])).unwrap();
        assert_eq!(pod.shell("web", "echo again"), "again");
    });
}
