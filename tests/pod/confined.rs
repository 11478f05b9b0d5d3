//! Checks that each process of a running guest has the rights that policy/*.json declares, as the kernel
//! shows them.

use std::fs;
use std::time::Instant;

use hyperinit::embedded_policy;
use hyperinit::sandbox::{CapSet, ContainerProfile, Policy};
use hyperinit::wire::Profile;
use serde_json::{Value, json};

use crate::guest::processes::{NAMES, children, process, status};
use crate::guest::{Guest, Kind, PATIENCE};

/// Reads a file of policy/.
fn file(name: &str) -> Value {
    let path = format!("{}/policy/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn declared(name: &str) -> CapSet {
    let policy: &[u8] = match name {
        "init" => embedded_policy!("init"),
        "warden" => embedded_policy!("warden"),
        "netd" => embedded_policy!("netd"),
        "mountd" => embedded_policy!("mountd"),
        "execd" => embedded_policy!("execd"),
        "streamd" => embedded_policy!("streamd"),
        "podinit" => embedded_policy!("podinit"),
        other => panic!("{other} has no policy"),
    };
    Policy::decode(policy).unwrap().capabilities()
}

fn sets(pid: i32, key: &str) -> CapSet {
    CapSet(u64::from_str_radix(&status(pid, key), 16).unwrap())
}

/// The number of seccomp filters of a process.
fn filters(pid: i32) -> u32 {
    status(pid, "Seccomp_filters").parse().unwrap()
}

#[test]
fn every_process_has_exactly_what_its_policy_says() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    // This machine's root may lack capabilities, and the test may already run under a filter.
    let own = std::process::id().cast_signed();
    let (available, inherited) = (sets(own, "CapPrm"), filters(own));
    let granted = ContainerProfile::of(Profile::Default).unwrap().capabilities();
    for name in NAMES {
        let pid = process(&guest, name, None);
        let keeps = match name {
            // execd also holds the capabilities that it grants to containers.
            "execd" => declared(name).union(granted),
            _ => declared(name),
        };
        let keeps = keeps.intersection(available);
        let bounding = match name {
            "warden" => keeps,
            "execd" => granted.intersection(available),
            _ => CapSet::default(),
        };
        assert_eq!(sets(pid, "CapPrm"), keeps, "{name}");
        assert_eq!(sets(pid, "CapEff"), keeps, "{name}");
        assert_eq!(sets(pid, "CapBnd"), bounding, "{name}");
        assert_eq!(sets(pid, "CapInh"), CapSet::default(), "{name}");
        assert_eq!(sets(pid, "CapAmb"), CapSet::default(), "{name}");
        let policy = file(name);
        let uid = policy["user"]["uid"].as_u64().unwrap_or(0);
        // The user for the files that it opens and makes (fsuid).
        let files = if policy["user"]["root_files"] == true { 0 } else { uid };
        for key in ["Uid", "Gid"] {
            assert_eq!(status(pid, key), format!("{uid}\t{uid}\t{uid}\t{files}"), "{name}");
        }
        assert_eq!(status(pid, "NoNewPrivs"), u8::from(policy["no_new_privs"] == true).to_string(), "{name}");
        assert_eq!(status(pid, "Seccomp"), "2", "{name}");
        // policy/README.md «The ceiling»: the number of filters between each process and the kernel.
        let count = match name {
            // One: init has only its own, and the warden's is the ceiling.
            "init" | "warden" => 1,
            // The ceiling, then their own; execd's own filter is the ceiling once more.
            "netd" | "mountd" | "streamd" | "execd" => 2,
            // Both filters of execd, which starts the pod init, then its own.
            _ => 3,
        };
        assert_eq!(filters(pid), inherited + count, "{name}");
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let text = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            assert!(text.contains("Seccomp:\t2"), "every thread of {name}");
        }
    }
    guest.finish(main);
}

#[test]
fn a_containers_process_has_what_its_profile_grants() {
    let own = std::process::id().cast_signed();
    let (available, inherited) = (sets(own, "CapPrm"), filters(own));
    for profile in Profile::ALL {
        let guest = Guest::boot_with(Kind::Local, &format!("hyper_profile={}", profile.name()));
        guest.start_pod();
        let granted = ContainerProfile::of(profile).unwrap().capabilities().intersection(available);
        let init = guest.sleeper("main");
        let root = guest.exec("main", &["sleep", "100000"], json!({}));
        let user = guest.exec("main", &["sleep", "100000"], json!({"user": "web"}));
        let guests_init = process(&guest, "init", None);
        let sleeping = || {
            let named = |pid: &i32| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm == "sleep\n")
            };
            children(guests_init).into_iter().filter(named).collect::<Vec<_>>()
        };
        // A started process may not have executed its program yet.
        let deadline = Instant::now() + PATIENCE;
        while sleeping().len() < 3 {
            assert!(Instant::now() < deadline, "three were started, not {:?}", sleeping());
            std::thread::yield_now();
        }
        for pid in sleeping() {
            let is_root = status(pid, "Uid").starts_with("0\t");
            let keeps = if is_root { granted } else { CapSet::default() };
            assert_eq!((sets(pid, "CapPrm"), sets(pid, "CapEff")), (keeps, keeps), "{profile:?}");
            assert_eq!(sets(pid, "CapBnd"), granted, "{profile:?}");
            assert_eq!((sets(pid, "CapInh"), sets(pid, "CapAmb")), (CapSet::default(), CapSet::default()));
            let none_new = if profile == Profile::Restricted { "1" } else { "0" };
            assert_eq!(status(pid, "NoNewPrivs"), none_new, "whether setuid programs work");
            assert_eq!((status(pid, "Seccomp").as_str(), filters(pid)), ("2", inherited + 3), "{profile:?}");
        }
        for running in [root, user] {
            running.signal(9);
            assert_eq!(running.end().status, 137);
        }
        guest.finish(init);
    }
}

/// The kinds of the files that a process has open besides the standard streams.
fn open_kinds(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let above = entries.filter(|entry| entry.file_name().to_str().unwrap().parse::<i32>().unwrap() > 2);
    let mut kinds: Vec<String> = above
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| target.display().to_string())
        .map(|target| target.split(['[', ' ']).next().unwrap_or_default().trim_end_matches(':').to_owned())
        .collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

#[test]
fn every_process_has_open_what_it_needs() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    for (name, kinds) in [
        ("init", &["/dev/null", "anon_inode", "socket"][..]),
        ("netd", &["socket"]),
        ("mountd", &["/dev/null", "/proc", "mnt", "socket"]),
        ("execd", &["/proc", "ipc", "pid", "pipe", "socket", "uts"]),
        ("streamd", &["/memfd:streamd", "anon_inode", "pipe", "socket"]),
        ("podinit", &[]),
    ] {
        let pid = process(&guest, name, None);
        let open = open_kinds(pid);
        assert!(open.iter().all(|kind| kinds.contains(&kind.as_str())), "{name} has {open:?} open");
    }
    let outcome = guest.exec("main", &["ls", "/proc/self/fd"], json!({})).outcome();
    assert_eq!(outcome.stdout, "0\n1\n2\n3\n", "3 is the directory that ls reads");
    guest.finish(main);
}

/// A container sees which sockets exist in its network namespace, and may use the links there. So the pod's
/// network namespace is not the guest's.
#[test]
fn the_pods_network_is_not_the_guests() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let network = |name| fs::read_link(format!("/proc/{}/ns/net", process(&guest, name, None))).unwrap();
    let pods = network("podinit");
    for name in ["netd", "mountd", "execd"] {
        assert_eq!(network(name), pods, "{name} works on the pod's");
    }
    for name in ["init", "warden", "streamd"] {
        assert_eq!(network(name), network("init"), "{name}");
        assert_ne!(network(name), pods, "{name}");
    }
    let seen = guest.says("main", "readlink /proc/self/ns/net");
    assert_eq!(seen.trim_end(), pods.display().to_string());
    // A local guest opens its ports before the pod's network exists, and a listening socket stays in the
    // network namespace where it was opened. A VM has devices instead.
    let sockets = guest.says("main", "cat /proc/net/unix");
    let others: Vec<_> = sockets
        .lines()
        .skip(1)
        .filter(|line| !line.ends_with("ctl.sock") && !line.ends_with("stream.sock"))
        .collect();
    assert!(others.is_empty(), "{others:?}");
    let guests = fs::read_to_string(format!("/proc/{}/net/unix", process(&guest, "init", None))).unwrap();
    assert!(guests.lines().count() > 10, "its channels are there: {guests}");
    let links = fs::read_to_string(format!("/proc/{}/net/dev", process(&guest, "streamd", None))).unwrap();
    let links: Vec<_> = links.lines().skip(2).map(|line| line.trim().split(':').next().unwrap()).collect();
    assert_eq!(links, ["lo"], "no link of the pod's");
    guest.finish(main);
}

/// The inodes of the sockets bound to a file, and of the connections accepted there, in a process's network
/// namespace.
fn sockets(pid: i32, file: &str) -> Vec<String> {
    // proc_net(5): the inode, then the path.
    let text = fs::read_to_string(format!("/proc/{pid}/net/unix")).unwrap();
    let lines = text.lines().map(|line| line.split_whitespace().skip(6).collect::<Vec<_>>());
    lines
        .filter(|fields| matches!(fields[..], [_, path] if path.ends_with(file)))
        .map(|fields| format!("socket:[{}]", fields[0]))
        .collect()
}

#[test]
fn each_port_to_the_host_is_in_one_process() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let exec = guest.exec("main", &["sleep", "100000"], json!({}));
    // Once output has come over it, streamd has accepted the host's connection.
    assert_eq!(guest.says("main", "echo up"), "up\n");
    let (init, netd) = (process(&guest, "init", None), process(&guest, "netd", None));
    let mut everybody: Vec<_> = NAMES.iter().map(|&name| (name, process(&guest, name, None))).collect();
    let named: Vec<_> = everybody.iter().map(|(_, pid)| *pid).collect();
    everybody
        .extend(children(init).into_iter().filter(|pid| !named.contains(pid)).map(|pid| ("container", pid)));
    assert!(everybody.len() >= NAMES.len() + 2, "{everybody:?}");
    // The holders of the listening socket and of the host's connection. The warden keeps streamd's listening
    // socket for the next streamd.
    for (file, holders) in
        [("ctl.sock", &[("init", 2)][..]), ("stream.sock", &[("warden", 1), ("streamd", 2)])]
    {
        // The kernel lists a listening socket in the network namespace where it was opened, before init left
        // that network to the pod, and an accepted connection in the namespace of the process that connected.
        let ends = [sockets(netd, file), sockets(std::process::id().cast_signed(), file)].concat();
        let mut holding = Vec::new();
        for (name, pid) in &everybody {
            let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
            let open = open.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string()));
            match open.filter(|open| ends.contains(open)).count() {
                0 => {}
                count => holding.push((*name, count)),
            }
        }
        assert_eq!(holding, holders, "who has {file} open");
    }
    exec.signal(9);
    assert_eq!(exec.end().status, 137);
    guest.finish(main);
}

#[test]
fn who_opens_nothing_has_no_file_to_open() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let mut empty = 0;
    for name in NAMES {
        let pid = process(&guest, name, None);
        let entries = |path: &str| fs::read_dir(format!("/proc/{pid}/{path}")).unwrap().count();
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
        let found = (entries("root"), entries("cwd"), mounts.lines().count());
        if file(name)["empty_root"] == true {
            assert_eq!(found, (0, 0, 1), "{name}:\n{mounts}");
            let options: Vec<_> = mounts.split(' ').nth(5).unwrap().split(',').collect();
            for option in ["ro", "nosuid", "nodev", "noexec"] {
                assert!(options.contains(&option), "{name}: {mounts}");
            }
            empty += 1;
        } else {
            assert!(found.0 > 0 && found.2 > 1, "{name}: {found:?}");
        }
    }
    assert_eq!(empty, 3, "netd, streamd and the pod init");
    guest.finish(main);
}

#[test]
fn nobody_outside_sees_into_a_helper() {
    let guest = Guest::with_pod(Kind::Local);
    for name in NAMES {
        let pid = process(&guest, name, None);
        // The process is not dumpable, so its /proc files belong to root, whatever user it runs as.
        let owner =
            std::os::unix::fs::MetadataExt::uid(&fs::metadata(format!("/proc/{pid}/environ")).unwrap());
        assert_eq!(owner, 0, "{name}");
    }
}
